"""The matrix: every registered optimizer, in every mode, compared with its native mode: parameters, state and gradients.

The cells come from the registry, so a new optimizer adds no code here. The default run takes a pairwise covering of them (`default_cells`):
each optimizer meets each option, decay, dtype, scenario and mode. The whole product is marked slow.
"""
import copy,io,multiprocessing as mp,pickle,queue,threading,weakref
from functools import lru_cache,partial
from itertools import combinations
from operator import itemgetter

import numpy as np,pytest,torch
import torch.nn.functional as F
from fastai.optimizer import Optimizer,weight_decay,l2_reg,average_grad,average_sqr_grad,step_stat,adam_step,sgd_step,momentum_step,debias
from torch import nn,tensor
from fastxtend_opt.engine.kinds import kind_of
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
import helpers,oracles
from helpers import *

ROWS = {o.name: o for o in list_optimizers()}
NAMES = list(ROWS)
N,AT = 25,(0,1,5,6,12,24) # 5: Ranger's first synchronisation; 6: RAdam's rectification has begun
N_TRITON = 13 # steps of the default cells in Triton's interpreter, which is slow
LR = 1e-2

# ---------------------------------------------------------------- an optimizer's options, read from its signature
def options(name):
    "The defaults, and one dict of keywords per option: flags flipped, `mom` off or on, coefficients that default to 0 set"
    res = [{}]
    for k,v in ROWS[name].hypers.items():
        if k in ('wd','decouple_wd'): continue
        if isinstance(v, bool): res.append({k: not v})
        elif k=='mom': res.append({k: 0. if v else .9})
        elif isinstance(v, float) and v==0.: res.append({k: .9})
    return res

def decays(name):
    res = {'none': dict(wd=0.), 'decoupled': dict(wd=.1)}
    if 'wd' not in ROWS[name].hypers: return {'none': {}}
    if 'decouple_wd' in ROWS[name].hypers:
        res['decoupled']['decouple_wd'],res['L2'] = True,dict(wd=.1, decouple_wd=False)
    return res

def opt_func(name, mode='native', **kw): return WithBackend(partial(ROWS[name].func, lr=LR, **kw, **flags(mode)), mode)

# ---------------------------------------------------------------- scenarios: what happens before each step
SCENARIOS = {}
def scenario(f): SCENARIOS[f.__name__] = f; return f

@scenario
def plain(i, opt, params, stream): stream.set(params, i)

@scenario
def no_decay_on_some(i, opt, params, stream):
    "As Learner's `wd_bn_bias=False`: set right after construction and, for one tensor, reset later"
    if i==0:
        for p in params[::2]: opt.state[p]['do_wd'] = False
    if i==9: opt.state[params[0]]['do_wd'] = True
    stream.set(params, i)

