"Fully decoupled weight decay: the steppers in all modes, against optimi, and `max_lr` in fastai's Learner, whatever the schedule."
import math,subprocess,sys,warnings
from functools import partial

import fastai.optimizer as fo,numpy as np,optimi,pytest,torch
from fastai.basics import DataLoader,DataLoaders,Learner,params
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder,ParamScheduler,SchedCos,SchedExp,SchedLin
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from torch import nn

import fastxtend_opt.training.schedule
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.ranger import ranger
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.definition import registry
from fastxtend_opt.definition.lessons import take_steps
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.definition.modifiers import decays_weights, fully_decoupled
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.training.decoupled_decay import MaxLR,peak_lrs
from helpers import *
from learner_utils import learner as digits,no_warnings
from test_oracles import optimi_adam,optimi_adan,optimi_lion,optimi_radam,optimi_ranger,optimi_sgd,optimi_stableadamw

NAMES = [r.name for r in list_optimizers() if 'wd' in r.hypers]
L2 = [r.name for r in list_optimizers() if 'decouple_wd' in r.hypers]
WD = 5e-4 # below the warning
PEAKS = [3e-3,1e-2]
every = pytest.mark.parametrize('name', NAMES)
KW = dict({r.name: dict(decouple_wd=True) for r in list_optimizers() if r.hypers.get('decouple_wd') is False}, # those whose default is L2
    apollo=dict(decouple_wd=True, warmup=0), # its first rate is a thousandth
    radam_schedulefree=dict(silent_sgd_phase=False)) # else its first steps leave the weights alone
pytestmark = pytest.mark.filterwarnings('error:.*decouple_lr') # a test that wants one says so

def lrs_at(i, n=25):
    "Two groups' learning rates, warmed up to `PEAKS` and then annealed"
    top = min((i+1)/8, .5+.5*math.cos(math.pi*max(0, i-7)/n))
    return [o*top for o in PEAKS]

def scheduled(i, opt, params, stream):
    "Learning rates of step `i`, numpy's among them; one tensor is not decayed"
    if i==0: opt.state[params[1]]['do_wd'] = False
    lrs = lrs_at(i)
    opt.set_hyper('lr', np.array(lrs) if i%2 else lrs)
    if i==15: opt.set_hyper('max_lr', [np.float64(o*2) for o in PEAKS])
    if i==20: opt.set_hyper('max_lr', PEAKS[1])
    stream.set(params, i)

def run(name, mode='native', n=25, dtype=torch.float64, **kw):
    f = WithBackend(partial(get_optimizer(name).func, lr=.1, **{'wd':WD, **KW.get(name, {}), **kw}, **flags(mode)), mode)
    return run_trajectory(f, n, dtype, scheduled, at=(0,1,6,12,16,n-1))

# ---------------------------------------------------------------- the modes
@pytest.mark.parametrize('name,mode,dtype', [
    slow(n, m, t, when=n not in (INTERPRETED if m=='triton' else CORE) or not (t=='f64' or m=='fused'))
    for n in NAMES for m in MODES for t in ('f64','f32')])
def test_modes_agree(name, mode, dtype):
    if mode not in (*get_optimizer(name).modes,'triton'): pytest.skip(f'no {mode}')
    kw = dict(decouple_lr=True, max_lr=PEAKS, wd=.05, dtype={'f64':torch.float64,'f32':torch.float32}[dtype])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # so large a wd, for float32 to show it
        a,b = run(name, mode, **kw),run(name, **kw)
    assert_same(a, b, **TOL[kw['dtype']])

@pytest.mark.parametrize('name', [n for n in NAMES if n!='prodigy']) # without the option its decay has the size of its steps in it
def test_is_wd_over_max_lr(name):
    "The same as `wd/max_lr` without the option, whatever else the optimizer does with its decay"
    kw = dict(eps=0.) if name=='madgrad' else {} # its plain decay is by lr+eps
    plain = run(name, n=15, wd=[WD/o for o in PEAKS], **kw)
    both = run(name, n=15, decouple_lr=True, max_lr=PEAKS, **kw)
    for i in plain: assert_same(both[i]['params'], plain[i]['params'], rtol=1e-12, atol=1e-15, path=f'step {i}')

