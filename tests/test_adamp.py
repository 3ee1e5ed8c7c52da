"AdamP and SGDP: every branch of the projection fires, in every mode, and no step waits for a value."
from functools import partial
import pytest,torch
from torch import nn
from fastxtend_opt.algorithms.adamp import AdamP,SGDP
from test_oracles import REFS,DECAYS,ours,problem,run_reference
from helpers import *

OPTS = dict(adamp=AdamP, sgdp=partial(SGDP, mom=.9))
DELTAS = (1.2,10.) # rows, the whole and neither by turns; rows always

@pytest.mark.parametrize('name', ['adamp','sgdp'])
def test_cases_reach_every_branch(name):
    count = {k:0 for k in ('channels','layers','neither')}
    for h in REFS[name][2]:
        for o in run_reference(name, {**h, 'wd':0.}, *problem())[1]:
            for k in count: count[k] += getattr(o, k)
    assert min(count.values())>10, count

def stepped(name, mode, delta, dtype, n=20, **kw):
    params = make_params(dtype=dtype, seed=2)
    opt = WithBackend(lambda p: OPTS[name](p, 1e-2, delta=delta, wd=.1, **kw, **flags(mode)), mode)(two_groups(params))
    opt.state[params[3]]['do_wd'] = False
    for i in range(n):
        GradStream(4, (7,)).set(params, i)
        opt.step()
    return snapshot(params, opt)

@pytest.mark.parametrize('mode', [pytest.param(m, marks=pytest.mark.slow if m=='triton' else ()) for m in MODES])
@pytest.mark.parametrize('dtype', [torch.float64,pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize('delta', DELTAS)
@pytest.mark.parametrize('name', list(OPTS))
def test_modes_project_as_native(name, delta, dtype, mode):
    tol = {**TOL[dtype], 'atol':1e3*TOL[dtype]['atol']} # a spike of a thousand in the averages
    assert_same(stepped(name, mode, delta, dtype), stepped(name, 'native', delta, dtype), **tol)

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('name', list(OPTS))
def test_each_tensor_decides_for_itself(name, mode):
    "Three matrices of one shape: rows are projected, the whole is, none is. The first two decay by a tenth"
    values = [([[2.,0.],[0.,2.]], [[0.,1.],[1.,0.]]), ([[1.,0.],[0.,1.]], [[1.,0.],[0.,-1.]]), ([[1.,1.],[1.,1.]], [[1.,1.],[1.,1.]])]
    params = [nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w,_ in values]
    opt = WithBackend(lambda p: OPTS[name](p, 1e-2, wd=.1, eps=1e-13, **flags(mode)), mode)(params)
    for p,(_,g) in zip(params, values): p.grad = torch.tensor(g, dtype=torch.float64)
    opt.step()
    share = 1. if name=='adamp' else 1/(1-.9)
    for p,(w,g),ratio in zip(params, values, (.1,.1,1.)):
        assert_same(p.detach(), torch.tensor(w, dtype=torch.float64)*(1-1e-3*share*ratio) - 1e-2*torch.tensor(g, dtype=torch.float64),
                    **TOL[torch.float64])

@pytest.mark.parametrize('name', list(OPTS))
def test_no_step_reads_a_value(name, monkeypatch):
    "A branch on a value, or `item`, would make a GPU wait"
    p = nn.Parameter(torch.randn(3,4))
    opt = OPTS[name]([p], 1e-2, delta=10.)
    for k in ('__bool__','item','__float__','tolist'): monkeypatch.setattr(torch.Tensor, k, lambda *a: pytest.fail('read a value'))
    p.grad = torch.ones(3,4)
    opt.step()

def test_dampening_and_ranges():
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match='dampening=1'): SGDP(p, .1, dampening=1.)
    with pytest.raises(ValueError, match='wd_ratio=1.5'): AdamP(p, .1, wd_ratio=1.5)
    with pytest.raises(ValueError, match='delta=-1'): AdamP(p, .1, delta=-1.)