@scenario
def group_without_grads(i, opt, params, stream): stream.set(params, i, skip=range(len(params)//2))

@scenario
def late_and_vanishing(i, opt, params, stream):
    "Gradients that first come at step 2*j and are missing for a while"
    stream.set(params, i, skip=[j for j in range(len(params)) if i < 2*j%7 or (8+j <= i < 12+j)])

@scenario
def no_grads_at_first(i, opt, params, stream): stream.set(params, i, skip=range(len(params)) if i < 2 else ())

@scenario
def freeze_unfreeze(i, opt, params, stream):
    "As `learn.freeze()` and `unfreeze()`: gradients of frozen tensors stay zero, `force_train` keeps one training, both clear the state"
    if i==0: opt.state[params[1]]['force_train'] = True
    if i==6:  opt.freeze_to(1);  opt.clear_state()
    if i==15: opt.unfreeze();    opt.clear_state()
    if i>0: opt.zero_grad()
    for j,p in enumerate(params):
        if p.requires_grad:
            g = like(p, stream.values(p, i, j).to(p.dtype))
            if p.grad is None: p.grad = g
            else: p.grad.add_(g)

@scenario
def discriminative(i, opt, params, stream):
    if i==0:
        opt.set_hyper('lr', slice(1e-4, 1e-2))
        opt.set_hyper('wd', [.3, 0.])
    if i==12: opt.set_hyper('lr', slice(1e-2))
    stream.set(params, i)

@scenario
def scheduled(i, opt, params, stream):
    "Hypers that change at each step: numpy scalars, ints, zero, in-place writes, and `mom`, which one-cycle sets on every algorithm"
    x = i/(N-1)
    if   i==3: opt.set_hyper('lr', 0)
    elif i==4: opt.set_hyper('lr', 0.)
    elif i%3==0: opt.set_hyper('lr', [np.float64(LR*(1.1-x))]) # a bare numpy scalar is a TypeError in fastai with fastcore 2.2.39
    elif i%3==1: opt.set_hypers(lr=np.array([LR*.1, LR])*(1.1-x), mom=[np.float64(.95-.1*x)])
    else:
        # native computes `1 - lr*wd` of a np.float32 in float32, the modes in double: 1e-8 apart, which only float64 parameters show
        num = np.float32 if params[0].dtype is torch.float32 else np.float64
        for k,h in enumerate(opt.hypers): h['lr'],h['wd'] = num(LR*(1.1-x)),.05*k + .01*i
    if i%5==0: opt.set_hyper('mom', .85+.1*x)
    if i==10: opt.set_hyper('wd', 0)
    if i==13: opt.set_hyper('wd', [np.float64(.2)])
    if i==11: opt.set_hyper('sqr_mom', [np.float64(.98)])
    if i==14: opt.set_hyper('unknown_to_all', 3)
    stream.set(params, i)

@scenario
def zero_grad_tensors(i, opt, params, stream):
    "Whole gradients of zeros, from the first step for one tensor"
    stream.set(params, i)
    for j,p in enumerate(params):
        if i%4==3 or j==2: p.grad.zero_()

@scenario
def spikes(i, opt, params, stream):
    stream.spikes = (7,19)
    stream.set(params, i)

@scenario
def life(i, opt, params, stream):
    "All of the above in one"
    if i==0:
        for p in params[::2]: opt.state[p]['do_wd'] = False
        opt.set_hyper('lr', slice(LR/10, LR))
    if i==9: opt.state[params[0]]['do_wd'] = True
    if i>=11: scheduled(i, opt, params, stream)
    n = len(params)
    stream.set(params, i, skip=range(n//2) if i < 2 else range(n) if i==7 else [j for j in range(n) if i < 2*j%7 or 14+j <= i < 18+j])
    if i%4==3 and params[2].grad is not None: params[2].grad.zero_()

# ---------------------------------------------------------------- elementwise agreement in float64 and float32
@lru_cache(24)
def trajectory(name, mode, option, decay, dtype, scen, n=N, nudged=False):
    kw,stream = {**options(name)[option], **decays(name)[decay]},NudgedStream(dtype=dtype) if nudged else None
    torch.manual_seed(0)
    return run_trajectory(opt_func(name, mode, **kw), n, dtype, SCENARIOS[scen], at=AT, stream=stream)

def tolerance(dtype, scen, name=''):
    """For values of order 1; larger for spikes of thousands that cancel in the averages, for undamped sums (AggMo's reach 20 and cancel),
    and for an average divided by a floor of 0.01 (Apollo's)"""
    tol = TOL[dtype]
    return {**tol, 'atol': tol['atol']*(1e3 if scen=='spikes' else dict(aggmo=10, apollo=100).get(name, 1))}

def comparable(snap, name, dtype):
    "A snapshot without the state that rounding decides in float32 (`ROUNDED` in the oracle's module)"
    names = () if dtype is torch.float64 else getattr(oracles.load().get(name), 'ROUNDED', ())
    return {**snap, 'opt':{**snap['opt'], 'state':[{k:v for k,v in st.items() if k not in names}
                                                   for st in snap['opt']['state']]}} if names else snap

def check(name, mode, option, decay, dtype, scen, n=N):
    got,ref = trajectory.__wrapped__(name, mode, option, decay, dtype, scen, n),trajectory(name, 'native', option, decay, dtype, scen, n)
    assert list(got)==list(ref)==[i for i in AT if i<n]
    tol,noisy = tolerance(dtype, scen, name),None
    for i in got:
        a,b = (comparable(o[i], name, dtype) for o in (got, ref))
        try: assert_same(a, b, **tol)
        except Mismatch: # some cells amplify the last bit, also within native
            if noisy is None: noisy = trajectory.__wrapped__(name, 'native', option, decay, dtype, scen, n, nudged=True)
            assert_same(less_noise(a, b, comparable(noisy[i], name, dtype)), b, **tol, path=f'step {i}')

DT = {'f32': torch.float32, 'f64': torch.float64}
def diverges(name, option, decay, dtype, scen):
    """LARS without decay divides by eps alone where a whole gradient is zero: native's rate reaches 1e7, weights 1e15 and NaN, and float32
    keeps no digit that could be compared. float64 does, and is compared."""
    return name=='larc' and options(name)[option].get('clip') is False and (decay,dtype,scen) == ('none','f32','zero_grad_tensors')

def cells():
    "The whole matrix: each optimizer with each option, decay, dtype and scenario, in each of its modes"
    return [(n,o,d,t,s,m) for n in NAMES for o in range(len(options(n))) for d in decays(n) for t in DT for s in SCENARIOS for m in MODES
            if not diverges(n, o, d, t, s) and ('fused' if m=='triton' else m) in ROWS[n].modes]

# elementwise, with slow weights, with reductions: every scenario in every mode that needs no interpreter
THOROUGH = ('adam','ranger','larc')
def default_cells(cells):
    "A pairwise covering of the matrix, in which each optimizer meets each scenario once, and the scenarios of `THOROUGH`"
    scens = list(SCENARIOS)
    # another scenario first for each optimizer
    order = sorted(cells, key=lambda c: (k := NAMES.index(c[0]), (scens.index(c[4])+k) % len(scens)))
    res = pairwise(order, group=itemgetter(0, 4), dear=lambda c: c[5]=='triton' and c[0])
    return {*res, *(c for c in cells if c[0] in THOROUGH and c[1:4]==(0,'decoupled','f32') and c[5]!='triton')}

CELLS = cells()
DEFAULT = default_cells(CELLS)
MATRIX = [slow(*c, when=c not in DEFAULT, id='-'.join(map(str, c))) for c in CELLS if c in DEFAULT or helpers.SLOW]

def test_default_cells_cover_all_pairs():
    """Any two values of two columns that occur in a cell together occur in a default cell together; every optimizer meets every mode and
    scenario"""
    for i,j in combinations(range(6), 2):
        missing = {(c[i],c[j]) for c in CELLS} - {(c[i],c[j]) for c in DEFAULT}
        assert not missing, f'{i}, {j}: {sorted(map(str, missing))}'
    assert {(c[0],c[5]) for c in DEFAULT} >= {(n, m) for n in NAMES for m in MODES if m in ROWS[n].modes}
    assert {(c[0],c[4]) for c in DEFAULT} == {(n, s) for n in NAMES for s in SCENARIOS}
    assert len(DEFAULT) < len(CELLS)/20

@pytest.mark.parametrize('name,option,decay,dtype,scen,mode', MATRIX)
def test_equals_native(name, option, decay, dtype, scen, mode):
    short = mode=='triton' and (name, option, decay, dtype, scen, mode) in DEFAULT
    check(name, mode, option, decay, DT[dtype], scen, N_TRITON if short else N)

@pytest.mark.parametrize('name', NAMES)
def test_state_is_what_the_row_says(name):
    params = make_params([(3,)], big=False, channels_last=False)
    opt = opt_func(name)(params)
    GradStream().set(params, 0)
    opt.step()
    assert {k for k,v in opt.state[params[0]].items() if isinstance(v, torch.Tensor)} <= set(ROWS[name].state)

DOWN = dict(adadelta=1., prodigy=1., muon=1.) # Adadelta's first steps are lr*.003, Prodigy's lr is 1, Muon's rate for a vector is lr*.015
@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_goes_downhill(name, mode): goes_downhill(name, mode)

@pytest.mark.parametrize('name', [n for n in NAMES if n not in CORE])
def test_goes_downhill_natively(name): goes_downhill(name, 'native')

def goes_downhill(name, mode):
    "60 steps on a quadratic come closer to its minimum at 3"
    p = nn.Parameter(torch.full((5,), 1., dtype=torch.float64))
    opt = ROWS[name].func([p], lr=DOWN.get(name, .05), **decays(name)['none'], **flags(mode))
    for _ in range(60):
        p.grad = p.detach() - 3
        opt.step()
    assert (p.detach()-3).abs().max() < 1.9

# ---------------------------------------------------------------- low precision
def cast(o, dtype):
    "A `state_dict` with its floating tensors in `dtype`"
    if isinstance(o, torch.Tensor): return o.detach().clone().to(dtype) if o.is_floating_point() else o.detach().clone()
    if isinstance(o, dict): return {k: cast(v, dtype) for k,v in o.items()}
    if isinstance(o, (list,tuple,L)): return [cast(v, dtype) for v in o]
    return copy.deepcopy(o)

# the last bit of a sum, which a fused multiply-add may change, decides the direction of a step
SIGNS = ('lion','sophia',*(n for n,o in oracles.load().items() if getattr(o, 'SIGNED', False)))
def as_signed(got, want, lr):
    "`want`, with `got` at the elements (at most 1 in 10,000) that took a step of `lr` in another direction, or none"
    far = [(a.double()-b.double()).abs() for a,b in zip(got, want)]
    off = [(d > lr/2) & (d < 5/2*lr) & (d > ulp(b)) for d,b in zip(far, want)]
    assert sum(int(o.sum()) for o in off) <= 1e-4*sum(o.numel() for o in off)
    return [torch.where(o, a, b) for o,a,b in zip(off, got, want)]

CANCEL = 4*2**-24 # the float32 rounding of a sum of values of order 1
# Its consequences: the last bit of a masked optimizer's step decides whether an element passes the mask. About half do, and one more or
# less in 10,000 changes the factor 1/.5 of all steps by 1e-4/.5 of itself. Apollo divides by at least .01.
CANCELS = dict(cadamw=4e-4*LR, clion=4e-4*LR, apollo=100*CANCEL)
LOW = {'bf16': torch.bfloat16, 'f16': torch.float16}
LOWCASES = [pytest.param(n, d, t, id=f'{n}-{d}-{t}', marks=() if ((d=='decoupled') != (t=='f16')
    if n in CORE else (d,t)==(list(decays(n))[:2][-1],'bf16')) else pytest.mark.slow)
            for n in NAMES for d in decays(n) for t in LOW]

@pytest.mark.parametrize('name,decay,dtype,mode', [
    slow(*c.values, m, id=f'{c.id}-{m}', when=bool(c.marks) or (m=='triton' and c.values[0] not in INTERPRETED))
    for c in LOWCASES for m in ('fused','triton')])
def test_fused_low_precision_rounds_once(name, decay, dtype, mode):
    """Each fused step with bfloat16 or float16 storage is a float32 step from the same stored values, rounded once at its end: at most one
    ulp from native's float32 step, whose sums may fall on the other side of a rounding boundary. Where a sum of values of order 1 cancels,
    its float32 rounding is more than an ulp of the remainder, hence the absolute part."""
    kw,dtype,cancel = decays(name)[decay],LOW[dtype],max(CANCEL, CANCELS.get(name, 0))
    params,stream = make_params(dtype=dtype),GradStream(1)
    opt = opt_func(name, mode, kahan_sum=False, **kw)(two_groups(params))
    opt.state[params[2]]['do_wd'] = False
    for i in range(7 if name=='ranger' else 4): # its slow weights are synchronised in the sixth
        stream.set(params, i)
        twins = [nn.Parameter(p.detach().clone().float()) for p in params]
        twin = opt_func(name, **kw)(two_groups(twins))
        for p,q in zip(params, twins): q.grad = p.grad.clone().float()
        twin.load_state_dict(cast(opt.state_dict(), torch.float32))
        opt.step(); twin.step()
        want = [q.detach().to(dtype) for q in twins]
        if name in SIGNS: want = as_signed([p.detach() for p in params], want, LR)
        assert_ulps([p.detach() for p in params], want, 1, cancel, f'step {i} params')
        got,state = detach_copy(opt.state_dict()),cast(twin.state_dict(), dtype)
        for p,st,wide in zip(params, state['state'], twin.state_dict()['state']): # matrices stay in float32
            st.update((k, v.clone()) for k,v in wide.items() if isinstance(v, torch.Tensor) and kind_of(v.shape, p.shape)[0]=='o')
        # they include sums over the model, which are made in another order
        if ROWS[name].kind=='model': assert_same(got.pop('hypers'), state.pop('hypers'), rtol=1e-5, atol=1e-10)
        assert_ulps(got, state, 1, cancel, f'step {i}')

@pytest.mark.parametrize('mode', ['foreach','jit'])
@pytest.mark.parametrize('name,decay,dtype', LOWCASES)
def test_low_precision_rounds_as_native(name, decay, dtype, mode):
    """foreach and jit run native's operations, each of which rounds to storage: the same bits after three steps. torch's order of summation
    depends on a tensor's layout and shape, and these modes may flatten it, so optimizers with reductions are compared after one step, to an
    ulp of the value or of the update."""
    kw,dtype = decays(name)[decay],LOW[dtype]
    a,b = (run_trajectory(opt_func(name, m, kahan_sum=False, **kw), 3, dtype, no_decay_on_some) for m in (mode,'native'))
    if ROWS[name].kind=='elementwise':
        for i in a: assert_bitwise(a[i], b[i], f'step {i}')
    else: assert_ulps(a[0], b[0], 1, torch.finfo(dtype).eps*LR)

# ---------------------------------------------------------------- checkpoints
# as fastai/learner.py's load_model
FASTAI_SAFE = [L, np._core.multiarray.scalar, np.dtype, *[getattr(np.dtypes, o) for o in np.dtypes.__all__]]

def through_file(sd):
    "A state dict as `learn.save` and `learn.load` return it"
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    with torch.serialization.safe_globals(FASTAI_SAFE): return torch.load(f, weights_only=True)

def _trained(name, mode, n=8, dtype=torch.float64, **kw):
    params,stream = make_params(dtype=dtype, big=False),GradStream(2)
    opt = opt_func(name, mode, **kw)(two_groups(params))
    opt.state[params[1]]['do_wd'] = False
    for i in range(n):
        late_and_vanishing(i, opt, params, stream)
        opt.set_hyper('lr', [np.float64(LR*(1-i/20))])
        opt.step()
    return params,opt

def _go_on(params, opt, n=6):
    for i in range(100, 100+n):
        GradStream(2).set(params, i)
        opt.step()
    return snapshot(params, opt)

def _crossings(name):
    """Every pair of modes. By default, optimizers outside `CORE` go from each mode to itself and to the next one in a circle. Triton's
    interpreter has a few: to itself, to native and back."""
    circle = [m for m in ALL_MODES if m!='triton']
    def default(a, b):
        if 'triton' in (a,b): return name in INTERPRETED and (a==b or 'native' in (a,b))
        return name in CORE or a==b or circle[(circle.index(a)+1)%len(circle)]==b
    return [slow(name, a, b, when=not default(a, b)) for a in ALL_MODES for b in ALL_MODES]

@pytest.mark.parametrize('name,src,dst', [c for n in NAMES for c in _crossings(n)])
def test_checkpoint_crosses_modes(name, src, dst):
    "Saved in one mode, loaded in another; bit-exact within a mode"
    params,opt = _trained(name, src)
    sd = through_file(opt.state_dict())
    twins = copy_params(params)
    new = opt_func(name, dst)(two_groups(twins))
    GradStream(9).set(twins, 0) # it has state already, which must be replaced
    new.step()
    for p,q in zip(params, twins): q.data.copy_(p.data)
    new.load_state_dict(sd)
    assert_bitwise(detach_copy(new.state_dict()), detach_copy(opt.state_dict()), 'right after loading')
    a,b = _go_on(params, opt),_go_on(twins, new)
    (assert_bitwise if src==dst else partial(assert_same, **TOL[torch.float64]))(b, a)

def _tensors(o):
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, dict):
        for v in o.values(): yield from _tensors(v)
    elif isinstance(o, (list,tuple,L)):
        for v in o: yield from _tensors(v)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_loading_leaves_its_argument_alone(name, mode):
    params,opt = _trained(name, mode)
    sd = opt.state_dict()
    held,ids = detach_copy(sd),{t.data_ptr() for t in _tensors(sd) if t.numel()}
    twins = copy_params(params)
    new = opt_func(name, mode)(two_groups(twins))
    new.load_state_dict(sd)
    assert_bitwise(detach_copy(sd), held, 'argument after loading')
    assert not ids & {t.data_ptr() for t in _tensors(new.state_dict()) if t.numel()}, 'a loaded tensor is the argument\'s own'
    _go_on(twins, new)
    new.set_hyper('lr', .5)
    assert_bitwise(detach_copy(sd), held, 'argument after stepping the loaded optimizer')
    new.load_state_dict(sd) # and can be loaded twice

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_state_dict_is_plain(name, mode):
    "Only types that `weights_only=True` accepts, one dict per parameter and one per group, in order"
    params,opt = _trained(name, mode)
    sd = opt.state_dict()
    assert len(sd['state'])==len(params) and len(sd['hypers'])==2
    def walk(o):
        if isinstance(o, dict):
            for k,v in o.items(): assert isinstance(k, str); walk(v)
        elif isinstance(o, (list,tuple,L)):
            for v in o: walk(v)
        else: assert o is None or isinstance(o, (bool,int,float,str,np.generic,torch.Tensor)), type(o)
    walk(sd)
    through_file(sd)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_checkpoint_before_first_step_and_after_clear_state(name, mode):
    "`lr_find` saves the state before the first step and restores it after many: everything since must be forgotten"
    params = make_params(dtype=torch.float64, big=False)
    opt = opt_func(name, mode)(two_groups(params))
    opt.state[params[1]]['do_wd'] = False
    start,sd = [p.detach().clone() for p in params],through_file(opt.state_dict())
    first = _go_on(params, opt)
    for restore in (lambda: opt.load_state_dict(sd), opt.clear_state):
        restore()
        for p,q in zip(params, start): p.data.copy_(q)
        assert_bitwise(_go_on(params, opt), first)
    opt.clear_state()
    cleared = through_file(opt.state_dict())
    assert_bitwise(cleared['state'], detach_copy(sd['state']))
    twins = copy_params(params)
    for p,q in zip(twins, start): p.data.copy_(q)
    new = opt_func(name, mode)(two_groups(twins))
    new.load_state_dict(cleared)
    assert_bitwise(_go_on(twins, new), first)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_a_wrong_checkpoint_changes_nothing(name, mode):
    params,opt = _trained(name, mode)
    good = detach_copy(opt.state_dict())
    def bad(f):
        sd = copy.deepcopy(good)
        f(sd)
        return sd
    def drop(k): return bad(lambda sd: sd.pop(k))
    j = (j for j,s in enumerate(good['state']) if any(isinstance(v, torch.Tensor) and v.ndim>1 for v in s.values()))
    j = next(j, None)
    wrong = [drop('state'), drop('hypers'), bad(lambda sd: sd['state'].pop()), bad(lambda sd: sd['hypers'].pop()), {}, [], None,
             bad(lambda sd: sd['hypers'].__setitem__(0, 3.)), bad(lambda sd: sd['state'].__setitem__(0, None))]
    if j is not None:
        k = next(k for k,v in good['state'][j].items() if isinstance(v, torch.Tensor) and v.ndim>1)
        wrong.append(bad(lambda sd: sd['state'][j].__setitem__(k, torch.zeros(2,2,2,2,2)))) # a tensor of another shape
    for sd in wrong:
        held = detach_copy(sd)
        with unchanged(params, opt):
            with pytest.raises((ValueError,TypeError,KeyError,AssertionError)): opt.load_state_dict(sd)
        assert_same(detach_copy(sd), held)
    params2,opt2 = copy_params(params),None
    opt2 = opt_func(name, mode)(two_groups(params2))
    opt2.load_state_dict(good)
    assert_bitwise(_go_on(params, opt), _go_on(params2, opt2)) # and it still works

# ---------------------------------------------------------------- what a step must not change
@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_step_keeps_storage_and_objects(name, mode):
    "Parameters and gradients keep their storage and stay the same objects"
    params = make_params(dtype=torch.float32, big=False)
    opt,ref = opt_func(name, mode)(two_groups(params)),None
    ptrs,ids = [p.data_ptr() for p in params],[id(p) for p in params]
    for i in range(7):
        GradStream().set(params, i)
        versions,grads = [p._version for p in params],[(p.grad, p.grad.data_ptr()) for p in params]
        opt.step()
        assert [p.data_ptr() for p in params]==ptrs and [id(p) for p in params]==ids
        assert [(id(p.grad), p.grad.data_ptr()) for p in params]==[(id(g),d) for g,d in grads]
        # ADOPT's first step only begins the average; native's `p.data` hides the change from autograd; LARC leaves a tensor of norm 0 as it
        # is
        if mode != 'native' and name != 'larc' and not (name=='adopt' and i==0):
            assert all(p._version>v for p,v in zip(params, versions) if p.numel()), 'autograd must see the in-place change'

@pytest.mark.parametrize('mode', MODES)
def test_autograd_sees_the_step(mode):
    "A graph made before the step must refuse to run after it (native's `p.data` hides the change, so gradients are silently wrong there)"
    p = nn.Parameter(torch.ones(4))
    opt = opt_func('adam', mode)([p])
    p.grad = torch.ones(4)
    loss = (p**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', [n for n in NAMES if 'L2' in decays(n)])
@pytest.mark.engine
def test_l2_adds_nothing_where_do_wd_is_false(name, mode):
    "fastxtend's foreach added 1.0 times the weight"
    params,free = (make_params(dtype=torch.float64, big=False) for _ in range(2))
    opt,ref = opt_func(name, mode, wd=.3, decouple_wd=False)(two_groups(params)),opt_func(name, wd=0., decouple_wd=False)(two_groups(free))
    for o in (opt.state[p] for p in params): o['do_wd'] = False
    if ROWS[name].kind=='reduction' and name=='larc': ref.set_hyper('wd', .3) # LARC keeps wd in its denominator
    for o in (ref.state[p] for p in free): o['do_wd'] = False
    for i in range(8):
        GradStream().set(params, i); GradStream().set(free, i)
        g = [p.grad.clone() for p in params]
        opt.step(); ref.step()
        assert_bitwise([p.grad for p in params], g, 'grads')
        assert_same([p.detach() for p in params], [p.detach() for p in free], **TOL[torch.float64])

@pytest.mark.parametrize('mode', MODES)
def test_grad_is_left_as_native_leaves_it(mode):
    "L2 writes into `p.grad`, decoupled decay does not, in all modes as in native"
    for kw in (dict(wd=.3, decouple_wd=False), dict(wd=.3), dict(wd=0.)):
        a,b = (run_trajectory(opt_func('adam', m, **kw), 3, torch.float64, no_decay_on_some) for m in (mode,'native'))
        for i in a: assert_same(a[i]['grads'], b[i]['grads'], **TOL[torch.float64])
        stream,fresh = GradStream(),make_params(dtype=torch.float64)
        if kw['wd']==0. or 'decouple_wd' not in kw:
            for i in a: assert_bitwise(a[i]['grads'], [stream.values(p, i, j) for j,p in enumerate(fresh)])

@pytest.mark.parametrize('mode', ALL_MODES)
def test_zero_grad(mode):
    params = make_params()
    opt = opt_func('adam', mode)(two_groups(params))
    GradStream().set(params, 0, skip=(1,))
    grads = [p.grad for p in params]
    opt.zero_grad()
    assert all(p.grad is g for p,g in zip(params, grads)) and params[1].grad is None
    assert all((g==0).all() for g in grads if g is not None)
    if mode=='native': return
    GradStream().set(params, 0)
    params[0].grad = (params[0]*2).sum().clone().detach().requires_grad_(False)
    opt.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in params)
    opt.zero_grad(set_to_none=False); opt.step() # nothing to do, no error
    GradStream().set(params, 1)
    opt.step()

@pytest.mark.parametrize('mode', MODES)
def test_zero_grad_detaches(mode):
    "A gradient that is part of a graph is detached, as in fastai"
    p = nn.Parameter(torch.ones(3))
    opt = opt_func('sgd', mode)([p])
    torch.autograd.grad((p**3).sum(), p, create_graph=True)
    (p**3).sum().backward(create_graph=True)
    assert p.grad.grad_fn is not None
    opt.zero_grad()
    assert p.grad.grad_fn is None and not p.grad.requires_grad and (p.grad==0).all()

@pytest.mark.parametrize('mode', MODES)
def test_optimizer_is_truthy_and_has_fastais_interface(mode):
    params = make_params(big=False)
    opt = opt_func('adam', mode)(two_groups(params))
    assert opt and isinstance(opt, Optimizer) and not hasattr(type(opt), '__len__')
    assert len(opt.param_lists)==2 and len(opt.hypers)==2 and opt.frozen_idx==0
    assert [len(o['params']) for o in opt.param_groups]==[len(o) for o in opt.param_lists]
    assert len(opt.all_params())==len(params) and len(opt.all_params(with_grad=True))==0
    assert opt.state[params[0]]=={} # missing dicts are made
    opt.state[params[0]]['do_wd'] = False
    assert opt.all_params()[0][2]['do_wd'] is False
    other = nn.Parameter(torch.ones(2)) # Learner writes `do_wd` for parameters that are not in the optimizer, too
    opt.state[other]['do_wd'] = False
    GradStream().set(params, 0)
    opt.step()
    assert len(opt.state_dict()['state'])==len(params)

@pytest.mark.parametrize('mode', MODES)
def test_param_lists_can_be_replaced(mode):
    "NonNativeMixedPrecision swaps in float32 masters and moves the state to them"
    res = []
    for m in (mode,'native'):
        params = make_params(dtype=torch.float32, big=False)
        opt = opt_func('adam', m)(two_groups(params))
        for i in range(6):
            if i==3:
                new = copy_params(params)
                for p,q in zip(params, new): opt.state[q] = opt.state.pop(p)
                opt.param_lists,params = L(L(o) for o in two_groups(new)),new
            GradStream().set(params, i)
            opt.step()
        res.append(snapshot(params, opt))
    assert_same(*res, **TOL[torch.float32])

# ---------------------------------------------------------------- steppers that users write
def s_temporaries(p, lr, **kwargs):
    u = (p.grad.data*2 + p.data/3 - 1).abs() + .5
    v = -u + 1/u - (2-u)
    p.data.sub_(v*lr)

def s_out_of_place(p, lr, mom, avg=None, **kwargs):
    if avg is None: avg = torch.zeros_like(p.data)
    avg = avg*mom + p.grad.data*(1-mom)
    p.data.add_(avg, alpha=-lr)
    return {'avg': avg}
s_out_of_place.defaults = dict(mom=.8)

def s_init_from_p(p, lr, slow=None, **kwargs):
    if slow is None: slow = p.data.clone()
    p.data.add_(p.grad.data, alpha=-lr)
    slow.lerp_(p.data, .25)
    p.data.copy_(slow)
    return {'slow': slow}

def s_init_from_g2(p, lr, eps, sq=None, **kwargs):
    g = p.grad.data
    if sq is None: sq = g**2
    else: sq.mul_(.9).addcmul_(g, g, value=.1)
    p.data.addcdiv_(g, sq.sqrt() + eps, value=-lr)
    return {'sq': sq}
s_init_from_g2.defaults = dict(eps=1e-3)

def s_prior(p, lr, prior=None, **kwargs):
    g = p.grad.data
    d = torch.zeros_like(g) if prior is None else g - prior
    p.data.sub_((g + d*.5)*lr)
    return {'prior': g.clone()}

def s_functions(p, lr, **kwargs):
    g,w = p.grad.data,p.data
    u = torch.where(g*w>0, g, g*.5).clamp(-1,1) + torch.sign(w)*.1 + w.abs().sqrt() + torch.exp(-g.abs()) + torch.log(w.abs()+1)
    u = u + (w.abs()+.1).pow(.3) + torch.lerp(w, g, .2) + torch.maximum(w, g)*.1 + torch.minimum(w, g)*.2 + (w.abs()+.2).rsqrt() + g**3*1e-3
    p.data.add_(u, alpha=-lr)

def s_masks(p, lr, m=None, **kwargs):
    g = p.grad.data
    m = torch.zeros_like(g) if m is None else m
    m.mul_(.9).add_(g, alpha=.1)
    mask = (m*g > 0).to(g.dtype)
    p.data.sub_(m*mask*lr)
    return {'m': m}

def s_comparisons(p, lr, **kwargs):
    g,w = p.grad.data,p.data
    u = torch.where(g>=w, g, w) + torch.where(g<.1, 1., g) + torch.where(w<=0, w, 2*w) + torch.where(g==0, w, torch.zeros_like(w))
    p.data.sub_(u*lr)

def s_softplus(p, lr, **kwargs): p.data.sub_(F.softplus(p.grad.data, 2.)*lr)

def s_inplace_chain(p, lr, **kwargs): p.data.mul_(1-lr).add_(1e-3).sub_(p.grad.data, alpha=lr).clamp_(-2,2)

def s_clips_grad(p, lr, **kwargs):
    p.grad.data.clamp_(-.5,.5)
    p.data.add_(p.grad.data, alpha=-lr)

def s_scales_grad(p, **kwargs): p.grad.data.mul_(.5).add_(p.data, alpha=.1)

def s_norms(p, lr, eps, **kwargs):
    g = p.grad.data
    p.data.sub_(g/(g.norm() + eps)*(torch.norm(p.data) + .1)*lr)
s_norms.defaults = dict(eps=1e-6)

def s_reductions(p, lr, **kwargs):
    g,w = p.grad.data,p.data
    u = (g - g.mean())/(g.abs().amax() + 1) + w.sum()*1e-4 + w.pow(2).mean().sqrt()
    p.data.sub_(u*lr)

def s_two_phases(p, lr, avg=None, **kwargs):
    "A reduction of another reduction's result, with state in between"
    g = p.grad.data/(p.grad.data.norm() + 1)
    avg = torch.zeros_like(g) if avg is None else avg
    avg.mul_(.9).add_(g)
    u = avg/(avg.pow(2).mean().sqrt() + .1)
    p.data.add_(u, alpha=-lr)
    return {'avg': avg}

def s_scalar_state(p, lr, count=0, seen=0., **kwargs):
    count,seen = count+1,.9*seen + lr
    p.data.mul_(1-.01*seen).add_(p.grad.data, alpha=-lr/count**.5 if count>3 else -lr)
    return {'count': count, 'seen': seen}

def s_numpy_scalars(p, lr, **kwargs):
    a,b = np.float64(lr),np.float32(.25)
    p.data.sub_(p.grad.data*a + a*p.data*b)
    p.data.add_(p.grad.data, alpha=np.float64(-lr))

def s_scalar_tensor_state(p, lr, scale=None, **kwargs):
    "State with one number per tensor: the running norm of the gradient"
    n = p.grad.data.norm()
    scale = n if scale is None else scale*.9 + n*.1
    p.data.sub_(p.grad.data/(scale + 1e-3)*lr)
    return {'scale': scale}

def s_scalar_tensor_changed_last(p, lr, scale=None, other=None, **kwargs):
    "Numbers per tensor that the elements use before they change, and that swap"
    if scale is None: scale,other = p.data.mean() + 2,p.grad.data.norm()
    p.data.sub_(p.grad.data*scale*lr)
    return {'scale': other*.5, 'other': scale.clone()}

def s_spread(p, lr, scale=None, wide=None, **kwargs):
    "One value expanded over the elements, and then reduced"
    if scale is None: scale,wide = p.data.mean() + 2,torch.zeros_like(p.data)
    wide.copy_(scale)
    p.data.sub_((p.grad.data/wide + wide.sum()*1e-3 + wide.norm()*1e-3)*lr)
    return {'scale': scale*.9, 'wide': wide}

def s_buffer_from_grad(p, lr, buf=None, **kwargs):
    "As torch.optim.SGD: the buffer begins as a copy of the gradient"
    buf = p.grad.data.clone() if buf is None else buf.mul_(.9).add_(p.grad.data)
    p.data.sub_(buf*lr)
    return {'buf': buf}

def s_keeps_grad(p, lr, prev=None, **kwargs):
    "The gradient is stored before it is used again"
    if prev is None: prev = torch.zeros_like(p.data)
    n = p.grad.data.norm()
    prev.copy_(p.grad.data)
    p.data.sub_(p.grad.data/(n + 1)*lr)
    return {'prev': prev}

def s_plain_p(p, lr, **kwargs):
    "`p` and `p.grad` without `.data`, under no_grad"
    with torch.no_grad(): p.sub_(p.grad*lr + p*1e-3)

class ClassStepper:
    "Steppers need not be functions"
    defaults = dict(scale=.5)
    def __init__(self, power=2): self.power = power
    def __call__(self, p, lr, scale, **kwargs): p.data.sub_(p.grad.data.abs()**self.power*scale*lr)

def s_returns_self(p, lr, **kwargs): return p.data.add_(p.grad.data, alpha=-lr)

def s_state_updated_twice(p, avg, **kwargs):
    avg.add_(p.data, alpha=.01)
    return {'avg': avg, 'avg2': avg*2}

def s_extra_scalar(p, step, lr, **kwargs):
    r = 1/step
    if r<.2: p.data.mul_(1-lr)

USERS = {
    'temporaries': [s_temporaries], 'out_of_place_state': [s_out_of_place], 'state_from_p': [s_init_from_p],
    'state_from_g2': [s_init_from_g2],
    'prior_grad': [s_prior], 'functions': [s_functions], 'masks': [s_masks], 'comparisons': [s_comparisons], 'softplus': [s_softplus],
    'inplace_chain': [s_inplace_chain], 'clips_grad': [s_clips_grad], 'scales_grad': [s_scales_grad, average_grad, momentum_step],
    'norms': [s_norms], 'reductions': [s_reductions], 'two_phases': [s_two_phases],
    'scalar_state': [s_scalar_state], 'numpy_scalars': [s_numpy_scalars], 'scalar_tensor_state': [s_scalar_tensor_state],
    'scalar_tensor_changed_last': [s_scalar_tensor_changed_last], 'spread': [s_spread], 'buffer_from_grad': [s_buffer_from_grad],
    'keeps_grad': [s_keeps_grad], 'plain_p': [s_plain_p],
    'class': [ClassStepper()], 'class3': [ClassStepper(3)], 'returns_tensor': [s_returns_self],
    'closure': [lambda p, lr, **kwargs: p.data.sub_(p.grad.data*(lr/2))],
    'chain': [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, adam_step, s_extra_scalar],
    'state_made_by_another': [s_out_of_place, s_state_updated_twice], 'partial': [partial(s_out_of_place, mom=.3)],
    'fastai_sgd': [l2_reg, sgd_step]}
HYPERS = {'chain': dict(mom=.9, sqr_mom=.99, eps=1e-5)}
REDUCES = ('norms','reductions','two_phases','scalar_tensor_state','scalar_tensor_changed_last','spread','keeps_grad')

def engine(mode): return Optimizer if mode=='native' else WithBackend(ENGINES[mode], mode)

def run_user(user, mode, dtype, scen=plain, n=8, shapes=tuple(s for s in SHAPES if 0 not in s)):
    params = make_params(shapes, dtype=dtype) # no empty tensors: torch can't take their amax
    return run_trajectory(lambda ps: engine(mode)(ps, USERS[user], lr=.05, **HYPERS.get(user, {})), n, dtype, scen, params=params)

@pytest.mark.parametrize('dtype', [pytest.param('f32', marks=pytest.mark.slow), 'f64'])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('user', list(USERS))
def test_users_steppers(user, mode, dtype):
    got,ref = (run_user(user, m, DT[dtype], late_and_vanishing) for m in (mode,'native'))
    for i in got: assert_same(got[i], ref[i], **TOL[DT[dtype]], path=f'step {i}')

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('user', [o for o in USERS if o not in REDUCES])
def test_users_steppers_on_empty_tensors(user, mode):
    got,ref = (run_user(user, m, torch.float64, shapes=((0,),(3,0),(2,))) for m in (mode,'native'))
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], path=f'step {i}')

@pytest.mark.parametrize('mode', MODES)
def test_step_passes_extra_keywords_to_steppers(mode):
    p = nn.Parameter(torch.ones(3))
    seen = []
    def s(p, lr, boost=1., **kwargs):
        seen.append(boost)
        p.data.add_(p.grad.data, alpha=-lr*boost)
    opt = engine(mode)([p], [s], lr=.1)
    p.grad = torch.ones(3)
    opt.step(boost=3.)
    assert_same(p.detach(), torch.full((3,), .7), rtol=1e-6)
    opt.step()
    assert_same(p.detach(), torch.full((3,), .6), rtol=1e-6)
    assert set(seen)=={3.,1.} and 'boost' not in opt.hypers[0]

# ---------------------------------------------------------------- difficult values and layouts
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_inf_and_nan_grads(name, mode):
    "A poisoned element spreads exactly as far as in native"
    def poison(i, opt, params, stream):
        stream.set(params, i)
        for j,(k,v) in enumerate([(2,float('inf')), (3,float('nan')), (4,-float('inf'))]):
            if i==2+j: params[2+j].grad.view(-1)[k] = v if params[2+j].numel()>k else 0
        if i==6:
            for p in params: p.grad.contiguous().view(-1)[:1] = 0
    def run(m):
        ps = make_params(((), (9,), (33,), (17,5), (8,4,3,3)), dtype=torch.float64)
        return run_trajectory(opt_func(name, m), 8, torch.float64, poison, params=ps)
    got,ref = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], equal_nan=True, path=f'step {i}')
    if name=='rprop': return # the sign of NaN is 0, and its state is one gradient: two steps later nothing is NaN
    # the sign of NaN is 0: the weights stay, the average is NaN
    spread = [s['grad_avg'] for s in ref[7]['opt']['state']] if name in SIGNS and name!='sophia' else ref[7]['params']
    assert any(o.isnan().any() for o in spread)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_float_range(name, mode):
    "Very small and very large gradients: denormals are not flushed, overflow gives the same infinities"
    scales = [1e-42, 1e-30, 1e-20, 1e15, 1e25, 1e37, 1e-38, 1.]
    def extreme(i, opt, params, stream):
        for j,p in enumerate(params): p.grad = (stream.values(p, i, j)*scales[(i+j)%8]).to(p.dtype)
    def run(m): return run_trajectory(opt_func(name, m), 8, torch.float32, extreme,
                                      params=make_params(((9,),(5,4),(33,)), channels_last=False, big=False))
    got,ref = run(mode),run('native')
    for i in got:
        for j,(a,b) in enumerate(zip(got[i]['params'], ref[i]['params'])):
            lim = b.abs()[b.isfinite()].max().item() if b.isfinite().any() else 1.
            assert_same(a, b, rtol=2e-5, atol=2e-6*lim, equal_nan=True, path=f'step {i} param {j}')

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['sgd','adam','lamb','ranger'])
def test_groups_and_tensors_of_different_dtypes(name, mode):
    dts = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    def run(m):
        ps = [nn.Parameter(p.detach().to(dts[j%4])) for j,p in enumerate(make_params(dtype=torch.float64, big=False))]
        return run_trajectory(opt_func(name, m, kahan_sum=False), 6, None, plain, params=ps, at=range(3 if name=='lamb' else 6))
    got,ref = run(mode),run('native')
    for i in got:
        for j,(a,b) in enumerate(zip(got[i]['params'], ref[i]['params'])):
            if a.dtype==torch.bfloat16: # fused rounds once a step where native rounds at each operation
                assert_same(a, b, rtol=(i+1)*2**-7, atol=(i+1)*2**-8, path=f'step {i} param {j}')
            else: assert_same(a, b, **TOL[a.dtype], path=f'step {i} param {j}')
        assert [{k: getattr(v,'dtype',type(v)) for k,v in o.items()} for o in got[i]['opt']['state']] \
            == [{k: getattr(v,'dtype',type(v)) for k,v in o.items()} for o in ref[i]['opt']['state']]

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['adam','ranger','sgd'])
@pytest.mark.parametrize('to', [torch.bfloat16, torch.float16, torch.float64])
def test_model_cast_after_some_steps(name, mode, to):
    "As after `model.half()`: parameter and gradient in another dtype than the state, which native promotes"
    def casting(i, opt, params, stream):
        if i==3:
            for p in params: p.data = p.data.to(to)
        stream.set(params, i)
    def run(m): return run_trajectory(opt_func(name, m), 5, torch.float32, casting, params=make_params(big=False))
    try: ref = run('native')
    except RuntimeError as e: pytest.skip(f'native can not: {e}')
    got = run(mode)
    for i in got:
        tol = TOL[torch.float32] if i<3 or to==torch.float64 else dict(rtol=(i-2)*2*torch.finfo(to).eps, atol=(i-2)*torch.finfo(to).eps)
        assert_same(got[i]['params'], ref[i]['params'], **tol, path=f'step {i}')
        assert [{k: getattr(v,'dtype',type(v)) for k,v in o.items()} for o in got[i]['opt']['state']] \
            == [{k: getattr(v,'dtype',type(v)) for k,v in o.items()} for o in ref[i]['opt']['state']]

