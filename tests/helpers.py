"What tests of optimizers share: choosing cases, comparing, making parameters and gradients, running."
import copy,numbers,pickle
from collections.abc import Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import combinations

import numpy as np,pytest,torch
from fastcore.all import L
from torch import nn,tensor
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.optimizer.native import NativeOptimizer
from fastxtend_opt.optimizer.traced import ForEachOptimizer,JitOptimizer

MODES = ('foreach', 'jit', 'fused', 'triton') # 'triton' is the fused mode with the GPU's kernels, in Triton's interpreter
ALL_MODES = ('native',) + MODES
ENGINES = dict(native=NativeOptimizer, foreach=ForEachOptimizer, jit=JitOptimizer, fused=FusedOptimizer, triton=FusedOptimizer)

def flags(mode): return {} if mode=='native' else {'fused' if mode=='triton' else mode: True}

BACKEND = 'FASTXTEND_OPT_FUSED_BACKEND'

@contextmanager
def backend_of(mode):
    "Optimizers that are made in the block have `mode`'s backend"
    with pytest.MonkeyPatch.context() as m:
        if mode=='triton': m.setenv(BACKEND, 'triton')
        elif mode=='fused': m.setenv(BACKEND, 'cpp')
        yield

class WithBackend:
    "An `opt_func` that calls `f` with `mode`'s backend"
    def __init__(self, f, mode): self.f,self.mode = f,mode
    def __call__(self, *args, **kwargs):
        with backend_of(self.mode): return self.f(*args, **kwargs)

# one of each kind for the engine: no state, one, two; state made from the weights; reductions, also along axes; signs
CORE = ('sgd','adam','ranger','larc','lamb','lion','adamw_schedulefree','adafactor')

# those of `CORE` that Triton's slow interpreter runs by default: elementwise, and with reductions
INTERPRETED = ('adam','larc')
# with reductions along axes: only C++ has kernels for them, for contiguous parameters; otherwise a fused step of these is foreach's
AXES = ('adafactor','came','adamp','sgdp','adam_mini')

# ---------------------------------------------------------------- choosing
SLOW = True # Does this session run slow tests? Set by `conftest.py` before collection, because making thousands of slow cells takes seconds

def slow(*values, when=True, id=None):
    "A case of `parametrize`, marked slow `when` it is not in the default run"
    return pytest.param(*values, id=id, marks=pytest.mark.slow if when else ())

def interpreted_slow(modes):
    "Parametrize by `modes`; the one in Triton's interpreter is slow"
    return pytest.mark.parametrize('mode', [slow(m, when=m=='triton') for m in modes])

def pairwise(rows, group, dear=lambda row: None):
    """Choose rows that together have every pair of values of two columns that `rows` have, always the same ones. Each group of `rows`
    (those with one `group(row)`) contributes the row with most new pairs, and of several such rows the one whose pairs were used least.
    More rows complete the pairs. Of the rows with one `dear(row)`, which are slow, one is enough."""
    ids = {}
    pairs = {r: [ids.setdefault(p, len(ids)) for p in combinations(enumerate(r), 2)] for r in rows}
    used,had,groups,res = [0]*len(ids),set(),{},[]
    for r in rows: groups.setdefault(group(r), []).append(r)
    def value(r):
        counts = [used[p] for p in pairs[r]]
        return counts.count(0) - 4*bool(dear(r) and dear(r) in had),-sum(counts)
    def take(rs):
        res.append(r := max(rs, key=value)); had.add(dear(r))
        for p in pairs[r]: used[p] += 1
    for g in groups.values(): take(g)
    while not all(used): take([r for r in rows if any(not used[p] for p in pairs[r])])
    return res

# ---------------------------------------------------------------- comparing
class Mismatch(AssertionError): "Raised by `assert_same`; the message begins with the path of the difference"

def _kind(o):
    if isinstance(o, torch.Tensor): return 'tensor'
    if isinstance(o, np.ndarray):   return 'array'
    if isinstance(o, Mapping):      return 'dict'
    if isinstance(o, (list, tuple, L)): return 'list'
    if o is None or isinstance(o, (str, bytes)): return type(o).__name__
    if isinstance(o, (bool, np.bool_)): return 'bool'
    if isinstance(o, (int, np.integer)): return 'int'
    if isinstance(o, (float, np.floating)): return 'float'
    return type(o).__name__

def _fail(path, msg): raise Mismatch(f'{path or "value"}: {msg}')

def _bits(t): return t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) if t.numel() else t

