"""Run the tests with other versions of Python, torch, fastai and fastcore.

    python tools/versions.py --corners --out bench/results/versions.md        # all rows of the table
    python tools/versions.py --corners oldest colab -- tests/test_ops.py      # two of them, with arguments for pytest
    python tools/versions.py 3.12.1 2.11.0 2.8.7 1.13.10 --with numpy==2.0.2  # Python, torch, fastai, fastcore; '-' takes pip's newest

Each row gets a temporary environment (about 6 GB, deleted afterwards), an installation of a copy of this tree with these versions, the
default tests without the pages, and one line. Interpreters come from pyenv or from the path. FASTXTEND_OPT_TEST_CACHE keeps kernels, in a
folder for each version of torch. Left out are tests/test_docs.py and the check that running nbdev-export changes nothing: both need
nbdev 3.3, which needs fastcore 2.2."""
from __future__ import annotations
import argparse, json, os, re, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from datetime import date
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# fastai 2.8.5 is the first version that allows torch 2.9. Triton 3.6's interpreter fails with numpy 2.4 or newer; Colab has numpy 2.0.2
corners = dict(oldest=('3.10.13','2.9.1','2.8.5','1.8.0'), colab=('3.12.1','2.11.0','2.8.7','1.13.10','numpy==2.0.2'),
               newest=('3.13.0','-','-','-'), default=('3.11.7','-','-','-'))
packages = ('torch','fastai','fastcore','numpy')
pages = ('nbdev','pypandoc-binary') # requirements of the documentation alone
head = ('# Versions\n\nThe default tests without the pages, by `tools/versions.py`. Minutes are those of the tests, on 2 cores that ran '
        'other work too.\n\n| Python | torch | fastai | fastcore | numpy | result | minutes | commit | date |\n'
        '|---|---|---|---|---|---|--:|---|---|\n')

def interpreter(version):
    "Path of the Python interpreter of a version"
    short = '.'.join(version.split('.')[:2])
    try: r = subprocess.run([f'python{short}', '-c', 'import sys; print(sys.executable)'], capture_output=True, text=True,
                            env=dict(os.environ, PYENV_VERSION=version))
    except FileNotFoundError: r = None
    if r is None or r.returncode:
        raise SystemExit(f'There is no python{short} here. Install Python {version} with pyenv, or name another version.')
    return r.stdout.strip()

def requirements():
    "The development requirements without those of the pages"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return [r for r in cfg['DEFAULT']['dev_requirements'].split() if re.split('[<>=]', r)[0] not in pages]

def pins(versions):
    "Requirements of a row: pinned versions, then whatever else the row names"
    return [f'{k}=={v}' for k,v in zip(packages, versions[1:4]) if v!='-'] + list(versions[4:])

def installed(python):
    "The versions that an environment has"
    code = ("import json,platform; from importlib.metadata import version as v; "
            f"print(json.dumps(dict(python=platform.python_version(), **{{k: v(k) for k in {packages}}})))")
    return json.loads(subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout)

def make_environment(folder, versions, call):
    "A copy of this tree in `folder`, installed with these versions: the environment's interpreter, or None"
    python,tree = folder/'venv'/'bin'/'python',folder/'tree'
    leave = shutil.ignore_patterns('.git', '.venv', '.cache', '_*_preview', '_proc', '_docs', '__pycache__', '*.egg-info', 'build', 'dist')
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(root, tree, ignore=leave)
    if python.exists(): return python # kept by --keep
    subprocess.run([interpreter(versions[0]), '-m', 'venv', str(folder/'venv')], check=True)
    pip = [str(python), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    failed = call([*pip, '--upgrade', 'pip']) or call([*pip, *pins(versions), *requirements(), '-e', '.'])
    if not failed: return python
    shutil.rmtree(folder/'venv')

def test_environment(python, call, jobs, pytest_args):
    "Run the tests with `python`"
    have = installed(python)
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH='')
    cache = env.get('FASTXTEND_OPT_TEST_CACHE')
    if cache: env['FASTXTEND_OPT_TEST_CACHE'] = f'{cache}-torch{have["torch"]}-python{have["python"]}'
    pytest = [str(python), '-m', 'pytest', '-q', '-n', str(jobs), '--dist', 'loadgroup', '--ignore', 'tests/test_docs.py']
    call([*pytest, *pytest_args], env=env)
    return have

