"Prodigy: all modes while `d` grows, its `Learner`, checkpoints, what it refuses; `test_oracles` has the trajectories."
import copy,math,pickle,warnings
from functools import partial

import fastai.callback.schedule,pytest,torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.test_utils import RegModel,synth_dbunch
from fastai.torch_core import set_seed
from torch import nn
import oracles
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.prodigy import CheckProdigyLR,Prodigy,prodigy
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.definition.registry import get_optimizer
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release
from helpers import *
from test_oracles import distance,po,problem,run_fastai,run_reference,run_torch

GROWS = dict(d0=.01, d_coef=20., sqr_mom=.99)
ALL = [{}, dict(safeguard_warmup=True, use_bias_correction=True, growth_rate=1.2), dict(decouple_wd=False),
       dict(decouple_lr=True, max_lr=1.), dict(cautious=True)]

def life(i, opt, params, stream):
    "Two learning rates, none at times; a tensor without decay, gradients that come late and go, groups without any"
    if i==0: opt.state[params[1]]['do_wd'] = False
    opt.set_hyper('lr', [[1.,.2],[.5,1.],[0.,1.],[1.,0.],[0.,0.]][(i//2)%5])
    stream.set(params, i, skip=range(len(params)) if i==5 else range(len(params)//2)
               if i==7 else [j for j in range(len(params)) if i < j%3])

def run(mode, dtype=torch.float64, n=16, scenario=life, **kw):
    ds = []
    def each(i, opt, params, stream): ds.append(opt.d); scenario(i, opt, params, stream)
    res = run_trajectory(WithBackend(partial(Prodigy, lr=1., wd=.01, **{**GROWS, **kw}, **flags(mode)), mode), n, dtype, each,
                         at=(0,1,4,n-1))
    return res,ds

@pytest.mark.parametrize('mode,kw', [pytest.param(m, k, id=f"{m}-{'-'.join(k) or 'plain'}",
                                                  marks=() if not k or m=='foreach' else pytest.mark.slow) for m in MODES for k in ALL])
def test_modes_agree(mode, kw):
    (a,da),(b,db) = run(mode, **kw),run('native', **kw)
    assert db[-1]>3*.01 and sorted(db)==db and len(set(db))>4 # it has grown, more than once
    assert da==pytest.approx(db, rel=1e-10)
    for i in b: assert_same(a[i], b[i], **TOL[torch.float64], path=f'step {i}')

STORAGE = dict(kahan={}, sround=dict(stochastic_rounding=True, seed=5), f32_state=dict(state_dtype=torch.float32))
@pytest.mark.parametrize('mode,storage', [pytest.param(m, v, id=f'{m}-{k}',
    marks=() if (m,k) in (('fused','kahan'),('foreach','sround'),('jit','f32_state')) else pytest.mark.slow) for m in MODES for k,
    v in STORAGE.items()])
def test_bfloat16(mode, storage):
    "As native: state is rounded once a step, with the same draws; the sums are in float32"
    (a,da),(b,db) = (run(m, torch.bfloat16, 8, **storage) for m in (mode,'native'))
    assert db[-1]>.05 and da==pytest.approx(db, rel=1e-4)
    sa,sb = ([{k:v for k,v in st.items() if not isinstance(v, torch.Tensor)} for st in x[7]['opt']['state']] for x in (a,b))
    assert sa==sb and all(st['step']<=8 for st in sa)
    for x,y in zip(a[7]['params'], b[7]['params']): torch.testing.assert_close(x.float(), y.float(), rtol=2e-2, atol=2e-2)

# ---------------------------------------------------------------- others
@pytest.mark.parametrize('h', oracles.load()['prodigy'].CASES)
def test_how_close(h):
    "The authors' package, to a rounding; and d is the same. With steps of a millionth and weights of 1, x0-p has ten digits in float64"
    mod = oracles.load()['prodigy']
    params,_,gs = problem(late=False)
    group,h = [1]*len(params),{**h, 'wd':.1, 'decouple_wd':True}
    got,opt = run_fastai(partial(Prodigy, **h), copy_params(params), group, gs, no_decay=None)
    theirs = []
    def make(g): theirs.append(mod.prodigyopt(h)(g)); return theirs[0]
    ref = run_torch(make, copy_params(params), group, gs, .1, no_decay=None)
    tol = 1e-11 if h['d0']>=.01 else 1e-8
    assert distance(got, ref, params)<tol and opt.d==pytest.approx(theirs[0].param_groups[0]['d'], rel=tol)

def test_the_authors_refuse_two_learning_rates():
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = pytest.importorskip('prodigyopt').Prodigy([dict(params=[p]), dict(params=[q], lr=.5)], lr=1.)
    p.grad,q.grad = torch.ones(2),torch.ones(2)
    with pytest.raises(RuntimeError, match='Setting different lr'): opt.step()

@pytest.mark.parametrize('name', ['d','d_max'])
def test_cases_reach_every_branch(name):
    "The estimate passes d0, the limit of the growth binds, and d stays where an estimate is smaller"
    ends = []
    for h in oracles.load()['prodigy'].CASES:
        params,group,gs = problem()
        look = oracles.load()['prodigy'].REFERENCE([p.detach().numpy() for p in params], {**h, 'decouple_wd':True}, [0.]*len(params))
        for g in gs: look.step(g, [1.]*len(params))
        ends.append((getattr(look, name)/h['d0'], look.d<look.d_max))
    assert all(e[0]>1.5 for e in ends[:2]) and ends[1][1]==True

# ---------------------------------------------------------------- Learner
def learner(lr=1., mode='native', **kw):
    set_seed(0, True)
    kw = {'opt_func': prodigy(d0=1e-3, **flags(mode)), **({} if lr is None else {'lr':lr}), **kw}
    learn = Learner(synth_dbunch(), RegModel(), loss_func=MSELossFlat(), **kw)
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__=='ProgressCallback'])
    return learn

def told(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        with_no_output(f)
    return [str(o.message) for o in w if 'Prodigy' in str(o.message)]

def with_no_output(f):
    import contextlib,io
    with contextlib.redirect_stdout(io.StringIO()): f()

def test_learners_default_rate_is_warned_of_once():
    learn = learner(None)
    msgs = told(lambda: (learn.fit(1), learn.fit(1), learn.validate()))
    assert len(msgs)==1 and 'lr=0.001' in msgs[0] and 'Learner(..., lr=1.)' in msgs[0] and 'fit_one_cycle(n, lr_max=1.)' in msgs[0]
    assert sum(isinstance(c, CheckProdigyLR) for c in learn.cbs)==1

@pytest.mark.parametrize('f', [lambda l: l.fit(1), lambda l: l.fit(1, lr=.5), lambda l: l.fit_one_cycle(1, lr_max=1.),
                               lambda l: l.fit(1, lr=slice(1e-3,1.))])
def test_no_warning_where_the_peak_is_right(f):
    learn = learner(1.)
    assert not told(lambda: f(learn))

def test_one_cycle_at_the_default_is_warned_of():
    learn = learner(None)
    assert len(told(lambda: learn.fit_one_cycle(1)))==1

@pytest.mark.parametrize('mode', ['native','fused'])
def test_trains_and_resumes(mode, tmp_path):
    "Without a learning rate; a saved Learner continues bit for bit"
    a = learner(mode=mode)
    a.path = tmp_path
    with_no_output(lambda: a.fit(2))
    first,d = a.validate()[0],a.opt.d
    a.save('mid', with_opt=True)
    set_seed(1, True); with_no_output(lambda: a.fit(3))
    assert a.opt.d>=d>1e-3 and a.validate()[0]<first
    b = learner(mode=mode)
    b.path = tmp_path
    with_no_output(lambda: b.fit(2)); b.validate() # its data loader has to be as far
    b.load('mid', with_opt=True)
    assert b.opt.d==d
    set_seed(1, True); with_no_output(lambda: b.fit(3))
    assert_bitwise([p.detach() for p in b.model.parameters()], [p.detach() for p in a.model.parameters()])
    b.freeze() # fastai clears the state
    assert b.opt.d==1e-3

# ---------------------------------------------------------------- its own ways
@pytest.mark.parametrize('mode', ALL_MODES)
def test_fully_decoupled_decay_has_no_d_in_it(mode):
    p = nn.Parameter(torch.tensor([3.,4.], dtype=torch.float64))
    with backend_of(mode): opt = Prodigy([p], wd=1e-4, decouple_lr=True, **flags(mode))
    p.grad = torch.tensor([1e-30,0.], dtype=torch.float64)
    opt.step()
    assert p.tolist()[1]==pytest.approx(4*(1-1e-4), rel=1e-14)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_frozen_and_idle(mode):
    "No gradient at all, only zeros, or lr=0: no weight, no `d` moves"
    ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))]
    with backend_of(mode): opt = Prodigy([[p] for p in ps], wd=.1, **GROWS, **flags(mode))
    with unchanged(ps, opt): opt.step()
    for p in ps: p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in ps) and opt.d==.01
    opt.set_hyper('lr', 0.)
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in ps) and opt.d==.01 and opt.hypers[0]['d_num']==0

