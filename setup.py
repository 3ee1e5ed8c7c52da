"Passes settings.ini to pip; pyproject.toml names the fields that are set here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lib = cfg['lib_path']

licenses = {'apache2': 'Apache-2.0', 'mit': 'MIT'}
statuses = {'1': '1 - Planning', '2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license_expression=licenses[cfg['license']],
    classifiers=[f"Development Status :: {statuses[cfg['status']]}",
        'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
        'Natural Language :: English', 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['tools/data/*', 'engine/csrc/*']},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'bench': cfg['bench_requirements'].split()},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'nbdev': [f"{cfg['lib_name']}={lib}._modidx:d"], 'console_scripts': [f'fastxtend-opt={lib}.tools.cli:main']},
    zip_safe=False)
