"Opaque calls: matrix functions that steppers call, in each mode except jit."
import copy,pickle,random
from functools import partial

import pytest,torch
from torch import nn
from fastai.optimizer import average_grad,average_sqr_grad,l2_reg,momentum_step,step_stat,weight_decay
from fastxtend_opt.engine.cut import CutTape,cut_tape
from fastxtend_opt.engine.cut_run import CutRun
from fastxtend_opt.engine.opaque import opaque
from fastxtend_opt.engine.kinds import TapeSlot, UnsupportedError
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from helpers import assert_bitwise,assert_same,flags

MODES = ('foreach','fused','triton')

def some(names, *fast):
    "(name, mode) pairs: each kernel takes a second to build, so by default foreach runs all, and the other modes those of `fast`"
    return pytest.mark.parametrize('name, mode', [pytest.param(n, m, marks=() if m == 'foreach' or (n, m) in fast else pytest.mark.slow)
                                                  for n in names for m in MODES])
QUICK = pytest.mark.parametrize('mode', ('foreach', 'fused', pytest.param('triton', marks=pytest.mark.slow)))
SHAPES = ((4,3),(3,5),(3,5),(6,2,1,2),(4,3),(1,7))
CALLS = []

@opaque(ndim=2)
def orthogonal(x, steps=4, scale=1.):
    "A cubic Newton-Schulz iteration"
    CALLS.append(tuple(x.shape))
    x = x/(x.norm(dim=(-2,-1), keepdim=True) + 1e-3)
    for _ in range(steps): x = 1.5*x - .5*x@x.mT@x
    return x*scale

@opaque(ndim=2, results=lambda g: g@g.mT)
def second_moment(g): return g@g.mT

@opaque(ndim=2, results=lambda gg, g, beta: gg)
def follow(gg, g, beta): return torch.lerp(g@g.mT, gg, beta)

@opaque(ndim=2, results=lambda g, gg: (g, g[...,:1,:1], gg))
def whiten(g, gg):
    r = torch.linalg.solve(gg + torch.eye(gg.shape[-1], dtype=gg.dtype), g)
    return r, r.sum((-2,-1), keepdim=True), gg

def orthogonal_step(p, lr, grad_avg, steps=4, **kwargs):
    u = grad_avg*.9 + p.grad.data*.1
    p.data.add_(orthogonal(u, steps, scale=1+lr), alpha=-lr)

def moment(p, mom, gg=None, **kwargs): return dict(gg=second_moment(p.grad.data) if gg is None else follow(gg, p.grad.data, mom))

def whitened_step(p, lr, gg, **kwargs):
    u,s,_ = whiten(p.grad.data, gg)
    p.data.add_(u, alpha=-lr)
    return dict(last_gg=gg.clone())

def pull(p, lr, **kwargs): p.data.sub_(lr*.1*torch.sign(p.data)*torch.where(p.data.abs() > .5, 1., .5))

ALONE = [weight_decay, average_grad, orthogonal_step]
FULL = [weight_decay, step_stat, average_grad, moment, orthogonal_step, whitened_step, pull] # opaque calls between elementwise steppers
STATE = [l2_reg, moment, whitened_step]
LISTS = dict(alone=ALONE, full=FULL, state=STATE)

def params(dtype=torch.float64, shapes=SHAPES, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)) for s in shapes]

def give_grads(ps, seed, skip=()):
    gen = torch.Generator().manual_seed(seed)
    for i,p in enumerate(ps):
        g = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in skip else torch.empty_like(p).copy_(g)

def make(cbs, ps, mode='native', **kwargs): return make_optimizer([ps[:2],ps[2:]], cbs, **{**dict(lr=[.01,.05], wd=.1, mom=.9), **kwargs},
                                                                  **flags(mode))

def train(cbs, mode, steps=5, dtype=torch.float64, shapes=SHAPES, skip=lambda t: (), change=None, **kwargs):
    ps = params(dtype, shapes)
    opt = make(cbs, ps, mode, **kwargs)
    for t in range(steps):
        give_grads(ps, t, skip(t))
        if change: change(t, opt, ps)
        opt.step()
    return ps,opt

