"""Every algorithm against code that is not ours: the float64 references in `reference/`, fastai's functions, torch.optim, optimi,
pytorch_optimizer. All trajectories: float64, 30 steps of an lr schedule that differs by group, two groups, a tensor excluded from decay,
one whose gradients come late, an element whose gradient is always zero, and two gradient spikes of a thousand."""
import math
import fastai.optimizer as fo,numpy as np,pytest,torch
from torch import nn
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
import oracles
import reference as R
from helpers import *

N,SPIKES,LATE,NO_DECAY = 30,(7,19),3,1
ROWS = {o.name: o for o in list_optimizers()}
SHAPES_O = ((), (1,), (9,), (5,3), (4,3,2,2), (40,))
TOL64 = TOL[torch.float64]

# name: (reference from (theta, hypers, decay of this tensor), reference attribute of each state name, hypers of the cases)
def _adam(o): return dict(beta1=o['mom'], beta2=o['sqr_mom'], eps=o['eps'])
REFS = {
    'sgd':     (lambda t,h,lam: R.SGD(t, h['mom'], lam, h['decouple_wd']), dict(grad_avg='v'), [dict(mom=0.), dict(mom=.9)]),
    'rmsprop': (lambda t,h,lam: R.RMSProp(t, h['mom'], h['sqr_mom'], h['eps'], lam, h['decouple_wd']),
                dict(grad_avg='b', sqr_avg='mean_square'),
                [dict(mom=0., sqr_mom=.99, eps=1e-8), dict(mom=.9, sqr_mom=.9, eps=1e-8)]),
    'adam':    (lambda t,h,lam: R.Adam(t, **_adam(h), lam=lam, decoupled=h['decouple_wd']), dict(grad_avg='m', sqr_avg='v', step='t'),
                [dict(mom=.9, sqr_mom=.99, eps=1e-5), dict(mom=.5, sqr_mom=.999, eps=1e-8), dict(mom=0., sqr_mom=.9, eps=1e-3)]),
    'radam':   (lambda t,h,lam: R.RAdam(t, **_adam(h), lam=lam, beta=h['beta'], decoupled=h['decouple_wd']),
                dict(grad_avg='m', sqr_avg='v', step='t'),
                [dict(mom=.9, sqr_mom=.99, eps=1e-5, beta=0.), dict(mom=.95, sqr_mom=.9, eps=1e-6, beta=0.),
                 dict(mom=.9, sqr_mom=.5, eps=1e-6, beta=0.), # rho_inf = 3: never rectified
                 dict(mom=.9, sqr_mom=.99, eps=1e-5, beta=.03)]), # beta*den stays below 20, where softplus is exact
    'qhadam':  (lambda t,h,lam: R.QHAdam(t, **_adam(h), nu1=h['nu_1'], nu2=h['nu_2'], lam=lam, decoupled=h['decouple_wd']),
                dict(grad_avg='m', sqr_avg='v', step='t'),
                [dict(mom=.999, sqr_mom=.999, nu_1=.7, nu_2=1., eps=1e-8), dict(mom=.9, sqr_mom=.99, nu_1=.8, nu_2=.6, eps=1e-4)]),
    'larc':    (lambda t,h,lam: R.LARS(t, h['mom'], h['trust_coeff'], h['eps'], lam, h['clip'], h['decouple_wd'], denominator_lam=h['wd']),
                dict(grad_avg='v', local_lr='local_lr'),
                [dict(mom=.9, trust_coeff=.02, eps=1e-8, clip=True), dict(mom=.9, trust_coeff=.02, eps=1e-8, clip=False),
                 dict(mom=.9, trust_coeff=50., eps=1e-8, clip=True), # large enough for the clip to bind
                 dict(mom=0., trust_coeff=.001, eps=1e-4, clip=False)]),
    'lamb':    (lambda t,h,lam: R.LAMB(t, **_adam(h), lam=lam, decoupled=h['decouple_wd']), dict(grad_avg='m', sqr_avg='v', step='t'),
                [dict(mom=.9, sqr_mom=.99, eps=1e-5), dict(mom=.8, sqr_mom=.999, eps=1e-8)]),
    'ranger':  (None, dict(grad_avg='m', sqr_avg='v', step='t'),
                [dict(mom=.95, sqr_mom=.99, eps=1e-6, k=6, alpha=.5, beta=0.),
                 dict(mom=.9, sqr_mom=.9, eps=1e-5, k=5, alpha=.8, beta=.03)]),
    'adan':    (lambda t,h,lam: R.Adan(t, 1-h['beta1'], 1-h['beta2'], 1-h['beta3'], h['eps'], lam, zero_prior=not h['paper_init']),
                dict(grad_avg='m', diff_avg='v', sqr_avg='n', prior_grad='g_prior', step='t'),
                [dict(beta1=.98, beta2=.92, beta3=.99, eps=1e-8, paper_init=True),
                 dict(beta1=.9, beta2=.5, beta3=.8, eps=1e-3, paper_init=True),
                 dict(beta1=.98, beta2=.92, beta3=.99, eps=1e-6, paper_init=False)]),
    'lion':    (lambda t,h,lam: R.Lion(t, h['beta1'], h['beta2'], lam), dict(grad_avg='m'),
                [dict(beta1=.9, beta2=.99), dict(beta1=.95, beta2=.8)]),
    'stableadam': (lambda t,h,lam: R.StableAdamW(t, **_adam(h), lam=lam, decoupled=h['decouple_wd']),
                   dict(grad_avg='v', sqr_avg='u', step='t'),
                [dict(mom=.9, sqr_mom=.99, eps=1e-6), dict(mom=.5, sqr_mom=.9, eps=1e-2), dict(mom=0., sqr_mom=.999, eps=1e-6)]),
    'sgd_schedulefree': (lambda t,h,lam: R.SGDScheduleFree(t, h['beta'], lam, h['warmup_steps'], h['r'], h['weight_lr_power']),
                         dict(z='z', step='t', weight_sum='W', lr_max='gamma_max'),
                [dict(beta=.9, warmup_steps=0, r=0., weight_lr_power=2.), dict(beta=.98, warmup_steps=10, r=1.5, weight_lr_power=1.)]),
    'adamw_schedulefree': (lambda t,h,lam: R.AdamWScheduleFree(t, h['beta'], h['sqr_mom'], h['eps'], lam, h['warmup_steps'], h['r'],
                                                               h['weight_lr_power']),
                dict(z='z', sqr_avg='v', step='t', weight_sum='W', lr_max='gamma_max'),
                [dict(beta=.9, sqr_mom=.999, eps=1e-8, warmup_steps=0, r=0., weight_lr_power=2.),
                 dict(beta=.5, sqr_mom=.9, eps=1e-3, warmup_steps=10, r=1., weight_lr_power=0.)]),
    'radam_schedulefree': (lambda t,h,lam: R.RAdamScheduleFree(t, h['beta'], h['sqr_mom'], h['eps'], lam, h['r'], h['weight_lr_power'],
                                                               h['silent_sgd_phase']),
                dict(z='z', sqr_avg='v', step='t', weight_sum='W', lr_max='gamma_max'),
                [dict(beta=.9, sqr_mom=.999, eps=1e-8, r=0., weight_lr_power=2., silent_sgd_phase=True),
                 dict(beta=.95, sqr_mom=.9, eps=1e-3, r=.5, weight_lr_power=1., silent_sgd_phase=False)]),
    'sophia':  (lambda t,h,lam: R.SophiaG(t, h['mom'], h['hess_mom'], h['rho'], h['eps'], lam), dict(grad_avg='exp_avg', hessian='hessian'),
                [dict(mom=.965, hess_mom=.99, rho=.04, eps=1e-15), dict(mom=.8, hess_mom=.9, rho=.5, eps=1.)])} # with update_hessian: below
