"""A step of several passes (`Between`): totals over the whole model, numbers for the next pass, in all modes; errors come before anything
changes."""
import copy,io,math

import pytest,torch
from fastai.optimizer import Optimizer,average_grad,momentum_step,sgd_step,step_stat,weight_decay
from torch import nn
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.optimizer.native import NativeOptimizer
from fastxtend_opt.optimizer.passes import Between
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release
from helpers import *

every = pytest.mark.parametrize('mode', ALL_MODES)

# ---------------------------------------------------------------- clipping by the global norm, as a user would write it
def squares(p, **kwargs): return {'sq': p.grad.data.square().sum()}
def clip_factor(sq, max_norm, **kwargs): return {'scale': min(1., max_norm/(sq**.5+1e-6))}
def scale_grad(p, scale, **kwargs): p.grad.data.mul_(scale)
CLIP = [squares, Between(clip_factor, ('sq',), scale=1.), scale_grad]

def clipping(groups, mode='native', cbs=(*CLIP, step_stat, weight_decay, average_grad, momentum_step), **kw):
    with backend_of(mode): return make_optimizer(groups, list(cbs), **{**dict(lr=.1, mom=.9, wd=.1, max_norm=2.), **kw}, **flags(mode))

@every
@pytest.mark.parametrize('dtype', [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_clipping_is_torchs(mode, dtype):
    "torch's function and then one pass; with gradients that come late, a scalar, an empty tensor, a channels_last kernel, two groups"
    params,stream = make_params(dtype=dtype),GradStream(1)
    twins = copy_params(params)
    opt,ref = clipping(two_groups(params), mode),clipping(two_groups(twins), cbs=(step_stat, weight_decay, average_grad, momentum_step))
    for i in range(5):
        for ps in (params, twins): stream.set(ps, i, skip=[2,4] if i<2 else [5] if i==3 else [])
        norm = torch.nn.utils.clip_grad_norm_([p for p in twins if p.grad is not None], 2.)
        opt.step(); ref.step()
        assert opt.scale==pytest.approx(min(1., 2./(float(norm)+1e-6)), rel=1e-12 if dtype==torch.float64 else 1e-5)
        assert opt.hypers[0]['scale']==opt.hypers[1]['scale']
    assert_same([p.detach() for p in params], [p.detach() for p in twins], **TOL[dtype])
    assert [opt.state[p]['step'] for p in params]==[ref.state[p]['step'] for p in twins] # counted once a step

# ---------------------------------------------------------------- what comes of the totals
def values(p, **kwargs): return {'a': p.data.sum(), 'b': p.data.sum(), 'c': p.data.sum(), 'd': p.data.sum()}
def spread(a, b, c, d, hypers, **kwargs): return dict(total=a, low=b, high=c, both=d, top=max(h['lr'] for h in hypers))
SPREAD = Between(spread, dict(a='sum', b='min', c='max', d=lambda v: v.prod()), total=0., low=0., high=0., both=0., top=0.)

@every
def test_sum_min_max_and_a_function(mode):
    ps = [nn.Parameter(torch.full(s, v, dtype=torch.float64)) for s,v in (((2,),1.), ((),-3.), ((2,2),.5), ((0,),9.))]
    with backend_of(mode): opt = make_optimizer([ps[:2],ps[2:]], [values, SPREAD], lr=[.1,.3], **flags(mode))
    with pytest.raises(AttributeError, match="no attribute 'other'"): opt.other
    assert opt.total==0. and hasattr(opt, 'high') and not hasattr(opt, 'nothing')
    for p in ps: p.grad = torch.ones_like(p)
    for both in (0.,-12.): # products of 2, -3, 2 and the empty one's 0
        opt.step()
        assert (opt.total, opt.low, opt.high, opt.both, opt.top)==(1.,-3.,2.,both,.3)
        ps[3].grad = None # its value counts no longer, though it is in the state still

@every
def test_first_and_last_and_in_a_row(mode):
    "A `Between` may come first, last, or after another one"
    seen = []
    def note(turn, **kwargs): seen.append(turn); return {'turn': turn+1}
    p = nn.Parameter(torch.ones(3))
    with backend_of(mode): opt = make_optimizer([p], [Between(note, turn=0), Between(note, turn=0), sgd_step, Between(note, turn=0)], lr=.5,
                                                **flags(mode))
    p.grad = torch.ones(3)
    for _ in range(2): opt.step()
    assert seen==list(range(6)) and opt.turn==6 and p.tolist()==[0.]*3

@every
def test_none_ends_the_step(mode):
    def only_large(sq, **kwargs): return {'n': 1.} if sq>4 else None
    p = nn.Parameter(torch.ones(2))
    with backend_of(mode): opt = make_optimizer([p], [squares, Between(only_large, ('sq',), n=0.), sgd_step], lr=.1, **flags(mode))
    p.grad = torch.ones(2); opt.step()
    assert p.tolist()==[1.,1.] and opt.n==0.
    p.grad = torch.full((2,), 3.); opt.step()
    assert p.detach().allclose(torch.tensor(.7)) and opt.n==1.

@every
def test_a_value_that_is_not_made_anew_does_not_count(mode):
    "A group whose stepper returns nothing this time; steppers don't see the previous step's value"
    def share(p, lr, sq=None, **kwargs):
        assert sq is None
        return {'sq': p.grad.data.square().sum()} if lr else None
    def keep(sq, **kwargs): return {'got': sq}
    ps = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    with backend_of(mode): opt = make_optimizer([[p] for p in ps], [share, Between(keep, ('sq',), got=0.), sgd_step], lr=[.1,.2],
                                                **flags(mode))
    for lrs,want in (([.1,.2],5.), ([0.,.2],3.), ([0.,0.],0.), ([.1,0.],2.), ([.1,.2],5.)):
        for p in ps: p.grad = torch.ones_like(p)
        opt.set_hyper('lr', lrs)
        opt.step()
        assert opt.got==want, lrs

@every
def test_state_that_was_replaced(mode):
    "A total replaced by another tensor, a new parameter, moved data: the sums stay right"
    params = make_params(((3,),(2,2),()), torch.float64, big=False, channels_last=False)
    opt = clipping(two_groups(params), mode)
    for i in range(6):
        GradStream(4).set(params, i)
        if i==2: opt.state[params[0]]['sq'] = torch.tensor(7., dtype=torch.float64)
        if i==3: params[1].data = params[1].data.clone()
        if i==4: params.append(nn.Parameter(
            torch.ones(2, dtype=torch.float64))); opt.param_lists[1].append(params[-1]); GradStream(4).set(params, i)
        if i==5: opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in params))
        opt.step()
        assert opt.scale==pytest.approx(min(1., 2./(norm+1e-6)), rel=1e-12), i