@pytest.mark.parametrize('mode', ALL_MODES)
def test_a_gradient_that_is_not_finite(mode):
    "Its tensor is lost, as with Adam; the others and d continue"
    ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    with backend_of(mode): opt = Prodigy(ps, **GROWS, **flags(mode))
    for i in range(4):
        for p in ps: p.grad = torch.ones_like(p)
        if i==2: ps[0].grad[1] = math.nan
        opt.step()
    assert ps[0].isnan().tolist()==[False,True,False] and ps[1].isfinite().all() and math.isfinite(opt.d)

def test_refusals():
    m = nn.Linear(2, 1)
    opt = Prodigy(m.parameters())
    with pytest.raises(ValueError, match="gradient release: stepper 'prodigy_distance' needs the gradients of all"):
        prepare_for_gradient_release(m, opt)
    with pytest.raises(UnsupportedError, match='Accumulate gradients instead'): opt.optimizer_accumulation = True
    for kw,words in ((dict(beta3=1.), 'beta3=1.0'), (dict(d0=0.), 'd0=0.0'), (dict(d_coef=-1.), 'd_coef=-1.0'),
                     (dict(growth_rate=.5), 'growth_rate=0.5.*or inf'), (dict(growth_rate=math.nan), 'growth_rate=nan')):
        for f in (lambda: Prodigy(m.parameters(), **kw), lambda: prodigy(**kw)):
            with pytest.raises(ValueError, match=words): f()
    prodigy(growth_rate=float('inf'))
    with pytest.warns(UserWarning, match='state_dtype=torch.float32'): Prodigy([nn.Parameter(torch.ones(2, dtype=torch.float16))])
    assert get_optimizer('prodigy').kind=='model'

@pytest.mark.parametrize('mode', ['native','fused'])
def test_lookahead_round_it(mode):
    "k steps and back, d untouched by it"
    def go(wrap):
        params,stream = make_params(dtype=torch.float64, big=False),GradStream(3)
        with backend_of(mode): opt = Prodigy(two_groups(params), **GROWS, **flags(mode))
        outer = wrap(opt)
        for i in range(5): stream.set(params, i); outer.step()
        return [p.detach() for p in params],opt.d
    (a,d),(b,e) = go(lambda o: Lookahead(o, k=5, alpha=.5)),go(lambda o: o)
    start = [p.detach() for p in make_params(dtype=torch.float64, big=False)]
    assert d==e
    assert_same(a, [s+.5*(x-s) for s,x in zip(start, b)], **TOL[torch.float64])

@pytest.mark.parametrize('mode', ['native','foreach','fused'])
def test_copies(mode):
    "A deep copy and a pickle continue as the original does, independently of it"
    params,stream = make_params(dtype=torch.float64, big=False),GradStream(3)
    with backend_of(mode): opt = Prodigy(two_groups(params), **GROWS, **flags(mode))
    for i in range(4): stream.set(params, i); opt.step()
    assert_copies_go_on(opt, stream, (4,5))