ORACLES = oracles.load()
REFS.update({n: (o.REFERENCE, o.STATE, o.CASES) for n,o in ORACLES.items()})
DECAYS = {'none': dict(wd=0., decouple_wd=True), 'decoupled': dict(wd=.1, decouple_wd=True), 'L2': dict(wd=.1, decouple_wd=False)}
FASTAI = dict(sgd='SGD', rmsprop='RMSProp', adam='Adam', radam='RAdam', qhadam='QHAdam', larc='Larc', lamb='Lamb', ranger='ranger')
CASES = [(n,i) for n,o in REFS.items() for i in range(len(o[2]))]
FASTAI_CASES = [(n,i) for n,i in CASES if n in FASTAI]
SOURCES = [('fastai',*c) for c in FASTAI_CASES] + [('ours',*c) for c in CASES]
def decays_of(name):
    "An optimizer's kinds of decay: one without `decouple_wd`, none without `wd`"
    have = ROWS[name].hypers
    return [d for d in DECAYS if 'wd' in have and (d!='L2' or 'decouple_wd' in have) or d=='none']

def hypers_of(name, h, decay):
    "A case's hyperparameters together with a decay's"
    return {**h, **{k:v for k,v in DECAYS[decay].items() if k in ROWS[name].hypers}}

def ours(name, **kw):
    return lambda params, lr: get_optimizer(name).func(params, lr=lr, **kw)

