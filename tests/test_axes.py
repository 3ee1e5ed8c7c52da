"Reductions along axes: every mode against fastai's native optimizer, on shapes of one to four axes, with state of reduced shapes"
import copy
import pytest, torch
from torch import nn
from fastai.optimizer import Optimizer, weight_decay
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.optimizer.native import NativeOptimizer
from fastxtend_opt.optimizer.traced import ForEachOptimizer, JitOptimizer
from fastxtend_opt.engine.kinds import TapeSlot, UnsupportedError
from fastxtend_opt.engine.trace import trace_steppers
from helpers import backend_of

MODES = dict(foreach=ForEachOptimizer, jit=JitOptimizer, fused=FusedOptimizer, triton=FusedOptimizer)
SHAPES = [(5,), (1,), (20_011,), (3,4), (1,7), (7,1), (1,1), (300,97), (5,3,4), (6,5,3,3), (64,16,3,3), (8,6,1,1), (4,3,1,5), (2,1,3,1),
          (3,20_011), (40,2500), (2,3,70,80)]
EMPTY = [(0,), (0,3), (3,0), (2,0,3,3)]
# on a GPU they go through foreach; test_matrix has AdaFactor in mode triton
modes = pytest.mark.parametrize('mode', [*(m for m in MODES if m!='triton'), pytest.param('triton', marks=pytest.mark.slow)])

