"Bad input of each kind in each mode: the message, and that the error changes nothing."
import re
from functools import partial

import numpy as np,pytest,torch
from fastai.optimizer import Optimizer,average_grad,momentum_step,sgd_step,step_stat,weight_decay
from torch import nn
from fastxtend_opt.engine.cohort import check_tensors
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from helpers import *

NAMES = [o.name for o in list_optimizers()]
modes = pytest.mark.parametrize('mode', MODES)
all_modes = pytest.mark.parametrize('mode', ALL_MODES)

def two(**kw): return make_params([(3,),(2,4)], big=False, channels_last=False, **kw)

def stepped(mode, name='adam', n=2, **kw):
    "An optimizer of two parameters after `n` steps, with gradients for the next one"
    params = two()
    opt = get_optimizer(name).func(params, lr=.1, **kw, **flags(mode))
    for i in range(n+1):
        GradStream().set(params, i)
        if i<n: opt.step()
    return params,opt

def refused(params, opt, exc, *words, step=None):
    "`step` raises `exc` with `words` in its message, and changes nothing"
    held = [None if p.grad is None else p.grad.detach().clone() for p in params]
    before = detach_copy([p.data for p in params]),detach_copy(opt.state_dict())
    with pytest.raises(exc) as e: (step or opt.step)()
    for w in words: assert re.search(w, str(e.value), re.I), f'{w!r} is not in: {e.value}'
    assert_bitwise([p.data for p in params], before[0], 'params')
    assert_bitwise(detach_copy(opt.state_dict()), before[1], 'state')
    for p,g in zip(params, held):
        if g is not None and g.layout is torch.strided and g.device.type=='cpu': assert_bitwise(p.grad, g, 'grad')
    return str(e.value)

# ---------------------------------------------------------------- gradients that can't be stepped
def sparse(params): params[1].grad = params[1].grad.to_sparse()
def other_shape(params): params[1].data = params[1].data[:1]

@pytest.mark.parametrize('first', [0, 2], ids=['first_step','later_step'])
@modes
@pytest.mark.parametrize('spoil,exc,words', [
    (sparse, NotImplementedError, (r'shape \(2, 4\)', 'sparse', 'dense|SparseAdam')),
    (other_shape, ValueError, (r'gradient has shape \(2, 4\)', r'\(1, 4\)'))], ids=['sparse','shape'])
def test_gradients_that_can_not_be_stepped(spoil, exc, words, mode, first):
    params,opt = stepped(mode, n=first)
    spoil(params)
    refused(params, opt, exc, *words)
    params[1].grad = None # and the next step works when the cause is gone
    opt.step()
    assert opt.state[params[0]]['step']==first+1

def test_gradient_on_another_device():
    "torch 2.15 refuses to attach such a gradient in any way, so this calls the check directly"
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError): p.grad = torch.empty(3, device='meta')
    with pytest.raises(ValueError, match=r'shape \(3,\).*on cpu, its gradient on meta'): check_tensors(p, torch.empty(3, device='meta'))

def test_fused_on_a_device_without_kernels():
    p = nn.Parameter(torch.empty(3, device='meta'))
    opt = get_optimizer('adam').func([p], lr=.1, fused=True)
    p.grad = torch.empty(3, device='meta')
    with pytest.raises(UnsupportedError, match='meta.*foreach=True'): opt.step()

@pytest.mark.parametrize('dtype,words', [(torch.complex64, ('complex', 'view_as_real')), (torch.int64, ('int64', 'float32')),
                                         (torch.bool, ('bool', 'float32'))])
@modes
def test_complex_and_integer(mode, dtype, words):
    params = [*two(), nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_complex)]
    opt = ENGINES[mode](params[:2], [weight_decay, sgd_step], lr=.1)
    opt.param_lists[0].append(params[2]) # the classes refuse complex parameters at once
    GradStream().set(params[:2], 0)
    params[2].grad = torch.ones(3, dtype=dtype)
    refused(params, opt, NotImplementedError, *words)