def _odd_layouts(dtype):
    "Sliced, transposed, stepped, narrowed at an odd offset, 5-D channels_last; and the whole storage of each, to see other changes"
    gen = torch.Generator().manual_seed(3)
    r = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype)
    bases = [r(12,9), r(7,5), r(40), r(100), r(2,3,4,5,6).contiguous(memory_format=torch.channels_last_3d), r(6,6,3,3)]
    views = [bases[0][::2,1:6], bases[1].t(), bases[2][1::3], bases[3][3:90], bases[4], bases[5].permute(1,0,2,3)]
    return [nn.Parameter(v) for v in views],bases

@pytest.mark.parametrize('grads', ['like', 'contiguous', 'expanded'])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_memory_layouts(name, mode, grads):
    "Parameters that are views with any strides, gradients in the same layout or another; the memory around them does not change"
    def setter(i, opt, params, stream):
        for j,p in enumerate(params):
            v = stream.values(p, i, j).to(p.dtype)
            if   grads=='like':       p.grad = like(p, v)
            elif grads=='contiguous': p.grad = v.contiguous()
            else:                     p.grad = v.flatten()[:1].reshape([1]*v.ndim).expand(v.shape) # as `sum().backward()` may leave it
    def run(m):
        params,bases = _odd_layouts(torch.float64)
        return run_trajectory(opt_func(name, m), 7, torch.float64, setter, params=params),bases
    (got,gb),(ref,rb) = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], path=f'step {i}')
    assert_same(gb, rb, **TOL[torch.float64], path='storage')

