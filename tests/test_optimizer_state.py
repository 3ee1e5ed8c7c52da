"State dicts, parameter groups, and steps that fail: the same promises in every mode."
import copy,io

import numpy as np,pytest,torch,torch.distributed as dist
from fastai.optimizer import Optimizer,average_grad,momentum_step,sgd_step,step_stat,weight_decay
from torch import nn
import fastxtend_opt.all as fastxtend
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.optimizer import checks, fused, native, traced
from helpers import *

NAMES = [o.name for o in list_optimizers()]
SHARDED = ('adam','accsgd','adan','cadamw','lamb','swats','prodigy','adafactor')
FEW = ('adam','ranger','adamw_schedulefree','prodigy','muon')
all_modes = pytest.mark.parametrize('mode', ALL_MODES)
four_modes = pytest.mark.parametrize('mode', ['native','foreach','jit','fused'])
MOMENTUM = [weight_decay, average_grad, step_stat, momentum_step]

def has_mode(name, mode): return mode!='jit' or name not in ('muon','shampoo','soap')

def two(**kw): return make_params([(3,),(2,4)], big=False, channels_last=False, **kw)

def build(name, mode, params=None, **kw):
    params = two() if params is None else params
    with backend_of(mode): return params,get_optimizer(name).func(params, lr=.01, **kw, **flags(mode))

def go(params, opt, steps):
    for i in steps:
        GradStream().set(params, i)
        opt.step()

def same_as(params, opt, before, grads=True):
    "Weights, state, hyperparameters and gradients are those of `snapshot` `before`"
    now = snapshot(params, opt, grads)
    for k in now: assert_bitwise(now[k], before[k], k)

def torch_load(sd):
    f = io.BytesIO()
    torch.save(sd, f); f.seek(0)
    return torch.load(f)

# ---------------------------------------------------------------- parameter groups
@all_modes
@pytest.mark.parametrize('name', FEW)
def test_what_is_written_to_a_group_takes_effect(name, mode):
    if not has_mode(name, mode): pytest.skip('no such mode')
    params,opt = build(name, mode, wd=0.) if name!='muon' else build(name, mode)
    go(params, opt, range(2))
    for g in opt.param_groups: g['lr'] = 0.
    assert {h['lr'] for h in opt.hypers}=={0.}
    before = [p.detach().clone() for p in params]
    go(params, opt, [2])
    if name!='adamw_schedulefree': assert_bitwise([p.detach() for p in params], before) # whose y moves towards x
    opt.set_hyper('lr', .5)
    assert all(g['lr']==.5 for g in opt.param_groups)

@all_modes
def test_groups_in_the_words_of_torch(mode):
    params,opt = build('adam', mode, two())
    g, = opt.param_groups
    g['weight_decay'],g['betas'] = .3,(.7,.8)
    assert (opt.hypers[0]['wd'],opt.hypers[0]['mom'],opt.hypers[0]['sqr_mom'])==(.3,.7,.8)
    assert (g['weight_decay'],g['betas'],g['momentum'])==(.3,(.7,.8),.7) and set(g)=={'params',*opt.hypers[0]}
    with pytest.raises(KeyError): g['nesterov']
    with pytest.raises(KeyError, match="can't be removed"): del g['params']
    with pytest.raises(ValueError, match='param_groups: 2 groups given.*has 1'): opt.param_groups = [{}, {}]
    opt.param_groups = [dict(lr=.2, params=params[:1])]
    assert opt.hypers[0]['lr']==.2 and len(opt.param_lists[0])==1
    before = params[1].detach().clone()
    go(params, opt, [0])
    assert torch.equal(params[1], before) and opt.state[params[0]]['step']==1
    assert type(copy.deepcopy(g)) is dict

@all_modes
def test_a_written_hyperparameter_reaches_its_aliases(mode):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with backend_of(mode):
        both = fastxtend.rules({'*bias': fastxtend.sgd(mom=.5, **flags(mode)), '*': fastxtend.adam(**flags(mode))})
        opt = fastxtend.Lookahead(both(net.named_parameters(), lr=.1))
    names = [k for k in opt.hypers[0] if k.startswith('mom@')]
    assert names
    opt.param_groups[0]['mom'] = .25
    assert {opt.hypers[0][k] for k in ('mom',*names)}=={.25}
    opt.set_hyper('mom', .75)
    assert {opt.hypers[0][k] for k in ('mom',*names)}=={.75}

