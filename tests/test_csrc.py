"The C++ files of the package: they compile without warnings, and the address reader decides as the rule in Python does"
import ctypes,os,re,shutil,subprocess,sys,textwrap
from pathlib import Path

import numpy as np,pytest,torch
from torch import nn
from fastxtend_opt.engine import addresses,build,cpp
from fastxtend_opt.engine.addresses import AddressTable
from fastxtend_opt.engine.build import csrc,load_library
from fastxtend_opt.engine.cohort import freed,make_cohorts
from fastxtend_opt.definition.registry import get_optimizer
from helpers import *

FOLDER = Path(build.__file__).parent/'csrc'
COMPILERS = [c for c in ('g++','clang++') if shutil.which(c)]
HEADERS = {'prelude.h':'', 'vector_math.h':'', 'axes.h':'#include "prelude.h"\ntypedef {} CT;\n'}

def compile_strictly(cxx, source, *flags):
    "Fails on every warning; optimised, as some warnings come from the optimiser"
    args = [cxx, *'-O1 -march=native -std=c++14 -Wall -Wextra -Werror -c -x c++ -'.split(), *flags, '-I', str(FOLDER), '-o', os.devnull]
    r = subprocess.run(args, input=source, capture_output=True, text=True, timeout=110)
    assert r.returncode == 0, r.stderr[-3000:]

# ---------------------------------------------------------------- warnings
@pytest.mark.parametrize('cxx', COMPILERS)
@pytest.mark.parametrize('threads', ['-fopenmp','-pthread'])
@pytest.mark.parametrize('name', sorted(p.name for p in FOLDER.iterdir()))
def test_no_warnings(cxx, threads, name):
    for ct in ('float','double')[:1 + (name == 'axes.h')]:
        source = HEADERS[name].format(ct) + f'#include "{name}"\n' if name in HEADERS else csrc(name)
        compile_strictly(cxx, source, threads, '-DVECTOR_MATH')

def test_a_warning_is_found():
    with pytest.raises(AssertionError, match='unused'): compile_strictly(COMPILERS[0], 'void f(int i) {}')

def sources(monkeypatch, name, dtype=torch.float32, **kw):
    "The kernels of two steps of an optimizer"
    found,real = [],cpp.load_library
    monkeypatch.setattr(cpp, '_kernels', {})
    monkeypatch.setattr(cpp, 'load_library', lambda s: (found.append(s), real(s))[1])
    ps = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((6,5),(7,),(4,3,3,3))]
    opt = get_optimizer(name).func(ps, lr=.1, fused=True, **kw)
    for _ in range(2):
        for p in ps: p.grad = torch.ones_like(p)
        opt.step()
    return list(dict.fromkeys(found))

@pytest.mark.parametrize('cxx', COMPILERS)
@pytest.mark.parametrize('name,dtype', [('adam',torch.float16), ('lamb',torch.bfloat16), ('adafactor',torch.float32)])
def test_kernels_have_no_warnings(cxx, name, dtype, monkeypatch):
    "Elementwise, with a reduction over a tensor and along axes; with and without OpenMP"
    found = sources(monkeypatch, name, dtype)
    assert found and all(s.startswith('#include "prelude.h"') for s in found)
    compile_strictly(cxx, found[-1], '-fopenmp', '-DVECTOR_MATH')
    compile_strictly(cxx, found[-1], '-pthread')

def test_headers_include_no_other_file_of_ours():
    "The cache key has the text of what a kernel includes, and looks no further"
    for p in FOLDER.iterdir(): assert '#include "' not in p.read_text(), p

# ---------------------------------------------------------------- what the headers compute
HALF = '''#include "prelude.h"
extern "C" void load(const f16* h, float* f, i64 n) { for (i64 i = 0; i < n; i++) f[i] = ld(h[i]); }
extern "C" void store(const float* f, f16* h, i64 n) { for (i64 i = 0; i < n; i++) st(h[i], f[i]); }
extern "C" void load_b(const bf16* h, float* f, i64 n) { for (i64 i = 0; i < n; i++) f[i] = ld(h[i]); }
extern "C" void store_b(const float* f, bf16* h, i64 n) { for (i64 i = 0; i < n; i++) st(h[i], f[i]); }
'''