@pytest.mark.parametrize('way', ['to_channels_last', 'to_contiguous', 'grads_other', 'grads_alternate'])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_channels_last(name, mode, way):
    "`ChannelsLast` changes the layout of parameters and gradients, not of existing state"
    cl = torch.channels_last
    def turn(i, opt, params, stream):
        if i==3 and way in ('to_channels_last','to_contiguous'):
            fmt = cl if way=='to_channels_last' else torch.contiguous_format
            for p in params:
                if p.ndim==4: p.data = p.data.contiguous(memory_format=fmt)
        stream.set(params, i)
        for p in params:
            if p.ndim==4 and (way=='grads_other' or (way=='grads_alternate' and i%2)): p.grad = p.grad.contiguous(
                memory_format=torch.contiguous_format if p.is_contiguous(memory_format=cl) and not p.is_contiguous() else cl)
    def run(m):
        ps = make_params([(4,3,3,3),(5,7,1,1),(2,8,2,2),(6,)], dtype=torch.float64, big=False, channels_last=way!='to_channels_last')
        if way=='to_contiguous': ps = [nn.Parameter(p.detach().contiguous(memory_format=cl) if p.ndim==4 else p.detach()) for p in ps]
        return run_trajectory(opt_func(name, m), 8, torch.float64, turn, params=ps)
    got,ref = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], path=f'step {i}')

