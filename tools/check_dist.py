"""Build wheel and sdist into dist/, install the wheel into an empty environment outside of the checkout, and take a fused step there.

    python tools/check_dist.py
    python tools/check_dist.py --with torch==2.13.0    # more requirements for pip

The environment gets what a user's would: the wheel and its requirements, about 6 GB, deleted afterwards."""
from __future__ import annotations
import argparse, os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
step = '''
import sys, torch, fastxtend_opt
from fastxtend_opt.all import Adam, adam, list_optimizers
assert sys.argv[1] not in fastxtend_opt.__file__, f"imported from the checkout: {fastxtend_opt.__file__}"
def run(**mode):
    torch.manual_seed(0)
    ps = [torch.randn(n, requires_grad=True) for n in (3,1000)]
    opt = Adam(ps, lr=.1, **mode)
    for _ in range(3):
        for p in ps: p.grad = torch.sin(p.detach())
        opt.step()
    return torch.cat([p.detach() for p in ps])
native = run()
for mode in ('foreach','jit','fused'): torch.testing.assert_close(run(**{mode: True}), native, rtol=1e-5, atol=1e-6)
print(f"fastxtend_opt {fastxtend_opt.__version__} with torch {torch.__version__}: {len(list_optimizers())} optimizers; "
      "foreach, jit and fused agree with native")
'''

def call(*cmd, **kwargs):
    print('$', *(o if len(o)<99 else '...' for o in map(str, cmd)), flush=True)
    subprocess.run([str(o) for o in cmd], check=True, **kwargs)

def environment(folder):
    "A new environment: its interpreter"
    call(sys.executable, '-m', 'venv', folder)
    return folder/'bin'/'python'

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--with', nargs='+', default=[], dest='extra', metavar='REQUIREMENT', help='more requirements for pip')
    a = p.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix='fastxtend_opt_dist_'))
    dist = root/'dist'
    # the environment of the caller must not reach into the new one
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','VIRTUAL_ENV')}
    env['FASTXTEND_OPT_CACHE'] = str(folder/'kernels')
    try:
        shutil.rmtree(dist, ignore_errors=True)
        builder = environment(folder/'builder')
        call(builder, '-m', 'pip', 'install', '--quiet', 'build', env=env)
        call(builder, '-m', 'build', '--outdir', dist, root, env=env)
        wheel, = dist.glob('*.whl')
        python = environment(folder/'empty')
        call(python, '-m', 'pip', 'install', '--quiet', *a.extra, wheel, env=env)
        call(python, '-c', step, root, env=env, cwd=folder)
        call(folder/'empty'/'bin'/'fastxtend-opt', '--help', env=env, cwd=folder, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as e: return e.returncode
    finally: shutil.rmtree(folder, ignore_errors=True)
    for f in sorted(dist.iterdir()): print(f'{f.relative_to(root)}: {f.stat().st_size/1024:.0f} KB')

if __name__=='__main__': sys.exit(main())