def theirs(name, **kw): return lambda params, lr: getattr(fo, FASTAI[name])(params, lr=lr, **kw)

def lrs_at(i):
    "The two groups' learning rates at step `i`, warmed up and then cosine-annealed"
    top = min(1., (i+1)/8)*.5*(1+math.cos(math.pi*i/N))
    return [3e-3*top, 1e-2*top]

def problem(zero_element=True, late=True, spikes=SPIKES):
    "Parameters, their group, and the gradients (numpy, or None) of each step"
    params = make_params(SHAPES_O, torch.float64, seed=11, big=False, channels_last=False)
    group,stream = [0 if j < len(params)//2 else 1 for j in range(len(params))],GradStream(5, spikes)
    gs = []
    for i in range(N):
        g = [stream.values(p, i, j).numpy().copy() for j,p in enumerate(params)]
        if not zero_element:
            for o in g: o[o==0] = .1
        if late and i < LATE: g[-1] = None
        gs.append(g)
    return params,group,gs

def set_grads(params, gs):
    for p,g in zip(params, gs): p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)

def run_fastai(opt_func, params, group, gs, no_decay=NO_DECAY):
    "Parameters after each step of a fastai-style optimizer, and the optimizer"
    opt = opt_func([[p for p,o in zip(params,group) if o==k] for k in (0,1)], lr=1.)
    if no_decay is not None: opt.state[params[no_decay]]['do_wd'] = False
    res = []
    for i,g in enumerate(gs):
        set_grads(params, g)
        opt.set_hyper('lr', lrs_at(i))
        opt.step()
        res.append([p.detach().numpy().copy() for p in params])
    return res,opt

def run_reference(name, hypers, params, group, gs, no_decay=NO_DECAY):
    thetas = [p.detach().numpy().copy() for p in params]
    lams,look = [0. if j==no_decay else hypers.get('wd', 0.) for j in range(len(params))],None
    if name=='ranger':
        h = hypers
        look = R.Ranger(thetas, h['mom'], h['sqr_mom'], h['eps'], lams, h['k'], h['alpha'], h['beta'], h['decouple_wd'])
        objs = look.inner
    elif getattr(ORACLES.get(name), 'WHOLE_MODEL', False):
        look = REFS[name][0](thetas, hypers, lams)
        objs = look.inner
    else:
        objs = [REFS[name][0](t, hypers, lam) for t,lam in zip(thetas, lams)]
    res = []
    for i,g in enumerate(gs):
        lr = [lrs_at(i)[k] for k in group]
        if look is not None: look.step(g, lr)
        else:
            for o,x,l in zip(objs, g, lr):
                if x is not None: o.step(x, l)
        res.append([np.array(o.theta) for o in objs])
    return res,objs

def run_torch(make, params, group, gs, wd, no_decay=NO_DECAY):
    "The same with an optimizer of torch's interface: one group per tensor, so that counters kept by group count as ours do"
    opt = make([dict(params=[p], weight_decay=0. if j==no_decay else wd) for j,p in enumerate(params)])
    res = []
    for i,g in enumerate(gs):
        set_grads(params, g)
        for pg,k in zip(opt.param_groups, group): pg['lr'] = lrs_at(i)[k]
        opt.step()
        res.append([p.detach().numpy().copy() for p in params])
    return res

def distance(a, b, start):
    "Largest difference between two trajectories' ends, relative to the path of `b`"
    d = max(np.abs(x-y).max() for x,y in zip(a[-1], b[-1]))
    return d/max(np.abs(y-p.detach().numpy()).max() for y,p in zip(b[-1], start))