@every
def test_it_decays(name):
    "And `do_wd=False`, or `wd=0`, does not"
    a,b,c = (run(name, n=4, decouple_lr=True, max_lr=PEAKS, wd=wd)[1]['params'] for wd in (WD, 0., 2e-4))
    for j,(x,y,z) in enumerate(zip(a, b, c)):
        # LARC's rate of a layer has wd in it, decayed or not, as fastai's
        if not x.numel(): continue
        assert torch.equal(x, y) == (j==1 and name!='larc') and torch.equal(x, z) == (j==1 and name!='larc'), j

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('lr', [1e-6, 1e-3, .1, 3.])
# Adan divides by 1+wd; ADOPT's first step only begins the average; Prodigy takes no step before there is a gradient
@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('adan','adopt','prodigy')])
@pytest.mark.engine
def test_peak_takes_wd_whatever_lr_is(name, lr, mode):
    "At the peak a step without a gradient leaves `1-wd`"
    opt = partial(get_optimizer(name).func, wd=WD, decouple_lr=True, **flags(mode))
    if name=='stableadam': opt = partial(opt, eps=1e-3) # 0/0 is kept away by eps
    if name in KW: opt = partial(opt, **KW[name])
    assert take_steps(opt, [3.,-4.], [0.,0.], lr=lr).tolist()==pytest.approx([3*(1-WD),-4*(1-WD)], rel=1e-14)

def test_adan_divides():
    for lr in (1e-6, .1, 3.):
        assert take_steps(partial(get_optimizer('adan').func, wd=WD, decouple_lr=True), [3.], [0.],
                          lr=lr).tolist()==pytest.approx([3/(1+WD)], rel=1e-14)

def test_stableadam_takes_the_clipped_rate():
    "As optimi: a spike divides the learning rate, and so the decay"
    kw,g = dict(mom=0., sqr_mom=.5, eps=0., max_lr=.1, decouple_lr=True),([1.,1.],[7.,1.])
    eta = .1/(41/33)**.5
    a = take_steps(get_optimizer('stableadam').factory(wd=WD, **kw), [1.,1.], *g)
    x = (1-WD)-.1
    assert a.tolist()==pytest.approx([x*(1-eta/.1*WD)-eta*7/33**.5, x*(1-eta/.1*WD)-eta], rel=1e-12)

def test_larc_has_wd_over_max_lr_in_its_rate():
    f = get_optimizer('larc').factory(mom=0., decouple_lr=True, wd=WD, max_lr=1e-3, trust_coeff=.02, eps=0., clip=False)
    p = np.array([3.,4.])*(1-.1/1e-3*WD)
    rate = .1*.02*np.linalg.norm(p)/(1+np.linalg.norm(p)*WD/1e-3)
    assert take_steps(f, [3.,4.], [.6,.8]).tolist()==pytest.approx((p-rate*np.array([.6,.8])).tolist(), rel=1e-12)

def test_lr_zero_takes_nothing():
    for kw in ({}, dict(max_lr=.1)): assert take_steps(sgd(decouple_lr=True, wd=WD, **kw), [1.,2.], [1.,1.], lr=0.).tolist()==[1.,2.]

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_low_precision_storage(dtype, mode):
    "With a compensation, decay far below a bfloat16's last bit adds up"
    p = nn.Parameter(torch.full((64,), 1., dtype=dtype))
    opt = sgd(decouple_lr=True, wd=1e-4, **flags(mode))([p], lr=.1)
    for _ in range(200):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert p.float().mean().item()==pytest.approx((1-1e-4)**200, rel=4e-3)

# ---------------------------------------------------------------- optimi
PEERS = dict(sgd=(optimi_sgd, dict(mom=.9)), adam=(optimi_adam, dict(mom=.9, sqr_mom=.99, eps=1e-5)),
             radam=(optimi_radam, dict(mom=.9, sqr_mom=.99, eps=1e-5, beta=0.)), lion=(optimi_lion, dict(beta1=.9, beta2=.99)),
             ranger=(optimi_ranger, dict(mom=.95, sqr_mom=.99, eps=1e-6, k=6, alpha=.5, beta=0.)),
             adan=(optimi_adan, dict(beta1=.98, beta2=.92, beta3=.99, eps=1e-8)),
             stableadam=(optimi_stableadamw, dict(mom=.9, sqr_mom=.99, eps=1e-6)))

