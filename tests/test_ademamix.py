"AdEMAMix's warm-ups: in a Learner, under a schedule of momentum, in groups, in a checkpoint, and refused where their length is unknown."
import numpy as np,pytest,torch
from fastai.callback.schedule import *
from fastai.learner import Callback
from torch import nn
from fastxtend_opt.algorithms.ademamix import AdEMAMix,FitSteps,ademamix,warmed_alpha,warmed_beta3
from helpers import *
from learner_utils import learner
from reference.ademamix import AdEMAMix as Reference

class Watch(Callback):
    "The hyperparameters of each step"
    run_valid = False
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([dict(h) for h in self.opt.hypers])

@pytest.mark.parametrize('mode', ['native','fused'])
def test_warmups_are_as_long_as_the_fit(mode):
    learn,watch = learner('ademamix', mode, opt_kw=dict(alpha_warmup=-1, beta3_warmup=-1)),Watch()
    learn.fit_one_cycle(2, 1e-3, cbs=watch)
    assert len(watch.seen)==24 and all(h['fit_steps']==24 and h['alpha_warmup']==h['beta3_warmup']==-1 for o in watch.seen for h in o)
    # one-cycle moves `mom`, not where the ramp starts
    assert len({h['mom'] for o in watch.seen for h in o})>10 and all(h['beta3_start']==.9 for o in watch.seen for h in o)
    learn.validate(); learn.get_preds()
    assert learn.opt.hypers[0]['fit_steps']==24
    learn.fit(1, 1e-3)
    assert learn.opt.hypers[0]['fit_steps']==12 and sum(isinstance(o, FitSteps) for o in learn.cbs)==1

def test_with_decouple_lr():
    learn = learner('ademamix', 'native', opt_kw=dict(alpha_warmup=-1, decouple_lr=True, wd=1e-5))
    learn.fit_one_cycle(1, 1e-3)
    assert ({type(o).__name__ for o in learn.cbs} >= {'FitSteps','MaxLR'} and learn.opt.hypers[0]['fit_steps']==12
            and learn.opt.hypers[0]['max_lr']==pytest.approx(1e-3))

def test_a_learner_is_the_number_given():
    res = []
    for n in (-1,12):
        learn = learner('ademamix', 'native', opt_kw=dict(alpha_warmup=n, beta3_warmup=n))
        learn.fit(1, 1e-3)
        res.append([p.detach() for p in learn.model.parameters()])
    assert_bitwise(*res)

@pytest.mark.parametrize('name', ['alpha_warmup','beta3_warmup'])
@pytest.mark.parametrize('mode', ALL_MODES)
def test_refused_outside_of_a_learner(mode, name):
    params = make_params(big=False)
    opt = WithBackend(ademamix(wd=.1, **{name:-1}, **flags(mode)), mode)(params, lr=.1)
    GradStream().set(params, 0)
    with unchanged(params, opt):
        with pytest.raises(ValueError, match=f"{name}=-1 means .* pass the number of steps"): opt.step()
    opt.set_hyper(name, 10)
    opt.step()
    assert opt.state[params[0]]['step']==1

@pytest.mark.parametrize('mode', ALL_MODES)
def test_groups_and_scheduled_mom(mode):
    "Each group's ramp starts from the `mom` that it was given, whatever `mom` is at a step"
    moms,ps = (.9,.8),[nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2)]
    kw = dict(sqr_mom=.99, beta3=.99, alpha=3., alpha_warmup=6, beta3_warmup=9, eps=1e-6)
    opt = WithBackend(ademamix(**kw, **flags(mode)), mode)([dict(params=ps[0]), dict(params=ps[1], mom=.8)], lr=.1)
    refs = [Reference(p.detach().numpy(), m, .99, .99, 3., 6, 9, 1e-6) for p,m in zip(ps, moms)]
    gen = torch.Generator().manual_seed(0)
    for i in range(12):
        opt.set_hyper('mom', .95-.01*i)
        for p,r in zip(ps, refs):
            p.grad = torch.randn(7, generator=gen, dtype=torch.float64)
            r.beta1 = .95-.01*i
            r.step(p.grad.numpy(), .1)
        opt.step()
        for p,r in zip(ps, refs): assert_same(p.detach().numpy(), r.theta, rtol=1e-10, atol=1e-12)
    assert [h['beta3_start'] for h in opt.hypers]==[.9,.8]

def test_mom_of_one_group_alone():
    ps = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = AdEMAMix([dict(params=ps[0]), dict(params=ps[1], mom=.9)], .1, mom=0.)
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    assert 'grad_avg' in opt.state[ps[0]] and [h['beta3_start'] for h in opt.hypers]==[0.,.9]

def test_checkpoint_keeps_where_the_ramp_starts():
    def make(**kw):
        p = nn.Parameter(torch.ones(3))
        opt = AdEMAMix([p], .1, beta3_warmup=20, **kw)
        p.grad = torch.ones(3)
        opt.step()
        return p,opt
    (p,a),(q,b) = make(mom=.8),make()
    a.set_hyper('mom', .95)
    b.load_state_dict(a.state_dict())
    assert b.hypers[0]['beta3_start']==.8 and b.hypers[0]['mom']==.95

@pytest.mark.parametrize('kw', [dict(alpha_warmup=2.5), dict(beta3_warmup=-2), dict(alpha=-1.), dict(beta3=1.),
                                dict(alpha_warmup=float('nan'))])
def test_bad_values(kw):
    (k,v), = kw.items()
    with pytest.raises(ValueError, match=f'{k}={v!r}'): AdEMAMix([nn.Parameter(torch.ones(1))], .1, **kw)

def test_ramps():
    "Edges: no momentum to start from, a slow average that is none, a ramp downwards, and beyond the end"
    assert ([warmed_beta3(.99, 10, 0., t) for t in (10,11,1000)]==[.99]*3 and warmed_beta3(0., 10, 0., 3)==0.
            and warmed_beta3(.5, 0, .9, 1)==.5)
    assert all(warmed_beta3(.5, 10, .9, t)==.5 for t in range(1,12))
    b = [warmed_beta3(.99, 10, 0., t) for t in range(1,11)]
    assert b==sorted(b) and 0<b[0]<.99
    for t in range(1,10): assert warmed_beta3(.999, 10, .9, t)==pytest.approx(np.exp(np.log(.9)*np.log(.999)/((1-t/10)*np.log(.999)
        + t/10*np.log(.9))), rel=1e-12)
    assert [warmed_alpha(5., 0, 1), warmed_alpha(5., 10, 1), warmed_alpha(5., 10, 99)]==[5.,.5,5.]

def test_no_callback_without_need():
    learn = learner('ademamix', 'native', opt_kw=dict(alpha_warmup=5))
    learn.fit(1, 1e-3)
    assert not any(isinstance(o, FitSteps) for o in learn.cbs) and learn.opt.hypers[0]['fit_steps']==0