@pytest.mark.parametrize('cxx', COMPILERS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision(cxx, dtype, monkeypatch):
    "All 65,536 values, and rounding of what lies between them, with a compiler that has the type and one that has not (old clang)"
    monkeypatch.setenv('CXX', cxx)
    monkeypatch.setattr(build, '_libs', {})
    lib,b = load_library(HALF),'_b' if dtype is torch.bfloat16 else ''
    bits = torch.arange(-2**15, 2**15, dtype=torch.int16)
    wide = torch.empty(2**16)
    getattr(lib, 'load'+b)(ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(wide.data_ptr()), ctypes.c_int64(2**16))
    ref = bits.view(dtype).float()
    assert torch.equal(wide.isnan(), ref.isnan())
    assert torch.equal(wide.nan_to_num(7.).view(torch.int32), ref.nan_to_num(7.).view(torch.int32))
    ref = ref[ref.isfinite()].sort().values.double()
    middle = (ref[1:] + ref[:-1])/2
    x = torch.cat([ref, middle, middle*(1+1e-6), torch.tensor([65519., 65520., 1e5, 3.4e38, 1e-8, 1e-45])]).float()
    x = torch.cat([x, -x, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    got = torch.empty(len(x), dtype=dtype)
    getattr(lib, 'store'+b)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(got.data_ptr()), ctypes.c_int64(len(x)))
    want = x.to(dtype)
    assert torch.equal(got[:-1].view(torch.int16), want[:-1].view(torch.int16)) and got[-1].isnan()

@pytest.mark.skipif('clang++' not in COMPILERS, reason='clang++ is not installed')
@pytest.mark.parametrize('name,dtype', [('adafactor',torch.float32), ('lamb',torch.float16)])
def test_clang_gives_the_same(name, dtype, monkeypatch):
    def run():
        monkeypatch.setattr(build, '_libs', {}); monkeypatch.setattr(cpp, '_kernels', {})
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(s).to(dtype)) for s in ((6,5),(7,),(40,30))]
        opt = get_optimizer(name).func(ps, lr=.01, fused=True)
        for _ in range(3):
            for p in ps: p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
        return [p.detach() for p in ps]
    want = run()
    monkeypatch.setenv('CXX', 'clang++')
    assert_same(run(), want, rtol=1e-5 if dtype is torch.float32 else 2e-3, atol=1e-6 if dtype is torch.float32 else 1e-3)

# ---------------------------------------------------------------- the cache
def test_key_has_the_headers(tmp_path, monkeypatch):
    "A package that was upgraded finds no kernel of the old one, and the headers are kept beside the kernel"
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(tmp_path))
    monkeypatch.setattr(build, '_libs', {})
    source = '#include "prelude.h"\nextern "C" int answer() { return int(round_bf16(42)); }\n'
    a = build.build_library(source)
    assert ctypes.CDLL(str(a)).answer() == 42
    assert (a.parent/'prelude.h').read_text() == csrc('prelude.h') and not (a.parent/'axes.h').exists()
    new = csrc('prelude.h').replace('round_bf16(float x) {', 'round_bf16(float x) { x += 1;')
    monkeypatch.setitem(build._csrc, 'prelude.h', new)
    b = build.build_library(source)
    assert a != b and ctypes.CDLL(str(b)).answer() == 43 and (b.parent/'prelude.h').read_text() == new