@every
def test_shape_in_a_later_pass(mode):
    "A stepper asks for the shape after the first pass, which is not run again"
    calls = []
    def first(p, **kwargs): calls.append(1); return {'sq': p.grad.data.square().sum(), 'n': kwargs.get('n', 0)+1}
    def by_size(p, lr, **kwargs): p.data.add_(p.grad.data, alpha=-lr/p.numel())
    ps = [nn.Parameter(torch.ones(s)) for s in ((2,),(2,2),(5,))]
    with backend_of(mode): opt = make_optimizer(ps, [first, Between(clip_factor, ('sq',), scale=1.), by_size], lr=1., max_norm=1.,
                                                **flags(mode))
    for _ in range(3):
        for p in ps: p.grad = torch.ones_like(p)
        opt.step()
    for p in ps: assert p.detach().allclose(torch.tensor(1-3/p.numel()))
    assert [opt.state[p]['n'] for p in ps]==[3]*3

# ---------------------------------------------------------------- low precision
def lean(p, mom, grad_avg=None, seen=0, **kwargs):
    if grad_avg is None: grad_avg = torch.zeros_like(p.grad.data)
    grad_avg.mul_(mom).add_(p.grad.data, alpha=1-mom)
    return {'grad_avg': grad_avg, 'seen': seen+1, 'sq': grad_avg.square().sum()}
def step_by(p, lr, scale, grad_avg, **kwargs): p.data.add_(grad_avg, alpha=-lr*scale)