def same(a, b, rtol=1e-9, atol=1e-9):
    assert_same([p.detach() for p in a[0]], [p.detach() for p in b[0]], rtol, atol)
    assert_same([dict(a[1].state[p]) for p in a[0]], [dict(b[1].state[p]) for p in b[0]], rtol, atol)

# ---------------------------------------------------------------- modes
@some(LISTS, ('full','fused'), ('full','triton'))
def test_modes_agree(name, mode): same(train(LISTS[name], mode), train(LISTS[name], 'native'))

@QUICK
def test_float32(mode): same(train(FULL, mode, dtype=torch.float32), train(FULL, 'native', dtype=torch.float32), 1e-4, 1e-5)

@pytest.mark.parametrize('mode', MODES)
def test_one_call_a_shape(mode):
    ps = params(shapes=((3,4),(4,3),(3,4),(3,2,2,1)))
    opt = make_optimizer(ps, ALONE, lr=.1, wd=0., mom=.9, **flags(mode))
    give_grads(ps, 0)
    CALLS.clear()
    opt.step()
    assert sorted(CALLS) == [(1,4,3), (3,3,4)] # the kernel is a matrix of (3, 4) too

@QUICK
def test_late_and_missing_gradients(mode):
    skip = lambda t: (0,3) if t == 0 else (1,2,4) if t == 1 else range(6) if t == 2 else ()
    same(train(FULL, mode, 6, skip=skip), train(FULL, 'native', 6, skip=skip))

@QUICK
def test_changing_numbers(mode):
    def change(t, opt, ps):
        opt.set_hyper('lr', .01*(t+1)); opt.set_hyper('steps', 2 + t%2)
        if t == 1: opt.state[ps[0]]['do_wd'] = False
    same(train(FULL, mode, change=change, steps=4), train(FULL, 'native', change=change, steps=4))

@QUICK
def test_channels_last_and_gradients_in_another_layout(mode):
    shapes = ((4,3,2,2),(4,3,2,2),(2,5))
    def change(t, opt, ps):
        if t == 0: ps[0].data = ps[0].data.to(memory_format=torch.channels_last)
        ps[0].grad = ps[0].grad.contiguous() if t == 1 else ps[0].grad.to(memory_format=torch.channels_last)
        ps[1].grad = ps[1].grad.to(memory_format=torch.channels_last) if t == 2 else ps[1].grad.contiguous()
    same(train(FULL, mode, 4, shapes=shapes, change=change), train(FULL, 'native', 4, shapes=shapes, change=change))

@pytest.mark.parametrize('mode', MODES)
def test_nothing_is_stale(mode):
    "New storage, another shape with as many elements, a replaced state, a new gradient tensor"
    def change(t, opt, ps):
        if t == 1: ps[1].data = ps[1].data.clone()
        if t == 2:
            ps[2].data = ps[2].data.view(5,3); ps[2].grad = ps[2].grad.view(5,3)
            opt.state[ps[2]] = dict(grad_avg=opt.state[ps[2]]['grad_avg'].view(5,3))
        if t == 3: opt.state[ps[0]]['grad_avg'] = torch.ones_like(ps[0])
        if t == 4: opt.state[ps[5]].clear()
    same(train(ALONE, mode, 6, change=change), train(ALONE, 'native', 6, change=change))

@QUICK
def test_parameters_that_share_memory(mode):
    def run(mode):
        base = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4,3).clone()
        ps = [nn.Parameter(base), nn.Parameter(base)]
        opt = make_optimizer(ps, ALONE, lr=.1, wd=.1, mom=.9, **flags(mode))
        for t in range(3): give_grads(ps, t); opt.step()
        return ps,opt
    same(run(mode), run('native'))

# ---------------------------------------------------------------- what crosses a cut
@opaque
def doubled(x): return x+x
@opaque(results=lambda x: x.sum())
def total(x): return x.flatten(-2).sum(-1)
@opaque(results=lambda x, y: (y, x))
def crossed(x, y): return y, x

def kept_alone(p, lr, avg=None, **kwargs): # the old average is read after the call that takes the new one
    avg = torch.zeros_like(p) if avg is None else avg
    old = avg.clone()
    avg.mul_(.5).add_(p.grad.data)
    p.data.sub_(lr*(doubled(avg) + old))
    return dict(avg=avg)