@all_modes
def test_functions_refuse_complex_parameters_at_once(mode):
    with pytest.raises(NotImplementedError, match=r'params\[0\] is complex.*view_as_real'):
        get_optimizer('adam').func([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=.1, **flags(mode))

@modes
def test_state_of_another_shape_or_kind(mode):
    params,opt = stepped(mode)
    for bad,exc,words in ((torch.zeros(5), ValueError, (r'grad_avg.*\(5,\)',)),
                          (torch.zeros(2,4,dtype=torch.int64), NotImplementedError, ('grad_avg.*int64',)),
                          (torch.zeros(2,4,device='meta'), ValueError, ('grad_avg.*meta',))):
        good = opt.state[params[1]]['grad_avg']
        opt.state[params[1]]['grad_avg'] = bad
        held = [p.detach().clone() for p in params],opt.state[params[0]]['grad_avg'].clone()
        with pytest.raises(exc) as e: opt.step()
        for w in words: assert re.search(w, str(e.value)), str(e.value)
        assert_bitwise(([p.detach() for p in params], opt.state[params[0]]['grad_avg']), held)
        opt.state[params[1]]['grad_avg'] = good
    opt.step()

# ---------------------------------------------------------------- hypers
@pytest.mark.parametrize('v', [float('nan'), float('inf'), -float('inf'), np.float64('nan'), np.float32('inf')], ids=repr)
@pytest.mark.parametrize('key', ['lr','wd','mom'])
@modes
def test_non_finite_hypers_at_the_step(mode, key, v):
    params,opt = stepped(mode)
    good = opt.hypers[0][key]
    opt.hypers[0][key] = v
    held = [p.detach().clone() for p in params],detach_copy([dict(opt.state[p]) for p in params])
    with pytest.raises(ValueError, match=f'{key}.*(nan|inf).*finite'): opt.step()
    assert_bitwise(([p.detach() for p in params], detach_copy([dict(opt.state[p]) for p in params])), held)
    opt.hypers[0][key] = good
    opt.step()

@pytest.mark.parametrize('v', [(.9,.99), [.9,.99], {'a':1.}], ids=['tuple','list','dict'])
@modes
def test_sequences_as_hypers(mode, v):
    params,opt = stepped(mode)
    opt.hypers[0]['betas'] = v
    held = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="'betas'.*one number per group.*(name for each|partial)"): opt.step()
    assert_bitwise([p.detach() for p in params], held)

@modes
def test_tuple_hypers_at_construction(mode):
    with pytest.raises(ValueError, match="'betas'.*one number per group"): ENGINES[mode](two(), [sgd_step], lr=.1, betas=(.9,.99))

@modes
def test_closure(mode):
    params,opt = stepped(mode)
    refused(params, opt, NotImplementedError, 'closure', step=lambda: opt.step(lambda: 0.))
    opt = stepped(mode, 'ranger')[1]
    with pytest.raises(NotImplementedError, match='closure'): opt.step(lambda: 0.)

# ---------------------------------------------------------------- steppers that the engine can't run
def branches(p, lr, **kwargs):
    if p.grad.data.norm() > 1: p.data.sub_(p.grad.data, alpha=lr)
def reads_item(p, lr, **kwargs): p.data.sub_(p.grad.data, alpha=lr*p.grad.data.norm().item())
def makes_float(p, lr, **kwargs): p.data.mul_(float(p.grad.data.sum()))
def sorts(p, lr, **kwargs): p.data.sub_(p.data.sort()[0], alpha=lr)
def fft(p, lr, **kwargs): p.data.sub_(torch.fft.rfft(p.grad.data).abs()*lr)
def along_an_axis(p, lr, **kwargs): p.data.sub_(p.grad.data - p.grad.data.mean(0))
def sums_an_axis(p, lr, **kwargs): p.data.sub_(torch.sum(p.grad.data, dim=-1))
def norm_axis(p, lr, **kwargs): p.data.sub_(p.grad.data.norm(dim=0))
def norm3(p, lr, **kwargs): p.data.sub_(p.grad.data.norm(3))
def indexes(p, lr, **kwargs): p.data.sub_(p.grad.data[0]*lr)
def replaces_data(p, lr, **kwargs): p.data = p.data*2
def outside_tensor(p, lr, **kwargs): p.data.sub_(torch.ones(2,4)*p.grad.data)
def outside_state(p, lr, buf=None, **kwargs): return {'buf': torch.zeros(4)}
def matmul(p, lr, **kwargs): p.data.sub_(p.grad.data @ p.grad.data.t())
def random(p, lr, **kwargs): p.data.add_(torch.randn_like(p.data))
UNSUPPORTED = [(branches,'bool'), (reads_item,'item'), (makes_float,'item'), (sorts,'sort'), (fft,'rfft'),
               (along_an_axis,'mean along an axis'),
               (sums_an_axis,'sum along an axis'), (norm_axis,'norm along an axis'), (norm3,'norm with p=3'), (indexes,'indexing'),
               (replaces_data,'data ='),
               (outside_tensor,'mul'), (outside_state,'buf'), (matmul,'matmul|mm'), (random,'randn_like')]

