"The cache of compiled kernels: its keys, and that no damage to its folder harms a run."
import ctypes,errno,os,shutil,subprocess,sys,tempfile,textwrap,time
from pathlib import Path

import pytest,torch
from torch import nn
from fastxtend_opt.engine import build
from fastxtend_opt.engine.build import build_library,cache_folder,cpp_compiler,load_library
from fastxtend_opt.definition.registry import get_optimizer
from helpers import *

pytestmark = pytest.mark.skipif(os.name!='posix', reason='folders and permissions of POSIX')
ROOT = Path(build.__file__).parents[2]
SOURCE = 'extern "C" int answer() { return %d; }\n'

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty private cache; libraries that this process has loaded are forgotten"
    path = tmp_path/'kernels'
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(path))
    monkeypatch.setattr(build, '_libs', {})
    return path

@pytest.fixture
def compiles(monkeypatch):
    "The sources that are actually compiled"
    done,f = [],build._compile
    monkeypatch.setattr(build, '_compile', lambda source, folder: (done.append(source), f(source, folder))[1])
    return done

def answer(path): return ctypes.CDLL(str(path)).answer()
def kept(cache): return sorted(p for p in cache.iterdir() if not p.name.startswith('.'))

def run_python(code, **env):
    "Run `code` in a new process"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS':'1', **env}
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=110)

# ---------------------------------------------------------------- the key
def test_compiled_once_and_found_again(cache, compiles):
    a = build_library(SOURCE%42)
    assert answer(a)==42 and build_library(SOURCE%42)==a and len(compiles)==1
    assert load_library(SOURCE%42) is load_library(SOURCE%42) and len(compiles)==1
    assert cache in a.parents and len(kept(cache))==1

def test_a_warm_cache_is_fast(cache):
    build_library(SOURCE%1)
    t = min(_timed(lambda: build_library(SOURCE%1)) for _ in range(5))
    assert t < .02

def _timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t

def test_key_has_source_flags_compiler_and_cpu(cache, compiles, monkeypatch, tmp_path):
    first = build_library(SOURCE%1)
    assert build_library(SOURCE%2) != first
    with monkeypatch.context() as m:
        m.setattr(build, 'CPP_FLAGS', tuple('-O1' if o=='-O3' else o for o in build.CPP_FLAGS))
        assert build_library(SOURCE%1) != first
    with monkeypatch.context() as m:
        m.setattr(build, '_cpu', lambda: 'another processor')
        assert build_library(SOURCE%1) != first
    cxx = tmp_path/'bin'/'g++' # another compiler of the same name, first on the PATH
    cxx.parent.mkdir()
    cxx.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@"\n')
    cxx.chmod(0o755)
    with monkeypatch.context() as m:
        m.setenv('PATH', f'{cxx.parent}:{os.environ["PATH"]}')
        assert build_library(SOURCE%1) != first
    with monkeypatch.context() as m:
        m.setenv('CXX', 'g++ -DSOMETHING')
        assert build_library(SOURCE%1) != first
    assert len(compiles)==6 and len(kept(cache))==6
    assert build_library(SOURCE%1)==first and len(compiles)==6

def test_hypers_are_no_part_of_the_key(cache, compiles, monkeypatch):
    "lr, mom, wd and the step number change at each step: one kernel for the first step, one for the others"
    from fastxtend_opt.engine import cpp
    monkeypatch.setattr(cpp, '_kernels', {})
    p = nn.Parameter(torch.ones(5))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    for i in range(6):
        opt.set_hypers(lr=.1/(i+1), mom=.9-.01*i, wd=.01*(i+1))
        p.grad = torch.ones(5)
        opt.step()
    assert len([s for s in compiles if 'void run(' in s]) <= 2