STORAGE = dict(kahan={}, sround=dict(stochastic_rounding=True, seed=3), f32=dict(state_dtype=torch.float32), plain=dict(kahan_sum=False))
@pytest.mark.parametrize('mode,storage', [pytest.param(m, k, marks=() if m!='triton' and k in ('kahan','sround') else pytest.mark.slow)
                                          for m in MODES for k in STORAGE])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_state_is_rounded_once(mode, storage, dtype):
    """Each pass draws its own random numbers and stores only what has changed: after a step of two passes, weights, state and counters
    equal native's bit for bit. (The last bit of a sum could move the scale, so the factor here is a power of two.)"""
    kw = dict(STORAGE[storage]) if dtype is torch.bfloat16 else dict(state_dtype=torch.bfloat16)
    def power(sq, **kwargs): return {'scale': 2.**-round(math.log2(1+sq)/2)}
    def go(m):
        params,stream = make_params(((33,),(17,5),(1,)), dtype, big=False, channels_last=False),GradStream(2)
        with backend_of(m): opt = make_optimizer(two_groups(params), [lean, Between(power, ('sq',), scale=1.), step_by], lr=.03, mom=.9,
                                                 **kw, **flags(m))
        for i in range(6): stream.set(params, i); opt.step()
        return snapshot(params, opt)
    a,b = go(mode),go('native')
    assert all(s['seen']==6 for s in a['opt']['state'])
    assert [s.get('sr_step') for s in a['opt']['state']]==[s.get('sr_step') for s in b['opt']['state']]
    (assert_bitwise if storage!='plain' and dtype is torch.bfloat16 and mode!='triton' else lambda x, y: assert_ulps(x, y, 2, 1e-6))(a, b)

# ---------------------------------------------------------------- checkpoints
def through_file(sd):
    f = io.BytesIO(); torch.save(sd, f); f.seek(0)
    return torch.load(f, weights_only=False)

@pytest.mark.parametrize('src,dst', [(m, ALL_MODES[(i+j)%5]) for i,m in enumerate(ALL_MODES) for j in (0,1)])
def test_checkpoints(src, dst):
    "A checkpoint has the model's numbers but not the totals, and crosses from any mode into any other"
    def build(ps, mode): return clipping(two_groups(ps), mode, cbs=[squares, Between(slow_norm, ('sq',), norm=0., scale=1.), scale_grad,
                                                                    average_grad, momentum_step])
    params,stream = make_params(dtype=torch.float64, big=False),GradStream(6)
    opt = build(params, src)
    for i in range(3): stream.set(params, i, skip=[1]); opt.step()
    sd = through_file(opt.state_dict())
    assert sd['hypers'][0]['norm']==opt.norm>0 and not any('sq' in s for s in sd['state'])
    twins = copy_params(params)
    new = build(twins, dst)
    new.load_state_dict(sd)
    assert new.norm==opt.norm
    for i in (3,4):
        for ps,o in ((params,opt),(twins,new)): stream.set(ps, i); o.step()
    (assert_bitwise if src==dst else lambda a, b: assert_same(a, b, **TOL[torch.float64]))(snapshot(twins, new), snapshot(params, opt))
    new.clear_state()
    assert new.norm==0. and [h['norm'] for h in new.hypers]==[0.,0.]

def slow_norm(sq, norm, max_norm, **kwargs):
    norm = .9*norm + .1*sq**.5
    return {'norm': norm, 'scale': min(1., max_norm/norm)}

@every
def test_copies(mode):
    params,stream = make_params(dtype=torch.float64, big=False),GradStream(6)
    opt = clipping(two_groups(params), mode)
    for i in range(2): stream.set(params, i); opt.step()
    assert_copies_go_on(opt, stream, (2,3))

# ---------------------------------------------------------------- with others
@every
def test_extra_arguments_and_closure(mode):
    def shift(p, by, **kwargs): p.data.add_(by)
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    with backend_of(mode): opt = make_optimizer([p], [squares, Between(clip_factor, ('sq',), scale=1.), shift], lr=.1, max_norm=1.,
                                                **flags(mode))
    opt.step(by=2.)
    assert p.tolist()==[3.,3.]
    with pytest.raises(NotImplementedError, match='closure'): opt.step(lambda: 0)

