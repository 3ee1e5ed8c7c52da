"""Schedule-free training: the authors' package and the paper's x, y, z; switching between training and averaged weights changes no bit; a
Learner switches itself and has x wherever the model does not train; checkpoints in either mode; BatchNorm; around any optimizer."""
import copy,pickle,random,warnings
from functools import partial

import fastai.callback.schedule,fastai.optimizer as fo,pytest,schedulefree,torch
from fastai.callback.core import CancelFitException,FetchPredsCallback
from fastai.callback.schedule import ParamScheduler,SchedCos
from fastai.callback.tracker import EarlyStoppingCallback,SaveModelCallback
from fastai.learner import Callback,Learner,load_learner
from torch import nn
import reference as R
import fastxtend_opt.training.low_precision
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.ranger import Ranger
from fastxtend_opt.algorithms.schedulefree import (AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree, ScheduleFree, ScheduleFreeMode,
                                                   ScheduleFreeOptimizer,
                                                   averaged_weights, recalibrate_bn, schedule_free)
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.definition.lessons import mode_differences
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from helpers import *
from learner_utils import dls,learner,losses,weights

NAMES = ('sgd_schedulefree','adamw_schedulefree','radam_schedulefree')
FUNCS = dict(zip(NAMES, (SGDScheduleFree,AdamWScheduleFree,RAdamScheduleFree)))
every,modes = pytest.mark.parametrize('name', NAMES),pytest.mark.parametrize('mode', ALL_MODES)
SHAPES_F = ((), (9,), (5,3), (4,3,2,2))
LR = dict(sgd_schedulefree=.2, adamw_schedulefree=.02, radam_schedulefree=.02)

def make(name, params, mode='native', **kw):
    with backend_of(mode): return FUNCS[name](params, **{'lr':LR[name], **kw}, **flags(mode))
def small(dtype=torch.float64, seed=11): return make_params(SHAPES_F, dtype, seed=seed, big=False, channels_last=False)
def go(opt, r, skip=()):
    "Steps `r` of the seeded stream"
    ps,stream = [p for pg in opt.param_lists for p in pg],GradStream(5)
    for i in r: stream.set(ps, i, skip=skip); opt.step()
    return opt
def values(ps): return [p.detach().clone() for p in ps]
def avg(opt):
    "x of each parameter in float64, from y and z"
    return [torch.lerp(opt.state[p].get('y', p).detach().double(), opt.state[p]['z'].double(), 1-1/h.get('sf_beta', h.get('beta'))) for pg,
            h in zip(opt.param_lists, opt.hypers) for p in pg]

# ---------------------------------------------------------------- the authors' package, and the paper
CASES = [('sgd_schedulefree', dict(beta=.9)), ('sgd_schedulefree', dict(beta=.98, warmup_steps=30, r=1.5, weight_lr_power=1.)),
         ('adamw_schedulefree', dict(beta=.9, sqr_mom=.999, eps=1e-8)),
         ('adamw_schedulefree', dict(beta=.5, sqr_mom=.9, eps=1e-3, warmup_steps=30, r=1., weight_lr_power=0.)),
         ('radam_schedulefree', dict(beta=.9, sqr_mom=.999, eps=1e-8, silent_sgd_phase=True)),
         ('radam_schedulefree', dict(beta=.95, sqr_mom=.99, eps=1e-3, r=.5, weight_lr_power=1., silent_sgd_phase=False))]

def theirs(name, groups, beta, sqr_mom=None, **kw):
    cls = getattr(schedulefree, get_optimizer(name).oracle.split('.')[1])
    return cls(groups, **(dict(momentum=beta) if sqr_mom is None else dict(betas=(beta,sqr_mom))), **kw, foreach=False)

def paper(name, p, h, lam):
    extra = {} if name=='sgd_schedulefree' else dict(beta2=h['sqr_mom'], eps=h['eps'])
    extra = {**extra, 'silent':h['silent_sgd_phase']} if name=='radam_schedulefree' else {**extra, 'warmup':h.get('warmup_steps', 0)}
    return getattr(R, get_optimizer(name).func.__name__)(p.detach().numpy(), h['beta'], lam=lam, r=h.get('r', 0.),
                                                         rho=h.get('weight_lr_power', 2.), **extra)

@pytest.mark.parametrize('name,h,mode', [slow(*c, m, id=f'{c[0][:-13]}-{i}-{m}', when=m=='triton' and i%2==0) for i,
                                         c in enumerate(CASES) for m in ALL_MODES])