@pytest.mark.parametrize('stepper,op', UNSUPPORTED, ids=[f.__name__ for f,_ in UNSUPPORTED])
@modes
def test_unsupported_operations(mode, stepper, op):
    "The message names stepper, operation and remedy; the steppers before it in the list have changed nothing"
    params = two()
    opt = ENGINES[mode](params, [weight_decay, average_grad, stepper], lr=.1, wd=.1, mom=.9)
    GradStream().set(params, 0)
    msg = refused(params, opt, NotImplementedError, stepper.__name__, op, 'native')
    assert 'OPS' in msg or 'add_op' in msg
    opt.cbs = opt.cbs[:2] + L(momentum_step) # it can continue without
    opt.step()
    assert (opt.state[params[0]]['grad_avg']==params[0].grad).all()

@modes
def test_a_name_is_found_for_partials_and_classes(mode):
    class Sorter:
        def __call__(self, p, **kwargs): p.data.sort()
    for s,name in ((partial(sorts, lr=.1), 'sorts'), (Sorter(), 'Sorter'), (lambda p, **kw: p.data.sort(), '<lambda>')):
        params = two()
        opt = ENGINES[mode](params, [s], lr=.1)
        GradStream().set(params, 0)
        refused(params, opt, UnsupportedError, name, 'sort')

def returns_alias(p, avg=None, **kwargs): return {'avg': p.grad.data}
def returns_twice(p, **kwargs):
    x = p.grad.data*2
    return {'a': x, 'b': x}

@pytest.mark.parametrize('stepper,words', [(returns_alias, ('avg', 'grad', 'clone')), (returns_twice, ("'b'", "'a'", 'clone'))])
@modes
def test_state_that_is_another_tensor(mode, stepper, words):
    "fastai would let the next gradient overwrite it"
    params = two()
    opt = ENGINES[mode](params, [stepper, sgd_step], lr=.1)
    GradStream().set(params, 0)
    refused(params, opt, ValueError, *words)

def divides(p, lr, step, **kwargs): p.data.mul_(1/(step-3))
@modes
def test_an_exception_in_a_stepper_changes_nothing(mode):
    params = two()
    opt = ENGINES[mode](params, [weight_decay, average_grad, step_stat, divides], lr=.1, wd=.1, mom=.9)
    for i in range(2):
        GradStream().set(params, i)
        opt.step()
    refused(params, opt, ZeroDivisionError, 'division')
    assert opt.state[params[0]]['step']==2

def needs(p, missing, **kwargs): pass
@modes
def test_a_hyper_that_is_not_there(mode):
    params = two()
    opt = ENGINES[mode](params, [weight_decay, needs], lr=.1, wd=.1)
    GradStream().set(params, 0)
    refused(params, opt, TypeError, 'missing')

# ---------------------------------------------------------------- construction
@modes
def test_engine_classes_refuse_bad_parameters(mode):
    a,b = two()
    cls = ENGINES[mode]
    with pytest.raises(ValueError, match='params is empty'): cls([], [sgd_step], lr=.1)
    with pytest.raises(ValueError, match='params is empty'): cls(iter([]), [sgd_step], lr=.1)
    with pytest.raises(ValueError, match='stepped twice'): cls([a,b,a], [sgd_step], lr=.1)
    with pytest.raises(ValueError, match='stepped twice'): cls([[a],[b,a]], [sgd_step], lr=.1)
    with pytest.raises(TypeError, match=r'params\[0\] is a dict, not a parameter'): cls([{'params':[a]}], [sgd_step], lr=.1)
    with pytest.raises(TypeError, match=r'params\[1\] is a float, not a parameter'): cls([a, 1.], [sgd_step], lr=.1)