def run(versions, jobs, pytest_args, log, keep=None):
    "Install and test one row: the installed versions, pytest's summary, seconds"
    folder = keep/'-'.join(o.replace('=', '') for o in versions) if keep else Path(tempfile.mkdtemp(prefix='fastxtend_opt_versions_'))
    folder.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    try:
        with open(log, 'a') as out:
            def call(cmd, **kwargs):
                return subprocess.run(cmd, stdout=out, stderr=subprocess.STDOUT, cwd=folder/'tree', **kwargs).returncode
            python = make_environment(folder, versions, call)
            if not python: return dict(zip(('python',*packages), (*versions[:4],'-'))), f'not installed: see {log}', 0
            began = time.time()
            have = test_environment(python, call, jobs, pytest_args)
        said = log.read_bytes()[start:].decode(errors='replace').splitlines()
        ends = [l for l in said if re.search(r'\d+ (passed|failed|errors?)\b.* in [\d.]+s', l)]
        counts = re.findall(r'\d+ (?:passed|failed|skipped|xfailed|xpassed|errors?)\b', ends[-1] if ends else '')
        return have, ', '.join(counts) or f'no result: see {log}', time.time()-began
    finally:
        if not keep: shutil.rmtree(folder, ignore_errors=True)

def commit():
    "The commit of this tree, with a + if files have changed since"
    def git(*args): return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True).stdout.strip()
    return (git('rev-parse', '--short', 'HEAD') or '?') + ('+' if git('status', '--porcelain', '--untracked-files=no') else '')

def parse(argv):
    "Arguments of the command line, and the rows to run"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('versions', nargs='*', metavar='VERSION', help='Python, torch, fastai and fastcore')
    p.add_argument('--corners', nargs='*', metavar='NAME', help=f"rows to run: {', '.join(corners)} (default: all)")
    p.add_argument('--with', nargs='+', default=[], dest='extra', metavar='REQUIREMENT', help='more requirements for pip')
    p.add_argument('--jobs', type=int, default=2, help='processes of pytest (default: 2)')
    p.add_argument('--out', type=Path, help='append the lines to this Markdown table')
    p.add_argument('--log', type=Path, default=Path('versions.log'), help='output of pip and pytest (default: versions.log)')
    p.add_argument('--keep', type=Path, metavar='FOLDER', help='keep the environments in this folder, and use those that it has')
    a,rest = argv,[]
    if '--' in argv: a,rest = argv[:argv.index('--')],argv[argv.index('--')+1:]
    a = p.parse_args(a)
    unknown = set(a.corners or ())-set(corners)
    if unknown: p.error(f"--corners {' '.join(sorted(unknown))}: choose from {', '.join(corners)}")
    if a.corners is not None: rows = [(*corners[n], *a.extra) for n in (a.corners or corners)]
    elif len(a.versions)==4: rows = [(*a.versions, *a.extra)]
    else: p.error('name four versions (Python, torch, fastai, fastcore), or --corners')
    return a,rows,rest

def main(argv=None):
    a,rows,pytest_args = parse(sys.argv[1:] if argv is None else argv)
    bad = False
    for versions in rows:
        tested = commit()
        have,result,seconds = run(versions, a.jobs, pytest_args, a.log.resolve(), a.keep and a.keep.resolve())
        if pytest_args: result += f" of `{' '.join(pytest_args)}`" # a selection is not the whole
        bad |= 'passed' not in result or 'failed' in result or 'error' in result
        line = f"| {' | '.join(have.values())} | {result} | {seconds/60:.1f} | {tested} | {date.today()} |"
        print(line, flush=True)
        if a.out and not a.out.exists(): a.out.write_text(head)
        if a.out: a.out.open('a').write(line+'\n')
    return int(bad)

if __name__=='__main__': sys.exit(main())
