"`cautious=True` for every optimizer: the modes agree or refuse it, also with the other options."
import warnings
from functools import partial

import pytest,torch
from fastai.optimizer import average_grad,momentum_step,step_stat,weight_decay
from torch import nn
from fastxtend_opt.algorithms.adam import Adam
from fastxtend_opt.algorithms.lookahead import Lookahead,lookahead_step,slow_weights
from fastxtend_opt.algorithms.ranger import Ranger
from fastxtend_opt.algorithms.sgd import SGD
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.definition.modifiers import cautious_step,decays_weights
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from helpers import *

NAMES = [r.name for r in list_optimizers()]
REFUSED = {'adamw_schedulefree','radam_schedulefree','sgd_schedulefree','stableadam'} # decay and step in one; others may follow
KW = {'sgd':dict(mom=.9), 'rmsprop':dict(mom=.9)}
modes = pytest.mark.parametrize('mode', MODES)
all_modes = pytest.mark.parametrize('mode', ALL_MODES)
SHAPES_C = ((), (7,), (5,3), (0,))

def make(name, ps, mode='native', lr=.01, **kw):
    with backend_of(mode): return get_optimizer(name).func(ps, lr=lr, **{**KW.get(name, {}), 'cautious':True, **kw}, **flags(mode))

def life(name, mode, n=8, dtype=torch.float64, accumulate=0, shapes=SHAPES_C, **kw):
    ps,stream = make_params(shapes, dtype, big=False, channels_last=False),GradStream(3)
    opt = make(name, two_groups(ps), mode, lr=[.01,.02], **kw)
    opt.state[ps[1]]['do_wd'] = False
    for i in range(n):
        stream.set(ps, i, skip=[2] if i < 2 else [])
        if accumulate: opt.optimizer_accumulation = (i+1)%accumulate != 0
        opt.step()
    return snapshot(ps, opt)

def refused(name):
    "The message, if the option is refused"
    try: make(name, [nn.Parameter(torch.ones(2))])
    except ValueError as e: return str(e)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_modes_agree_or_it_is_refused(name):
    if (msg := refused(name)): assert 'cautious=True' in msg and 'decays the weights and steps in one' in msg and 'Leave out' in msg; return
    assert name not in REFUSED
    ref,plain = life(name, 'native', wd=.1),life(name, 'native', wd=.1, cautious=name in ('cadamw','clion'))
    # something was masked
    assert any(not torch.equal(a, b) for a,b in zip(ref['params'], plain['params'])) == (name not in ('cadamw','clion'))
    for mode in MODES if name in ('adam','lamb','mars') else MODES[:3]:
        assert_same(life(name, mode, wd=.1), ref, **(dict(rtol=1e-9, atol=1e-11) if mode=='triton' else TOL[torch.float64]), path=mode)

def test_who_refuses(): assert {n for n in NAMES if refused(n)} >= REFUSED and not refused('adam')

@pytest.mark.parametrize('name', ['sgd','adam','lion'])
def test_is_the_formula(name):
    "Compared with the same optimizer without it, step by step from the same state"
    a = make_params(((9,),(4,5)), torch.float64, big=False, channels_last=False); b = copy_params(a)
    x,y,stream = make(name, a, wd=.1),make(name, b, wd=.1, cautious=False),GradStream(7)
    for i in range(10):
        stream.set(a, i); stream.set(b, i)
        for p,q in zip(a, b): q.data.copy_(p.data)
        before = [p.detach()*(1-.01*.1) for p in a]
        x.step(); y.step()
        for p,q,o in zip(a, b, before):
            u = o-q.detach()
            mask = (u*p.grad > 0).double()
            assert_same(p.detach(), o - u*mask/max(mask.mean().item(), 1e-3), rtol=1e-12, atol=1e-14, path=f'step {i}')

@all_modes
def test_share_is_a_thousandth_at_least(mode):
    "One element of 2,000 agrees: it moves by a thousand steps, not by two thousand"
    p = nn.Parameter(torch.zeros(2000, dtype=torch.float64))
    with backend_of(mode): opt = SGD([p], lr=1e-3, mom=.9, cautious=True, **flags(mode))
    p.grad = torch.ones_like(p); opt.step()
    before = p.detach().clone()
    p.grad = torch.full_like(p, -.1); p.grad[7] = .1
    opt.step()
    moved = (before-p.detach())
    assert moved[7].item()==pytest.approx(1e3*1e-3*(.9+.1), rel=1e-10) and moved.count_nonzero()==1