# ---------------------------------------------------------------- damage
def damage_truncate(so): so.write_bytes(so.read_bytes()[:1000])
def damage_empty(so): so.write_bytes(b'')
def damage_flip(so):
    b = bytearray(so.read_bytes())
    b[len(b)//2] ^= 0xff
    so.write_bytes(bytes(b))
def damage_text(so): so.write_text('not a library')
def damage_remove(so): so.unlink()
def damage_sum(so): (so.parent/'sha256').unlink()
def damage_sum_binary(so): (so.parent/'sha256').write_bytes(b'\xff\xfe\x00')
def damage_folder(so):
    shutil.rmtree(so.parent)
    so.parent.mkdir()
def damage_file_in_place(so):
    folder = so.parent
    shutil.rmtree(folder)
    folder.write_text('a file where the folder should be')

@pytest.mark.parametrize('damage', [v for k,v in list(globals().items()) if k.startswith('damage_')], ids=lambda f: f.__name__[7:])
def test_damaged_library_is_built_anew(cache, compiles, damage):
    so = build_library(SOURCE%7)
    damage(so)
    new = build_library(SOURCE%7)
    assert answer(new)==7 and len(compiles)==2
    assert build_library(SOURCE%7)==new and len(compiles)==2
    assert len(kept(cache))==1 and not list(cache.glob('.build-*'))

def test_a_killed_build_leaves_nothing_in_the_way(cache, compiles):
    "A build killed halfway: the next one builds, and old remains are removed"
    code = f'''
        import os,signal
        from fastxtend_opt.engine import build
        def killed(source, folder):
            (folder/'kernel.cpp').write_text(source); (folder/'kernel.so').write_bytes(b'half')
            os.kill(os.getpid(), signal.SIGKILL)
        build._compile = killed
        build.build_library({SOURCE%5!r})
    '''
    r = run_python(code)
    assert r.returncode==-9, r.stderr
    left = list(cache.glob('.build-*'))
    assert len(left)==1
    assert answer(build_library(SOURCE%5))==5
    assert left[0].exists() # it might belong to a build that still runs
    os.utime(left[0], (time.time()-7200,)*2)
    build_library(SOURCE%6)
    assert not left[0].exists() and len(kept(cache))==2

def test_a_failed_compilation_says_so_and_leaves_nothing(cache):
    with pytest.raises(RuntimeError, match=r'could not compile.*foreach=True(.|\n)*error'): build_library('this is no C++')
    assert list(cache.iterdir())==[]

# ---------------------------------------------------------------- several at once
def test_several_processes_build_the_same_kernel(cache):
    "Four processes start together on an empty cache: each gets its kernels, and one library of each remains"
    code = '''
        import os,time,ctypes
        from fastxtend_opt.engine.build import build_library
        while not os.path.exists(os.environ['GO']): time.sleep(.005)
        print([ctypes.CDLL(str(build_library('extern "C" int answer() { return %d; }'%k))).answer() for k in (1,2,3)])
    '''
    go = cache.parent/'go'
    env = {**os.environ, 'PYTHONPATH':str(ROOT), 'OMP_NUM_THREADS':'1', 'GO':str(go)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ps = [subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=env, **pipes) for _ in range(4)]
    time.sleep(1)
    go.touch()
    out = [p.communicate(timeout=110) for p in ps]
    assert [o.strip() for o,_ in out]==['[1, 2, 3]']*4, out
    assert len(kept(cache))==3 and not list(cache.glob('.build-*'))

def test_several_threads_build_the_same_kernel(cache, compiles):
    import threading
    res = []
    ts = [threading.Thread(target=lambda: res.append(load_library(SOURCE%9).answer())) for _ in range(6)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert res==[9]*6 and len(compiles)==1

# ---------------------------------------------------------------- the folder
def test_environment_moves_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(build, '_libs', {})
    for name in ('one','two/deep'):
        monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(tmp_path/name))
        assert build_library(SOURCE%3).is_relative_to(tmp_path/name)
        assert (tmp_path/name).stat().st_mode & 0o777==0o700
    monkeypatch.delenv('FASTXTEND_OPT_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert cache_folder()==tmp_path/'xdg'/'fastxtend_opt'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    assert cache_folder()==tmp_path/'home'/'.cache'/'fastxtend_opt'
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', '~/mine')
    assert cache_folder()==tmp_path/'home'/'mine'

@pytest.mark.parametrize('mode', [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_to_is_refused(cache, mode):
    cache.mkdir(mode=0o700)
    cache.chmod(mode)
    with pytest.raises(RuntimeError, match=r"can be written by others.*chmod go-w .*FASTXTEND_OPT_CACHE"): build_library(SOURCE%1)
    p = nn.Parameter(torch.ones(3))
    cache.chmod(0o755) # others may read
    assert answer(build_library(SOURCE%1))==1

def test_folder_of_someone_else_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, 'getuid', lambda: cache.stat().st_uid + 1)
    with pytest.raises(RuntimeError, match="belongs to another user.*FASTXTEND_OPT_CACHE"): build_library(SOURCE%1)

def test_folder_that_can_not_be_made(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(tmp_path/'file'/'kernels'))
    with pytest.raises(RuntimeError, match="can't make the kernel cache.*FASTXTEND_OPT_CACHE.*foreach=True"): build_library(SOURCE%1)

def test_a_refused_folder_changes_no_weight(cache, monkeypatch):
    from fastxtend_opt.engine import cpp
    monkeypatch.setattr(cpp, '_kernels', {})
    p = nn.Parameter(torch.ones(3))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    p.grad = torch.ones(3)
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    with unchanged([p], opt):
        with pytest.raises(RuntimeError, match='written by others'): opt.step()
    cache.chmod(0o700)
    opt.step()
    assert opt.state[p]['step']==1

def test_folder_that_is_changed_all_the_time(cache, monkeypatch):
    monkeypatch.setattr(build, '_valid', lambda folder: None)
    with pytest.raises(RuntimeError, match="changed by something else.*FASTXTEND_OPT_CACHE"): build_library(SOURCE%1)

# ---------------------------------------------------------------- a full disk
FULL_DISK = r"can't write to the kernel cache {}.*(No space left|no space left).*free space.*FASTXTEND_OPT_CACHE.*foreach=True"
def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

@pytest.mark.parametrize('target,name', [(tempfile,'mkdtemp'), (Path,'write_text')])
def test_a_full_disk_is_explained(cache, monkeypatch, target, name):
    "The message has the folder and the remedies; no weight changes, nothing is left, and with space again the step goes on"
    from fastxtend_opt.engine import cpp
    monkeypatch.setattr(cpp, '_kernels', {})
    p = nn.Parameter(torch.ones(3))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    p.grad = torch.ones(3)
    with monkeypatch.context() as m, unchanged([p], opt):
        m.setattr(target, name, full)
        with pytest.raises(RuntimeError, match=FULL_DISK.format(cache)): opt.step()
    assert list(cache.iterdir()) == []
    opt.step()
    assert opt.state[p]['step'] == 1

def compiler(tmp_path, text):
    "A program that stands in for the compiler"
    path = tmp_path/'cxx'
    path.write_text(text)
    path.chmod(0o755)
    return str(path)

def test_a_full_disk_seen_by_the_compiler(cache, monkeypatch, tmp_path):
    text = '#!/bin/sh\necho "/tmp/cc.s: fatal error: error writing to /tmp/cc.s: No space left on device" >&2\nexit 1\n'
    monkeypatch.setenv('CXX', compiler(tmp_path, text))
    with pytest.raises(RuntimeError, match=FULL_DISK.format(cache)) as e: build_library(SOURCE%1)
    assert tempfile.gettempdir() in str(e.value) and list(cache.iterdir()) == []

def test_a_full_disk_stops_a_triton_module(cache, monkeypatch):
    from fastxtend_opt.engine.triton import _import_text
    monkeypatch.setattr(tempfile, 'mkstemp', full)
    with pytest.raises(RuntimeError, match=FULL_DISK.format(cache)): _import_text('x = 1', 'compiled')

# ---------------------------------------------------------------- a compiler that hangs
def gone(pid):
    "Has the process ended (or is it a zombie that waits for its parent)?"
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError: return True

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
def test_a_compiler_that_hangs_is_stopped(cache, monkeypatch, tmp_path):
    "With what it has started; the message has the remedies, no weight changes, nothing is left"
    from fastxtend_opt.engine import cpp
    monkeypatch.setattr(cpp, '_kernels', {})
    pids = tmp_path/'pids'
    monkeypatch.setenv('CXX', compiler(tmp_path, f'#!/bin/sh\nsleep 300 &\necho $$ $! > {pids}\nwait\n'))
    monkeypatch.setenv('FASTXTEND_OPT_COMPILE_TIMEOUT', '1.5')
    p = nn.Parameter(torch.ones(3))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    p.grad = torch.ones(3)
    start = time.monotonic()
    with unchanged([p], opt):
        with pytest.raises(RuntimeError, match=r'stopped after 1\.5 s.*FASTXTEND_OPT_COMPILE_TIMEOUT.*CXX.*foreach=True'): opt.step()
    assert time.monotonic() - start < 30 and list(cache.iterdir()) == []
    ids = pids.read_text().split()
    for _ in range(100):
        if all(map(gone, ids)): break
        time.sleep(.05)
    assert len(ids) == 2 and all(map(gone, ids))

def test_an_interrupt_stops_the_compiler(monkeypatch, tmp_path):
    "Ctrl-C while the compiler runs: its process is ended, and the interrupt goes on"
    seen = []
    class Popen(subprocess.Popen):
        def communicate(self, *args, **kwargs): seen.append(self); raise KeyboardInterrupt
    monkeypatch.setattr(build.subprocess, 'Popen', Popen)
    with pytest.raises(KeyboardInterrupt): build._run_compiler(['sleep', '300'], tmp_path)
    assert seen[0].returncode == -9

@pytest.mark.parametrize('value', ['0', '-3', 'soon', 'nan', 'inf', '1e9', ''])
def test_time_limits_that_are_none(cache, monkeypatch, value):
    monkeypatch.setenv('FASTXTEND_OPT_COMPILE_TIMEOUT', value)
    with pytest.raises(ValueError, match='FASTXTEND_OPT_COMPILE_TIMEOUT.*number of seconds'): build_library(SOURCE%1)

def test_the_usual_time_limit(monkeypatch):
    monkeypatch.delenv('FASTXTEND_OPT_COMPILE_TIMEOUT', raising=False)
    assert build._time_limit() == 120

def test_a_compiler_that_can_not_be_started(cache, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', compiler(tmp_path, '\0 no program'))
    with pytest.raises(RuntimeError, match="can't start the C\\+\\+ compiler.*CXX.*foreach=True"): build_library(SOURCE%1)

# ---------------------------------------------------------------- no compiler
@pytest.mark.parametrize('env', [dict(CXX='/nonexistent/c++'), dict(PATH='/nonexistent', CXX='')], ids=['CXX','PATH'])
def test_no_compiler(cache, monkeypatch, env):
    "The message names the remedy, no weight changes, and foreach works"
    from fastxtend_opt.engine import cpp
    monkeypatch.setattr(cpp, '_kernels', {})
    for k,v in env.items(): monkeypatch.setenv(k, v)
    p = nn.Parameter(torch.ones(3))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    p.grad = torch.ones(3)
    with unchanged([p], opt):
        with pytest.raises(RuntimeError, match=r'no C\+\+ compiler.*(apt-get install g\+\+).*CXX.*foreach=True'): opt.step()
    if env['CXX']: # the name that was asked for is in the message
        with pytest.raises(RuntimeError, match=env['CXX']): cpp_compiler()
    opt = get_optimizer('adam').func([p], lr=.1, foreach=True)
    opt.step()
    assert opt.state[p]['step']==1

# ---------------------------------------------------------------- import
def test_import_writes_and_compiles_nothing(tmp_path):
    code = '''
        import subprocess
        import fastai.optimizer # torch and fastai may start what they like
        def refuse(*a, **k): raise AssertionError('a process was started')
        subprocess.run = subprocess.Popen.__init__ = refuse
        from fastxtend_opt.all import *
        import torch
        p = torch.nn.Parameter(torch.ones(2))
        opts = [adam(fused=True)([p], lr=.1), ranger(jit=True)([p], lr=.1), lamb(foreach=True)([p], lr=.1)]
        print('done')
    '''
    cache,home = tmp_path/'cache',tmp_path/'home'
    home.mkdir()
    r = run_python(code, FASTXTEND_OPT_CACHE=str(cache), HOME=str(home), XDG_CACHE_HOME=str(home/'xdg'), PYTHONDONTWRITEBYTECODE='1',
                   CXX='/nonexistent')
    assert r.stdout.strip().endswith('done'), r.stderr
    assert not cache.exists() and not (home/'xdg'/'fastxtend_opt').exists() and not (home/'.cache'/'fastxtend_opt').exists()