# ---------------------------------------------------------------- state dicts
def is_plain(o):
    if type(o) is dict: return all(type(k) is str and is_plain(v) for k,v in o.items())
    if type(o) is list: return all(map(is_plain, o))
    return o is None or type(o) in (bool,int,float,str,torch.Tensor)

@pytest.mark.parametrize('mode', ['native','fused'])
@pytest.mark.parametrize('name', NAMES)
def test_torch_load_reads_a_state_dict_by_default(name, mode):
    params,opt = build(name, mode)
    opt.set_hyper('lr', [np.float64(.01)]) # as fastai's schedules set it
    go(params, opt, range(2))
    sd = opt.state_dict()
    assert is_plain(sd)
    read = torch_load(sd)
    other = build(name, mode, copy_params(params))[1]
    other.load_state_dict(read)
    assert_bitwise(other.state_dict(), sd)

@all_modes
@pytest.mark.parametrize('name', ['adam','ranger'])
def test_older_checkpoints_load(name, mode):
    "Lists were fastcore's `L`, hyperparameters numpy's numbers"
    params,opt = build(name, mode)
    go(params, opt, range(3))
    sd = opt.state_dict()
    hypers = L({k:np.float64(v) if isinstance(v, float) else v for k,v in h.items()} for h in sd['hypers'])
    old = {**sd, 'state': L(sd['state']), 'hypers': hypers}
    if 'slow_weights' in sd: old['slow_weights'] = L(L(o) for o in sd['slow_weights'])
    twins = copy_params(params)
    new = build(name, mode, twins)[1]
    new.load_state_dict(old)
    go(params, opt, range(3, 9)); go(twins, new, range(3, 9))
    assert_bitwise(snapshot(twins, new), snapshot(params, opt))

@all_modes
@pytest.mark.parametrize('name', ['adam','ranger','prodigy','adamw_schedulefree'])
def test_a_state_dict_is_of_one_moment(name, mode):
    "Five more steps and other hyperparameters change nothing in it; loading goes back, and on as before, as often as one likes"
    params,opt = build(name, mode)
    go(params, opt, range(3))
    before = snapshot(params, opt)
    sd = opt.state_dict()
    go(params, opt, range(3, 8))
    opt.set_hyper('lr', 7.)
    assert_bitwise(sd, before['opt'])
    runs = []
    for _ in range(2):
        with torch.no_grad():
            for p,q in zip(params, before['params']): p.copy_(q)
        opt.load_state_dict(sd)
        same_as(params, opt, before, False)
        go(params, opt, range(3, 8))
        runs.append(snapshot(params, opt))
    assert_bitwise(*runs)
    assert_bitwise(sd, before['opt'])

@all_modes
def test_loading_shares_nothing(mode):
    params,opt = build('adam', mode)
    go(params, opt, range(2))
    sd,twins = opt.state_dict(),copy_params(params)
    a,b = build('adam', mode, twins)[1],build('adam', mode, copy_params(params))[1]
    held = detach_copy(sd)
    a.load_state_dict(sd); b.load_state_dict(sd)
    a.set_hyper('lr', 9.); a.hypers[0]['mom'] = .1
    a.state[twins[0]]['do_wd'] = False
    go(twins, a, range(2, 4))
    for o in (sd, opt.state_dict(), b.state_dict()): assert_bitwise(o, held)

@four_modes
def test_a_state_dict_is_in_cpu_memory(mode, monkeypatch):
    "A state on another device is brought to the CPU, so that saving takes none of its memory"
    seen = []
    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device('cuda'))
        def detach(self): return self
        def to(self, device, copy=False): seen.append((device, copy)); return torch.ones(1)
    assert type(fastxtend.plain_state({'a':[torch.zeros(1).as_subclass(Elsewhere)]})['a'][0]) is torch.Tensor and seen==[('cpu', True)]
    params,opt = build('adam', mode)
    go(params, opt, range(1))
    for p,s in zip(params, opt.state_dict()['state']):
        tensors = {k:v for k,v in s.items() if isinstance(v, torch.Tensor)}
        assert tensors and all(v.device.type=='cpu' and v.data_ptr()!=opt.state[p][k].data_ptr() for k,v in tensors.items())