@all_modes
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_functions_refuse_bad_parameters(name, mode):
    f = partial(get_optimizer(name).func, lr=.1, **flags(mode))
    a,b = two()
    for bad,words in (([], 'empty'), (iter([]), 'empty'), ([[],[]], 'empty'), ([a,a], 'stepped twice'),
                      ([[a],[a]], 'group 0 and .* group 1'),
                      ([a,[b]], 'mixes'), ([dict(lr=1.)], "without 'params'"), ([dict(params=[a], betas=(.9,.9))], 'betas')):
        with pytest.raises(ValueError, match=words): f(bad)
    for bad in (nn.Linear(2,2), [3.], ['a']):
        with pytest.raises(TypeError): f(bad)

@all_modes
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_torch_style_groups_are_taken(name, mode):
    a,b = two()
    opt = get_optimizer(name).func([dict(params=[a]), dict(params=b, lr=.5, wd=0.)], lr=.1, wd=.2, **flags(mode))
    assert [h['lr'] for h in opt.hypers]==[.1,.5] and [h['wd'] for h in opt.hypers]==[.2,0.] and [len(o) for o in opt.param_lists]==[1,1]

BAD_HYPERS = [('lr',-.1), ('lr',float('nan')), ('lr',float('inf')), ('eps',-1e-8), ('eps',float('nan')), ('wd',-.01), ('wd',float('inf')),
              ('mom',1.), ('mom',-.1),
              ('mom',float('nan')), ('sqr_mom',1.), ('sqr_mom',-.5), ('beta',-1.), ('trust_coeff',0.), ('k',0), ('k',2.5), ('alpha',0.),
              ('alpha',1.5), ('nu_1',float('nan'))]

@all_modes
@pytest.mark.engine
@pytest.mark.parametrize('name,key,v', [(n,k,v) for n in NAMES for k,v in BAD_HYPERS if (k=='lr' or k in get_optimizer(n).hypers)
                                        and v not in get_optimizer(n).ranges[k]])
def test_bad_hypers(name, key, v, mode):
    "The message has name, value and range, from the function and (except for lr) from the factory"
    row = get_optimizer(name)
    words = rf'{key}={re.escape(repr(v))}.*must be'
    with pytest.raises(ValueError, match=words): row.func(two(), **{'lr':.1, key:v, **flags(mode)})
    if key!='lr':
        with pytest.raises(ValueError, match=words): row.factory(**{key:v, **flags(mode)})

@all_modes
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_unknown_keyword(name, mode):
    row = get_optimizer(name)
    for bad in ('weight_decay','betas','momentm'):
        with pytest.raises(TypeError, match=bad): row.func(two(), lr=.1, **{bad:.1}, **flags(mode))
        with pytest.raises(TypeError, match=bad): row.factory(**{bad:.1}, **flags(mode))

@pytest.mark.parametrize('pair', [('foreach','jit'), ('foreach','fused'), ('jit','fused')])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.engine
def test_two_flags(name, pair):
    row,kw = get_optimizer(name),{k:True for k in pair}
    with pytest.raises(ValueError, match=f'{pair[0]}=True and {pair[1]}=True'): row.func(two(), lr=.1, **kw)
    with pytest.raises(ValueError, match=f'{pair[0]}=True and {pair[1]}=True'): row.factory(**kw)
    with pytest.raises(ValueError, match='foreach=True and jit=True and fused=True'):
        row.func(two(), lr=.1, foreach=True, jit=True, fused=True)

# ---------------------------------------------------------------- loading
@modes
def test_load_state_dict_says_what_is_wrong(mode):
    params,opt = stepped(mode)
    sd = opt.state_dict()
    def but(**kw): return {**sd, **kw}
    for bad,words in ((None, "'state' and 'hypers'"), ({}, "'state' and 'hypers'"), (but(hypers=[]), '0 parameter groups.*1'),
                      (but(state=sd['state'][:1]), '1 parameters.*2'),
                      (but(hypers=[3.]), 'dict.*float'), (but(state=[None,{}]), 'dict.*NoneType'),
                      (but(state=[{'grad_avg':torch.zeros(7)},{}]), r"'grad_avg'.*\(7,\).*\(3,\)"),
                      (but(state=[{'grad_avg':torch.zeros(3, dtype=torch.int32)},{}]), "'grad_avg'.*int32"),
                      (but(hypers=[{'lr':float('nan')}]), "'lr'.*nan")):
        msg = refused(params, opt, ValueError, words, step=lambda: opt.load_state_dict(bad))