def numbers_and_masks(p, lr, **kwargs):
    mask,size = p.grad.data > 0,p.grad.data.norm()
    s = total(p.grad.data*mask)
    p.data.sub_(lr*torch.where(mask, s, size)*doubled(size)*p.data)

def turn_about(p, lr, a=None, b=None, **kwargs):
    a,b = (torch.zeros_like(p) if o is None else o for o in (a,b))
    b.add_(p.grad.data)
    x,y = crossed(a, doubled(b))
    a.copy_(x); b.copy_(y)
    p.data.sub_(lr*a)
    return dict(a=a, b=b)

def through_gradient(p, lr, **kwargs):
    p.grad.data.copy_(doubled(p.grad.data))
    p.data.sub_(lr*p.grad.data)
    p.grad.data.add_(p.data)

def by_rows(p, lr, **kwargs):
    r = p.grad.data.norm(dim=1, keepdim=True)
    p.data.sub_(lr*doubled(p.grad.data/r)*doubled(r))

CROSSING = dict(kept_alone=kept_alone, numbers_and_masks=numbers_and_masks, turn_about=turn_about, through_gradient=through_gradient,
                by_rows=by_rows)
MATRICES = ((4,3),(3,5),(3,5),(1,7))

@some(CROSSING, ('numbers_and_masks','fused'), ('by_rows','fused'), ('numbers_and_masks','triton'))
def test_crossing(name, mode):
    cbs = [average_grad, CROSSING[name], pull]
    a,b = (train(cbs, m, 4, shapes=MATRICES) for m in (mode, 'native'))
    same(a, b)
    assert_same([p.grad for p in a[0]], [p.grad for p in b[0]], 1e-9, 1e-9)

def random_stepper(seed):
    "A stepper that does a dozen things at random: values of all ages, state, calls"
    def stepper(p, lr, s0=None, s1=None, **kwargs):
        rng = random.Random(seed)
        state = dict(s0=torch.zeros_like(p) if s0 is None else s0, s1=torch.ones_like(p) if s1 is None else s1)
        vals = [p.data*1, p.grad.data*1, *(v*1 for v in state.values())]
        def any_of(): return rng.choice([*vals[-4:], rng.choice(vals), p.data, p.grad.data, *state.values()])
        for _ in range(rng.randint(8, 16)):
            what = rng.random()
            if what < .25: vals.append(any_of()*.5 + any_of())
            elif what < .35: vals.append(any_of()/(1 + any_of().norm()))
            elif what < .55: vals.append(doubled(any_of()))
            elif what < .65: vals += crossed(any_of(), any_of())
            elif what < .75: vals.append(any_of()*total(any_of()).tanh())
            elif what < .9: state[rng.choice(('s0','s1'))].mul_(.5).add_(any_of().tanh())
            elif what < .95: p.grad.data.copy_(any_of().tanh())
            else: p.data.sub_(lr*any_of().tanh())
        p.data.sub_(lr*(any_of() + any_of()).tanh())
        return state
    stepper.__name__ = f'random{seed}'
    return stepper

def _random(seed, mode):
    a,b = (train([random_stepper(seed), pull], m, 3, shapes=MATRICES) for m in (mode, 'native'))
    same(a, b)
    assert_same([p.grad for p in a[0]], [p.grad for p in b[0]], 1e-9, 1e-9)

@pytest.mark.parametrize('seed', range(40))
def test_random_programs(seed): _random(seed, 'foreach')

@pytest.mark.parametrize('mode', ('fused','triton'))
@pytest.mark.parametrize('seed', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 25))])
def test_random_programs_fused(seed, mode): _random(seed, mode)

def test_weights_are_read_and_written_once():
    "The momentum is stored before the call, and the weights change only after it"
    f = torch.float32
    slots = TapeSlot('p','e',f),TapeSlot('grad','e',f),TapeSlot('grad_avg','e',f)
    tape,_ = trace_steppers(ALONE, slots, {}, dict(lr=.1, wd=.1, mom=.9))
    first,second = cut_tape(tape).parts
    assert ([first.slots[i].name for i,_ in first.stores] == ['grad_avg', first.slots[-1].name] and second.stores[0][0] == 0
            and len(second.stores) == 1)
    assert cut_tape(tape) is cut_tape(tape)