@four_modes
def test_loading_something_else(mode):
    params,opt = build('adam', mode)
    go(params, opt, range(2))
    sd,before = opt.state_dict(),snapshot(params, opt)
    for bad,words in ((None, "'state' and 'hypers'"), ({'state':[]}, "'state' and 'hypers'"),
                      ({**sd, 'hypers':[]}, '0 parameter groups, the optimizer 1'),
                      ({**sd, 'state':sd['state'][:1]}, '1 parameters, the optimizer 2'),
                      ({**sd, 'hypers':[3.]}, 'dict, got float'), ({**sd, 'state':[None,{}]}, 'dict, got NoneType')):
        with pytest.raises(ValueError, match=words): opt.load_state_dict(bad)
        same_as(params, opt, before, False)

def test_wrappers_of_fastais_optimizer():
    "Lookahead and SAM of fastai's own Optimizer have plain state dicts too, that later steps leave alone"
    for wrap in (fastxtend.Lookahead, lambda o: fastxtend.SVRG(o, 0.)):
        params = two()
        opt = wrap(Optimizer(params, MOMENTUM, lr=.1, mom=.9, wd=0.))
        go(params, opt, range(2))
        sd = opt.state_dict()
        held = detach_copy(sd)
        assert is_plain(sd)
        torch_load(sd)
        go(params, opt, range(2, 4))
        assert_bitwise(sd, held)

# ---------------------------------------------------------------- what can't be stepped is known before
def momentum(mode, params, cbs=MOMENTUM, cls=None):
    with backend_of(mode): return ENGINES[mode](params, cbs, lr=.1, mom=.9, wd=.1)

def before_step(mode, n, cbs=MOMENTUM):
    "Parameters with the gradients of step `n`, and their optimizer, which has taken `n` steps"
    params = two()
    opt = momentum(mode, params, cbs)
    go(params, opt, range(n))
    GradStream().set(params, n)
    return params,opt

def refuses(params, opt, exc, words):
    params = [p for p in params if p.untyped_storage().size()] # the others can't be looked at
    before = snapshot(params, opt)
    with pytest.raises(exc, match=words): opt.step()
    same_as(params, opt, before, False)

@pytest.mark.parametrize('which', ['parameter','gradient'])
@pytest.mark.parametrize('n', [0,2])
@all_modes
def test_freed_memory(mode, n, which):
    "Operations on it would end the process, in every mode"
    params,opt = before_step(mode, n)
    if n and which=='gradient' and mode!='native': opt.clear_state() # the plan is made anew
    (params[1].data if which=='parameter' else params[1].grad).untyped_storage().resize_(0)
    refuses(params, opt, ValueError, f'{which} of shape .*freed.*[Nn]o parameter was changed')

@all_modes
def test_elements_that_share_memory(mode):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).expand(3))]
    for p in params: p.grad = torch.ones(3)
    refuses(params, momentum(mode, params), ValueError, r'parameter of shape \(3,\): several elements share memory')

@all_modes
def test_another_shape(mode):
    params,opt = before_step(mode, 0)
    params[1].data = params[1].data[:1]
    refuses(params, opt, ValueError, r'shape \(1, 4\).*gradient has shape \(2, 4\)')

def product_step(p, lr, **kwargs): p.data.sub_(p.data*p.grad.data.exp(), alpha=lr)

@all_modes
def test_sparse_gradients(mode):
    "Refused with one message, before anything changes; native mode steps those that its steppers can take"
    params,opt = before_step(mode, 0, [weight_decay, product_step])
    params[1].grad = params[1].grad.to_sparse()
    refuses(params, opt, NotImplementedError, r'shape \(2, 4\).*sparse.*SparseAdam')
    opt.cbs = L(sgd_step)
    if mode!='native': return refuses(params, opt, NotImplementedError, 'sparse.*SparseAdam')
    want = params[1].detach() - .1*params[1].grad.to_dense()
    opt.step()
    assert torch.equal(params[1], want)
    opt.zero_grad()
    assert not params[1].grad.to_dense().any()

def test_native_tries_sparse_gradients_once(monkeypatch):
    n,params = [],two()
    monkeypatch.setattr(native, 'trial_of', lambda *args: (n.append(1), checks.trial_of(*args))[1])
    opt = momentum('native', params, [sgd_step])
    for i in range(3):
        GradStream().set(params, i)
        params[1].grad = params[1].grad.to_sparse()
        opt.step()
    assert len(n)==1