def _same_tensor(a, b, rtol, atol, equal_nan, path):
    if a.shape  != b.shape:  _fail(path, f'shape {tuple(a.shape)} against {tuple(b.shape)}')
    if a.dtype  != b.dtype:  _fail(path, f'dtype {a.dtype} against {b.dtype}')
    if a.device != b.device: _fail(path, f'device {a.device} against {b.device}')
    a,b = a.detach(),b.detach()
    if not a.numel(): return
    if not (a.is_floating_point() or a.is_complex()):
        if not torch.equal(a, b): _fail(path, f'{int((a!=b).sum())} of {a.numel()} values differ')
        return
    if a.dtype != torch.float64 and not a.is_complex(): a,b = a.double(),b.double()
    na,nb = a.isnan(),b.isnan()
    if (na|nb).any():
        if not equal_nan:         _fail(path, f'{int(na.sum())} NaN against {int(nb.sum())}, of {a.numel()} values')
        if not torch.equal(na,nb): _fail(path, f'NaN in different places ({int((na!=nb).sum())} of {a.numel()})')
    ia,ib = a.isinf(),b.isinf()
    if (ia|ib).any() and not torch.equal(torch.where(ia, a, 0*torch.ones_like(a)), torch.where(ib, b, 0*torch.ones_like(b))):
        _fail(path, f'infinities differ: {int(ia.sum())} against {int(ib.sum())}, of {a.numel()} values')
    ok = ~(na|ia)
    d,lim = (a-b).abs()[ok],(atol + rtol*b.abs())[ok]
    bad = d > lim
    if bad.any():
        i = int((d-lim).argmax())
        _fail(path, f'{int(bad.sum())} of {a.numel()} values differ; worst {a[ok].flatten()[i].item()!r} against '
                    f'{b[ok].flatten()[i].item()!r}'
                    f' (|difference| {d[i].item():.3g} > {lim[i].item():.3g} = {atol:g} + {rtol:g} * |b|)')

def assert_same(a, b, rtol=0., atol=0., equal_nan=False, path=''):
    """Fail unless `a` and `b` have the same structure, lengths, shapes, dtypes and values: `|a-b| <= atol + rtol*|b|` elementwise.
    NaN is a failure unless `equal_nan`, and then must be in the same places. Integers, booleans and strings are compared exactly;
    a dict is a dict whatever its class, and list, tuple and `L` are one kind."""
    ka,kb = _kind(a),_kind(b)
    if ka != kb: _fail(path, f'{type(a).__name__} against {type(b).__name__}')
    if ka=='dict':
        if set(a) != set(b): _fail(path, f'keys {sorted(map(str,a))} against {sorted(map(str,b))}')
        for k in a: assert_same(a[k], b[k], rtol, atol, equal_nan, f'{path}[{k!r}]')
    elif ka=='list':
        if len(a) != len(b): _fail(path, f'length {len(a)} against {len(b)}')
        for i,(x,y) in enumerate(zip(a,b)): assert_same(x, y, rtol, atol, equal_nan, f'{path}[{i}]')
    elif ka=='tensor': _same_tensor(a, b, rtol, atol, equal_nan, path)
    elif ka=='array':
        if a.dtype != b.dtype: _fail(path, f'dtype {a.dtype} against {b.dtype}')
        _same_tensor(torch.from_numpy(np.array(a)), torch.from_numpy(np.array(b)), rtol, atol, equal_nan, path)
    elif ka=='float': _same_tensor(tensor(float(a), dtype=torch.float64), tensor(float(b), dtype=torch.float64), rtol, atol, equal_nan,
                                   path)
    elif a != b: _fail(path, f'{a!r} against {b!r}')

def assert_bitwise(a, b, path=''):
    "Fail unless `a` and `b` agree to the last bit (so that NaN equals NaN and 0. differs from -0.)"
    ka,kb = _kind(a),_kind(b)
    if ka != kb: _fail(path, f'{type(a).__name__} against {type(b).__name__}')
    if ka=='dict':
        if set(a) != set(b): _fail(path, f'keys {sorted(map(str,a))} against {sorted(map(str,b))}')
        for k in a: assert_bitwise(a[k], b[k], f'{path}[{k!r}]')
    elif ka=='list':
        if len(a) != len(b): _fail(path, f'length {len(a)} against {len(b)}')
        for i,(x,y) in enumerate(zip(a,b)): assert_bitwise(x, y, f'{path}[{i}]')
    elif ka=='tensor':
        if (a.shape,a.dtype,a.device) != (b.shape,b.dtype,b.device): _fail(path, f'{a.shape, a.dtype} against {b.shape, b.dtype}')
        if not torch.equal(_bits(a), _bits(b)): _fail(path, f'{int((a!=b).sum())} of {a.numel()} values differ in some bit')
    elif ka=='array': assert_bitwise(torch.from_numpy(np.array(a)), torch.from_numpy(np.array(b)), path)
    elif ka=='float' and np.float64(a).tobytes() != np.float64(b).tobytes(): _fail(path, f'{a!r} against {b!r}')
    elif ka!='float' and a != b: _fail(path, f'{a!r} against {b!r}')