# ---------------------------------------------------------------- storage
LOW = dict(kahan=dict(), rounding=dict(stochastic_rounding=True), wide=dict(state_dtype=torch.float32),
           plain=dict(kahan_sum=False, state_dtype=torch.bfloat16))

@some(LOW, ('rounding','fused'), ('kahan','triton'))
def test_bfloat16(name, mode):
    shapes = ((4,3),(3,5),(3,5),(6,2,1,2))
    a,b = (train(FULL, m, 4, torch.bfloat16, shapes, **LOW[name]) for m in (mode, 'native'))
    assert {k:v.dtype for k,v in a[1].state[a[0][0]].items() if isinstance(v, torch.Tensor)} == {k:v.dtype for k,
        v in b[1].state[b[0][0]].items() if isinstance(v, torch.Tensor)}
    assert a[1].state[a[0][0]]['gg'].dtype is torch.float32 # opaque state is no storage's business
    for p,q in zip(a[0], b[0]): assert ((p.float()-q.float()).abs() <= 2**-7*q.float().abs() + 1e-3).all()

# ---------------------------------------------------------------- copies, resume
@pytest.mark.parametrize('mode, other', [('native','foreach'), ('foreach','native'), ('fused','foreach'),
                                         pytest.param('triton', 'native', marks=pytest.mark.slow)])
def test_resume(mode, other):
    ps,opt = train(FULL, mode, 3)
    sd = pickle.loads(pickle.dumps(opt.state_dict()))
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    new = make(FULL, qs, other)
    new.load_state_dict(sd)
    for t in range(3, 6):
        for xs,o in ((ps,opt),(qs,new)): give_grads(xs, t); o.step()
    same((ps,opt), (qs,new))

@QUICK
def test_copies_have_no_buffers(mode):
    ps,opt = train(FULL, mode, 2)
    assert any(opt._plan.pools.values())
    for c in (copy.deepcopy(opt), pickle.loads(pickle.dumps(make(FULL, ps, mode)))): assert c._plan is None
    size = sum(v.numel() for p in ps for v in opt.state[p].values() if isinstance(v, torch.Tensor))
    assert size == sum(v.numel() for st in opt.state_dict()['state'] for v in st.values() if isinstance(v, torch.Tensor))
    two = copy.deepcopy(opt)
    qs = [p for pg in two.param_lists for p in pg]
    for t in range(2, 4):
        for xs,o in ((ps,opt),(qs,two)): give_grads(xs, t); o.step()
    assert_bitwise([p.detach() for p in ps], [p.detach() for p in qs])

def test_rows_of_a_stack_are_not_state():
    ps,opt = train(FULL, 'foreach', 2)
    for p in ps:
        for v in opt.state[p].values():
            if isinstance(v, torch.Tensor): assert v.untyped_storage().nbytes() == v.numel()*v.element_size()

def test_state_of_another_model_is_not_loaded():
    ps,opt = train(FULL, 'foreach', 2)
    sd = opt.state_dict()
    for k,v in (('grad_avg', torch.ones(2,2,dtype=torch.float64)), ('gg', torch.ones(9,9,dtype=torch.float64))):
        bad = copy.deepcopy(sd)
        bad['state'][0][k] = v
        if k == 'gg': opt.load_state_dict(bad); continue # a shape that only the function could tell
        with pytest.raises(ValueError, match=rf"state 'grad_avg' has shape .*Nothing was loaded"): opt.load_state_dict(bad)

# ---------------------------------------------------------------- with the callbacks and wrappers around a step
@pytest.mark.parametrize('mode', ('native',)+MODES)
def test_gradient_release(mode):
    def run(release):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(4,5,bias=False), nn.Tanh(), nn.Linear(5,3,bias=False), nn.Tanh(), nn.Linear(3,5,bias=False)).double()
        opt = make_optimizer(m.parameters(), FULL, lr=.05, wd=.1, mom=.9, **flags(mode))
        if release: prepare_for_gradient_release(m, opt)
        for t in range(4):
            m(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))).square().sum().backward()
            if not release: opt.step(); m.zero_grad(set_to_none=True)
        remove_gradient_release(m)
        return list(m.parameters()),opt
    same(run(True), run(False))