# ---------------------------------------------------------------- steps that fail on the n-th tensor
class Brittle(torch.Tensor):
    "A tensor on which some operations fail"
    fails = ()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(o in str(func) for o in cls.fails): raise ArithmeticError(f'{func} on a Brittle')
        with torch._C._DisableTorchDispatch(): res = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not isinstance(res, torch.Tensor): return res
        return res if isinstance(res, cls) else torch.Tensor._make_subclass(cls, res)

@pytest.fixture
def brittle():
    "Parameters of which the third is Brittle, and not of a layout that a kernel can walk"
    third = torch.Tensor._make_subclass(Brittle, torch.ones(4, 6)[:,::2])
    yield [nn.Parameter(t) for t in (torch.ones(4, 3), torch.ones(5), third, torch.ones(2))]
    Brittle.fails = ()

def plain_copy(t):
    with torch._C._DisableTorchDispatch(): return t.detach().clone()

def plain(params): return list(map(plain_copy, params))

def plain_snapshot(params, opt):
    return plain(params),[{k:plain_copy(v) if isinstance(v, torch.Tensor) else v for k,v in opt.state[p].items()} for p in params]

def set_ones(params):
    for p in params: p.grad = torch.ones_like(p)

ADDS = ('aten.add_','aten._foreach_add_','aten.sub_','aten._foreach_sub_')

@pytest.mark.parametrize('n', [0,2], ids=['first_step','later_step'])
@all_modes
def test_an_operation_that_fails_on_the_third_tensor(mode, n, brittle):
    "A subclass is tried on copies: nothing has changed, and the next step works without it"
    opt = momentum(mode, brittle)
    Brittle.fails = () if n else ADDS
    for i in range(n): set_ones(brittle); opt.step()
    if n: # only what comes with momentum_step, of another tape, fails
        opt.cbs = L(*MOMENTUM, product_step)
        Brittle.fails = ('aten.exp','aten._foreach_exp')
    set_ones(brittle)
    before = plain_snapshot(brittle, opt)
    exc = RuntimeError if mode=='jit' else ArithmeticError # TorchScript's own
    with pytest.raises(exc) as e: opt.step()
    assert_bitwise(plain_snapshot(brittle, opt), before)
    if hasattr(e.value, '__notes__'): assert 'No parameter was changed' in e.value.__notes__[0]
    brittle[2].grad = None
    opt.step()
    assert [opt.state[p].get('step', 0) for p in brittle]==[n+1, n+1, n, n+1]

@all_modes
def test_a_trial_changes_nothing_and_is_made_once(mode, brittle, monkeypatch):
    "With tensors that don't fail: the same steps as plain ones, the same random numbers, and a trial for each tape"
    n,real = [],checks.trial_of
    for m in (traced, native): monkeypatch.setattr(m, 'trial_of', lambda *args: (n.append(1), real(*args))[1])
    twins = [nn.Parameter(p.clone()) for p in plain(brittle)]
    a,b = momentum(mode, brittle),momentum(mode, twins)
    rng = torch.get_rng_state()
    for i in range(5):
        set_ones(brittle); set_ones(twins)
        a.step(); b.step()
    assert torch.equal(rng, torch.get_rng_state())
    for p,q in zip(plain(brittle), plain(twins)): assert_same(p, q, **TOL[torch.float32])
    assert len(n)==(2 if mode=='native' else 1) # without averages, and with them; a tape is the same

@all_modes
def test_a_failure_that_nobody_could_foresee(mode, brittle):
    "Counters agree with what happened: native has stepped those before, the others count no step"
    opt = momentum(mode, brittle)
    for i in range(2): set_ones(brittle); opt.step()
    set_ones(brittle)
    Brittle.fails = ADDS
    with pytest.raises((ArithmeticError,RuntimeError)): opt.step()
    assert [opt.state[p]['step'] for p in brittle]==([3,3,2,2] if mode=='native' else [2]*4)
    Brittle.fails = ()
    set_ones(brittle); opt.step()
    assert [opt.state[p]['step'] for p in brittle]==([4,4,3,3] if mode=='native' else [3]*4)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('n', [0,2], ids=['first_step','later_step'])