def less_noise(a, b, noisy, factor=4.):
    """Move `a` towards `b` by `factor` times the largest difference between `b` and `noisy` in each tensor, and let `assert_same` judge the
    rest. `noisy` is `b` computed from inputs whose last bit differs: a computation in another order can't be expected to come closer."""
    if _kind(b)=='dict': return {k: less_noise(a[k], v, noisy[k], factor) if k in a and k in noisy else a.get(k) for k,v in b.items()}
    if _kind(b)=='list': return [less_noise(*o, factor) for o in zip(a, b, noisy)] if len(a)==len(b) else a
    if _kind(b)!='tensor' or not b.is_floating_point() or a.shape!=b.shape or not b.numel(): return a
    d,room = a.double()-b.double(),factor*(noisy.double()-b.double()).abs()
    room = room[room.isfinite()].max() if room.isfinite().any() else 0.
    return torch.where(d.isfinite(), b.double() + torch.sign(d)*(d.abs()-room).clamp(min=0), a.double()).to(a.dtype)

_ULP = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149), torch.float64: (53, -1074)}

def ulp(t):
    "The spacing of `t`'s dtype at each of its values, as float64"
    bits,low = _ULP[t.dtype]
    return torch.exp2((torch.frexp(t.double()).exponent - bits).clamp(min=low).double())

def assert_ulps(a, b, n, atol=0., path=''):
    """Fail unless `a` and `b`, of one low-precision dtype, are at most `n` representable steps apart everywhere, or `atol` where a step is
    smaller"""
    if _kind(a)=='dict' and _kind(b)=='dict':
        if set(a) != set(b): _fail(path, f'keys {sorted(map(str,a))} against {sorted(map(str,b))}')
        for k in a: assert_ulps(a[k], b[k], n, atol, f'{path}[{k!r}]')
    elif _kind(a)=='list' and _kind(b)=='list':
        if len(a) != len(b): _fail(path, f'length {len(a)} against {len(b)}')
        for i,(x,y) in enumerate(zip(a,b)): assert_ulps(x, y, n, atol, f'{path}[{i}]')
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point() and a.dtype==b.dtype and a.shape==b.shape:
        fin = a.isfinite()&b.isfinite()
        if not torch.equal(torch.where(fin, 0, a.double()).nan_to_num(nan=7), torch.where(fin, 0, b.double()).nan_to_num(nan=7)):
            _fail(path, 'inf or NaN in different places')
        d = torch.where(fin, ((a.double()-b.double()).abs()-atol).clamp(min=0)/torch.maximum(ulp(a), ulp(b)), 0.)
        if d.numel() and d.max() > n:
            i = int(d.argmax())
            _fail(path, f'{int((d>n).sum())} of {d.numel()} values more than {n} ulp apart; worst {a.flatten()[i].item()!r} against '
                        f'{b.flatten()[i].item()!r} ({d.max().item():g} ulp)')
    else: assert_same(a, b, path=path)

# Parameters, gradients and updates of the streams below are of order 1, so the absolute part is a few roundings of 1.
TOL = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=2e-5, atol=1e-6)}

# ---------------------------------------------------------------- parameters and gradients
BIG = 16*1024 + 5 # more than one chunk of the fused backend, and not a multiple of a vector's length
SHAPES = ((), (1,), (33,), (17,5), (8,4,3,3), (0,), (0,3))

def _fill(shape, gen, dtype, scale=1.): return (torch.randn(shape, generator=gen, dtype=torch.float64)*scale).to(dtype)

def make_params(shapes=SHAPES, dtype=torch.float32, seed=0, big=True, channels_last=True, scale=.5):
    "Seeded parameters of `shapes`, then one of more than a chunk, then a channels_last kernel"
    gen = torch.Generator().manual_seed(seed)
    res = [_fill(s, gen, dtype, scale) for s in shapes]
    if big: res.append(_fill((BIG,), gen, dtype, scale))
    if channels_last: res.append(_fill((6,8,3,5), gen, dtype, scale).contiguous(memory_format=torch.channels_last))
    return [nn.Parameter(o) for o in res]