@all_modes
def test_nothing_agrees(mode):
    p = nn.Parameter(torch.ones(5))
    with backend_of(mode): opt = Adam([p], lr=.1, wd=0., cautious=True, **flags(mode))
    p.grad = torch.ones_like(p); opt.step()
    before = p.detach().clone()
    p.grad = torch.full_like(p, -1e-3); opt.step()
    assert torch.equal(before, p) and opt.state[p]['step']==2

@all_modes
@pytest.mark.parametrize('kw', [dict(kahan_sum=True), dict(stochastic_rounding=True), dict(state_dtype=torch.float32)],
                         ids=lambda o: next(iter(o)))
def test_low_precision(mode, kw):
    "As in float32, up to the rounding of state and gradient"
    low,full = (life('adam', mode, dtype=d, wd=0., shapes=((64,),(8,8),(3,)), **(kw if d==torch.bfloat16 else {}))
                for d in (torch.bfloat16, torch.float32))
    for a,b in zip(low['params'], full['params']): assert (a.float()-b).abs().max() < .03
    assert any('kahan_comp' in s for s in low['opt']['state']) == ('stochastic_rounding' not in kw)

@interpreted_slow(ALL_MODES)
def test_small_steps_add_up_in_bfloat16(mode):
    "Steps far below the last bit of the weights are masked and kept in the compensation"
    p = nn.Parameter(torch.full((64,), 2., dtype=torch.bfloat16))
    with backend_of(mode): opt = SGD([p], lr=1e-4, mom=.5, cautious=True, **flags(mode))
    for _ in range(200): p.grad = torch.ones_like(p); opt.step()
    kept = p.detach().float()+opt.state[p]['kahan_comp'].float()
    torch.testing.assert_close(kept, torch.full_like(kept, 2-.04), rtol=0, atol=1e-3)

@modes
def test_decouple_lr(mode):
    kw = dict(decouple_lr=True, wd=5e-4, max_lr=.02)
    assert_same(life('adam', mode, **kw), life('adam', 'native', **kw), **TOL[torch.float64])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='stableadam_step decays the weights and steps in one'):
            make('stableadam', [nn.Parameter(torch.ones(2))], decouple_lr=True)

@modes
@pytest.mark.parametrize('name', ['adam','lion','ranger'])
def test_optimizer_accumulation(name, mode):
    "Micro-batches leave the weights alone, and the check that there is an average sees one"
    a,b = life(name, mode, n=12, accumulate=3),life(name, 'native', n=12, accumulate=3)
    assert_same(a, b, **TOL[torch.float64])
    start = make_params(SHAPES_C, torch.float64, big=False, channels_last=False)
    assert all(torch.equal(p.detach(), q) for p,q in zip(start, life(name, mode, n=2, accumulate=3)['params']))
    with pytest.raises(NotImplementedError, match='keep no average'):
        make('sgd', [nn.Parameter(torch.ones(2))], mode, mom=0.).optimizer_accumulation = True