@QUICK
def test_optimizer_accumulation(mode):
    def run(mode):
        ps = params()
        opt = make(FULL, ps, mode)
        for t in range(6):
            opt.optimizer_accumulation = t%3 != 2
            give_grads(ps, t); opt.step()
        return ps,opt
    same(run(mode), run('native'))

@pytest.mark.parametrize('mode', ('native',)+MODES)
def test_cautious(mode):
    cbs = [average_grad, orthogonal_step]
    ps,_ = train(cbs, mode, 4, cautious=True)
    qs,_ = train(cbs, 'native', 4, cautious=True)
    assert_same([p.detach() for p in ps], [p.detach() for p in qs], 1e-9, 1e-9)
    assert not torch.equal(ps[0], train(cbs, mode, 4)[0][0])

@pytest.mark.parametrize('scale', (None, 4.))
def test_unscaled_before_the_calls(scale):
    "`GradScaler`'s scale is applied in the ordinary way: gradients are unscaled first, and an overflow changes nothing"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FASTXTEND_OPT_FUSED_BACKEND', 'triton')
        ps = params(torch.float32)
        opt = make(FULL, ps, 'fused')
        qs = params(torch.float32)
        ref = make(FULL, qs)
        for t in range(3):
            give_grads(ps, t); give_grads(qs, t)
            if scale:
                for p in ps: p.grad.mul_(scale)
            opt.grad_scale,opt.found_inf = scale and torch.tensor(scale),torch.tensor(float(t == 1))
            opt.step()
            del opt.grad_scale,opt.found_inf
            if t != 1: ref.step()
        same((ps,opt), (qs,ref), 1e-4, 1e-5)

# ---------------------------------------------------------------- errors
def test_jit_is_refused_before_anything_changes():
    ps = params()
    opt = make(FULL, ps, 'jit')
    give_grads(ps, 0)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(UnsupportedError, match='orthogonal.*foreach=True or fused=True.*No parameter was changed'): opt.step()
    assert_bitwise([p.detach() for p in ps], before)
    assert not any(opt.state[p] for p in ps)

def wrong(f, step=None, mode='foreach', shapes=((3,4),)):
    def stepper(p, lr, **kwargs): p.data.sub_(lr*f(p.grad.data))
    ps = params(shapes=shapes)
    opt = make_optimizer(ps, [step or stepper], lr=.1, **flags(mode))
    give_grads(ps, 0)
    opt.step()

@opaque
def writes(x): return x.mul_(2)
@opaque
def not_batched(x): return x.T if x.dim()==2 and x.shape[0]==x.shape[1] else x.flatten()
@opaque
def two(x): return x,x
@opaque
def nothing(x): return None
@opaque
def flat(x): return x.unsqueeze(-1)
@opaque(ndim=2)
def of_matrices(x): return x.clone()

@pytest.mark.parametrize('mode', ('native',)+MODES)
def test_errors_of_functions(mode):
    for f,match in ((writes,"'writes' writes into a tensor"), (not_batched,r"'not_batched': result 0 is of shape \(12,\)"),
                    (two,"'two' returned 2 results, and 1 was"), (nothing,'NoneType')):
        with pytest.raises(ValueError, match=match): wrong(f, mode=mode)
    with pytest.raises(ValueError, match=r"'of_matrices' works on tensors of 2 axes.*\(5,\)"): wrong(of_matrices, mode=mode, shapes=((5,),))

@pytest.mark.parametrize('mode', MODES)
def test_too_few_axes_in_a_later_cohort(mode):
    "The vector of the second group is refused before the matrix of the first one moves"
    ps = params(shapes=((3,4),(5,)))
    def stepper(p, lr, **kwargs): p.data.sub_(lr*of_matrices(p.grad.data))
    opt = make_optimizer([[p] for p in ps], [weight_decay, average_grad, stepper], lr=.1, wd=.1, mom=.9, **flags(mode))
    give_grads(ps, 0)
    before = [p.detach().clone() for p in ps]
    for _ in range(2):
        with pytest.raises(ValueError, match="'of_matrices' works on tensors of 2 axes"): opt.step()
        assert_bitwise([p.detach() for p in ps], before)
        assert not any(opt.state[p] for p in ps)
    ps[1].grad = None
    opt.step()
    assert not torch.equal(ps[0], before[0])