@every
def test_grad_scaler(mode):
    "The scaler itself unscales and skips, even where the fused mode could"
    def go(scaled):
        p = nn.Parameter(torch.ones(3))
        opt = clipping([p], mode, max_norm=.5)
        opt.amp_scaling = True
        assert not getattr(opt, '_step_supports_amp_scaling', False)
        scaler = torch.amp.GradScaler('cpu', init_scale=4., enabled=scaled)
        for i in range(4):
            loss = (p*(math.inf if i==2 and scaled else 1.)).sum()
            if i==2 and not scaled: continue
            scaler.scale(loss).backward(); scaler.step(opt); scaler.update()
            p.grad = None
        return p.detach(),opt.scale,opt.state[p]['step']
    a,b = go(True),go(False)
    assert a[0].allclose(b[0]) and a[1:]==b[1:]

# ---------------------------------------------------------------- errors
def branching(p, **kwargs): return p.data.sort()

@pytest.mark.parametrize('mode', MODES)
def test_a_later_pass_that_can_not_run_fails_first(mode):
    "Before the first pass has changed anything"
    params = make_params(big=False)
    opt = clipping(params, mode, cbs=[average_grad, step_stat, squares, Between(clip_factor, ('sq',), scale=1.), branching])
    GradStream().set(params, 0)
    with unchanged(params, opt), pytest.raises(UnsupportedError, match="'branching'"): opt.step()

@pytest.mark.parametrize('mode', MODES)
def test_a_value_an_element(mode):
    def wrong(p, **kwargs): return {'sq': p.grad.data.square()}
    params = make_params(big=False)
    opt = clipping(params, mode, cbs=[average_grad, wrong, Between(clip_factor, ('sq',), scale=1.), scale_grad])
    GradStream().set(params, 0)
    with unchanged(params, opt), pytest.raises(ValueError, match="'sq' is a total of 'clip_factor'.*x.sum()"): opt.step()

def test_a_value_an_element_natively():
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    for v,words in ((torch.ones(2), r'shape \(2,\)'), (3., 'got 3.0')):
        with pytest.raises(ValueError, match=words):
            clipping([p], cbs=[lambda p, **kwargs: {'sq': v}, Between(clip_factor, ('sq',), scale=1.)]).step()

@every
def test_what_a_between_may_return(mode):
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    for f,words in ((lambda **kwargs: {'other': 1.}, 'returned other.*scale'), (lambda **kwargs: {'scale': math.nan}, "'scale' is nan"),
                    (lambda **kwargs: {'scale': [1.]}, "one number per group")):
        with pytest.raises(ValueError, match=words): clipping([p], mode, cbs=[squares, Between(f, ('sq',), scale=1.), sgd_step]).step()
    assert p.tolist()==[1.,1.]

def test_a_between_says_what_it_is_and_where_it_may_stand():
    assert repr(CLIP[1])=='Between(clip_factor)' and 'clip_factor' in repr(clipping([nn.Parameter(torch.ones(2))], 'foreach'))
    with pytest.raises(ValueError, match="totals\\['sq'\\]='mean' must be 'sum'"): Between(clip_factor, dict(sq='mean'))
    with pytest.raises(ValueError, match='sq: a total and a number'): Between(clip_factor, ('sq',), sq=1.)
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    with pytest.raises(NotImplementedError, match="'clip_factor' runs between two passes"): Optimizer([p], CLIP, lr=.1).step() # fastai's

@every
def test_refused_elsewhere(mode):
    m = nn.Linear(2, 1)
    opt = clipping(list(m.parameters()), mode)
    with pytest.raises(ValueError, match="gradient release: stepper 'clip_factor' needs"): prepare_for_gradient_release(m, opt)
    with pytest.raises(ValueError, match="gradient release: stepper 'clip_factor' needs"): prepare_for_gradient_release(m, Lookahead(opt))
    with pytest.raises(UnsupportedError, match='optimizer_accumulation: a step of this optimizer has several passes'):
        opt.optimizer_accumulation = True
    assert not opt.optimizer_accumulation