def test_a_kernel_that_fails(mode, n, monkeypatch):
    "State that the step has created is gone again, and counters are those before it"
    params,opt = before_step(mode, n)
    before = snapshot(params, opt)
    def boom(*args, **kwargs): raise MemoryError('no memory')
    with monkeypatch.context() as m:
        if mode in ('fused','triton'): m.setattr(fused.FusedOptimizer, '_launch', boom)
        else: m.setattr(traced, 'run_foreach' if mode=='foreach' else 'run_script', boom)
        with pytest.raises(MemoryError): opt.step()
    same_as(params, opt, before, False)
    opt.step()
    assert [opt.state[p]['step'] for p in params]==[n+1]*2

@all_modes
def test_a_second_pass_that_fails(mode, monkeypatch):
    "Numbers of the whole model and counters of the first pass go back"
    def squares(p, **kwargs): return {'sq': p.grad.data.square().sum()}
    def fails(sq, calls, **kwargs):
        if calls==2: raise ArithmeticError('third call')
        return {'calls': calls+1}
    params,opt = before_step(mode, 2, [step_stat, squares, fastxtend.Between(fails, ('sq',), calls=0), sgd_step])
    assert opt.calls==2
    with pytest.raises(ArithmeticError): opt.step()
    assert opt.calls==2 and ([opt.state[p]['step'] for p in params]==[2,2] or mode=='native') # whose first pass is complete

@pytest.fixture(scope='module')
def mesh():
    from torch.distributed.tensor import init_device_mesh
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh('cpu', (1,))
    dist.destroy_process_group()

def sharded(mesh, value, *shape):
    from torch.distributed.tensor import distribute_tensor, Shard
    return distribute_tensor(torch.full(shape, value), mesh, [Shard(0)])

@pytest.mark.parametrize('mode', ['native','foreach','jit','fused'])
@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n in SHARDED else pytest.mark.slow) for n in NAMES])
@pytest.mark.filterwarnings('ignore')
def test_dtensors_step_or_change_nothing(name, mode, mesh):
    if not has_mode(name, mode): pytest.skip('no such mode')
    params = [nn.Parameter(sharded(mesh, 1., 4, 4)), nn.Parameter(sharded(mesh, 1., 4))]
    _,opt = build(name, mode, params)
    def held():
        numbers = [{k:v for k,v in opt.state[p].items() if not isinstance(v, torch.Tensor)} for p in params]
        return [p.full_tensor().clone() for p in params],numbers,[set(opt.state[p]) for p in params]
    for i in range(8): # some don't move in their first steps
        for p in params: p.grad = sharded(mesh, 1., *p.shape)
        before = held()
        try: opt.step()
        except Exception:
            now = held()
            assert_bitwise(now[0], before[0])
            assert now[1:]==before[1:]
            return
    assert not torch.equal(params[0].full_tensor(), torch.ones(4, 4))

# ---------------------------------------------------------------- small things
@all_modes
def test_repr(mode):
    params = two()
    opt = momentum(mode, [[params[0]],[params[1]]])
    opt.hypers[1]['lr'] = .25
    words = dict(triton='fused').get(mode, mode)
    text = repr(opt)
    assert text.startswith(f'{ENGINES[mode].__name__} ({words}: weight_decay, average_grad, step_stat, momentum_step\n'
        'Parameter Group 0 (1 parameters, 3 elements)\n    lr: 0.1\n    mom: 0.9\n    wd: 0.1\n')
    assert 'Parameter Group 1 (1 parameters, 8 elements)\n    lr: 0.25' in text and text.endswith(')')

@all_modes
@pytest.mark.parametrize('name', ['adam','ranger'])
def test_zero_grad(name, mode):
    params,opt = build(name, mode)
    for kw,zeros in (({}, True), (dict(set_to_none=False), True), (dict(set_to_none=True), False)):
        GradStream().set(params, 0)
        opt.zero_grad(**kw)
        assert all(not p.grad.any() if zeros else p.grad is None for p in params)

@four_modes
def test_parameters_are_checked_in_every_mode(mode):
    a,b = two()
    for bad,words in (([], 'params is empty'), ([a,a], 'stepped twice'), ([[a],[b,a]], 'stepped twice'), (['weight'], 'is a str, not a')):
        with pytest.raises((ValueError,TypeError), match=words): ENGINES[mode](bad, [sgd_step], lr=.1)