def test_errors_on_the_tape():
    other = torch.ones(3,4)
    @opaque
    def both(x, y): return x+y
    with pytest.raises(UnsupportedError, match="'both' takes a tensor that is neither"): wrong(lambda g: both(g, other))
    with pytest.raises(UnsupportedError, match="'both' takes a list"): wrong(lambda g: both(g, [1,2]))
    def elementwise(p, lr, **kwargs): p.data.sub_(second_moment(p.grad.data))
    with pytest.raises(ValueError, match=r"'sub' on a tensor of shape \(3, 3\).*@opaque"): wrong(None, elementwise)
    def kept(p, lr, gg=None, **kwargs):
        if gg is None: return dict(gg=second_moment(p.grad.data))
        gg.mul_(2)
    ps = params(shapes=((3,4),))
    opt = make_optimizer(ps, [kept], lr=.1, foreach=True)
    give_grads(ps, 0); opt.step()
    with pytest.raises(ValueError, match=r"'mul' on state 'gg' of shape \(3, 3\)"): opt.step()

def test_no_tensor():
    with pytest.raises(TypeError) as e: doubled(1)
    assert str(e.value) == "@opaque function 'doubled' was given no tensor: pass at least one."

def other_tensor(p, **kwargs): p.data.sub_(lerped(p.grad.data, torch.ones(3,4)))
def unhashable(p, **kwargs): p.data.sub_(lerped(p.grad.data, [1,2]))

@opaque
def lerped(x, y): return x

MESSAGES = [
    (writes, "'writes' writes into a tensor that it was given, which in some modes is the parameter's own tensor and in others a copy. "
             "Return a new tensor instead."),
    (two, "'two' returned 2 results, and 1 was expected. Describe what it returns with @opaque(results=...)."),
    (of_matrices, "'of_matrices' works on tensors of 2 axes or more and was given one of shape (5,). Let another stepper handle such "
                  "parameters."),
    *[(f, f"'{f.__name__}': result 0 is {what}, and {want} was expected. The function must work on matrices with leading axes, and "
          "@opaque(results=...) must describe results that are not like its first tensor.")
      for f,what,want in ((flat, 'of shape (5, 1)', '(5,)'), (nothing, 'a NoneType', '(5,)'))]]

@pytest.mark.parametrize('f,message', MESSAGES, ids=[f.__name__ for f,_ in MESSAGES])
def test_messages_of_functions(f, message):
    "Each message names the function and what it was given or has returned, and says what to do"
    with pytest.raises(ValueError) as e: f(torch.ones(5))
    assert str(e.value) == f"@opaque function {message}"

@pytest.mark.parametrize('stepper,message', [
    (other_tensor, "takes a tensor that is neither the parameter, its gradient, its state nor computed from these."),
    (unhashable, "takes a list: pass each tensor and number as an argument of its own, and other constants in a hashable form (a tuple "
                 "instead of a list).")], ids=['tensor','list'])
def test_messages_of_arguments(stepper, message):
    slots = TapeSlot('p','e',torch.float32),TapeSlot('grad','e',torch.float32)
    with pytest.raises(UnsupportedError) as e: trace_steppers([stepper], slots, {}, {})
    assert str(e.value).startswith(f"stepper '{stepper.__name__}': 'lerped' {message} Run this optimizer in native mode")

@pytest.mark.parametrize('mode', MODES)
def test_constants(mode):
    "Arguments that are not numbers are part of the cut"
    @opaque
    def power(x, how, dtype=None, n=1):
        assert type(n) is int and type(how) is str
        return (x.to(dtype)*n if how == 'times' else x.to(dtype)**n).to(x.dtype)
    def step(p, lr, how, n, **kwargs): p.data.sub_(lr*power(p.grad.data, how, dtype=torch.float32, n=n))
    def run(mode):
        ps = params()
        opt = make_optimizer(ps, [step], lr=.1, how='times', n=2, **flags(mode))
        for t,(how,n) in enumerate((('times',2),('times',3),('power',3))):
            for h in opt.hypers: h.update(how=how, n=n)
            give_grads(ps, t); opt.step()
        return ps,opt
    same(run(mode), run('native'), 1e-6, 1e-6)
