"AdaFactor: the state that depends on the shape, the branches, and where it differs from torch."
import numpy as np,pytest,torch
from torch import nn
from fastxtend_opt.algorithms.adafactor import AdaFactor
from test_oracles import REFS,DECAYS,TOL64,ours,problem,run_fastai,run_reference
from helpers import *

STATE = dict(row=('R',-1), col=('C',-2), sqr_avg=('V',None))

@pytest.mark.parametrize('decay', list(DECAYS))
@pytest.mark.parametrize('case', range(len(REFS['adafactor'][2])))
def test_state_against_reference(case, decay):
    h = {**REFS['adafactor'][2][case], **DECAYS[decay]}
    params,group,gs = problem()
    ref,objs = run_reference('adafactor', h, params, group, gs)
    _,opt = run_fastai(ours('adafactor', **h), params, group, gs)
    for p,o in zip(params, objs):
        st = {k:v for k,v in opt.state[p].items() if isinstance(v, torch.Tensor)}
        assert set(st) == ({'row','col'} if p.ndim>1 else {'sqr_avg'})
        for k,v in st.items():
            attr,axis = STATE[k]
            want = np.asarray(getattr(o, attr), dtype=np.float64)
            assert_same(v.numpy(), want if axis is None else np.expand_dims(want, axis), **TOL64, path=k)

def test_cases_reach_every_branch():
    objs = [o for h in REFS['adafactor'][2] for o in run_reference('adafactor', {**h, **DECAYS['none']}, *problem())[1]]
    assert all(sum(getattr(o, k) for o in objs)>20 for k in ('clipped','unclipped','small'))

@pytest.mark.parametrize('mode', ALL_MODES)
def test_rate_is_capped_as_in_torch(mode):
    "lr of .3 and 1.: above 1/sqrt(t) from step 12 and 2"
    params = make_params([(7,),(5,3),(2,3,4,2)], torch.float64, big=False, channels_last=False)
    twins = copy_params(params)
    opt = WithBackend(lambda p: AdaFactor(p, [.3,1.], wd=.01, **flags(mode)), mode)(two_groups(params))
    ref = torch.optim.Adafactor([dict(params=g, lr=l) for g,l in zip(two_groups(twins), (.3,1.))], weight_decay=.01)
    for i in range(20):
        for ps in (params,twins): GradStream(3).set(ps, i)
        opt.step(); ref.step()
        assert_same([p.detach() for p in params], [p.detach() for p in twins], **TOL64, path=f'step {i}')

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('eps1', [None,1e-30])
def test_gradients_of_zero_and_tiny_ones_in_float32(eps1, mode):
    "No NaN, where torch has it with eps1=1e-30; squares of 1e-12 would underflow as a product of row and column"
    params = [nn.Parameter(torch.ones(s)) for s in ((4,3),(5,),(2,3,2))]
    opt = WithBackend(lambda p: AdaFactor(p, .1, eps1=eps1, **flags(mode)), mode)(params)
    for g in (0.,1e-12,1.):
        for p in params: p.grad = torch.full_like(p, g)
        before = [p.detach().clone() for p in params]
        opt.step()
        for p,b in zip(params, before):
            assert p.isfinite().all() and (g!=0.) == bool((p!=b).all())

def test_torch_with_eps1_in_float32_has_nan():
    p = nn.Parameter(torch.ones(4,3))
    p.grad = torch.zeros_like(p)
    torch.optim.Adafactor([p], eps=(1e-30,1e-3)).step()
    assert p.isnan().any()

def test_eps1():
    p = [[nn.Parameter(torch.ones(2))],[nn.Parameter(torch.ones(2,2))]]
    assert 'eps1' not in AdaFactor(p, .1).hypers[0]
    assert [h['eps1'] for h in AdaFactor(p, .1, eps1=[1e-30,1e-20]).hypers] == [1e-30,1e-20]
    for bad in (0.,-1.,float('nan')):
        with pytest.raises(ValueError, match='eps1'): AdaFactor(p, .1, eps1=bad)
    with pytest.raises(ValueError, match='decay_rate=0.5'): AdaFactor(p, .1, decay_rate=.5)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_state_of_a_matrix_is_small(mode):
    "64 rows and 32 columns: 96 numbers, in each mode"
    p = nn.Parameter(torch.ones(64,32))
    p.grad = torch.ones_like(p)
    opt = WithBackend(lambda p: AdaFactor(p, .1, **flags(mode)), mode)([p])
    opt.step()
    assert {k:tuple(v.shape) for k,v in opt.state[p].items() if isinstance(v, torch.Tensor)} == dict(row=(64,1), col=(1,32))
