"Corner cases of the engine: phases, state that begins from values, shapes, layouts, errors that change nothing"
import math
import numpy as np, pytest, torch
from torch import nn
from functools import partial
from fastai.optimizer import Optimizer, average_grad, l2_reg, sgd_step, weight_decay
from fastxtend_opt.engine.cohort import check_state, check_tensors
from fastxtend_opt.engine.cpp import emit_cpp
from fastxtend_opt.engine.launch import SOLO_SIZE
from fastxtend_opt.engine.phases import TapePhases
from fastxtend_opt.engine.kinds import TapeSlot, UnsupportedError
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.optimizer.traced import ForEachOptimizer, JitOptimizer

MODES = dict(foreach=ForEachOptimizer, jit=JitOptimizer, fused=FusedOptimizer, triton=FusedOptimizer) # 'triton' in Triton's interpreter
SHAPES = [(3,), (4,5), (), (2,3,4), (20_011,), (0,), (1,)]

def pair(cls, cbs, shapes=SHAPES, dtype=torch.float64, groups=False, **hyper):
    "A native optimizer and its twin, with equal parameters"
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    def split(x): return [x[:len(x)//2], x[len(x)//2:]] if groups else x
    return ps, qs, Optimizer(split(ps), cbs, **hyper), cls(split(qs), cbs, **hyper)

def run(ps, qs, a, b, n=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        for p,q in zip(ps, qs):
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype); q.grad = p.grad.clone()
        a.step(); b.step()
        for p,q in zip(ps, qs):
            torch.testing.assert_close(q.data, p.data, rtol=1e-10, atol=1e-12, equal_nan=True)
            sa,sb = a.state[p],b.state[q]
            assert set(sa) == set(sb)
            for k in sa: torch.testing.assert_close(torch.as_tensor(sb[k]), torch.as_tensor(sa[k]), rtol=1e-10, atol=1e-12, equal_nan=True,
                                                    msg=lambda m: f'state {k}: {m}')

def old_after_new(p, lr, m=None, **kwargs):
    "Needs the old average after a reduction over the new one: the store has to wait for the second pass"
    if m is None: m = torch.zeros_like(p.data)
    old = m.clone()
    m.mul_(.9).add_(p.grad.data)
    p.data.sub_(lr * old / (1 + m.norm()))
    return dict(m=m)

def chained(p, lr, **kwargs):
    "Three passes: each norm depends on the one before"
    g = p.grad.data
    u = g / (g.norm() + 1)
    v = u - u.mean()
    p.data.sub_(lr * v / (v.abs().amax() + .1))

def value_state(p, lr, v=None, **kwargs):
    "The first step differs: v begins from the gradient, and the weights don't move"
    if v is None: return dict(v=p.grad.data**2)
    p.data.sub_(lr * p.grad.data / (v.sqrt() + 1e-3))
    v.mul_(.9).addcmul_(p.grad.data, p.grad.data, value=.1)
    return dict(v=v)

def shaped(p, lr, **kwargs):
    "Looks at the shape: matrices and vectors are treated differently"
    p.data.sub_(p.grad.data, alpha=lr / math.sqrt(max(p.numel(), 1)) if p.ndim > 1 else lr)

def scalar_state(p, lr, seen=None, **kwargs):
    "State of one value per parameter, read again at the next step"
    if seen is None: seen = torch.zeros_like(p.grad.data.sum())
    seen.mul_(.5).add_(p.grad.data.abs().sum())
    p.data.sub_(lr * p.grad.data / (seen + 1))
    return dict(seen=seen)

def rebinding(p, lr, a=None, b=None, **kwargs):
    "State made out of place, swapped state, and numpy numbers"
    if a is None: a,b = torch.zeros_like(p.data),torch.ones_like(p.data)
    a,b = b*np.float64(.5) + p.grad.data, a + np.float32(1)
    p.data.add_(np.float64(-lr) * (a - b).clamp(-1, 1))
    return dict(a=a, b=b)

def masks(p, lr, **kwargs):
    g = p.grad.data
    keep = (g > 0) & ~(p.data.abs() > 1.5) | (g == 0)
    p.data.sub_(lr * g * keep * (keep.to(g.dtype).mean() + .1))
    p.data.copy_(torch.where(p.data > 2, 2., p.data))

def repeated_loads(p, lr, **kwargs):
    g = p.grad.data
    p.data.add_(torch.lerp(g, p.data, .7), alpha=-lr).add_(torch.copysign(g.square(), g), alpha=-lr)

USERS = [old_after_new, chained, value_state, shaped, scalar_state, rebinding, masks, repeated_loads]

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('stepper', USERS, ids=lambda f: f.__name__)
def test_user_steppers(stepper, mode):
    shapes = SHAPES if stepper not in (chained,) else [s for s in SHAPES if s != (0,)] # the largest element of nothing
    if stepper in (masks,): shapes = [s for s in shapes if s != (0,)]
    run(*pair(MODES[mode], [stepper], shapes, lr=.1))

@pytest.mark.parametrize('mode', MODES)
def test_two_groups_one_launch(mode):
    ps,qs,a,b = pair(MODES[mode], [weight_decay, chained], [s for s in SHAPES if s != (0,)], groups=True, lr=.1, wd=.1)
    for o,xs in ((a,ps),(b,qs)): o.state[xs[0]]['do_wd'] = False; o.set_hyper('lr', [.01,.1])
    run(ps, qs, a, b)

@pytest.mark.parametrize('threads', [1,2])
def test_solo_and_wide_groups(threads):
    "Big tensors between small ones, at the ends, and enough small ones for several groups"
    n = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        big = 3*SOLO_SIZE
        shapes = [(big,), (7,), (SOLO_SIZE//4,), *[(31,)]*300, (SOLO_SIZE,), (big+3,), (5,), (2*big,)]
        ps,qs,a,b = pair(FusedOptimizer, [chained], shapes, lr=.1)
        run(ps, qs, a, b, n=2)
        launch, = b._plan.launches.values()
        solo,wide = launch.groups[threads][0]
        rows = sorted([*solo.tolist(), *wide.tolist()])
        assert len(wide) == (1 if threads == 1 else 3) and len(solo) > 2
        assert (rows[0][:2] == [0,0] and rows[-1][2:] == [len(shapes), len(launch.chunks)]
                and all(x[2:] == y[:2] for x,y in zip(rows, rows[1:])))
    finally: torch.set_num_threads(n)

def test_postponed_store():
    f64 = torch.float64
    tape,_ = trace_steppers([old_after_new], (TapeSlot('p','e',f64), TapeSlot('grad','e',f64), TapeSlot('m','e',f64)), {}, dict(lr=.1))
    ph = TapePhases(tape)
    assert ph.n == 2 and ph.at[2] == 1 # `m` is known in the first pass, and stored in the second

def test_no_second_pass_without_reduction():
    tape,_ = trace_steppers([repeated_loads], (TapeSlot('p','e',torch.float32), TapeSlot('grad','e',torch.float32)), {}, dict(lr=.1))
    assert TapePhases(tape).n == 1 and 'pass1' not in emit_cpp(tape)

@pytest.mark.parametrize('l2', [False,True])
def test_gradient_in_another_layout(l2):
    "The gradient is contiguous, the parameter channels_last; L2 decay changes the real gradient, as native does"
    ps,qs,a,b = pair(FusedOptimizer, [l2_reg if l2 else weight_decay, average_grad, sgd_step], [(4,3,5,5)], lr=.1, wd=.1, mom=.9)
    for x in (ps[0], qs[0]): x.data = x.data.to(memory_format=torch.channels_last)
    for i in range(3):
        g = torch.randn(4,3,5,5, dtype=torch.float64)
        for x in (ps[0], qs[0]): x.grad = g.clone().to(memory_format=torch.contiguous_format)
        keep = qs[0].grad
        a.step(); b.step()
        assert qs[0].grad is keep and b._plan.how[b._plan.cohorts[0]] == 'copy'
        torch.testing.assert_close(qs[0].grad, ps[0].grad); torch.testing.assert_close(qs[0].data, ps[0].data)
        torch.testing.assert_close(b.state[qs[0]]['grad_avg'], a.state[ps[0]]['grad_avg'])

def test_state_is_laid_out_anew():
    "The model becomes channels_last after the first step: contiguous state under a channels_last parameter and gradient"
    ps,qs,a,b = pair(FusedOptimizer, [average_grad, sgd_step], [(4,3,5,5)], lr=.1, mom=.9)
    run(ps, qs, a, b, n=2)
    for x in (ps[0], qs[0]): x.data = x.data.to(memory_format=torch.channels_last)
    g = torch.randn(4,3,5,5, dtype=torch.float64).to(memory_format=torch.channels_last)
    for x in (ps[0], qs[0]): x.grad = g.clone()
    a.step(); b.step()
    torch.testing.assert_close(qs[0].data, ps[0].data)
    torch.testing.assert_close(b.state[qs[0]]['grad_avg'], a.state[ps[0]]['grad_avg'])
    assert b.state[qs[0]]['grad_avg'].stride() == qs[0].stride()

@pytest.mark.parametrize('mode', MODES)
def test_shared_memory(mode):
    "Two parameters that are views of one tensor are stepped one after the other, as native does"
    bases = [torch.arange(6.), torch.arange(6.)]
    xs = [[nn.Parameter(b[:4]), nn.Parameter(b[2:])] for b in bases]
    a,b = Optimizer(xs[0], [weight_decay, sgd_step], lr=.1, wd=.5),MODES[mode](xs[1], [weight_decay, sgd_step], lr=.1, wd=.5)
    for i in range(3):
        for x in xs[0]+xs[1]: x.grad = torch.ones(4)
        a.step(); b.step()
    torch.testing.assert_close(bases[1], bases[0])

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_storage(mode, dtype):
    "Fused computes in float32 and rounds once; foreach and jit round as native does"
    def step(p, lr, m=None, **kwargs):
        if m is None: m = torch.zeros_like(p.data)
        m.mul_(.9).add_(p.grad.data)
        p.data.add_(m, alpha=-lr)
        return dict(m=m)
    ps,qs,a,b = pair(MODES[mode], [step], [(1000,)], dtype=dtype, lr=.1)
    p,q = ps[0],qs[0]
    m32 = torch.zeros(1000)
    for i in range(3):
        g = torch.randn(1000).to(dtype)
        p.grad,q.grad = g.clone(),g.clone()
        if mode in ('fused','triton'):
            m32 = m32*.9 + g.float(); want = (q.detach().float() - .1*m32).to(dtype)
            b.step()
            ulp = 2.**(-7 if dtype is torch.bfloat16 else -10)
            assert ((q.detach().float() - want.float()).abs() <= ulp*want.float().abs() + 1e-6).all()
            m32 = b.state[q]['m'].float()
        else:
            a.step(); b.step()
            torch.testing.assert_close(q.data, p.data, rtol=0, atol=0)
    assert q.dtype is dtype and b.state[q]['m'].dtype is dtype

@pytest.mark.parametrize('mode', MODES)
def test_refusals_change_nothing(mode):
    def bad(p, **kwargs): p.data.add_(torch.cumsum(p.data, 0))
    def branch(p, lr, **kwargs):
        if p.grad.data.norm() > 1: p.data.sub_(lr)
    def outside(p, **kwargs): p.data.add_(torch.ones(3))
    def replace(p, **kwargs): p.data = p.data*2
    for f,name in ((bad,'cumsum'), (branch,'branch'), (outside,'neither'), (replace,'data =')):
        p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        opt = MODES[mode]([p], [weight_decay, average_grad, f], lr=.1, wd=.1, mom=.9)
        with pytest.raises(UnsupportedError, match=name) as e: opt.step()
        assert f"stepper '{f.__name__}'" in str(e.value) and 'native' in str(e.value)
        assert p.data.tolist() == [1.,1.,1.] and dict(opt.state[p]) == {}

# ---------------------------------------------------------------- messages
F32 = torch.float32
SLOTS = (TapeSlot('p','e',F32), TapeSlot('grad','e',F32), TapeSlot('one','s',F32), TapeSlot('rows','n1',F32))

def grows(p, **kw): return dict(one=p.grad.data*2)
def turns(p, **kw): return dict(rows=p.grad.data.mean(0, keepdim=True))
def foreign_state(p, **kw): return dict(new=torch.zeros(4))

@pytest.mark.parametrize('stepper,message', [
    (grows, "'state 'one'' changes from one value per parameter to one per element: create it in the shape that it keeps."),
    (turns, "'state 'rows'' changes its shape: create it in the shape that it keeps."),
    (foreign_state, "'state 'new'' is a tensor of shape (4,) that was not made from the stepper's arguments: use torch.zeros_like(p) or "
                    "p.clone().")], ids=lambda o: getattr(o, '__name__', ''))
def test_messages_of_tracing(stepper, message):
    with pytest.raises(UnsupportedError) as e: trace_steppers([stepper], SLOTS, {}, {}, shape=torch.Size((3,4)))
    assert str(e.value).startswith(f"stepper '{stepper.__name__}': {message} Run this optimizer in native mode (no foreach, jit or fused)")

def same_as_grad(p, **kw): return {'b': p.grad}
def same_twice(p, **kw): return dict.fromkeys(('a','b'), torch.zeros_like(p))

@pytest.mark.parametrize('stepper,other', [(same_as_grad, 'grad'), (same_twice, 'a')], ids=['gradient','state'])
def test_message_of_state_that_is_another_tensor(stepper, other):
    with pytest.raises(ValueError) as e: trace_steppers([stepper], SLOTS[:2], {}, {})
    assert str(e.value) == (f"a stepper returned state 'b' that is the same tensor as '{other}', so a change of one would change the "
                            "other. Return a `.clone()`.")

DTYPES = 'dtypes that can be stepped are bfloat16, float16, float32, float64'
def meta(*shape): return torch.empty(shape, device='meta')

@pytest.mark.parametrize('p,g,exc,message', [
    (torch.ones(2), torch.ones(2).to_sparse(), NotImplementedError, 'parameter of shape (2,), torch.float32: the gradient is sparse '
     '(torch.sparse_coo). Use a dense one (sparse=False in nn.Embedding) or torch.optim.SparseAdam.'),
    (torch.ones(2).to_sparse(), torch.ones(2), NotImplementedError, 'parameter of shape (2,), torch.float32: the parameter is sparse '
     '(torch.sparse_coo). Only dense parameters can be stepped: use p.to_dense().'),
    (torch.ones(2, dtype=torch.complex64), torch.ones(2), NotImplementedError, 'parameter of shape (2,), torch.complex64: complex '
     'parameters and gradients are not supported. Step torch.view_as_real(p) instead.'),
    (torch.ones(2), torch.ones(2).int(), NotImplementedError, 'parameter of shape (2,), torch.float32 with a torch.int32 gradient: '
     f'{DTYPES}. Convert the parameter, or leave it out of the optimizer.'),
    (torch.ones(2), meta(2), ValueError, 'parameter of shape (2,), torch.float32: the parameter is on cpu, its gradient on meta. Move '
     'one of them.'),
    (torch.ones(2), torch.ones(3), ValueError, "parameter of shape (2,), torch.float32: the gradient has shape (3,). Give it the "
     "parameter's shape.")], ids='sparse_gradient sparse_parameter complex integer device shape'.split())
def test_messages_of_gradients(p, g, exc, message):
    with pytest.raises(exc) as e: check_tensors(p, g)
    assert str(e.value) == message

@pytest.mark.parametrize('t,exc,message', [
    (torch.ones(2).int(), NotImplementedError, f"state 'm' is torch.int32: {DTYPES}. Convert it, or remove it from opt.state[p]."),
    (meta(2), ValueError, "state 'm' is on meta, its parameter on cpu. load_state_dict moves it there.")], ids=['dtype','device'])
def test_messages_of_state(t, exc, message):
    with pytest.raises(exc) as e: check_state('m', t, torch.ones(2))
    assert str(e.value) == message

# ---------------------------------------------------------------- what torch can see
def test_version_counter():
    "Autograd notices that the kernel changed a tensor it has saved"
    p = nn.Parameter(torch.ones(3)); loss = (p*p).sum()
    p.grad = torch.ones(3)
    FusedOptimizer([p], [sgd_step], lr=.1).step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

def test_grads_are_not_kept_alive():
    "A plan holds no gradients: dropping them frees their memory"
    import weakref
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    opt = FusedOptimizer([p], [sgd_step], lr=.1); opt.step()
    w = weakref.ref(p.grad)
    opt.zero_grad(set_to_none=True)
    assert w() is None

def test_compiler_without_openmp(monkeypatch, tmp_path):
    "As with Apple's clang: the kernel uses std::thread, with the same results"
    from fastxtend_opt.engine import build, cpp
    real,seen = build._run_compiler,[]
    def run_(args, folder):
        seen.append('-fopenmp' in args)
        return ('unsupported option -fopenmp', 1) if seen[-1] else real(args, folder)
    monkeypatch.setattr(build, '_run_compiler', run_)
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(tmp_path))
    monkeypatch.setattr(build, '_libs', {}); monkeypatch.setattr(cpp, '_kernels', {})
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    try: run(*pair(FusedOptimizer, [weight_decay, chained], [(200_000,), (7,)], lr=.1, wd=.1))
    finally: torch.set_num_threads(n)
    assert seen.count(False) >= 1
    so = next(tmp_path.glob('*/kernel.so'))
    assert not any(b'gomp' in f.read_bytes() for f in tmp_path.glob('*/kernel.so')), so