# ---------------------------------------------------------------- the reader and the rule in Python
def _replace(p, st, k, f): st[k] = f(st[k])
CHANGES = dict(
    nothing=(True, lambda p, st: None),
    new_gradient=(True, lambda p, st: setattr(p, 'grad', torch.ones_like(p))),
    same_number=(True, lambda p, st: st.update(step=int('2'))),
    similar_state=(True, lambda p, st: _replace(p, st, 'grad_avg', torch.clone)),
    no_gradient=(False, lambda p, st: setattr(p, 'grad', None)),
    moved=(False, lambda p, st: setattr(p, 'data', p.data.clone())),
    shorter=(False, lambda p, st: (setattr(p, 'grad', None), setattr(p, 'data', p.data[:2]), setattr(p, 'grad', torch.ones(2,3)))),
    shape=(False, lambda p, st: (setattr(p, 'grad', None), setattr(p, 'data', p.data.view(3,4)), setattr(p, 'grad', torch.ones(3,4)))),
    dtype=(False, lambda p, st: (setattr(p, 'grad', None), setattr(p, 'data', p.data.double()),
        setattr(p, 'grad', torch.ones(4,3).double()))),
    gradient_dtype=(False, lambda p, st: setattr(p.grad, 'data', p.grad.data.double())),
    gradient_shape=(False, lambda p, st: setattr(p.grad, 'data', p.grad.data.view(3,4))),
    gradient_strides=(False, lambda p, st: setattr(p, 'grad', torch.ones(3,4).t())),
    sparse_gradient=(False, lambda p, st: setattr(p, 'grad', torch.ones(4,3).to_sparse())),
    number=(False, lambda p, st: st.update(step=3)),
    number_is_text=(False, lambda p, st: st.update(step='2')),
    more_numbers=(False, lambda p, st: st.update(other=1)),
    other_number=(False, lambda p, st: st.update(other=st.pop('step'))),
    other_name=(False, lambda p, st: st.update(other=st.pop('grad_avg'))),
    no_state=(False, lambda p, st: st.clear()),
    state_dtype=(False, lambda p, st: _replace(p, st, 'grad_avg', torch.Tensor.double)),
    state_shape=(False, lambda p, st: _replace(p, st, 'grad_avg', torch.Tensor.flatten)),
    state_strides=(False, lambda p, st: _replace(p, st, 'grad_avg', lambda t: t.t().contiguous().t())),
    state_is_number=(False, lambda p, st: st.update(grad_avg=1.)),
    freed=(False, lambda p, st: p.untyped_storage().resize_(0)),
    freed_gradient=(False, lambda p, st: p.grad.untyped_storage().resize_(0)),
    freed_state=(False, lambda p, st: st['grad_avg'].untyped_storage().resize_(0)),
    freed_view=(False, lambda p, st: (setattr(p, 'grad', torch.ones(2,4,3)[1]), p.grad.untyped_storage().resize_(0))),
)
STRIDES = {'gradient_strides','state_strides'} # which only a kernel cares about

@pytest.mark.parametrize('count', [1,3])
@pytest.mark.parametrize('change', CHANGES)
def test_one_rule(change, count):
    "Does a cohort hold after a change of its last parameter? The C reader, the Python reader and `Cohort.unchanged` agree"
    holds,f = CHANGES[change]
    ps = [nn.Parameter(torch.ones(4,3)) for _ in range(count)]
    for p in ps: p.grad = torch.ones_like(p)
    opt = get_optimizer('adam').func(ps, lr=.1, foreach=True)
    opt.step(); opt.step()
    c, = make_cohorts(opt)
    in_c,in_python = AddressTable(c),AddressTable(c)
    assert in_c.lib is not None
    in_python.lib = None
    assert in_python._look(True)
    assert in_c.refresh() and in_python.refresh() and np.array_equal(in_c.address, in_python.address)
    f(ps[-1], opt.state[ps[-1]])
    assert in_c.refresh() == in_python.refresh() == holds
    assert c.unchanged() == (holds or change in STRIDES)
    if holds:
        assert np.array_equal(in_c.address, in_python.address)
        tensors = ps[-1],ps[-1].grad,*(opt.state[ps[-1]][k] for k in in_c.names)
        assert in_c.address[-1].tolist() == [t.data_ptr() for t in tensors]

def _old_torch(monkeypatch):
    monkeypatch.delattr(torch.Tensor, '__dlpack_c_exchange_api__')
    assert addresses._reader() is None