@pytest.mark.parametrize('mode', MODES)
def test_flat_buffer_views(mode):
    "Parameters that are adjacent views of one buffer, at unaligned offsets"
    def run(m):
        flat = torch.randn(1000, generator=torch.Generator().manual_seed(1))
        cuts = [0,1,4,11,300,301,999]
        params = [nn.Parameter(flat[a:b]) for a,b in zip(cuts, cuts[1:])]
        run_trajectory(opt_func('adam', m), 6, None, plain, params=params, at=())
        return flat
    a,b = run(mode),run('native')
    assert_same(a, b, **TOL[torch.float32])
    assert a[999]==torch.randn(1000, generator=torch.Generator().manual_seed(1))[999]

@pytest.mark.parametrize('when', [0, 3])
@pytest.mark.parametrize('way', ['same', 'overlap'])
@pytest.mark.parametrize('mode', MODES)
def test_weights_tied_later(mode, way, when, threads):
    """Two parameters that share memory, from the start or after some steps, are stepped one after the other as in native, with any number
    of threads"""
    def tie(i, opt, params, stream):
        if i==when:
            buf = torch.linspace(-1, 1, 40_000)
            if way=='same': params[1].data = params[0].data
            else: params[0].data,params[1].data = buf[:30_000],buf[5_000:35_000]
        stream.set(params, i)
    def run(m): return run_trajectory(opt_func('adam', m, wd=.1), 5, None, tie,
                                      params=make_params([(30_000,),(30_000,),(4,5)], channels_last=False), groups=list)
    threads(2)
    got,ref = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float32], path=f'step {i}')