@pytest.mark.parametrize('mode', ['native','fused'])
@pytest.mark.parametrize('name', list(PEERS))
def test_against_optimi(name, mode):
    "float64, 25 steps of a changing lr, two groups with a peak each, spikes, one tensor without decay"
    make,h = PEERS[name]
    mine = make_params(dtype=torch.float64, big=False, channels_last=False, scale=1.)
    mine = [p for p in mine if p.numel()]
    theirs,n = copy_params(mine),len(mine)
    group,stream = [int(j>=n//2) for j in range(n)],GradStream(4, spikes=(7,19))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # a wd large enough to see
        opt = WithBackend(partial(get_optimizer(name).func, lr=.1, wd=.02, decouple_lr=True, max_lr=PEAKS, **h, **flags(mode)), mode)(
            [[p for p,k in zip(mine, group) if k==i] for i in (0,1)])
        ref = make(dict(h, decouple_wd=True))([dict(params=[p], weight_decay=0. if j==1 else .02, decouple_lr=True, max_lr=PEAKS[k]) for j,
                                               (p,k) in enumerate(zip(theirs, group))])
    opt.state[mine[1]]['do_wd'] = False
    for i in range(25):
        opt.set_hyper('lr', lrs_at(i))
        for pg,k in zip(ref.param_groups, group): pg['lr'] = lrs_at(i)[k]
        stream.set(mine, i); stream.set(theirs, i)
        opt.step(); ref.step()
        assert_same([p.detach() for p in mine], [p.detach() for p in theirs], rtol=1e-9, atol=1e-12, path=f'step {i}')

def test_optimi_gives_all_groups_the_calls_lr():
    "Ours is a group's own"
    ps = [nn.Parameter(torch.ones(1)) for _ in range(4)]
    theirs = optimi.AdamW([dict(params=ps[0], lr=.5), dict(params=ps[1])], lr=.1, decouple_lr=True, weight_decay=0.)
    ours = Adam([dict(params=ps[2], lr=.5), dict(params=ps[3])], lr=.1, decouple_lr=True, wd=0.)
    assert [g['max_lr'] for g in theirs.param_groups]==[.1,.1] and [h['max_lr'] for h in ours.hypers]==[.5,.1]

# ---------------------------------------------------------------- max_lr as a hyperparameter
def two(): return [[nn.Parameter(torch.ones(2))],[nn.Parameter(torch.ones(3))]]

@every
@pytest.mark.engine
def test_default_is_each_groups_lr(name):
    f = get_optimizer(name).func
    def got(*args, **kw): return [h['max_lr'] for h in f(*args, decouple_lr=True, wd=0., **KW.get(name, {}), **kw).hypers]
    assert got(two(), .1)==[.1,.1] and got(two(), [.1,.2])==[.1,.2] and got(two(), slice(.1))==pytest.approx([.01,.1])
    assert (got(two(), .1, max_lr=.5)==[.5,.5] and got(two(), .1, max_lr=[.5,.6])==[.5,.6]
            and got(two(), .1, max_lr=slice(.1))==pytest.approx([.01,.1]))
    a,b = two()
    assert got([dict(params=a, lr=.3), dict(params=b)], .1)==[.3,.1] and got([dict(params=a, max_lr=.3), dict(params=b)], .1)==[.3,.1]
    h = f(two(), np.float32(.5), decouple_lr=True, wd=0., **KW.get(name, {}), max_lr=np.float32(.5)).hypers[0]
    assert type(h['max_lr']) is float and all(type(v) in (int,float) for v in h.values())

@every
def test_off_by_default(name):
    opt = get_optimizer(name).func(two(), .1)
    assert 'max_lr' not in opt.hypers[0] and not getattr(opt, 'decouple_lr', False) and MaxLR not in getattr(opt, 'learner_cbs', ())

@pytest.mark.parametrize('bad', [0, 0., -1., float('nan'), float('inf'), 'high', [.1,.2,.3]])
def test_bad_max_lr(bad):
    with pytest.raises(ValueError, match='max_lr='): Adam(two(), .1, decouple_lr=True, max_lr=bad)
    if not isinstance(bad, list):
        with pytest.raises(ValueError, match='max_lr='): adam(decouple_lr=True, max_lr=bad)

def test_factory_takes_its_defaults_when_said():
    assert adam(max_lr=None, kahan_sum=None, state_dtype=None)(two(), lr=.1).hypers[0]['lr']==.1

@pytest.mark.parametrize('name', L2)
def test_refuses_l2(name):
    with pytest.raises(ValueError, match='decouple_lr=True and decouple_wd=False'):
        get_optimizer(name).func(two(), .1, decouple_lr=True, decouple_wd=False)

def test_refuses_what_would_be_dropped():
    with pytest.raises(ValueError, match='max_lr=0.1 without decouple_lr=True'): Adam(two(), .1, max_lr=.1)
    with pytest.raises(ValueError, match="Parameter group 0 has max_lr=0.1"): Adam([dict(params=two()[0], max_lr=.1)], .1)
    with pytest.raises(ValueError, match='no stepper of sgd_step decays the weights'):
        make_optimizer(two(), fo.sgd_step, lr=.1, decouple_lr=True)
    with pytest.raises(ValueError, match='no stepper of _step decays'):
        def _step(p, lr, wd, **kwargs): p.data.mul_(1-lr*wd)
        make_optimizer(two(), [_step], lr=.1, wd=0., decouple_lr=True)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_a_stepper_of_ones_own(mode):
    @decays_weights
    def shrink(p, lr, wd, amount=1., **kwargs):
        if wd!=0: p.data.sub_(torch.sign(p.data), alpha=lr*wd*amount)
    f = lambda ps, lr: make_optimizer(ps, [partial(shrink, amount=2.), fo.sgd_step], lr=lr, wd=WD, decouple_lr=True, **flags(mode))
    assert take_steps(f, [1.,-2.], [0.,0.], lr=.3).tolist()==pytest.approx([1-2*WD,-2+2*WD], rel=1e-13)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_without_max_lr_a_step_fails_and_changes_nothing(mode):
    "The state of an optimizer without `decouple_lr` has none"
    p = make_params(dtype=torch.float64, big=False, channels_last=False)
    plain,opt = Adam(two_groups(copy_params(p)), .1),Adam(two_groups(p), .1, decouple_lr=True, wd=WD, **flags(mode))
    opt.load_state_dict(plain.state_dict())
    GradStream().set(p, 0)
    with unchanged(p, opt), pytest.raises(ValueError, match="needs the hyperparameter 'max_lr'"): opt.step()
    opt.set_hyper('max_lr', .1)
    opt.step()

@pytest.mark.parametrize('name,src,dst', [slow(n, a, b, when='triton' in (a,b) and not (n=='adam' and 'native' in (a,b)))
                                          for n in ('adam','ranger','stableadam') for a in ALL_MODES for b in ALL_MODES])
def test_checkpoint_crosses_modes(name, src, dst):
    def make(ps, mode, **kw): return WithBackend(partial(get_optimizer(name).func, lr=.1, wd=WD, decouple_lr=True,
                                                         **{**KW.get(name, {}), **kw}, **flags(mode)), mode)(two_groups(ps))
    a = make_params(dtype=torch.float64, big=False)
    opt = make(a, src, max_lr=PEAKS)
    for i in range(4): scheduled(i, opt, a, GradStream())
    for i in range(4): GradStream().set(a, i); opt.step()
    b = copy_params(a)
    new = make(b, dst)
    new.load_state_dict(detach_copy(opt.state_dict()))
    assert [h['max_lr'] for h in new.hypers]==PEAKS
    for ps,o in ((a,opt),(b,new)):
        for i in range(4,9): GradStream().set(ps, i); o.step()
    assert_same(snapshot(b, new), snapshot(a, opt), **TOL[torch.float64])

# ---------------------------------------------------------------- the warning
def caught(f):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in w if 'decouple_lr' in str(o.message)]

def test_warns_of_a_high_wd():
    "At optimi's threshold"
    for wd,n in ((0.,0),(9.9e-4,0),(1e-3,1),(.1,1)):
        assert len(caught(lambda: Adam(two(), .1, wd=wd, decouple_lr=True)))==n
        assert len(caught(lambda: optimi.AdamW(two()[0], lr=.1, weight_decay=wd, decouple_lr=True)))==n
    assert 'wd=0.01 is high' in caught(lambda: Adam(two(), .1, decouple_lr=True))[0] # Adam's default suits a decay that lr scales
    assert len(caught(lambda: Adam([dict(params=two()[0]),dict(params=two()[1],wd=.1)], .1, wd=0., decouple_lr=True)))==1
    assert not caught(lambda: Adam(two(), .1, wd=.5))
    msg = caught(lambda: ranger(decouple_lr=True)(two(), lr=.1))
    assert len(msg)==1 and 'wd=0.01' in msg[0]

# ---------------------------------------------------------------- the Learner
class Watch(Callback):
    "lr and max_lr of each step, one row per group"
    order,run_valid = 90,False
    def before_fit(self): self.rows = []
    def before_step(self): self.rows.append([(h['lr'],h.get('max_lr', math.nan)) for h in self.opt.hypers])
    @property
    def lrs(self): return np.array(self.rows, dtype=float)[...,0]
    @property
    def peaks(self): return np.array(self.rows, dtype=float)[...,1]

def split3(m): return [params(o) for o in m]

def synth(opt_func=None, n_batches=10, path=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(n_batches*4, 3)
    ds = list(zip(x, x.sum(1, keepdim=True)))
    dls = DataLoaders(DataLoader(ds, bs=4), DataLoader(ds[:8], bs=4), device='cpu')
    model = nn.Sequential(nn.Linear(3,4), nn.Linear(4,4), nn.Linear(4,1))
    learn = Learner(dls, model, nn.MSELoss(), opt_func=sgd(decouple_lr=True, wd=WD) if opt_func is None else opt_func, splitter=split3,
                    cbs=Watch(), path=path, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *a: None
    return learn

def cbs_of(learn): return [cb for cb in learn.cbs if isinstance(cb, MaxLR)]

def check_peaks(learn, rtol=1e-12):
    "In each step of the last fit, each group's max_lr is the highest lr that it had in this fit"
    w = learn.watch
    assert len(w.rows) and all(type(h['max_lr']) is float for h in learn.opt.hypers)
    np.testing.assert_allclose(w.peaks, np.broadcast_to(w.lrs.max(0), w.peaks.shape), rtol=rtol)
    assert len(cbs_of(learn))==1

FITS = dict(
    fit=lambda l: l.fit(2, .03), fit_default=lambda l: l.fit(1), fit_slice=lambda l: l.fit(2, slice(1e-3,.1)),
    one_cycle=lambda l: l.fit_one_cycle(3, .1), one_cycle_default=lambda l: l.fit_one_cycle(2),
    one_cycle_low=lambda l: l.fit_one_cycle(2, 1e-5),
    one_cycle_slice=lambda l: l.fit_one_cycle(3, slice(1e-4,.1), pct_start=.37, div=3),
    one_cycle_short=lambda l: l.fit_one_cycle(1, slice(.1)),
    flat_cos=lambda l: l.fit_flat_cos(2, .1), flat_cos_slice=lambda l: l.fit_flat_cos(2, slice(1e-3,.1)),
    sgdr=lambda l: l.fit_sgdr(2, 1, .1), sgdr_slice=lambda l: l.fit_sgdr(2, 1, slice(1e-3,.1)),
    flat_varied=lambda l: l.fit_flat_varied(4, 1e-3, next_lr=slice(1e-3,.1), change_by=2),
    linear=lambda l: l.fit(2, cbs=ParamScheduler(dict(lr=SchedLin(0., .2)))),
    list_of_values=lambda l: l.fit(2, cbs=ParamScheduler(dict(lr=lambda p: [.1*p,.2*(1-p),.05]))),
    slice_of_values=lambda l: l.fit(2, cbs=ParamScheduler(dict(lr=lambda p: slice(1e-3, 1e-3+.1*p)))),
    momentum_alone=lambda l: l.fit(2, .03, cbs=ParamScheduler(dict(mom=SchedLin(.9, .5)))),
    two_schedulers=lambda l: l.fit(2, cbs=[ParamScheduler(dict(lr=SchedLin(9., 9.))), ParamScheduler(dict(lr=SchedLin(0., .2)))]),
    accumulated=lambda l: l.fit_one_cycle(2, .1, cbs=GradientAccumulation(4)))

@pytest.mark.parametrize('how', list(FITS))
def test_max_lr_is_the_peak_of_the_fit(how):
    learn = synth()
    with no_warnings(): FITS[how](learn)
    # accumulation steps at every batch here; a step sees a batch's lr
    check_peaks(learn)

@pytest.mark.parametrize('how', ['one_cycle_slice','sgdr'])
@pytest.mark.parametrize('mode', ALL_MODES)
def test_training_with_it(how, mode):
    "The same weights in every mode, and those of `wd` over each group's peak without the option"
    def train(opt_func):
        learn = synth(opt_func)
        FITS[how](learn)
        return [p.detach() for p in learn.model.parameters()],learn
    a,learn = train(WithBackend(adam(decouple_lr=True, wd=9e-4, **flags(mode)), mode))
    wd = [9e-4/o for o in learn.watch.lrs.max(0)]
    b,_ = train(adam(wd=wd))
    assert_same(a, b, **TOL[torch.float32])

def test_long_fits_are_read_on_a_grid():
    learn = synth(n_batches=600)
    learn.fit_one_cycle(2, slice(1e-4,.1), pct_start=.123)
    check_peaks(learn, 1e-3)
    assert learn.watch.lrs.max(0)==pytest.approx(learn.watch.peaks[-1], rel=1e-4)

def test_fine_tune_and_freezing():
    learn = synth()
    learn.fine_tune(2, .1, freeze_epochs=1)
    check_peaks(learn)
    np.testing.assert_allclose(learn.watch.peaks[0], [5e-4,5e-3,.05], rtol=1e-3)
    learn.freeze(); learn.fit_one_cycle(1, .2); check_peaks(learn)
    learn.freeze_to(1); learn.fit(1, .01); check_peaks(learn)
    learn.unfreeze(); learn.fit(1, slice(.01)); check_peaks(learn)

def test_each_fit_has_its_own():
    learn = synth()
    for lr in (.1, 1e-3, .02):
        learn.fit_one_cycle(2, lr); check_peaks(learn)
        assert learn.watch.peaks[0]==pytest.approx([lr]*3, rel=1e-9)
        learn.fit(1, lr/2); check_peaks(learn)
        assert [h['max_lr'] for h in learn.opt.hypers]==[lr/2]*3

def test_reset_opt_and_new_optimizers():
    learn = synth()
    learn.fit_one_cycle(2, .1)
    learn.fit_one_cycle(2, slice(1e-3,.02), reset_opt=True); check_peaks(learn)
    learn.opt = None
    learn.create_opt()
    assert len(cbs_of(learn))==1 and learn.opt.hypers[0]['max_lr']==learn.lr
    learn.fit(1, .05); check_peaks(learn)

def test_lr_find_before_a_fit():
    learn = synth()
    learn.lr_find(show_plot=False, num_it=20, stop_div=False, end_lr=.1)
    assert (learn.watch.peaks[0]==pytest.approx(learn.watch.lrs.max(0).tolist())
            and not len(learn.opt.state[learn.model[0].weight].get('grad_avg', [])))
    learn.fit_one_cycle(2, slice(1e-4,.01)); check_peaks(learn)
    fresh = synth()
    fresh.fit_one_cycle(2, slice(1e-4,.01))
    assert_bitwise([p.data for p in learn.model.parameters()], [p.data for p in fresh.model.parameters()])

def test_lr_find_reads_its_own_positions():
    learn = synth()
    learn.create_opt(); learn.n_epoch = 3
    with learn.added_cbs(LRFinder(1e-4, 1., num_it=20)): assert peak_lrs(learn)==pytest.approx([10**(-4+4*19/20)]*3)

def test_start_epoch_goes_on_as_if_uninterrupted(tmp_path):
    "The peak is in the epochs that were done before"
    whole = synth(adam(decouple_lr=True, wd=9e-4))
    whole.fit_one_cycle(4, slice(1e-3,.1))
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch==2: from fastai.callback.core import CancelFitException; raise CancelFitException
    parts = synth(adam(decouple_lr=True, wd=9e-4), path=tmp_path)
    parts.fit_one_cycle(4, slice(1e-3,.1), cbs=Stop())
    parts.save('half')
    rest = synth(adam(decouple_lr=True, wd=9e-4, foreach=True), path=tmp_path)
    with no_warnings(['numpy.core']): rest.load('half')
    rest.fit_one_cycle(4, slice(1e-3,.1), start_epoch=2)
    np.testing.assert_allclose(rest.watch.peaks, whole.watch.peaks[20:], rtol=1e-12)
    assert_same([p.data for p in rest.model.parameters()], [p.data for p in whole.model.parameters()], **TOL[torch.float32])

def test_save_and_load(tmp_path):
    learn = synth(path=tmp_path)
    learn.fit_one_cycle(2, .1)
    peak = learn.opt.hypers[0]['max_lr']
    with no_warnings(['numpy.core']):
        learn.save('a')
        learn.fit(1, 1e-3)
        learn.load('a')
    assert learn.opt.hypers[0]['max_lr']==peak
    learn.fit_one_cycle(2, .02); check_peaks(learn)
    old = synth(sgd(), path=tmp_path); old.create_opt(); old.save('b')
    learn.load('b')
    assert 'max_lr' not in learn.opt.hypers[0]
    learn.fit_one_cycle(1, .03); check_peaks(learn) # the callback puts it back

@pytest.mark.parametrize('opt_func', [sgd(decouple_lr=True, wd=WD), partial(Adam, decouple_lr=True, wd=WD, foreach=True),
                                      ranger(decouple_lr=True, wd=WD)], ids=['factory','partial','ranger'])
def test_export_and_load_learner(opt_func, tmp_path):
    learn = digits('sgd', 'native', tmp_path)
    learn.opt_func = opt_func
    learn.add_cb(Watch())
    learn.fit_one_cycle(1, .05)
    peaks = [h['max_lr'] for h in learn.opt.hypers]
    learn.export('a.pkl')
    assert len(cbs_of(learn))==1 and [h['max_lr'] for h in learn.opt.hypers]==peaks
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'a.pkl')
    assert new.opt is None and len(cbs_of(new))==1
    new.dls = learn.dls
    for l in (learn,new):
        l.fit_one_cycle(1, slice(1e-4,.02)); check_peaks(l)

def test_validation_is_no_fit():
    "`validate` and `get_preds` call `before_fit` too, without a schedule, before there is an optimizer and after a fit, and within one"
    class Within(Callback):
        def after_train(self): self.learn.validate()
    learn = synth()
    learn.add_cb(MaxLR())
    assert learn.opt is None
    learn.validate(); learn.get_preds()
    learn.fit_one_cycle(2, slice(1e-3,.1)); check_peaks(learn)
    peaks = [h['max_lr'] for h in learn.opt.hypers]
    learn.validate(); learn.get_preds(); learn.get_preds(inner=True)
    assert [h['max_lr'] for h in learn.opt.hypers]==peaks
    learn.remove_cb(Watch)
    learn.fit_flat_cos(2, .3, cbs=Within())
    assert [h['max_lr'] for h in learn.opt.hypers]==pytest.approx([.3]*3, rel=1e-12)

class Plateau(ReduceLROnPlateau):
    def __init__(self): super().__init__(monitor='train_loss', min_delta=1e9, patience=1, factor=10.)

def test_reduce_lr_on_plateau():
    learn = synth()
    learn.fit(4, .1, cbs=Plateau())
    assert learn.watch.lrs.min()<=1e-3 and (learn.watch.peaks==.1).all()
    check_peaks(learn)

def test_a_rate_from_elsewhere_raises_it():
    class Higher(Callback):
        run_valid = False
        def after_batch(self):
            if self.train_iter==3: self.opt.set_hyper('lr', [.1,.3,.5])
    learn = synth()
    learn.fit(1, .2, cbs=Higher())
    peaks = learn.watch.peaks
    assert (peaks[:3]==.2).all() and (peaks[3:]==[.2,.3,.5]).all() and type(learn.opt.hypers[2]['max_lr']) is float

def test_only_max_lr_and_only_numbers():
    "TensorBoard logs every hyperparameter"
    learn = synth()
    learn.fit_one_cycle(1, slice(1e-3,.1))
    assert all(isinstance(v, (int,float)) for h in learn.opt.hypers for v in h.values())
    assert all(set(h)=={'wd','lr','mom','max_lr'} for h in learn.opt.hypers)

@pytest.mark.parametrize('given', [.7, [.5,.6,.7]])
def test_given_max_lr_stays(given):
    learn = synth(sgd(decouple_lr=True, wd=WD, max_lr=given))
    want = given if isinstance(given, list) else [given]*3
    for f in ('one_cycle','fit','sgdr'):
        FITS[f](learn)
        assert (learn.watch.peaks==want).all()
    learn.fit(1, 2.) # above it: what was asked for
    assert (learn.watch.peaks==want).all()

def test_given_for_one_group_stays_there():
    def opt_func(groups, lr): return SGD([dict(params=g, **(dict(max_lr=.7) if i==1 else {})) for i,g in enumerate(groups)], lr,
                                         decouple_lr=True, wd=WD)
    learn = synth(opt_func)
    learn.fit_one_cycle(2, .1)
    assert (learn.watch.peaks[:,1]==.7).all() and learn.watch.peaks[:,[0,2]]==pytest.approx(learn.watch.lrs.max())

@pytest.mark.parametrize('opt_func', [ranger(decouple_lr=True, wd=WD), lambda p,
                                      lr: Lookahead(Adam(p, lr, decouple_lr=True, wd=WD, foreach=True)),
                                      lambda p,lr: fo.Lookahead(Adam(p, lr, decouple_lr=True, wd=WD))], ids=['ranger','ours','fastais'])
def test_inside_lookahead(opt_func):
    learn = synth(opt_func)
    for f in ('one_cycle_slice','fit','flat_cos'): FITS[f](learn); check_peaks(learn)

def test_learner_warns_once():
    learn = synth(sgd(decouple_lr=True, wd=WD))
    assert not caught(lambda: learn.fit(1, .1))
    assert len(caught(lambda: learn.fit(1, .1, wd=.05)))==1 and learn.opt.hypers[0]['wd']==.05
    assert not caught(lambda: learn.fit(1, .1, wd=.06))
    assert len(caught(lambda: learn.fit(1, .1, wd=.06, reset_opt=True)))==1 # a new optimizer
    learn = synth(ranger(decouple_lr=True, wd=.01))
    assert len(caught(lambda: (learn.fit(1, .1), learn.fit(1, .1, wd=.5))))==1
    learn = synth(sgd(decouple_lr=True, wd=WD, max_lr=.1), wd=.1)
    assert len(caught(lambda: learn.fit(1, .1)))==1
    assert not caught(lambda: synth(sgd(), wd=.5).fit(1, .1))

@every
@pytest.mark.engine
def test_without_the_option_no_callback(name):
    learn = synth(get_optimizer(name).factory())
    before = list(learn.cbs)
    learn.fit_one_cycle(1, 1e-3)
    assert [cb for cb in learn.cbs if type(cb).__name__!='ScheduleFreeMode']==before and 'max_lr' not in learn.opt.hypers[0]

def test_inert_with_another_optimizer():
    "The callback of an optimizer that was replaced"
    learn = synth()
    learn.fit(1, .1)
    learn.opt_func,learn.opt = fo.Adam,None
    learn.fit_one_cycle(1, .1)
    assert len(cbs_of(learn))==1 and 'max_lr' not in learn.opt.hypers[0]
    learn = synth(partial(fo.OptimWrapper, opt=torch.optim.SGD))
    learn.add_cb(MaxLR())
    learn.fit_one_cycle(1, .1)

# ---------------------------------------------------------------- callbacks that an optimizer brings
class First(Callback): "Nothing"
class Second(Callback): "Nothing"

def bringing(*cbs, make=fo.SGD):
    def opt_func(params, lr):
        opt = make(params, lr=lr)
        opt.learner_cbs = cbs
        return opt
    return opt_func

def names(learn, *cls): return [type(c).__name__ for c in learn.cbs if isinstance(c, cls)]

def test_learner_cbs_are_added_once():
    learn = synth(bringing(First, Second))
    assert names(learn, First, Second)==[]
    for _ in range(3): learn.create_opt()
    assert names(learn, First, Second)==['First','Second'] and learn.first.learn is learn
    learn.fit(1, reset_opt=True)
    assert names(learn, First, Second)==['First','Second']

def test_learner_cbs_the_learner_has():
    class Mine(Second): "A subclass counts"
    learn = synth(bringing(First, Second))
    own = First()
    learn.add_cbs([own, Mine()])
    learn.create_opt()
    assert names(learn, First, Second)==['First','Mine'] and learn.first is own
    learn = synth(bringing(First))
    learn.add_cb(type('First', (Callback,), {})()) # the class of that name from before a reload
    learn.create_opt()
    assert len(learn.cbs.filter(lambda c: c.name=='first'))==1

def test_learner_cbs_of_a_wrapped_optimizer():
    for wrap in (fo.Lookahead, Lookahead):
        inner = bringing(First)
        learn = synth(lambda p,lr: wrap(inner(p, lr)))
        learn.create_opt()
        assert names(learn, First)==['First']

def test_learner_cbs_reach_the_fit_that_creates_the_optimizer():
    class Fits(Callback):
        n = 0
        def before_fit(self): type(self).n += 1
    synth(bringing(Fits)).fit(1)
    assert Fits.n==1

def test_the_patch_survives_a_reload_and_others():
    "In a separate process: importing one algorithm is enough, a reload does not stack patches, and someone else's patch stays"
    code = '''
import importlib,functools
from fastai.learner import Learner
fastais = Learner.create_opt
from fastxtend_opt.algorithms.adam import adam
import sys
from functools import partial
from fastxtend_opt.training import learner
assert Learner.create_opt is not fastais and Learner.create_opt.__wrapped__ is fastais
for _ in range(3): importlib.reload(learner)
assert Learner.create_opt.__wrapped__ is fastais
ours,calls = Learner.create_opt,[]
@functools.wraps(ours)
def theirs(self): calls.append(1); return ours(self)
Learner.create_opt = theirs
importlib.reload(learner)
assert Learner.create_opt.__wrapped__ is theirs
import torch
from torch import nn
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
ds = [(torch.ones(1),torch.ones(1))]*4
dls = DataLoaders(DataLoader(ds, bs=2), DataLoader(ds, bs=2), device='cpu')
for f in (adam(decouple_lr=True, wd=1e-5), partial(sys.modules['fastxtend_opt.algorithms.adam'].Adam, decouple_lr=True, wd=1e-5)):
    learn = Learner(dls, nn.Linear(1,1), nn.MSELoss(), opt_func=f)
    learn.create_opt()
    assert [type(c).__name__ for c in learn.cbs].count('MaxLR')==1
assert len(calls)==2
print('fine')'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.strip().endswith('fine'), r.stderr[-3000:]
