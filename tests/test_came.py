"CAME: the state that depends on the shape, and the branches."
import numpy as np,pytest,torch
from torch import nn
from fastxtend_opt.algorithms.came import CAME
from test_oracles import REFS,DECAYS,TOL64,ours,problem,run_fastai,run_reference
from helpers import *

STATE = dict(row=('r',-1), col=('c',-2), sqr_avg=('v',None), grad_avg=('m',None), res_row=('R',-1), res_col=('C',-2))

def hypers(case, decay): return {**REFS['came'][2][case], 'wd':DECAYS[decay]['wd']}

@pytest.mark.parametrize('decay', ['none','decoupled'])
@pytest.mark.parametrize('case', range(len(REFS['came'][2])))
def test_state_against_reference(case, decay):
    h,(params,group,gs) = hypers(case, decay),problem()
    _,objs = run_reference('came', h, params, group, gs)
    _,opt = run_fastai(ours('came', **h), params, group, gs)
    for p,o in zip(params, objs):
        st = {k:v for k,v in opt.state[p].items() if isinstance(v, torch.Tensor)}
        assert set(st) == {'grad_avg', *(('row','col','res_row','res_col') if p.ndim>1 else ('sqr_avg',))}
        for k,v in st.items():
            attr,axis = STATE[k]
            want = np.asarray(getattr(o, attr), dtype=np.float64)
            assert_same(v.numpy(), want if axis is None else np.expand_dims(want, axis), **TOL64, path=k)

def test_cases_reach_both_branches():
    objs = [o for i in range(len(REFS['came'][2])) for o in run_reference('came', hypers(i, 'none'), *problem())[1]]
    assert sum(o.clipped for o in objs)>50 and sum(o.unclipped for o in objs)>50

@pytest.mark.parametrize('mode', ALL_MODES)
def test_gradients_of_zero_and_tiny_ones_in_float32(mode):
    params = [nn.Parameter(torch.ones(s)) for s in ((4,3),(5,),(2,3,2))]
    opt = WithBackend(lambda p: CAME(p, .1, **flags(mode)), mode)(params)
    for g in (0.,0.,1e-12,1.):
        for p in params: p.grad = torch.full_like(p, g)
        before = [p.detach().clone() for p in params]
        opt.step()
        for p,b in zip(params, before): assert p.isfinite().all() and (g!=0.) == bool((p!=b).all())