@pytest.mark.parametrize('mode', MODES)
def test_parameters_and_steppers_may_change_between_steps(mode):
    "After a parameter was added or removed, or the steppers were replaced, the old plan is not used"
    def change(i, opt, params, stream):
        if i==3:
            params.append(nn.Parameter(torch.ones(7, dtype=torch.float64)))
            opt.param_lists[0].append(params[-1])
        if i==5: opt.param_lists[1].pop(0)
        if i==7: opt.cbs = L(weight_decay, sgd_step)
        stream.set(params, i)
    def run(m): return run_trajectory(opt_func('adam', m), 9, None, change, params=make_params(dtype=torch.float64, big=False),
                                      groups=lambda ps: [ps[:3], ps[3:]])
    got,ref = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], path=f'step {i}')

@pytest.mark.parametrize('mode', ALL_MODES)
def test_nothing_is_kept_of_old_grads_and_state(mode):
    "Gradients set to None and cleared state are freed at once"
    params = make_params(big=False)
    opt = opt_func('adam', mode)(params)
    for i in range(3):
        GradStream().set(params, i)
        opt.step()
    grads,state = [weakref.ref(p.grad) for p in params],[weakref.ref(opt.state[p]['grad_avg']) for p in params]
    for p in params: p.grad = None
    assert not any(o() is not None for o in grads)
    opt.clear_state()
    GradStream().set(params, 0)
    opt.step()
    assert not any(o() is not None for o in state)