def test_against_schedulefree_and_the_paper(name, h, mode):
    "float64, 100 steps, two groups with their own rates, one tensor without decay; both kinds of weights compared at 13 switches"
    a = small(); b = copy_params(a)
    lrs,wd = [LR[name],LR[name]/3],.05
    opt = make(name, [a[:2],a[2:]], mode, lr=lrs, wd=wd, **h)
    opt.state[a[1]]['do_wd'] = False
    ref = theirs(name, [dict(params=[p], lr=lrs[j//2], weight_decay=0. if j==1 else wd) for j,p in enumerate(b)], **h)
    slow,stream = [paper(name, p, h, 0. if j==1 else wd) for j,p in enumerate(a)],GradStream(5, spikes=(17,))
    opt.train(); ref.train()
    for i in range(100):
        stream.set(a, i); stream.set(b, i)
        opt.step(); ref.step()
        for j,o in enumerate(slow): o.step(stream.values(a[j], i, j).numpy(), lrs[j//2])
        assert_same([p.detach().numpy() for p in a], [np.asarray(o.y) for o in slow], rtol=1e-9, atol=1e-9, path=f'y, step {i}')
        if i%8==3:
            opt.eval(); ref.eval()
            assert_same(values(a), values(b), rtol=1e-9, atol=1e-9, path=f'x, step {i}')
            assert_same([p.detach().numpy() for p in a], [np.asarray(o.x) for o in slow], rtol=1e-9, atol=1e-9, path=f'x, step {i}')
            opt.train(); ref.train()
        assert_same(values(a), values(b), rtol=1e-9, atol=1e-9, path=f'y, step {i}')
    for p,o in zip(a, slow): assert_same(opt.state[p]['z'].numpy(), np.asarray(o.z), rtol=1e-9, atol=1e-9)

@every
def test_each_parameter_counts_its_own_steps(name):
    """A deviation: the package counts warmup and weights of the average by group. Here a tensor whose gradients come late is like a group
    that starts late"""
    kw = dict(beta=.9, warmup_steps=20, r=1.) if name!='radam_schedulefree' else dict(beta=.9, r=1.)
    ext = {} if name=='sgd_schedulefree' else dict(sqr_mom=.99)
    a = small(); b = copy_params(a); c = copy_params(a)
    opt = make(name, a, **kw, **ext)
    own,group = (theirs(name, g, lr=LR[name], **kw, **ext) for g in ([dict(params=[p]) for p in b], [dict(params=c)]))
    late = theirs(name, b[-1:], lr=LR[name], **kw, **ext)
    own = theirs(name, [dict(params=[p]) for p in b[:-1]], lr=LR[name], **kw, **ext)
    for o in (own, group, late): o.train()
    stream = GradStream(5)
    for i in range(40):
        skip = [len(a)-1] if i < 15 else []
        for ps in (a, b, c): stream.set(ps, i, skip)
        opt.step(); own.step(); group.step()
        if not skip: late.step()
    assert_same(values(a), values(b), rtol=1e-9, atol=1e-9)
    assert (opt.state[a[0]]['step'],opt.state[a[-1]]['step'])==(40,25)
    assert (a[-1]-c[-1]).abs().max() > 1e-3 and torch.allclose(a[0], c[0])

@every
@modes
def test_memory(name, mode):
    "z instead of the momentum: as many tensors as the base optimizer has with momentum; y only while evaluating"
    ps = small(torch.float32)
    opt = go(make(name, ps, mode), range(2))
    base = dict(sgd_schedulefree='sgd', adamw_schedulefree='adam', radam_schedulefree='radam')[name]
    qs = small(torch.float32)
    with backend_of(mode): other = go(get_optimizer(base).func(qs, lr=.1, mom=.9, **flags(mode)), range(2))
    tensors = lambda o, p: sorted(k for k,v in o.state[p].items() if isinstance(v, torch.Tensor) and v.dim()==p.dim())
    for p,q in zip(ps[1:], qs[1:]): # a 0-dim parameter's numbers are as large
        assert tensors(opt, p)==sorted(get_optimizer(name).state) and len(tensors(opt, p))==len(tensors(other, q))
    opt.eval(); assert all('y' in opt.state[p] for p in ps)
    opt.train(); assert not any('y' in opt.state[p] for p in ps)

def test_lr_zero_and_changing_beta_ranges():
    "No division by the sum of no weights"
    for name in NAMES:
        for mode in ('native','fused'):
            ps = small(); before = values(ps)
            opt = go(make(name, ps, mode, lr=0.), range(3))
            opt.eval(); assert_same(values(ps), before, rtol=1e-14)
            opt.train(); opt.set_hyper('lr', .1); go(opt, range(10))
            assert all(p.isfinite().all() for p in ps) and not torch.equal(ps[1], before[1])

# ---------------------------------------------------------------- train() and eval()
@pytest.mark.parametrize('dtype,mode,name', [slow(t, m, n, id=f'{t}-{m}-{n}',
                                                  when=m=='triton' and (n,t)!=('adamw_schedulefree',torch.bfloat16))
                                             for t in (torch.float32,torch.bfloat16,torch.float16) for m in ALL_MODES for n in NAMES])
def test_switching_changes_nothing(name, mode, dtype):
    "100 switches, and calls that don't switch, change no bit of weights, state or the training afterwards"
    def life(switches):
        ps = small(dtype)
        opt = go(make(name, two_groups(ps), mode, beta=[.9,.8]), range(12), skip=[1])
        if switches:
            y = snapshot(ps, opt)
            opt.eval(); x = values(ps)
            for _ in range(50):
                opt.eval(); opt.eval(); assert_bitwise(values(ps), x)
                opt.train(); opt.train(); assert_bitwise(snapshot(ps, opt), y)
            assert not torch.equal(x[2], y['params'][2]) and torch.equal(x[1], y['params'][1]) # without a step, both are one
        for i in range(12, 18):
            if switches: opt.eval().train(i>0); opt.train(False); opt.train()
            go(opt, [i])
        return snapshot(ps, opt)
    assert_bitwise(life(True), life(False))

def test_returns_and_modes():
    opt = make('sgd_schedulefree', small())
    assert opt.eval() is opt and opt.train() is opt and opt.train(False) is opt and opt._averaged and isinstance(opt, ScheduleFreeOptimizer)

@modes
def test_weights_from_outside_move_y_and_z(mode):
    "What is added to x is added to y and z; the other parameters keep their bits"
    for dtype,tol in ((torch.float64,1e-12), (torch.bfloat16,.02)):
        ps = small(dtype)
        opt = go(make('adamw_schedulefree', ps, mode), range(6))
        y,z = values(ps),[opt.state[p]['z'].clone() for p in ps]
        opt.eval()
        with torch.no_grad(): ps[2].add_(.5)
        x = values(ps)
        opt.train()
        assert_bitwise([y[1],z[1],y[3]], [ps[1].detach(),opt.state[ps[1]]['z'],ps[3].detach()])
        assert_same([ps[2].detach().double(),opt.state[ps[2]]['z'].double()], [y[2].double()+.5,z[2].double()+.5], atol=tol)
        opt.eval()
        assert_same(values(ps)[2].double(), x[2].double(), atol=tol)
        opt.train(); go(opt, range(6, 9))

@modes
def test_parameters_without_gradients_are_switched(mode):
    "Also those that are frozen now; those that have never had a gradient are the same in both"
    ps = small()
    opt = go(make('sgd_schedulefree', two_groups(ps), mode), range(5), skip=[3])
    for p in ps: p.grad = None
    ps[0].requires_grad_(False)
    y = values(ps)
    want = [p if 'z' not in opt.state[p] else (p-.1*opt.state[p]['z'])/.9 for p in ps]
    opt.eval()
    assert_same(values(ps), [o.detach() for o in want], rtol=1e-12)
    assert not torch.equal(ps[0], y[0]) and torch.equal(ps[3], y[3])
    opt.train(); assert_bitwise(values(ps), y)

def test_clear_state_goes_on_from_x():
    ps = small()
    opt = go(make('sgd_schedulefree', ps), range(5))
    opt.eval(); x = values(ps); opt.train()
    opt.clear_state()
    assert_bitwise(values(ps), x) is None and not any('z' in opt.state[p] for p in ps)
    go(opt, range(3))
    assert opt.state[ps[0]]['step']==3

def test_averaged_weights():
    "For one's own code; an exception restores, and other optimizers are left alone"
    ps = small(); opt = go(make('sgd_schedulefree', ps), range(5)); y = values(ps)
    with pytest.raises(KeyError):
        with averaged_weights(opt): assert_same(values(ps), avg(opt), rtol=1e-12); raise KeyError
    assert_bitwise(values(ps), y)
    opt.eval()
    with averaged_weights(opt): pass
    assert opt._averaged
    for o in (None, SGD(small(), lr=.1)):
        with averaged_weights(o): pass

# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize('made,loads,mode,name', [slow(a, b, m, n, when=m=='triton' and (a,b,n)!=('train','eval','adamw_schedulefree'))
                                                  for a in ('train','eval') for b in ('train','eval') for m in ALL_MODES for n in NAMES])
def test_checkpoint(name, mode, made, loads, tmp_path):
    "Made in native or the same mode, in either weights, loaded in either: continues bit for bit"
    for src in {'native', mode}:
        ps = small(torch.float32); opt = go(make(name, two_groups(ps), src), range(7))
        getattr(opt, made)()
        torch.save(dict(model=values(ps), opt=opt.state_dict()), tmp_path/'c.pth')
        opt.train()
        with torch.serialization.safe_globals([L]): ck = torch.load(tmp_path/'c.pth', weights_only=True)
        def resume(ck, loads):
            qs = small(torch.float32, seed=2); new = go(make(name, two_groups(qs), mode), range(3))
            getattr(new, loads)()
            with torch.no_grad():
                for q,v in zip(qs, ck['model']): q.copy_(v)
            new.load_state_dict(ck['opt'])
            assert new._averaged == any('y' in s for s in ck['opt']['state'])
            new.train(); go(new, range(7, 12))
            res = snapshot(qs, new)
            new.eval()
            return res,values(qs)
        plain = resume(dict(model=values(ps), opt=detach_copy(opt.state_dict())), 'train')
        assert_bitwise(resume(ck, loads), plain)
        go(opt, range(7, 12))
        if src==mode: assert_bitwise(plain[0], snapshot(ps, opt))
        else: assert_same(plain[0], snapshot(ps, opt), rtol=1e-4, atol=1e-5)

def test_a_state_dict_is_left_alone_by_switches():
    "Also the one that was loaded: train() takes y out of the optimizer's own"
    ps = small(); opt = go(make('sgd_schedulefree', ps), range(3)).eval()
    sd,x = opt.state_dict(),values(ps); held = detach_copy(sd)
    opt.train(); assert_bitwise(detach_copy(sd), held)
    for p,v in zip(ps, x): p.data.copy_(v)
    opt.load_state_dict(sd); assert opt._averaged
    opt.train(); assert_bitwise(detach_copy(sd), held)

# ---------------------------------------------------------------- a plain loop
@every
@modes
def test_step_in_eval_mode_is_an_error(name, mode):
    ps = small(); opt = go(make(name, ps, mode), range(2)).eval()
    GradStream(5).set(ps, 2)
    with unchanged(ps, opt):
        with pytest.raises(RuntimeError, match=r'opt\.train\(\)'): opt.step()
    opt.train().step()
    fresh = make(name, small(), mode) # without a call of train(): it begins there
    go(fresh, range(1)); assert fresh.state[fresh.param_lists[0][0]]['step']==1

@every
@modes
def test_gradient_release(name, mode):
    "Bit for bit as ordinary steps, with switches; a backward pass in eval mode is an error that leaves the weights alone"
    def run(release):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        opt = make(name, [list(m[0].parameters()),list(m[2].parameters())], mode)
        if release: prepare_for_gradient_release(m, opt)
        loss = lambda i: m(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))).square().mean()
        for i in range(12):
            if i%4==3: opt.eval(); loss(i).item(); opt.train()
            loss(i).backward()
            opt.step(); opt.zero_grad()
        res = snapshot(list(m.parameters()), opt)
        if release:
            opt.eval(); x = values(m.parameters())
            with pytest.raises(RuntimeError, match=r'opt\.train\(\)'): loss(0).backward()
            assert_bitwise(values(m.parameters()), x)
            opt.zero_grad(); opt.train(); loss(0).backward()
            remove_gradient_release(m)
        return res
    assert_bitwise(run(True), run(False))

def test_low_precision_follows_float64():
    "x too: bfloat16 with a compensation within .5% of the way, float16 as well"
    gen = torch.Generator().manual_seed(0)
    start = (torch.rand(500, generator=gen)+1).bfloat16().double(); target = start + torch.randn(500, generator=gen).double()
    def run(dtype, name, **kw):
        p = nn.Parameter(start.to(dtype, copy=True)); opt = FUNCS[name]([p], lr=1e-3, fused=True, **kw)
        for _ in range(500): p.grad = (p.detach().double()-target).to(dtype); opt.step()
        x = opt._average(p, p.detach(), opt.state[p], .9).double() if dtype is torch.float64 else torch.lerp(opt._whole(p,
            p.detach().float(), opt.state[p]).double(), opt.state[p]['z'].double(), 1-1/.9)
        opt.eval(); assert_same(p.detach().double(), x, rtol=2**-8, atol=1e-3) # rounded to the parameter's dtype
        return x
    for name,kw in (('sgd_schedulefree',{}), ('adamw_schedulefree',dict(sqr_mom=.99))):
        ref = run(torch.float64, name, **kw)
        for dtype in (torch.bfloat16,torch.float16):
            x = run(dtype, name, **kw)
            assert (x-ref).abs().mean() < .005*(ref-start).abs().mean(), (name, dtype,
                                                                          ((x-ref).abs().mean()/(ref-start).abs().mean()).item())

@every
def test_errors(name):
    for beta in (0., 1., 1.5, -.1, float('nan')):
        with pytest.raises(ValueError, match='beta='): make(name, small(), beta=beta)
        with pytest.raises(ValueError, match='beta='): make(name, [dict(params=small(), beta=beta)])
        with pytest.raises(ValueError, match='beta='): ScheduleFree(Adam(small(), lr=.1), beta=beta)
    assert [h['beta'] for h in make(name, two_groups(small()), beta=[.9,.95]).hypers]==[.9,.95]
    with pytest.raises(TypeError, match='schedule-free already'): ScheduleFree(make(name, small()))

def test_errors_of_the_wrapper():
    for opt in (Ranger(small(), lr=.1), fo.SGD(small(), lr=.1), torch.optim.SGD(small(), lr=.1),
                fo.OptimWrapper(small(), torch.optim.SGD, lr=.1), ScheduleFree(SGD(small(), lr=.1))):
        with pytest.raises(TypeError, match="ScheduleFree takes|schedule_free can't wrap"): ScheduleFree(opt)
    with pytest.raises(ValueError, match='stepped'): ScheduleFree(go(SGD(small(), lr=.1), range(1)))
    for kw in (dict(warmup_steps=-1), dict(warmup_steps=1.5), dict(weight_lr_power=-1.), dict(r=float('nan')), dict(beta=[.9,.9,.9])):
        with pytest.raises(ValueError, match=next(iter(kw))): ScheduleFree(SGD(small(), lr=.1), **kw)

# ---------------------------------------------------------------- around any optimizer
def taken(row):
    try: ScheduleFree(row.func(small(), lr=.01)); return True
    except TypeError as e:
        # with the reason, which tests/test_composition.py looks at
        assert "schedule_free can't wrap" in str(e); return False
BASES = [r.name for r in list_optimizers() if taken(r)]
def runs(name, mode): return ('fused' if mode=='triton' else mode) in get_optimizer(name).modes

def base(name, ps, mode='native', lr=.01, **kw):
    with backend_of(mode): return ScheduleFree(get_optimizer(name).func(ps, lr=lr,
        **{k:v for k,v in dict(mom=.9).items() if k in get_optimizer(name).hypers}, **flags(mode)), **kw)

@pytest.mark.parametrize('name,mode', [slow(n, m, when=n not in (INTERPRETED if m=='triton' else CORE)) for n in BASES
                                       for m in MODES if runs(n, m)])
def test_round_any_optimizer(name, mode):
    "As in native mode, with a late gradient, groups, warmup; weights of both kinds"
    def run(mode):
        ps = small(); opt = base(name, two_groups(ps), mode, lr=[.01,.02], warmup_steps=5, r=.5)
        opt.state[ps[1]]['do_wd'] = False
        go(opt, range(4), skip=[3]); go(opt, range(4, 20))
        res = snapshot(ps, opt)
        opt.eval(); x = values(ps)
        assert_same(x, avg(opt), rtol=1e-10, atol=1e-12)
        return res,x
    a,b = run(mode),run('native')
    assert_same(a, b, **(dict(rtol=1e-9, atol=1e-11) if mode=='triton' else TOL[torch.float64]))
    assert any((x!=p).any() for x,p in zip(b[1], small()))

@modes
def test_round_sgd_and_adam_is_the_algorithm(mode):
    for name,f,kw in (('sgd_schedulefree', SGD, dict(mom=.9)), ('adamw_schedulefree', Adam, dict(mom=.95, sqr_mom=.99, eps=1e-6, wd=0.))):
        h = dict(beta=.95, warmup_steps=10, r=1.)
        a = small(); b = copy_params(a)
        with backend_of(mode): opt = ScheduleFree(f(two_groups(a), lr=LR[name], **kw, **flags(mode)), **h)
        ref = make(name, two_groups(b), **{k:v for k,v in kw.items() if k!='mom'}, **h)
        for i in range(5): go(opt, range(5*i, 5*i+5)), go(ref, range(5*i, 5*i+5)); assert_same(values(a), values(b), rtol=1e-9,
            atol=1e-11); opt.eval(); ref.eval(); assert_same(values(a), values(b), rtol=1e-9, atol=1e-11); opt.train(); ref.train()

@pytest.mark.parametrize('name,mode', [(n,m) for n in BASES for m in ALL_MODES if runs(n, m)])
@pytest.mark.engine
def test_no_momentum_is_kept(name, mode):
    ps = small(torch.float32); opt = go(base(name, ps, mode), range(3))
    own = name in ('adan','came') or get_optimizer(name).kind=='matrix' # their average is more than momentum
    if not own: assert not any('grad_avg' in opt.state[p] for p in ps)
    q = small(torch.float32); plain = go(get_optimizer(name).func(q, lr=.01), range(3)) # what it keeps otherwise
    def keys(opt, p): return {k for k,v in opt.state[p].items() if isinstance(v, torch.Tensor) and v.dim()}
    for a,b in ((a,b) for a,b in zip(ps, q) if a.dim()): assert keys(opt, a)=={'z',*(k for k in keys(plain, b) if own or k!='grad_avg')}

def test_momentum_of_a_schedule_is_not_read():
    a = small(); b = copy_params(a)
    x,y = base('adam', a),base('adam', b)
    for i in range(6): y.set_hyper('mom', .5+.05*i); go(x, [i]); go(y, [i])
    assert_bitwise(values(a), values(b))

@pytest.mark.parametrize('name', ['sgd','adam','lion','rmsprop'])
def test_one_pass_when_fused(name):
    "All parameters of a group in one cohort, on one tape of one phase; no kernel is built after the first steps"
    from fastxtend_opt.engine.phases import TapePhases
    for opt in (base(name, [small(torch.float32)], 'fused'), *[make(n, [small(torch.float32)], 'fused') for n in NAMES]):
        ps = opt.param_lists[0]
        for p in ps: p.data = p.data.reshape(-1)
        go(opt, range(8)) # past RAdam's first
        kinds = set()
        for i in range(8, 14):
            GradStream(5).set(ps, i)
            (cohort,tape,_), = opt._trace({})
            assert len(cohort.params)==len(ps) and TapePhases(tape).n==1
            kinds.add(id(opt._plan.kernel(cohort, tape)) if opt._plan else None)
            opt.step()
        assert len(opt._plan.launches)==1

@modes
def test_pickle_and_deepcopy(mode):
    for f in (lambda ps: base('adam', ps, mode), lambda ps: make('radam_schedulefree', ps, mode)):
        ps = small(); opt = go(f(ps), range(7)).eval()
        for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
            assert type(other) is type(opt) and other._averaged
            qs = [p for pg in other.param_lists for p in pg]
            mine = copy.deepcopy(opt); rs = [p for pg in mine.param_lists for p in pg]
            with backend_of(mode): go(other.train(), range(7, 10)); go(mine.train(), range(7, 10))
            assert_bitwise(snapshot(qs, other), snapshot(rs, mine))

def test_wrapper_is_a_picklable_opt_func():
    f = pickle.loads(pickle.dumps(schedule_free(adam(wd=.1), beta=.95)))
    opt = f(two_groups(small()), lr=.1)
    assert [h['sf_beta'] for h in opt.hypers]==[.95,.95] and opt.hypers[0]['wd']==.1 and opt.hypers[0]['lr']==.1

# ---------------------------------------------------------------- in a Learner
class Look(Callback):
    "Where the weights are at each batch, and what they are then"
    order = 80
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append((self.learn.training, self.learn.opt._averaged))
    def after_fit(self):
        if not self.learn.lock.locked(): assert self.learn.opt._averaged

def at_x(learn):
    "Are the averages in the model, and do they differ from the training weights?"
    ps = [p for pg in learn.opt.param_lists for p in pg if 'z' in learn.opt.state[p]]
    assert ps and learn.opt._averaged
    for p,h in [(p,h) for pg,h in zip(learn.opt.param_lists, learn.opt.hypers) for p in pg if 'z' in learn.opt.state[p]]:
        y,z,b = learn.opt.state[p]['y'].double(),learn.opt.state[p]['z'].double(),h.get('sf_beta', h.get('beta'))
        assert_same(p.detach().double(), (y-(1-b)*z)/b, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(p, learn.opt.state[p]['y']) for p in ps)
    return True

def free(tmp_path=None, mode='fused', name='adamw_schedulefree', dtype=torch.float32, lr=.01, **kw):
    return learner(name, mode, path=tmp_path, dtype=dtype, lr=lr, **kw)

@pytest.mark.parametrize('mode', ['native','fused'])
@every
def test_fit_is_a_loop_with_the_package(name, mode, tmp_path):
    """Learner.fit alone has the losses of each training batch and validation, and the weights, of a plain PyTorch loop that calls train()
    and eval()"""
    kw = {'lr':.5 if name[0]=='s' else .01}
    learn = free(tmp_path, mode, name, torch.float64, **kw)
    learn.fit(2)
    assert at_x(learn) and [type(c).__name__ for c in learn.cbs].count('ScheduleFreeMode')==1
    other = free(tmp_path, mode, name, torch.float64) # the same weights and batches
    opt = theirs(name, other.model.parameters(), beta=.9, lr=kw['lr'], **({} if name[0]=='s' else dict(sqr_mom=.999)))
    train,valid = [],[]
    for _ in range(2):
        other.model.train(); opt.train()
        for x,y in other.dls.train:
            l = other.loss_func(other.model(x), y); l.backward(); opt.step(); opt.zero_grad()
            train.append(l.item())
        other.model.eval(); opt.eval()
        with torch.no_grad(): valid.append(sum(other.loss_func(other.model(x), y).item()*len(y) for x,y in other.dls.valid)/360)
    assert_same(losses(learn), dict(train=train, valid=valid), rtol=1e-6)
    assert_same(weights(learn), weights(other), rtol=1e-6, atol=1e-8)

def test_where_the_weights_are(tmp_path):
    learn,look = free(tmp_path),Look()
    learn.fit(2, cbs=look)
    assert set(look.seen)=={(True,False),(False,True)} and at_x(learn)
    w = weights(learn)
    a = learn.validate(); p = learn.get_preds()[0]; t = learn.get_preds(ds_idx=0)[0]
    learn.opt.train(); y = weights(learn); b = learn.validate() # also when somebody has called train()
    assert a[0]==b[0] and torch.equal(learn.get_preds()[0], p)
    assert_bitwise(weights(learn), y) and not learn.opt._averaged
    learn.opt.eval(); assert_bitwise(weights(learn), w)
    learn.model.eval()
    with torch.no_grad(): q = torch.cat([learn.model(x) for x,_ in learn.dls.valid]).softmax(1)
    assert_same(p, q, rtol=1e-5, atol=1e-6)

class Peek(Callback):
    "Predictions, validation, save and export in the middle of an epoch and at its end"
    order,run_valid = 75,False
    def __init__(self): self.n = 0
    def after_batch(self):
        if self.learn.lock.locked() or self.learn.iter not in (3,7): return
        l = self.learn; dl,it,n = l.dl,l.iter,l.n_iter; batch = l.xb,l.yb,l.pred,l.loss
        y = weights(l)
        a = l.get_preds(inner=True)[0]
        assert not l.opt._averaged
        l.opt.eval(); x = weights(l); l.model.eval()
        with torch.no_grad(): b = torch.cat([l.model(o) for o,_ in l.dls.valid]).softmax(1)
        l.opt.train(); l.model.train(); l.training = True
        assert_same(a, b, rtol=1e-5, atol=1e-6)
        saved = torch.load(l.save('peek'), weights_only=True)
        assert_bitwise(saved['model'], x); assert_bitwise(weights(l), y)
        l.dl,l.iter,l.n_iter = dl,it,n; l.xb,l.yb,l.pred,l.loss = batch
        self.n += 1
    def after_epoch(self):
        if not self.learn.lock.locked(): assert self.learn.opt._averaged; self.learn.get_preds(); assert self.learn.opt._averaged

def test_predictions_inside_of_a_fit(tmp_path):
    "They come from x, and training continues as if there had been none"
    a,b,peek = free(tmp_path),free(tmp_path),Peek()
    a.fit(2); b.fit(2, cbs=peek)
    assert peek.n==4
    assert_bitwise(weights(b), weights(a)); assert_bitwise(b.record.train_losses, a.record.train_losses)

def test_fetch_preds(tmp_path):
    a,b,fetch = free(tmp_path),free(tmp_path),FetchPredsCallback(with_input=False)
    a.fit(2); b.fit(2, cbs=fetch)
    assert_bitwise(weights(b), weights(a))
    assert_same(fetch.preds[0], b.get_preds()[0], rtol=1e-5, atol=1e-6)
    assert at_x(b)

def test_save_model_callback(tmp_path):
    "The best epoch's file has x, and at the end of the fit it is loaded"
    learn = free(tmp_path)
    learn.fit(3, cbs=[SaveModelCallback(every_epoch=True, with_opt=True),
                      SaveModelCallback(fname='best', comp=np.greater, monitor='accuracy')])
    xs = [torch.load(tmp_path/f'models/model_{i}.pth', weights_only=True) for i in range(3)]
    for s in xs: assert all('y' in o for o in s['opt']['state'])
    i = int(np.argmax([v[2] for v in learn.recorder.values]))
    assert_bitwise(weights(learn), {k:v for k,v in xs[i]['model'].items()})
    acc = learn.recorder.values[i][2]
    assert learn.validate()[1]==pytest.approx(acc)
    learn.fit(1) # from there

@pytest.mark.parametrize('num_it', [8,30]) # within an epoch of 12 batches, and over several
@pytest.mark.parametrize('before', [0,1])
def test_lr_find(tmp_path, num_it, before):
    "Weights, state and mode are as before, and the training after it is the same"
    learn = free(tmp_path)
    if before: learn.fit(1)
    else: learn.create_opt()
    w,sd,av = weights(learn),detach_copy(learn.opt.state_dict()),learn.opt._averaged
    learn.lr_find(num_it=num_it, show_plot=False)
    if before: assert_bitwise(detach_copy(learn.opt.state_dict()['state']), sd['state']); assert at_x(learn)
    assert_bitwise(weights(learn), w)
    learn.fit(1)
    assert at_x(learn)

class At(Callback):
    "Calls `f(learn)` after training batch `i`, or at another event"
    run_valid = False
    def __init__(self, i, f): self.i,self.f,self.batch = i,f,-1
    def after_batch(self):
        self.batch += 1
        if self.batch==self.i: self.f(self.learn)

def test_save_and_load_inside_of_an_epoch(tmp_path):
    "Loading at once changes nothing; loading later restores the weights, and training continues"
    def both(l): l.save('mid'); y = weights(l); l.load('mid'); assert_bitwise(weights(l), y); assert not l.opt._averaged
    a,b,c = (free(tmp_path) for _ in range(3))
    a.fit(2); b.fit(2, cbs=At(5, both))
    assert_bitwise(weights(b), weights(a)); assert_bitwise(losses(b), losses(a))
    held = {}
    def later(l):
        l.load('mid'); held['y2'] = weights(l)
    c.fit(2, cbs=[At(5, lambda l: (l.save('mid'), held.update(y=weights(l)))), At(9, later)])
    assert_bitwise(held['y2'], held['y']) and at_x(c)
    d = free(tmp_path) # the weights alone: training continues from them
    d.fit(1, cbs=At(5, lambda l: l.load('mid', with_opt=False)))
    assert at_x(d)

@pytest.mark.parametrize('mode', ['native','fused'])
def test_resume_from_a_file(tmp_path, mode):
    "A file of the first epoch's end, in a Learner that has seen its batches: the second epoch is the same, bit for bit"
    a = free(tmp_path, mode); a.fit(1); a.save('one'); a.fit(1)
    b = free(tmp_path, mode)
    for _ in b.dls.train: pass
    with warnings.catch_warnings(): warnings.simplefilter('error', UserWarning); b.load('one')
    assert at_x(b)
    b.fit(1)
    assert_bitwise(weights(b), weights(a)); assert_bitwise(b.record.train_losses, a.record.train_losses[12:])

def test_a_second_fit_continues(tmp_path):
    a,b = free(tmp_path),free(tmp_path)
    a.fit(2); b.fit(1); b.fit(1)
    assert_bitwise(weights(b), weights(a)); assert_bitwise(losses(b), losses(a))
    b.fit(1, reset_opt=True); assert at_x(b) and next(iter(b.opt.state.values()))['step']==12

def test_export(tmp_path):
    "Also in the middle of a fit: the exported Learner predicts with x, and the training continues"
    learn = free(tmp_path)
    learn.fit(1); p = learn.get_preds()[0]
    learn.export('e.pkl'); assert at_x(learn)
    new = load_learner(tmp_path/'e.pkl')
    assert_bitwise(weights(new), weights(learn))
    assert_same(new.get_preds(dl=learn.dls.valid)[0], p, rtol=1e-6)
    held = {}
    def mid(l):
        dl,it,n,rest = l.dl,l.iter,l.n_iter,(l.xb,l.yb,l.pred,l.loss)
        y = weights(l); l.export('m.pkl'); assert_bitwise(weights(l), y); assert not l.opt._averaged
        held['x'] = avg(l.opt)
        l.dl,l.iter,l.n_iter = dl,it,n; l.xb,l.yb,l.pred,l.loss = rest
    a,b = free(tmp_path),free(tmp_path)
    a.fit(1); b.fit(1, cbs=At(5, mid))
    assert_bitwise(weights(b), weights(a))

def test_export_of_a_vision_learner_predicts(tmp_path):
    "DataBlock, tta and predict"
    from fastai.vision.all import DataBlock,ImageBlock,CategoryBlock,PILImageBW,Flip,RandomSplitter,vision_learner
    from fastxtend_opt.tools.demo import _digits,digits_model
    from fastai.losses import CrossEntropyLossFlat
    x,y = _digits(); items = list(range(120))
    block = DataBlock(blocks=(ImageBlock(PILImageBW), CategoryBlock(vocab=list(range(10)))), get_x=_image, get_y=_label,
                      splitter=RandomSplitter(seed=1), batch_tfms=[Flip()])
    data = block.dataloaders(items, bs=16, num_workers=0, path=tmp_path, device='cpu')
    learn = Learner(data, digits_model(4, 1), CrossEntropyLossFlat(), opt_func=get_optimizer('adamw_schedulefree').factory(), lr=.01,
                    path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert at_x(learn)
        w = weights(learn)
        a = learn.tta(n=2)[0]
        learn.opt.train(); torch.manual_seed(0)
        b = learn.tta(n=2, use_max=False)[0]; assert not learn.opt._averaged
        learn.opt.eval(); assert a.shape==b.shape; assert_bitwise(weights(learn), w)
        c = learn.predict(_image(3))[2]
        learn.opt.train(); assert torch.equal(learn.predict(_image(3))[2], c)
        learn.export('v.pkl')
        assert_same(load_learner(tmp_path/'v.pkl').predict(_image(3))[2], c, rtol=1e-6)

def _image(i):
    from fastai.vision.all import PILImageBW
    from fastxtend_opt.tools.demo import _digits
    return PILImageBW.create((_digits()[0][i,0]*255).byte().numpy())
def _label(i):
    from fastxtend_opt.tools.demo import _digits
    return int(_digits()[1][i])

@pytest.mark.parametrize('mode', ['native','fused'])
def test_freeze_and_unfreeze(tmp_path, mode):
    "Both forget the state: training continues from x, outside a fit and within one"
    learn = free(tmp_path, mode); learn.fit(1); w = weights(learn)
    learn.freeze(); assert_bitwise(weights(learn), w)
    learn.fit(1); stem = {k for k in w if k.startswith(('0.','1.')) and 'running' not in k and 'batches' not in k
                          and k.endswith('0.weight')}
    assert stem and all(torch.equal(learn.model.state_dict()[k], w[k]) for k in stem)
    w = weights(learn); learn.unfreeze(); assert_bitwise(weights(learn), w); learn.fit(1)
    held = {}
    def freeze(l): held['x'] = avg(l.opt); l.freeze(); held['got'] = [p.detach().double() for pg in l.opt.param_lists
                                                                      for p in pg]; assert not l.opt._averaged
    learn = free(tmp_path, mode)
    learn.fit(2, cbs=[At(5, freeze), At(15, lambda l: l.unfreeze())])
    assert_same(held['got'], held['x'], rtol=1e-4, atol=1e-5)
    assert at_x(learn)

class Stop(Callback):
    run_valid = False
    def __init__(self, e): self.e = e
    def after_step(self):
        if self.learn.iter==5: raise self.e('stop')

@pytest.mark.parametrize('e', [KeyboardInterrupt,CancelFitException,ValueError])
def test_interrupted(tmp_path, e):
    "An interruption leaves the weights at x, and the next fit continues from y; callbacks see x after the fit"
    class After(Callback):
        order = 5
        def after_fit(self): self.learn.was_averaged = self.learn.opt._averaged
    learn = free(tmp_path)
    if e is CancelFitException: learn.fit(1, cbs=[Stop(e),After()]); assert learn.was_averaged
    else:
        with pytest.raises(e): learn.fit(1, cbs=Stop(e))
    assert at_x(learn)
    y = [learn.opt.state[p]['y'].clone() for pg in learn.opt.param_lists for p in pg]
    class First(Callback):
        order = 90
        def before_train(self): self.learn.held = [p.detach().clone() for pg in self.learn.opt.param_lists for p in pg]
    learn.opt.zero_grad()
    learn.fit(1, cbs=First())
    assert_bitwise(learn.held, y); assert at_x(learn)

def test_interrupted_validation(tmp_path):
    class Valid(Callback):
        def after_batch(self):
            if not self.learn.training: raise KeyboardInterrupt
    learn = free(tmp_path)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Valid())
    assert at_x(learn)
    w = weights(learn); learn.opt.train()
    assert at_x(learn.validate() and learn) if learn.opt.eval()._averaged else False
    assert_bitwise(weights(learn), w)

def test_early_stopping(tmp_path):
    learn = free(tmp_path); learn.fit(5, cbs=EarlyStoppingCallback(monitor='accuracy', min_delta=2., patience=1)); assert at_x(learn)

def test_momentum_schedule_and_warning(tmp_path):
    "A schedule of `mom` changes nothing; one of lr warns, but not in lr_find, nor a validation"
    a,b = free(tmp_path),free(tmp_path)
    a.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        b.fit(1, cbs=ParamScheduler({'mom':SchedCos(.95, .5)})); b.validate()
        assert_bitwise(weights(b), weights(a))
        b.lr_find(num_it=8, show_plot=False)
    with pytest.warns(UserWarning, match='needs none'): b.fit_one_cycle(1, .01)
    with pytest.warns(UserWarning, match='needs none'): b.fit_flat_cos(1, .01)
    assert at_x(b)

def test_round_any_in_a_learner(tmp_path):
    learn = free(tmp_path); learn.opt_func = schedule_free(adam(wd=0., eps=1e-8, sqr_mom=.999, fused=True))
    other = free(tmp_path); learn.fit(2, .01); other.fit(2, .01)
    assert at_x(learn); assert_same(losses(learn), losses(other), rtol=5e-3)
    learn.export('r.pkl'); assert_bitwise(weights(load_learner(tmp_path/'r.pkl')), weights(learn))

def test_other_optimizers_are_left_alone(tmp_path):
    "The callback of an optimizer that was replaced is inert"
    learn = free(tmp_path); learn.fit(1)
    learn.opt_func,learn.opt = adam(),None
    learn.fit_one_cycle(1, .01); learn.save('o'); learn.load('o'); learn.export('o.pkl')
    assert [type(c).__name__ for c in learn.cbs].count('ScheduleFreeMode')==1
    learn = learner('adam', 'fused', path=tmp_path); learn.add_cb(ScheduleFreeMode(recalibrate=True)); learn.fit(1, .01)

def test_to_low_precision(tmp_path):
    learn = free(tmp_path).to_low_precision()
    learn.fit(1)
    assert learn.opt._averaged and all('y' in s for s in learn.opt.state_dict()['state'])
    w = weights(learn)
    for _ in range(5): learn.opt.train(); learn.opt.eval()
    assert_bitwise(weights(learn), w)
    learn.fit(1); learn.save('l'); learn.load('l')

# ---------------------------------------------------------------- BatchNorm
def bns(m): return [o for o in m.modules() if isinstance(o, nn.BatchNorm2d)]
def stats(m): return [(b.running_mean.clone(),b.running_var.clone()) for b in bns(m)]

def direct(learn, n):
    "The mean over `n` batches of each BatchNorm's batch mean and unbiased variance, at the model's weights"
    m = copy.deepcopy(learn.model).eval(); sums = {b:[] for b in bns(m)}
    for b in bns(m): b.train(); b.register_forward_pre_hook(lambda b, x: sums[b].append((x[0].float().mean((0,2,3)),
                                                                                         x[0].float().transpose(0,1).flatten(1).var(1))))
    learn.dls.train.rng = random.Random(3)
    dt = next(m.parameters()).dtype
    with torch.no_grad():
        for i,(x,_) in enumerate(learn.dls.train):
            if i<n: m(x.to(dt))
    return [tuple(torch.stack(o).mean(0) for o in zip(*sums[b])) for b in bns(m)]

@pytest.mark.parametrize('low', [False,True])
@pytest.mark.parametrize('n', [4,50])
def test_recalibrate_bn(tmp_path, low, n):
    "Statistics of x; weights, training flags and momenta as before"
    learn = free(tmp_path)
    if low: learn.to_low_precision()
    learn.fit(1)
    for i,b in enumerate(bns(learn.model)): b.momentum = .1+.01*i
    learn.model.train(); bns(learn.model)[1].eval()
    modes,ws,old = [m.training for m in learn.model.modules()],values(learn.model.parameters()),stats(learn.model)
    want = direct(learn, n)
    learn.dls.train.rng = random.Random(3)
    recalibrate_bn(learn, n)
    assert_same(stats(learn.model), want, rtol=1e-4, atol=1e-5)
    assert (old[-1][0]-want[-1][0]).abs().max() > 1e-3
    assert ([m.training for m in learn.model.modules()]==modes
            and [b.momentum for b in bns(learn.model)]==[.1+.01*i for i in range(len(bns(learn.model)))])
    assert_bitwise(values(learn.model.parameters()), ws)

def test_recalibrate_before_each_validation(tmp_path):
    "The statistics in the model, and in its files, are x's; its losses are what they give"
    learn = free(tmp_path); learn.add_cb(ScheduleFreeMode(recalibrate=True, n_batches=4))
    held = []
    class Hold(Callback):
        order = 80
        def before_validate(self):
            if not self.learn.lock.locked():
                held.append(stats(self.learn.model)); assert not self.learn.model.training and self.learn.opt._averaged
    learn.fit(2, cbs=Hold())
    assert [type(c).__name__ for c in learn.cbs].count('ScheduleFreeMode')==1 and len(held)==2
    assert_bitwise(stats(learn.model), held[-1])
    loss = learn.recorder.values[-1][1]
    assert learn.validate()[0]==pytest.approx(loss, rel=1e-5)
    plain = free(tmp_path); plain.fit(2)
    assert (stats(plain.model)[-1][0]-held[-1][-1][0]).abs().max() > 1e-3

def test_recalibrate_restores_after_an_exception(tmp_path):
    learn = free(tmp_path); learn.fit(1)
    modes = [m.training for m in learn.model.modules()]
    h = learn.model[2].register_forward_pre_hook(lambda m, x: 1/0)
    with pytest.raises(ZeroDivisionError): recalibrate_bn(learn)
    h.remove()
    assert [m.training for m in learn.model.modules()]==modes and all(b.momentum==.1 for b in bns(learn.model))

def test_recalibrate_without_batchnorm():
    learn = free(); learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)); learn.dls = None
    recalibrate_bn(learn) # reads no batch

@pytest.mark.parametrize('mode', ['native','fused'])
def test_beta_may_change_while_averaged(mode):
    "y comes back unchanged: its average was made with the old beta"
    p = nn.Parameter(torch.linspace(1, 2, 8))
    opt = AdamWScheduleFree([p], lr=.1, **flags(mode))
    for _ in range(3): p.grad = torch.ones_like(p); opt.step()
    y,z = p.detach().clone(),opt.state[p]['z'].clone()
    opt.eval(); opt.set_hyper('beta', .98); opt.train()
    assert torch.equal(p, y) and torch.equal(opt.state[p]['z'], z) and 'y_beta' not in opt.state[p]

def test_found_by_the_name_of_the_function():
    from fastxtend_opt.definition.registry import get_optimizer
    assert get_optimizer('SGDScheduleFree') is get_optimizer('sgd_schedulefree') and get_optimizer('Adam') is get_optimizer('adam')