def make(mode, cbs, shapes=SHAPES, dtype=torch.float64, layout=None, groups=False, **hyper):
    "A native optimizer and its twin in `mode`, with equal parameters"
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]
    if layout:
        for p in ps: p.data = layout(p.data)
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    def split(x): return [x[:len(x)//2], x[len(x)//2:]] if groups else x
    with backend_of(mode): b = MODES[mode](split(qs), cbs, **hyper)
    return ps,qs,Optimizer(split(ps), cbs, **hyper),b

def grads(ps, qs, i, layout=None):
    g = torch.Generator().manual_seed(100+i)
    for p,q in zip(ps, qs):
        x = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        if layout: x = layout(x)
        p.grad,q.grad = x,x.clone()

def same(ps, qs, a, b, rtol=1e-10, atol=1e-12):
    for p,q in zip(ps, qs):
        torch.testing.assert_close(q.data, p.data, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f'{tuple(p.shape)}: {m}')
        sa,sb = a.state[p],b.state[q]
        assert set(sa) == set(sb)
        for k in sa:
            if k == 'sr_step': continue # native mode counts state that a step has left alone too
            if isinstance(sa[k], torch.Tensor):
                assert sa[k].shape == sb[k].shape and sa[k].dtype is sb[k].dtype, (k, p.shape, sa[k].shape, sb[k].shape)
            torch.testing.assert_close(torch.as_tensor(sb[k]), torch.as_tensor(sa[k]), rtol=rtol, atol=atol, equal_nan=True,
                                       msg=lambda m: f'{tuple(p.shape)} state {k}: {m}')

def run(ps, qs, a, b, n=4, layout=None, start=0, **tol):
    for i in range(start, start+n):
        grads(ps, qs, i, layout)
        a.step(); b.step()
        same(ps, qs, a, b, **tol)

# ---------------------------------------------------------------- steppers
def adafactor(p, lr, row=None, col=None, sqr=None, **kwargs):
    "Row and column means as state, a mean of the row means, a norm over all at the end"
    g = p.grad.data
    sq = g.square() + 1e-30
    if p.ndim > 1:
        if row is None: row,col = torch.zeros_like(sq.mean(-1, keepdim=True)),torch.zeros_like(sq.mean(-2, keepdim=True))
        row.lerp_(sq.mean(-1, keepdim=True), .3); col.lerp_(sq.mean(-2, keepdim=True), .3)
        u = g * (row/row.mean(-2, keepdim=True)).rsqrt() * col.rsqrt()
        new = dict(row=row, col=col)
    else:
        if sqr is None: sqr = torch.zeros_like(p)
        sqr.lerp_(sq, .3)
        u,new = g*sqr.rsqrt(),dict(sqr=sqr)
    u = u / u.square().mean().sqrt().clamp(min=1.)
    p.data.add_(-lr * p.data.square().mean().sqrt().clamp(min=1e-3) * u)
    return new

def came(p, lr, m=None, row=None, col=None, res_row=None, res_col=None, **kwargs):
    "State begins from the values; a second factored state, of what the first pass has made"
    g = p.grad.data
    sq = g**2 + 1e-30
    if p.ndim < 2: p.data.sub_(lr*g); return
    r,c = sq.mean(-1, keepdim=True),sq.mean(-2, keepdim=True)
    row,col = (r,c) if row is None else (row*.9 + r*.1, col*.9 + c*.1)
    u = g / (row*col/row.mean(-2, keepdim=True)).sqrt()
    u = u / (u.norm()/p.numel()**.5).clamp(min=1.)
    if m is None: m = torch.zeros_like(p.data)
    m.lerp_(u, .1)
    res = (u - m)**2 + 1e-16
    if res_row is None: res_row,res_col = torch.zeros_like(row),torch.zeros_like(col)
    res_row.lerp_(torch.mean(res, -1, True), .2); res_col.lerp_(torch.mean(res, dim=-2, keepdim=True), .2)
    p.data.addcmul_(m, (res_row/torch.mean(res_row, dim=-2, keepdim=True)*res_col).rsqrt(), value=-lr)
    return dict(m=m, row=row, col=col, res_row=res_row, res_col=res_col)

def adamp(p, lr, m=None, **kwargs):
    "Sums over all axes but the first, their maximum, masks of one value per parameter"
    g = p.grad.data
    if m is None: m = torch.zeros_like(p.data)
    m.mul_(.9).add_(g)
    u,ratio = m,1.
    if p.ndim > 1:
        dims = tuple(range(1, p.ndim))
        pn,gn = p.data.norm(2, dims, True),g.pow(2).sum(dim=dims, keepdim=True).sqrt()
        cos = ((g*p.data).sum(dim=dims, keepdim=True).abs()/(pn*gn + 1e-8)).amax()
        by_row = cos < .9
        cos_all = (g*p.data).sum().abs()/(p.data.norm()*g.norm() + 1e-8)
        by_all = (cos_all < .02).logical_and(by_row.logical_not())
        hat = p.data/(pn + 1e-8)
        u = torch.where(by_row, m - hat*(hat*m).sum(dims, keepdim=True),
                        torch.where(by_all, m - p.data*(p.data*m).sum()/(p.data.norm()**2 + 1e-8), m))
        # two numbers would be float32 in native mode, whatever the parameter
        ratio = torch.where(by_row | by_all, torch.full_like(cos, .1), torch.ones_like(cos))
    p.data.mul_(1 - lr*.01*ratio)
    p.data.sub_(lr*u)
    return dict(m=m)

def adam_mini(p, lr, m=None, v_b=None, **kwargs):
    "One second moment per row"
    g = p.grad.data
    if m is None: m = torch.zeros_like(p)
    m.lerp_(g, .1)
    v = g.pow(2).mean(dim=tuple(range(1, p.ndim)), keepdim=True) if p.ndim > 1 else g.pow(2).mean()
    v_b = v if v_b is None else v_b*.9 + v*.1
    p.data.addcdiv_(m, v_b.sqrt() + 1e-3, value=-lr)
    return dict(m=m, v_b=v_b)

def wholes(p, lr, top=None, **kwargs):
    "All axes, kept and not; whole-tensor reductions of reduced values; extremes"
    g = p.grad.data
    a = g.amax(-1, keepdim=True); b = torch.amin(g, dim=-1, keepdim=True)
    span = (a - b).clamp(min=.1)
    s = a.amax() - b.amin() + span.mean() + span.norm()*.01 + span.sum()*1e-3
    k = g.sum(dim=tuple(range(p.ndim)), keepdim=True) if p.ndim else g.sum()
    if top is None: top = torch.zeros_like(span)
    top.copy_(torch.maximum(top*.9, span))
    mask = span*1.01 > span.mean() # where all are equal, rounding would decide
    p.data.sub_(lr*torch.where(mask, g/span, g/(top + s.abs()))).sub_(1e-4*k)
    return dict(top=top)

def first_axis(p, lr, bias=None, **kwargs):
    "Over the first axis; a chain over one axis after the other"
    g = p.grad.data
    u = g - g.mean(0, keepdim=True)
    x = u.abs()
    for d in range(p.ndim): x = x.sum(d, keepdim=True)
    bias = g.mean(0, keepdim=True) if bias is None else bias + .1*u.norm(dim=0, keepdim=True)
    p.data.sub_(lr*(u/(x + 1.) + bias))
    return dict(bias=bias)

def middle(p, lr, **kwargs):
    "Keeps the second axis alone: more groups of axes than a kernel knows of"
    g = p.grad.data
    dims = tuple(d for d in range(p.ndim) if d != 1)
    c = g.square().mean(dims, keepdim=True)
    p.data.sub_(lr*g/(c.sqrt() + .1)*(g.abs().amax(-1, keepdim=True) + 1.))

def every_second(p, lr, step=0, row=None, **kwargs):
    "State of reduced shape that some steps only read, and a store that waits for a later pass"
    g = p.grad.data
    if row is None: row = torch.ones_like(g.mean(-1, keepdim=True))
    old = row.clone()
    if step % 2 == 0: row.mul_(.5).add_(g.abs().mean(-1, keepdim=True))
    u = g/old
    p.data.sub_(lr*u/(1 + u.norm()))
    return dict(row=row, step=step+1)

STEPPERS = [adafactor, came, adamp, adam_mini, wholes, first_axis, middle, every_second]
# algorithms have tests of their own
steppers = pytest.mark.parametrize('stepper', [pytest.param(f, marks=pytest.mark.slow if f in (came,adamp,middle) else ())
                                               for f in STEPPERS], ids=lambda f: f.__name__)

@modes
@steppers
def test_against_native(stepper, mode):
    run(*make(mode, [weight_decay, stepper], lr=.1, wd=.01))

@modes
@pytest.mark.parametrize('stepper', [adafactor, adam_mini, first_axis, every_second], ids=lambda f: f.__name__)
def test_empty(stepper, mode):
    run(*make(mode, [stepper], [(3,4), *EMPTY, (2,2)], lr=.1))

@modes
@steppers
def test_two_groups(stepper, mode):
    ps,qs,a,b = make(mode, [weight_decay, stepper], groups=True, lr=.1, wd=.01)
    for o,xs in ((a,ps), (b,qs)): o.state[xs[3]]['do_wd'] = False; o.set_hyper('lr', [.01,.1])
    run(ps, qs, a, b, n=3)

def _channels_last(x): return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
def _transposed(x): return x.mT.contiguous().mT if x.dim() > 1 else x
def _gaps(x): return torch.empty(*x.shape[:-1], x.shape[-1]*2, dtype=x.dtype)[...,::2].copy_(x) if x.dim() else x
@modes
@pytest.mark.parametrize('layout', [_channels_last, _transposed, _gaps], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize('grad', [False,True], ids=['plain','same'])
@pytest.mark.parametrize('stepper', [adafactor, adamp, adam_mini, first_axis], ids=lambda f: f.__name__)
def test_layouts(stepper, mode, layout, grad):
    run(*make(mode, [stepper], [(6,5,3,3), (30,20), (4,3,5), (7,), (6,4,1,1)], layout=layout, lr=.1), n=3, layout=layout if grad else None)

@modes
@pytest.mark.parametrize('stepper', [adafactor, *(pytest.param(f, marks=pytest.mark.slow) for f in (adam_mini, every_second))],
                         ids=lambda f: f.__name__)
def test_bfloat16(stepper, mode):
    "float32 arithmetic and state of reduced shape, as native keeps it"
    from fastxtend_opt.optimizer.storage import Storage
    shapes = [(5,), (3,4), (30,97), (6,5,3,3), (3,20_011)]
    for storage in (Storage(), Storage(stochastic_rounding=True), Storage(state_dtype=torch.float32),
                    Storage(kahan_sum=False, state_dtype=torch.bfloat16)):
        ps,qs,_,b = make(mode, [stepper], shapes, dtype=torch.bfloat16, lr=.1)
        a = NativeOptimizer(ps, [stepper], lr=.1)
        a.storage = b.storage = storage
        run(ps, qs, a, b, n=2, rtol=2e-2, atol=2e-2)
        for p in ps:
            for k,v in a.state[p].items():
                if isinstance(v, torch.Tensor) and v.shape != p.shape: assert v.dtype is torch.float32, k

@modes
@pytest.mark.parametrize('other', ['native', *MODES])
@pytest.mark.parametrize('stepper', [adafactor, every_second], ids=lambda f: f.__name__)
def test_checkpoints(stepper, mode, other):
    "A checkpoint continues in every other mode"
    shapes = [(5,), (3,4), (7,1), (6,5,3,3)]
    ps,qs,a,b = make(mode, [stepper], shapes, lr=.1)
    run(ps, qs, a, b, n=2)
    rs = [nn.Parameter(q.detach().clone()) for q in qs]
    with backend_of(other): c = (Optimizer if other == 'native' else MODES[other])(rs, [stepper], lr=.1)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    run(ps, rs, a, c, n=2, start=2)

@modes
def test_state_of_another_shape(mode):
    _,qs,_,b = make(mode, [adafactor], [(3,4)], lr=.1)
    qs[0].grad = torch.ones_like(qs[0]); b.step()
    sd = copy.deepcopy(b.state_dict())
    for shape in ((4,1), (3,), (3,1,1), (1,3)):
        bad = copy.deepcopy(sd); bad['state'][0]['row'] = torch.ones(shape, dtype=torch.float64)
        with pytest.raises(ValueError, match='row'): b.load_state_dict(bad)
        b.state[qs[0]] = dict(bad['state'][0])
        with pytest.raises(ValueError, match='row'): b.step()

@modes
def test_weights_of_another_shape(mode):
    "The same number of elements with other axes: nothing cached is reused"
    def plain(p, lr, **kwargs): p.data.sub_(lr*(p.grad.data - p.grad.data.mean(-1, keepdim=True)))
    ps,qs,a,b = make(mode, [plain], [(3,4), (5,2)], lr=.1)
    run(ps, qs, a, b, n=2)
    for p in (ps[0], qs[0]): p.data = p.data.reshape(6,2).clone()
    for p in ps+qs: p.grad = None
    run(ps, qs, a, b, n=2, start=2)

@modes
def test_refused(mode):
    "Calls that would remove an axis or have no meaning here raise; nothing has changed"
    def no_keep(p, **kwargs): p.data.sub_(p.grad.data.mean(-1))
    def no_such(p, **kwargs): p.data.sub_(p.grad.data.mean(2, keepdim=True))
    def indices(p, **kwargs): p.data.sub_(p.grad.data.max(dim=-1, keepdim=True)[0])
    def grows(p, **kwargs): p.grad.data.mean(-1, keepdim=True).add_(p.data)
    def shrinks(p, m=None, **kwargs): return dict(m=p.grad.data.clone() if m is None else p.grad.data.mean(-1, keepdim=True))
    for f,error,match in ((no_keep, UnsupportedError, 'keepdim=True'), (no_such, IndexError, 'axis 2'), (indices, UnsupportedError, 'amax'),
                          (grows, UnsupportedError, 'larger shape')):
        _,qs,_,b = make(mode, [weight_decay, f], [(3,4)], lr=.1, wd=.1)
        qs[0].grad = torch.ones_like(qs[0]); before = qs[0].detach().clone()
        with pytest.raises(error, match=match): b.step()
        assert torch.equal(qs[0].detach(), before) and not dict(b.state[qs[0]])
    _,qs,_,b = make(mode, [shrinks], [(3,4)])
    qs[0].grad = torch.ones_like(qs[0]); b.step()
    with pytest.raises(UnsupportedError, match='changes its shape'): b.step()

@modes
def test_axes_without_sizes(mode):
    "`ndim` and `dim=` tell cohorts apart by their axes, not by their sizes; `shape` by sizes"
    _,qs,_,b = make(mode, [adam_mini], [(3,4), (5,6), (7,8), (9,), (2,3,4)], lr=.1)
    for q in qs: q.grad = torch.ones_like(q)
    b.step()
    assert b._by_shape == 'axes' and sorted(map(len, b._plan.cohorts)) == [1,1,3]

# ---------------------------------------------------------------- C++: threads, chunks, which steps have a kernel
# shared by all threads: one matrix, many small ones, long rows, two matrices
WIDE = [(700,600), (7,), (40,30,70), (3,9), (2,90_001), (520,12,3,3), (2,130,700), (30,20)]
@pytest.mark.parametrize('stepper', [adafactor, came, adamp, wholes], ids=lambda f: f.__name__)
def test_threads(stepper):
    "Tensors that threads share: as native, and the same bits whatever the number of threads"
    n,seen = torch.get_num_threads(),[]
    try:
        for threads in (1,2,5):
            torch.set_num_threads(threads)
            ps,qs,a,b = make('fused', [weight_decay, stepper], WIDE, dtype=torch.float32 if threads > 1 else torch.float64, lr=.1, wd=.01)
            if threads == 1: run(ps, qs, a, b, n=2); ps,qs,a,b = make('fused', [weight_decay, stepper], WIDE, dtype=torch.float32, lr=.1,
                                                                      wd=.01)
            for i in range(2): grads(ps, qs, i); b.step()
            seen.append([q.detach().clone() for q in qs] + [v for q in qs for v in b.state[q].values()])
            if threads > 1: assert any(len(l.groups[threads][0][1]) for l in b._plan.launches.values()) # wide groups
    finally: torch.set_num_threads(n)
    for other in seen[1:]:
        for x,y in zip(seen[0], other): assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))

def served(stepper, shapes, layout=None, mode='fused'):
    _,qs,_,b = make(mode, [stepper], shapes, layout=layout, lr=.1)
    for q in qs: q.grad = torch.ones_like(q)
    b.step()
    return [form is not None for form in b._plan.forms]

def test_what_has_a_kernel():
    "Rows, columns and matrices have C++ kernels; other patterns, layouts and GPUs take the foreach path"
    assert (all(served(adafactor, [(3,4), (5,3,4), (6,5,3,3), (7,)])) and all(served(adam_mini, [(3,4), (6,5,3,3), (7,)]))
            and all(served(first_axis, [(3,4), (3,)])))
    assert (not any(served(middle, [(3,4,5)])) and not any(served(adafactor, [(6,5,3,3)], _channels_last))
            and not any(served(adafactor, [(3,4)], mode='triton')))
    def one(p, lr, **kwargs): p.data.sub_(p.grad.data/p.grad.data.norm(2, tuple(range(p.ndim)), True))
    # one value a tensor, with axes of size 1
    assert all(served(one, [(3,4)], mode='triton')) and all(served(one, [(6,5,3,3)], _channels_last))

def test_one_kernel_for_all_sizes():
    "Two and four axes, and all sizes, run the same kernel in one launch"
    from fastxtend_opt.engine.cpp import _kernels
    def rows(p, lr, **kwargs): p.data.sub_(lr*p.grad.data/(p.grad.data.square().mean(-1, keepdim=True) + 1))
    ps,qs,a,b = make('fused', [rows], [(3,4), (5,6), (4,3,3,3), (2,2,5,7), (40,50)], lr=.1)
    run(ps, qs, a, b, n=1)
    k = len(_kernels)
    ps,qs,a,b = make('fused', [rows], [(13,14), (3,3,3), (1,50,2)], lr=.1)
    run(ps, qs, a, b, n=1)
    assert len(_kernels) == k and len(b._plan.launches) == 1

@pytest.mark.parametrize('mode', ['fused','foreach'])
def test_gradient_release(mode):
    "One parameter at a time, as its gradient comes"
    ps,qs,a,b = make(mode, [adafactor], [(3,4), (6,5,3,3), (7,), (40,500)], lr=.1)
    for i in range(3):
        grads(ps, qs, i)
        held = [q.grad for q in qs]
        for q in qs: q.grad = None
        for q,g in zip(qs, held): q.grad = g; b.step(); q.grad = None
        a.step()
        same(ps, qs, a, b)

def test_amp_takes_the_plain_way():
    "GradScaler's scale and overflow reach a tape without a GPU kernel"
    ps,qs,a,b = make('triton', [adafactor], [(3,4)], dtype=torch.float32, lr=.1)
    b.amp_scaling = True
    grads(ps, qs, 0)
    for q in qs: q.grad.mul_(8.)
    b.grad_scale,b.found_inf = torch.tensor(8.),torch.tensor(0.)
    b.step(); a.step()
    same(ps, qs, a, b, rtol=1e-5, atol=1e-6)
    before = qs[0].detach().clone(); kept = {k:v.clone() for k,v in b.state[qs[0]].items()}
    grads(ps, qs, 1); b.grad_scale,b.found_inf = torch.tensor(8.),torch.tensor(1.)
    b.step()
    assert torch.equal(qs[0].detach(), before) and all(torch.equal(b.state[qs[0]][k], v) for k,v in kept.items())