@all_modes
def test_gradient_release(mode):
    def run(release):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        opt = make('adam', m.parameters(), mode)
        if release: prepare_for_gradient_release(m, opt)
        for i in range(9):
            m(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            opt.step(); opt.zero_grad()
        remove_gradient_release(m)
        return snapshot(list(m.parameters()), opt)
    assert_bitwise(run(True), run(False))

@pytest.mark.parametrize('dst', ['native','fused'])
@pytest.mark.parametrize('src', ['native','foreach'])
def test_checkpoints_cross_modes_and_the_option(src, dst):
    "It has no state"
    ps = make_params(SHAPES_C, torch.float64, big=False, channels_last=False); opt = make('adam', ps, src)
    for i in range(4): GradStream().set(ps, i); opt.step()
    qs = copy_params(ps); new = make('adam', qs, dst); new.load_state_dict(detach_copy(opt.state_dict()))
    for i in range(4, 8):
        for o,x in ((ps,opt),(qs,new)): GradStream().set(o, i); x.step()
    assert_same(snapshot(qs, new), snapshot(ps, opt), **TOL[torch.float64])
    make('adam', copy_params(ps), dst, cautious=False).load_state_dict(opt.state_dict())

def test_ranger_masks_no_sync():
    opt = Ranger([nn.Parameter(torch.ones(2))], lr=.1, cautious=True)
    assert slow_weights in opt.opt.cbs and lookahead_step in opt.opt.cbs
    assert [getattr(cb, 'func', None) is cautious_step for cb in opt.opt.cbs].count(True)==1
    assert lookahead_step in Lookahead(Adam([nn.Parameter(torch.ones(2))], lr=.1, cautious=True)).opt.cbs

@all_modes
def test_own_steppers(mode):
    def my_step(p, lr, grad_avg, taken=0, **kwargs):
        p.data.sub_(grad_avg, alpha=lr)
        return {'taken': taken+1}
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with backend_of(mode): opt = make_optimizer([p], [weight_decay, step_stat, average_grad, my_step], lr=.1, mom=.5, wd=.1, cautious=True,
                                                **flags(mode))
    for g in ([1.,1.],[1.,-.1]): p.grad = torch.tensor(g, dtype=torch.float64); opt.step()
    first = .99-.1
    assert p.tolist()==pytest.approx([first*.99-.1*1.5/.5, first*.99], rel=1e-12) and opt.state[p]['taken']==2

def test_refusals():
    ps = [nn.Parameter(torch.ones(2))]
    def both(p, lr, wd, **kwargs): p.data.sub_(p.grad.data + wd*p.data, alpha=lr)
    def needs(p, missing, **kwargs): p.data.sub_(missing)
    with pytest.raises(ValueError, match='cautious=True: both decays the weights and steps in one'):
        make_optimizer(ps, both, lr=.1, wd=0., cautious=True)
    with pytest.raises(ValueError, match='no stepper of average_grad changes'):
        make_optimizer(ps, average_grad, lr=.1, mom=.9, cautious=True)
    with pytest.raises(ValueError, match="tracing the steppers.*'missing'"): make_optimizer(ps, needs, lr=.1, cautious=True)
    with pytest.raises(ValueError, match='cautious=False gives plain Lion'): get_optimizer('clion').func(ps, .1, cautious=False)

def test_own_steppers_that_can_not_be_traced():
    "Native mode runs them: those that may step are masked, a marked decay is not, and what follows them works"
    def scale(p, **kwargs): return {'scale': 1/p.grad.norm().item()}
    def my_step(p, lr, grad_avg, scale, **kwargs): p.data.sub_(grad_avg, alpha=lr*scale)
    @decays_weights
    def my_decay(p, lr, wd, **kwargs): p.data.mul_(1 - lr*wd*(1. if p.data.norm().item() else 0.))
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = make_optimizer([p], [my_decay, step_stat, average_grad, scale, my_step], lr=.1, mom=.5, wd=.1, cautious=True)
    assert [getattr(cb, 'func', None) is cautious_step for cb in opt.cbs]==[False, False, False, True, True]
    for g in ([1.,1.],[1.,-.1]): p.grad = torch.tensor(g, dtype=torch.float64); opt.step()
    first = .99-.1/2**.5
    assert p.tolist()==pytest.approx([first*.99-.1*1.5/.5/1.01**.5, first*.99], rel=1e-12)
    opt = make_optimizer([p], [my_decay, step_stat, average_grad, scale, my_step], lr=.1, mom=.5, wd=.1, cautious=True, foreach=True)
    with pytest.raises(UnsupportedError, match='item'): opt.step()

@all_modes
def test_not_a_number_is_seen(mode):
    "A gradient that is NaN makes its weight NaN, as without the option"
    p = nn.Parameter(torch.ones(3))
    with backend_of(mode): opt = SGD([p], lr=.1, mom=.9, cautious=True, **flags(mode))
    p.grad = torch.tensor([1.,float('nan'),1.]); opt.step()
    assert p.isnan().tolist()==[False,True,False]