@pytest.mark.parametrize('mode', MODES)
def test_grads_of_fastais_tensor_class(mode):
    from fastai.torch_core import TensorBase
    def wrap(i, opt, params, stream):
        stream.set(params, i)
        for p in params: p.grad = p.grad.as_subclass(TensorBase)
    def run(m): return run_trajectory(opt_func('lamb', m, wd=.1, decouple_wd=False), 4, torch.float64, wrap,
                                      params=make_params(dtype=torch.float64, big=False))
    got,ref = run(mode),run('native')
    for i in got: assert_same(got[i], ref[i], **TOL[torch.float64], path=f'step {i}')

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['adam','lamb'])
def test_many_tensors(name, mode):
    def run(m):
        ps = make_params([(1+j%13, 1+j%5) for j in range(100 if mode=='triton' else 500)], big=False, channels_last=False)
        return run_trajectory(opt_func(name, m), 3, None, late_and_vanishing, params=ps, at=(2,))
    assert_same(run(mode), run('native'), **TOL[torch.float32])

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['adam','lamb'])
def test_only_empty_tensors(name, mode):
    params = make_params([(0,),(0,4)], big=False, channels_last=False)
    opt = opt_func(name, mode)(params)
    for i in range(3):
        GradStream().set(params, i)
        opt.step()
    assert opt.state[params[0]]['step']==3