@pytest.mark.parametrize('name', ['adam','lamb','adafactor','muon','ranger'])
def test_without_the_exchange_table(name, monkeypatch):
    "Older torch: the Python reader serves a step, with the same result"
    def life():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(s)) for s in ((6,5),(7,),(2,3,4,4))]
        opt = get_optimizer(name).func([ps[:2], ps[2:]], lr=.01, fused=True)
        for i in range(8):
            for j,p in enumerate(ps): p.grad = None if i == 1 and j == 0 else torch.randn(p.shape)
            if i == 4: ps[2].data = ps[2].data.to(memory_format=torch.channels_last)
            if i == 5: opt.load_state_dict(opt.state_dict())
            if i == 6: ps[1].grad = torch.randn(14)[::2]
            opt.step()
        assert all((t.lib is None) == old for t in opt._plan.tables.values()) and opt._plan.tables
        return ps,opt
    old = False
    want = life()
    _old_torch(monkeypatch)
    old = True
    got = life()
    assert_bitwise(snapshot(*got), snapshot(*want))

def test_another_exchange_table_is_not_read(monkeypatch):
    "A table of an unknown major version, or a capsule of another name"
    get = ctypes.pythonapi.PyCapsule_New
    get.restype,get.argtypes = ctypes.py_object,[ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    version = (ctypes.c_uint32*2)(2, 0)
    for name in (b'dlpack_exchange_api', b'other'):
        monkeypatch.setattr(torch.Tensor, '__dlpack_c_exchange_api__', get(ctypes.addressof(version), name, None))
        assert addresses._reader() is None

def test_an_address_that_can_not_be_read():
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    opt = get_optimizer('adam').func([p], lr=.1, foreach=True)
    opt.step()
    c, = make_cohorts(opt)
    opt.state[p]['grad_avg'].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="can't be read.*foreach=True"): AddressTable(c)

# ---------------------------------------------------------------- freed memory
FREED = '''
    import torch
    from fastxtend_opt.all import *
    def same(st, old): return all(torch.equal(torch.as_tensor(st[k]), torch.as_tensor(v)) for k,v in old.items())
    def run(mode, what, view):
        def tensor(): return torch.ones(2,8)[1] if view else torch.ones(8)
        p,q = torch.nn.Parameter(tensor()),torch.nn.Parameter(torch.ones(5))
        opt = adam(**({} if mode == 'native' else {mode:True}))([q,p], lr=.1)
        for i in range(2):
            p.grad,q.grad = tensor(),torch.ones(5)
            opt.step()
            if i == 0: opt.state[p]['grad_avg'] = tensor()
        p.grad = tensor()
        {'param':p.data, 'grad':p.grad, 'state':opt.state[p]['grad_avg']}[what].untyped_storage().resize_(0)
        before = q.detach().clone(),{k:v.clone() if isinstance(v, torch.Tensor) else v for k,v in opt.state[q].items()}
        try: opt.step()
        except ValueError as e: print(mode, what, view, e, flush=True)
        assert torch.equal(q, before[0]) and same(opt.state[q], before[1])
    for mode in ('native','foreach','jit','fused'):
        for what in ('param','grad','state'):
            for view in (False,True): run(mode, what, view)
'''

def test_freed_memory_is_refused():
    "In another process, which a null address would kill. The other parameter, which comes first, is not stepped either"
    env = {**os.environ, 'PYTHONPATH':str(FOLDER.parents[2]), 'OMP_NUM_THREADS':'1'}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(FREED)], env=env, capture_output=True, text=True, timeout=110)
    assert r.returncode == 0, (r.returncode, r.stdout, r.stderr[-2000:])
    assert len(re.findall('its memory was freed.*No parameter was changed', r.stdout)) == 4*3*2, r.stdout

def test_freed():
    t = torch.ones(2,4)
    assert not any(map(freed, (t, t[1], torch.ones(0), torch.ones(3).to_sparse(), torch.ones(3, device='meta'))))
    view,empty = t[1],t[:0]
    t.untyped_storage().resize_(0)
    assert view.data_ptr() and freed(t) and freed(view) and not freed(empty)
