"""Run the tests with other versions of Python, torch, fastai and fastcore.

    python tools/versions.py 3.12.1 2.11.0 2.8.7 1.13.10       # Python, torch, fastai, fastcore; '-' takes pip's newest
    python tools/versions.py --corners --out bench/results/versions.md
    python tools/versions.py 3.10.13 2.9.1 2.8.5 1.8.0 -- -k "adam and matrix"

Each tuple gets a temporary environment (6 GB, removed afterwards), an installation of this tree with these versions, the default tests without
the pages, and one line. Python interpreters come from pyenv (PYENV_VERSION) or from the path. The pages need nbdev 3.3 and so fastcore 2.2:
tests/test_docs.py does not run here, and the line says so."""
from __future__ import annotations
import argparse, json, os, re, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from datetime import date
from pathlib import Path

root = Path(__file__).resolve().parent.parent
#: name to (Python, torch, fastai, fastcore); '-' is the newest version that pip finds
corners = dict(oldest=('3.10.13','2.9.1','2.8.5','1.8.0'), colab=('3.12.1','2.11.0','2.8.7','1.13.10'),
               newest=('3.13.0','-','-','-'), default=('3.11.7','-','-','-'))
pages = ('nbdev', 'pypandoc-binary') # what only the pages need
head = '| Python | torch | fastai | fastcore | result | minutes | commit | date |\n|---|---|---|---|---|--:|---|---|\n'

def interpreter(version):
    "Path of a Python interpreter"
    short = '.'.join(version.split('.')[:2])
    r = subprocess.run([f'python{short}', '-c', 'import sys; print(sys.executable)'], capture_output=True, text=True,
                       env=dict(os.environ, PYENV_VERSION=version))
    if r.returncode: raise SystemExit(f'Python {version} is not here: {r.stderr.strip()}. Install it with pyenv, or name another version.')
    return r.stdout.strip()

def requirements():
    "The development requirements without those of the pages"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return [r for r in cfg['DEFAULT']['dev_requirements'].split() if re.split('[<>=]', r)[0] not in pages]

def pins(torch, fastai, fastcore):
    return [f'{k}=={v}' for k,v in dict(torch=torch, fastai=fastai, fastcore=fastcore).items() if v!='-']

def installed(python):
    "Versions of what matters, as the environment has them"
    code = ("import json,sys,platform; from importlib.metadata import version as v; "
            "print(json.dumps(dict(python=platform.python_version(), **{k:v(k) for k in ('torch','fastai','fastcore')})))")
    return json.loads(subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout)

def run(versions, jobs, pytest_args, log):
    "Install and test one tuple: versions, pytest's last line, seconds"
    folder = Path(tempfile.mkdtemp(prefix='fastxtend_opt_versions_'))
    try:
        python = str(folder/'venv'/'bin'/'python')
        subprocess.run([interpreter(versions[0]), '-m', 'venv', str(folder/'venv')], check=True)
        pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
        # a copy, so that no build folder is left in the tree
        tree = folder/'tree'
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns('.git', '.venv', '.cache', '_proc', '_docs', '_site_preview', '__pycache__'))
        with open(log, 'a') as out:
            def call(cmd, **kw): return subprocess.run(cmd, stdout=out, stderr=subprocess.STDOUT, cwd=tree, **kw).returncode
            if call([*pip, '--upgrade', 'pip']) or call([*pip, *pins(*versions[1:]), *requirements(), '-e', '.']):
                return dict(zip(('python','torch','fastai','fastcore'), versions)), 'not installed, see the log', 0
            env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONWARNINGS='ignore')
            start = time.time()
            cmd = [python, '-m', 'pytest', '-q', '-n', str(jobs), '--dist', 'loadgroup', '--ignore', 'tests/test_docs.py', *pytest_args]
            call(cmd, env=env)
        last = [l for l in Path(log).read_text().splitlines() if re.search(r'\d+ (passed|failed|error)', l)]
        return installed(python), re.sub(r'[=]| in .*| \d+ warnings?,?', '', last[-1]).strip(' ,') if last else 'no result, see the log', time.time()-start
    finally: shutil.rmtree(folder, ignore_errors=True)

def commit():
    r = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=root, capture_output=True, text=True)
    return r.stdout.strip() or '?'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('versions', nargs='*', metavar='VERSION', help='Python, torch, fastai and fastcore')
    p.add_argument('--corners', nargs='*', choices=[*corners, []], metavar='NAME', help=f"run {', '.join(corners)}, or some of them")
    p.add_argument('--jobs', type=int, default=2, help='processes of pytest (default: 2)')
    p.add_argument('--out', type=Path, help='write the lines as a Markdown table into this file')
    p.add_argument('--log', type=Path, default=Path('versions.log'), help="output of pip and pytest (default: versions.log)")
    argv,rest = sys.argv[1:],[]
    if '--' in argv: argv,rest = argv[:argv.index('--')],argv[argv.index('--')+1:]
    a = p.parse_args(argv)
    if a.corners is not None: todo = [corners[n] for n in (a.corners or corners)]
    elif len(a.versions)==4: todo = [tuple(a.versions)]
    else: p.error('name four versions (Python, torch, fastai, fastcore), or --corners')
    bad = False
    for versions in todo:
        have,result,seconds = run(versions, a.jobs, rest, a.log.resolve())
        bad |= 'failed' in result or 'error' in result or 'passed' not in result
        line = f"| {have['python']} | {have['torch']} | {have['fastai']} | {have['fastcore']} | {result} | {seconds/60:.1f} | {commit()} | {date.today()} |"
        print(line, flush=True)
        if a.out:
            if not a.out.exists(): a.out.write_text('# Versions\n\nThe default tests without the pages, by `tools/versions.py`.\n\n'+head)
            with open(a.out, 'a') as f: f.write(line+'\n')
    return int(bad)

if __name__=='__main__': sys.exit(main())