@pytest.mark.parametrize('source,name,case,decay', [(*c, d) for c in SOURCES for d in decays_of(c[1])])
def test_native_against_reference(source, name, case, decay):
    h = hypers_of(name, REFS[name][2][case], decay)
    params,group,gs = problem()
    ref,objs = run_reference(name, h, params, group, gs)
    got,opt = run_fastai((theirs if source=='fastai' else ours)(name, **h), params, group, gs)
    for i,(a,b) in enumerate(zip(got, ref)): assert_same(a, b, **TOL64, path=f'step {i}')
    for j,(p,o) in enumerate(zip(params, objs)):
        for k,attr in REFS[name][1].items():
            if k=='grad_avg' and h.get('mom')==0. and k not in opt.state[p]: continue # without momentum nothing is averaged
            assert_same(np.asarray(opt.state[p][k], dtype=np.float64), np.asarray(getattr(o, attr), dtype=np.float64), **TOL64,
                        path=f'{k} of tensor {j}')

@pytest.mark.parametrize('name', [o for o in ROWS if o != 'lookahead'])
def test_every_registered_optimizer_has_an_oracle(name):
    assert name in REFS, f"add tests/oracles/{name}.py: what {name} is tested against"
    assert len(REFS[name][2]) > 1, f'{name}: two settings at least'
    if ROWS[name].oracle.startswith('reference.'): assert hasattr(R, ROWS[name].oracle.split('.')[1]) or name in ORACLES

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('decay', list(DECAYS))
@pytest.mark.parametrize('name,case', FASTAI_CASES)
def test_ours_against_fastai(name, case, decay, dtype):
    "Native mode and fastai's own function, params and state (fastai's LARC keeps `local_lr` as a float where the clip binds)"
    h = {**REFS[name][2][case], **DECAYS[decay]}
    params,group,gs = problem()
    runs = []
    for make in (ours, theirs):
        ps = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
        runs.append((run_fastai(make(name, **h), ps, group, gs), ps))
    (a,oa),pa = runs[0]; (b,ob),pb = runs[1]
    # the spikes make momenta of 1e3, whose cancellation leaves 1e3 roundings of 1
    tol = TOL64 if dtype==torch.float64 else dict(rtol=2e-5, atol=1e-5)
    for i,(x,y) in enumerate(zip(a, b)): assert_same(x, y, **tol, path=f'step {i}')
    tol = tol if dtype==torch.float64 else dict(rtol=2e-5, atol=1e-3)
    for p,q in zip(pa, pb):
        sa,sb = dict(oa.state[p]),dict(ob.state[q])
        la,lb = sa.pop('local_lr', 0.),sb.pop('local_lr', 0.)
        sa.pop('slow_p', None) # fastai's Lookahead keeps its slow weights outside the state
        assert_same(float(la), float(lb), **tol)
        assert_same(sa, sb, **tol)

# ---------------------------------------------------------------- torch.optim, optimi, pytorch_optimizer
def torch_sgd(h):     return lambda g: torch.optim.SGD(g, lr=1., momentum=h['mom'])
def torch_adam(h):
    f = torch.optim.AdamW if h['decouple_wd'] else torch.optim.Adam
    return lambda g: f(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'])
def torch_radam(h):   return lambda g: torch.optim.RAdam(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'],
                                                         decoupled_weight_decay=h['decouple_wd'])
def torch_rmsprop(h): return lambda g: torch.optim.RMSprop(g, lr=1., momentum=h['mom'], alpha=h['sqr_mom'], eps=h['eps'])
def optimi_radam(h):
    import optimi
    return lambda g: optimi.RAdam(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], decouple_wd=h['decouple_wd'], foreach=False)
def optimi_adam(h):
    import optimi
    return lambda g: optimi.Adam(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], decouple_wd=h['decouple_wd'], foreach=False)
def optimi_sgd(h):
    import optimi
    return lambda g: optimi.SGD(g, lr=1., momentum=h['mom'], decouple_wd=h['decouple_wd'], foreach=False)
def optimi_ranger(h):
    import optimi
    return lambda g: optimi.Ranger(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], k=h['k'], alpha=h['alpha'],
                                   decouple_wd=h['decouple_wd'], foreach=False)
def optimi_adan(h):
    import optimi
    return lambda g: optimi.Adan(g, lr=1., betas=(h['beta1'],h['beta2'],h['beta3']), eps=h['eps'], foreach=False, triton=False)