def copy_params(params):
    "Parameters with the same values and memory layout, without gradients"
    return [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format), requires_grad=p.requires_grad) for p in params]

def like(p, values):
    "`values` in the memory layout of `p`"
    res = torch.empty_like(p, memory_format=torch.preserve_format).detach()
    return res.copy_(values)

@lru_cache(4096)
def _grad_values(shape, seed, i, j, spikes):
    gen = torch.Generator().manual_seed(1_000_003*seed + 1009*i + j)
    g = torch.randn(shape, generator=gen, dtype=torch.float64) + .25
    if i in spikes: g = g*1e3
    if g.numel()>2: g.view(-1)[1] = 0. # an element that never gets a gradient
    return g

class GradStream:
    "A seeded gradient for step `i` of parameter `j`: the same values for every mode, dtype and layout"
    def __init__(self, seed=0, spikes=()): self.seed,self.spikes = seed,tuple(spikes)
    def values(self, p, i, j): return _grad_values(tuple(p.shape), self.seed, i, j, self.spikes)
    def set(self, params, i, skip=()):
        "Give each parameter but those at positions `skip` a new gradient tensor"
        for j,p in enumerate(params):
            p.grad = None if j in skip or not p.requires_grad else like(p, self.values(p, i, j).to(p.dtype))

class NudgedStream(GradStream):
    "The same gradients, each moved up or down by one representable step of `dtype`"
    def __init__(self, seed=0, spikes=(), dtype=torch.float32): super().__init__(seed, spikes); self.dtype = dtype
    def values(self, p, i, j):
        v,gen = super().values(p, i, j).to(self.dtype),torch.Generator().manual_seed(7*self.seed + 1013*i + j)
        far = torch.where(torch.randint(2, v.shape, generator=gen)==0, -torch.inf, torch.inf).to(self.dtype)
        return torch.where(v==0, v, torch.nextafter(v, far)).double() # a gradient of zero stays zero

def two_groups(params):
    "Two layer groups, as fastai's splitters make them"
    n = len(params)//2
    return [params[:n], params[n:]]

# ---------------------------------------------------------------- running
def snapshot(params, opt, grads=False):
    "Copies of the parameters, the whole `state_dict`, and the gradients if `grads`"
    res = dict(params=[p.detach().clone() for p in params], opt=detach_copy(opt.state_dict()))
    if grads: res['grads'] = [None if p.grad is None else p.grad.detach().clone() for p in params]
    return res

def detach_copy(o):
    "A deep copy in plain containers that later steps can't change"
    if isinstance(o, torch.Tensor): return o.detach().clone()
    if isinstance(o, Mapping): return {k: detach_copy(v) for k,v in o.items()}
    if isinstance(o, (list, tuple, L)): return [detach_copy(v) for v in o]
    return copy.deepcopy(o)

def run_trajectory(opt_func, n=25, dtype=torch.float32, scenario=None, seed=0, params=None, groups=two_groups, at=None, spikes=(),
                   grads=True, stream=None):
    """Make parameters and `opt_func(groups(params))`, take `n` steps on the seeded stream and return snapshots after the steps in `at`.
    `scenario(i, opt, params, stream)` sets up step `i`, gradients included; without one, each parameter gets a gradient."""
    params = make_params(dtype=dtype, seed=seed) if params is None else params
    opt,stream = opt_func(groups(params)),GradStream(seed, spikes) if stream is None else stream
    at = range(n) if at is None else at
    res = {}
    for i in range(n):
        if scenario is None: stream.set(params, i)
        else: scenario(i, opt, params, stream)
        opt.step()
        if i in at: res[i] = snapshot(params, opt, grads)
    return res

@contextmanager
def unchanged(params, opt):
    "Fail if the block changes a weight, its storage, or the optimizer's state"
    before = detach_copy([p.data for p in params]),detach_copy(opt.state_dict()),[p.data_ptr() for p in params]
    yield
    assert_bitwise([p.data for p in params], before[0], 'params')
    assert_bitwise(detach_copy(opt.state_dict()), before[1], 'state_dict')
    assert [p.data_ptr() for p in params] == before[2]

def assert_copies_go_on(opt, stream, steps):
    "A deep copy and a pickle of `opt` take the same steps as `opt`, independently of it"
    def on(o):
        ps = [p for g in o.param_lists for p in g]
        for i in steps: stream.set(ps, i); o.step()
        return snapshot(ps, o)
    twins = copy.deepcopy(opt),pickle.loads(pickle.dumps(opt))
    want = on(opt)
    for t in twins: assert_bitwise(on(t), want)