@pytest.mark.parametrize('mode', MODES)
def test_subclassed_and_generator_params(mode):
    "Parameters as a generator, a single tensor, and fastai's L of L"
    from fastcore.all import L
    for wrap in (iter, L, lambda o: L(L(o[:2]), L(o[2:]))):
        params = make_params([(3,),(2,2),(4,)], big=False, channels_last=False)
        opt = opt_func('adam', mode)(wrap(params))
        GradStream().set(params, 0)
        opt.step()
        assert all(opt.state[p]['step']==1 for p in params)
    p = nn.Parameter(torch.ones(3))
    opt = opt_func('adam', mode)(p)
    p.grad = torch.ones(3)
    opt.step()
    assert opt.state[p]['step']==1

# ---------------------------------------------------------------- copies
@pytest.mark.parametrize('how', ['deepcopy','pickle'])
@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_copies_of_an_optimizer(name, mode, how):
    "A copy continues as the original does, and neither changes the other"
    params,opt = _trained(name, mode)
    ps,new = copy.deepcopy((params,opt)) if how=='deepcopy' else pickle.loads(pickle.dumps((params,opt)))
    held = snapshot(ps, new)
    a = _go_on(params, opt)
    assert_bitwise(snapshot(ps, new), held)
    for p in ps: p.grad = None
    assert_bitwise(_go_on(ps, new), a)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_opt_func_travels(mode):
    "`learn.export` pickles the `opt_func`"
    f = pickle.loads(pickle.dumps(get_optimizer('adam').factory(mom=.8, **flags(mode))))
    p = nn.Parameter(torch.ones(2))
    assert f([p], lr=.1).hypers[0]['mom']==.8

# ---------------------------------------------------------------- threads and processes
@pytest.mark.parametrize('name', ['adam','ranger','lamb','larc'])
@pytest.mark.parametrize('mode', MODES)
def test_thread_count_changes_no_bit(name, mode, threads):
    def run(n):
        threads(n)
        return run_trajectory(opt_func(name, mode), 2, torch.float32, params=make_params([(70_000,),(3,5)], big=True))
    one,two = run(1),run(2)
    if mode in ('foreach','jit') and ROWS[name].kind=='reduction': # torch's own mean and norm split a big tensor by threads
        for i in one: assert_same(two[i], one[i], rtol=1e-5, atol=1e-6, path=f'step {i}')
    else:
        for i in one: assert_bitwise(two[i], one[i], f'step {i}')

@pytest.mark.parametrize('mode', MODES)
def test_thread_count_may_change_between_steps(mode, threads):
    def change(i, opt, params, stream):
        threads(1 + i%2)
        stream.set(params, i)
    a = run_trajectory(opt_func('adam', mode), 6, torch.float32, change)
    threads(1)
    b = run_trajectory(opt_func('adam', mode), 6, torch.float32)
    assert_bitwise(a, b)

@pytest.mark.parametrize('mode', MODES)
def test_two_optimizers_in_two_threads(mode, threads):
    names,res,errors,n = ['adam','lamb','ranger','sgd'],{},[],6 if mode=='triton' else 20
    def life(k): return run_trajectory(opt_func(names[k], mode), n, torch.float32, late_and_vanishing, seed=k, at=(n-1,))
    ref = [life(k) for k in range(len(names))]
    start = threading.Barrier(len(names))
    def work(k):
        try:
            start.wait()
            res[k] = life(k)
        except Exception as e: errors.append(e)
    ts = [threading.Thread(target=work, args=(k,)) for k in range(len(names))]
    for t in ts: t.start()
    for t in ts: t.join(120)
    assert not errors and len(res)==len(names), errors
    for k in range(len(names)): assert_bitwise(res[k], ref[k], names[k])

def _child(q, params, opt, grads, n):
    try:
        torch.set_num_threads(n)
        for g in grads:
            for p,o in zip(params, g): p.grad = o
            opt.step()
        q.put([p.detach().numpy() for p in params])
    except BaseException as e: q.put(repr(e))

def _in_child(*args):
    ctx = mp.get_context('fork')
    q = ctx.Queue()
    p = ctx.Process(target=_child, args=(q,*args))
    p.start()
    try: return q.get(timeout=30)
    except queue.Empty: pytest.fail('the forked child did not finish its steps in 30 s')
    finally:
        p.join(1)
        if p.is_alive(): p.kill()

# A forked child of a process whose OpenMP threads have run hangs in torch's parallel loops unless it has one thread, as DataLoader's
# workers have. With two threads only the fused kernel itself can be tested, once the state exists.
FORKS = [(m,w,p,1) for m in MODES for w in ('before_first_step','after_first_step') for p in (1,2)] + [('fused','after_first_step',2,2)]

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('mode,when,parent,child', FORKS)
def test_forked_child_steps_too(mode, when, parent, child, threads):
    "A child forked from a process that has stepped, as a DataLoader's workers are: parent and child both continue, with threads or without"
    threads(parent)
    params,stream = make_params([(50_000,),(3,5)], big=True),GradStream(2)
    opt = opt_func('adam', mode)(params)
    if when=='after_first_step':
        for i in range(2):
            stream.set(params, i)
            opt.step()
    held = snapshot(params, opt)
    grads = [[like(p, stream.values(p, i, j).to(p.dtype)) for j,p in enumerate(params)] for i in (50,51)]
    res = _in_child(params, opt, grads, child)
    assert not isinstance(res, str), res
    assert_bitwise(snapshot(params, opt), held, 'the parent')
    for g in grads:
        for p,o in zip(params, g): p.grad = o
        opt.step()
    assert_bitwise(res, [p.detach().numpy() for p in params])