def optimi_lion(h):
    import optimi
    return lambda g: optimi.Lion(g, lr=1., betas=(h['beta1'],h['beta2']), foreach=False, triton=False)
def optimi_stableadamw(h):
    import optimi
    return lambda g: optimi.StableAdamW(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], foreach=False, triton=False)
def po(name, h, **kw):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: getattr(pytorch_optimizer, name)(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'],
                                                      weight_decouple=h['decouple_wd'],
                                                      foreach=False, **kw)
def po_qhadam(h): return po('QHAdam', h, nus=(h['nu_1'],h['nu_2']))
def po_radam(h):  return po('RAdam', h)
def po_lion(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.Lion(g, lr=1., betas=(h['beta1'],h['beta2']), weight_decouple=True, use_gc=False, foreach=False)
def po_adan(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.Adan(g, lr=1., betas=(h['beta1'],h['beta2'],h['beta3']), eps=h['eps'], weight_decouple=False,
                                            foreach=False)
def po_stableadamw(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.StableAdamW(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=True)
def po_lamb(h):   return po('Lamb', h)

ADAM,QH = dict(mom=.9, sqr_mom=.99, eps=1e-5),dict(mom=.9, sqr_mom=.99, nu_1=.8, nu_2=.6, eps=1e-4)
# torch's SGD has no decoupled decay
AGREE = [('sgd', torch_sgd, dict(mom=0.), ('none','L2')), ('sgd', torch_sgd, dict(mom=.9), ('none','L2')),
         ('sgd', optimi_sgd, dict(mom=.9), tuple(DECAYS)),
         ('adam', torch_adam, ADAM, tuple(DECAYS)), ('adam', optimi_adam, ADAM, tuple(DECAYS)),
         ('rmsprop', torch_rmsprop, dict(mom=0., sqr_mom=.99, eps=1e-8), ('none','L2')),
         ('radam', optimi_radam, dict(ADAM, beta=0.), tuple(DECAYS)),
         ('ranger', optimi_ranger, dict(mom=.95, sqr_mom=.99, eps=1e-6, k=6, alpha=.5, beta=0.), tuple(DECAYS)),
         ('qhadam', po_qhadam, QH, tuple(DECAYS)),
         *[(n, f, h, ('none','decoupled')) for n,fs,hs in [
             ('adan', (optimi_adan,po_adan), (dict(beta1=.98, beta2=.92, beta3=.99, eps=1e-8),
                                              dict(beta1=.9, beta2=.5, beta3=.8, eps=1e-3))),
             ('lion', (optimi_lion,po_lion), (dict(beta1=.9, beta2=.99), dict(beta1=.95, beta2=.8))),
             ('stableadam', (optimi_stableadamw,po_stableadamw), (dict(mom=.9, sqr_mom=.99, eps=1e-6),
                                                                  dict(mom=.5, sqr_mom=.9, eps=1e-2)))] for f in fs for h in hs]]
AGREE += [(n, *o) for n,m in ORACLES.items() for o in getattr(m, 'PEERS', ())]
PEER_SOURCES = [('fastai',*o) for o in AGREE if o[0] in FASTAI] + [('ours',*o) for o in AGREE]
# pytorch_optimizer's QHAdam keeps its debias weights in float32, so its float64 results are good to about 1e-7 only
LOOSE = {po_qhadam: dict(rtol=1e-6, atol=1e-6)}

@pytest.mark.parametrize('source,name,peer,h,decay', [pytest.param(s, n, f, h, d,
                                                                   id=f'{f.__name__}-{"-".join(f"{k}{v}" for k,v in h.items())}-{d}-{s}')
                                                      for s,n,f,h,ds in PEER_SOURCES for d in ds])
def test_native_against_peer(source, name, peer, h, decay):
    h = hypers_of(name, h, decay)
    # they count a group's steps, without gradients too
    late = getattr(peer, 'late', not peer.__name__.startswith(('optimi','po_adan','po_lion','po_stable')))
    params,group,gs = problem(late=late)
    if getattr(peer, 'same_lr', False): group = [1]*len(group)
    theirs_,mine = copy_params(params),copy_params(params)
    ref = run_torch(peer(h), theirs_, group, gs, h.get('wd', 0.))
    got,_ = run_fastai((theirs if source=='fastai' else ours)(name, **h), mine, group, gs)
    for i,(a,b) in enumerate(zip(got, ref)): assert_same(a, b, **LOOSE.get(peer, getattr(peer, 'tol', None) or TOL64), path=f'step {i}')

def deviation(name, peer, h, **kw):
    h = hypers_of(name, h, 'none')
    params,group,gs = problem(late=False, **kw)
    ref = run_torch(peer({**h, **DECAYS['none']}), copy_params(params), group, gs, 0.)
    got,_ = run_fastai((theirs if name in FASTAI else ours)(name, **h), copy_params(params), group, gs)
    return distance(ref, got, params)

@pytest.mark.parametrize('name,peer,h,least', [pytest.param(n, *o, id=f'{n}-{o[0].__name__}') for n,
                                               m in ORACLES.items() for o in getattr(m, 'DEVIATIONS', ())])
def test_well_known_ports_that_are_another_algorithm(name, peer, h, least):
    "The differences that the page lists show"
    assert deviation(name, peer, h, spikes=()) > least

def test_torch_rmsprop_with_momentum_is_another_algorithm():
    "torch accumulates the normalised gradient, fastai (and we) the raw one"
    assert deviation('rmsprop', torch_rmsprop, dict(mom=.9, sqr_mom=.99, eps=1e-8)) > .05

def test_torch_radam_differs_by_where_eps_stands():
    "torch adds eps before the debiasing: seen with eps=1e-2, gone with eps=1e-30 (where no gradient is zero)"
    assert deviation('radam', torch_radam, dict(mom=.9, sqr_mom=.99, eps=1e-2, beta=0.), spikes=()) > 1e-3
    assert deviation('radam', torch_radam, dict(mom=.9, sqr_mom=.99, eps=1e-30, beta=0.), spikes=(), zero_element=False) < 1e-12

def test_pytorch_optimizer_radam_does_not_move_at_first():
    "It makes no step while the rectification is undefined, where the paper, torch and fastai take one of plain momentum"
    assert deviation('radam', po_radam, dict(mom=.9, sqr_mom=.99, eps=1e-5, beta=0.), spikes=()) > .05

def test_pytorch_optimizer_lamb_is_another_variant():
    "It clips the global gradient norm and the weight norm, and does not debias"
    assert deviation('lamb', po_lamb, dict(mom=.9, sqr_mom=.99, eps=1e-5), spikes=()) > .05

def test_fastai_drops_rmsprops_eps_and_ours_does_not():
    h = dict(mom=0., sqr_mom=.9, eps=.1, **DECAYS['none'])
    params,group,gs = problem()
    ref,_   = run_reference('rmsprop', h, params, group, gs)
    small,_ = run_reference('rmsprop', dict(h, eps=1e-8), params, group, gs)
    upstream,_ = run_fastai(theirs('rmsprop', **h), copy_params(params), group, gs)
    mine,_     = run_fastai(ours('rmsprop', **h), copy_params(params), group, gs)
    for i in range(N):
        assert_same(upstream[i], small[i], **TOL64)
        assert_same(mine[i], ref[i], **TOL64)

@pytest.mark.parametrize('source', ['fastai', 'ours'])
def test_sadam_softplus_is_linear_beyond_its_threshold(source):
    """torch's softplus returns x where beta*x > 20, which is 1e-9 of x from the formula: beta=10 puts spikes there, so 1e-8 holds and 1e-10
    need not"""
    h = dict(mom=.9, sqr_mom=.99, eps=1e-5, beta=10., **DECAYS['decoupled'])
    params,group,gs = problem()
    ref,_ = run_reference('radam', h, params, group, gs)
    got,_ = run_fastai((theirs if source=='fastai' else ours)('radam', **h), params, group, gs)
    for a,b in zip(got, ref): assert_same(a, b, rtol=1e-8, atol=1e-10)

@pytest.mark.parametrize('source', ['fastai', 'ours'])
@pytest.mark.parametrize('theta,g,q', [(np.zeros(4), np.ones(4), 1.), (np.full(4, 100.), np.full(4, 1.), 10.),
                                       (np.full(4, 2.), np.ones(4), 2.), (np.ones(4), np.zeros(4), 1.)])
def test_lamb_trust_ratio_edges(source, theta, g, q):
    "First step of LAMB on a constant tensor: r = g/(|g|+eps), so the step is lr*q with q = 1 where a norm is 0, else the ratio up to 10"
    p = nn.Parameter(torch.tensor(theta))
    opt = (theirs if source=='fastai' else ours)('lamb', wd=0., eps=1e-12)([p], lr=.1)
    p.grad = torch.tensor(g)
    opt.step()
    assert_same(p.detach().numpy(), theta - (.1*q*np.sign(g)), rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('source', ['fastai', 'ours'])
def test_larc_zero_weights_never_move(source):
    "||w||=0 makes the local rate 0, as in the paper's formula (timm takes 1 instead)"
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = (theirs if source=='fastai' else ours)('larc')([p], lr=.1)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert torch.equal(p.detach(), torch.zeros(3, dtype=torch.float64))

@pytest.mark.parametrize('source', ['fastai', 'ours'])
def test_lookahead_synchronises_tensors_without_grads_and_counts_steps(source):
    "fastai's behaviour: slow weights are copied at the first step, not at construction, and one count serves all tensors"
    params = make_params([(3,),(2,)], torch.float64, big=False, channels_last=False)
    opt = (theirs if source=='fastai' else ours)('ranger', k=2)([[params[0]],[params[1]]], lr=.1)
    with torch.no_grad(): params[1].add_(1.)    # after construction, before the first step: part of the slow weights
    slow = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    with torch.no_grad(): params[1].add_(2.)    # moved by someone else in between: Lookahead pulls it half way back
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    assert_same(params[1].detach(), slow[1]+1., rtol=1e-12)

# ---------------------------------------------------------------- StableAdam's clip, Sophia's estimate
def test_spikes_make_stableadams_clip_bind():
    "Otherwise the trajectories above would not tell it from Adam"
    params,group,gs = problem()
    _,objs = run_reference('stableadam', {**REFS['stableadam'][2][0], **DECAYS['decoupled']}, params, group, gs)
    assert all(o.clipped>=1 for o in objs)
    kw,ps = dict(wd=0., eps=1e-6),[copy_params(params) for _ in range(2)]
    a,b = (run_fastai(ours(n, **kw), p, group, gs)[0] for n,p in zip(('stableadam','adam'), ps))
    assert distance(a, b, params) > .05

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('h', [dict(mom=.965, hess_mom=.99, rho=.04, eps=1e-15, wd=.1), dict(mom=.8, hess_mom=.9, rho=.5, eps=1e-8, wd=0.)])
@pytest.mark.parametrize('first', [0,4]) # the estimate's first update: before the first step (it makes the state), or later
def test_sophia_with_its_estimate(mode, h, first):
    "30 steps with an estimate every fourth, compared with the authors' code, which keeps `hessian` without the factor bs"
    from fastxtend_opt.algorithms.sophia import update_hessian
    params,group,gs = problem()
    objs = [R.SophiaG(p.detach().numpy(), h['mom'], h['hess_mom'], h['rho'], h['eps'], 0. if j==NO_DECAY else h['wd'], bs=64) for j,
            p in enumerate(params)]
    opt = WithBackend(ours('sophia', **h, **flags(mode)), mode)([[p for p,o in zip(params,group) if o==k] for k in (0,1)], 1.)
    opt.state[params[NO_DECAY]]['do_wd'] = False
    for i,g in enumerate(gs):
        if i>=first and i%4==0:
            set_grads(params, [None if x is None else x*3+.1 for x in gs[(i+1)%N]])
            held = [p.detach().clone() for p in params]
            update_hessian(opt, bs=64)
            assert_bitwise([p.detach() for p in params], held)
            for o,p in zip(objs, params):
                if p.grad is not None: o.update_hessian(p.grad.numpy())
        set_grads(params, g)
        opt.set_hyper('lr', lrs_at(i))
        opt.step()
        for o,x,k in zip(objs, g, group):
            if x is not None: o.step(x, lrs_at(i)[k])
        assert_same([p.detach().numpy() for p in params], [np.asarray(o.theta) for o in objs], **TOL64, path=f'step {i}')
        sd = [opt.state[p] for p in params]
        assert_same([s['hessian'].numpy() for s in sd if 'hessian' in s],
                    [np.asarray(64*o.hessian) for o,s in zip(objs, sd) if 'hessian' in s], **TOL64)
    assert sum(o.clipped for o in objs)>50 and sum(o.unclipped for o in objs)>50 # both branches of the minimum
