"Rprop: that the oracle's trajectories meet every branch; signs where a product would underflow; what a changed `lr` does."
import numpy as np,torch
from torch import nn
from fastxtend_opt.algorithms.rprop import Rprop,rprop
from fastxtend_opt.definition.lessons import take_steps
from helpers import *
from test_oracles import DECAYS,REFS,problem,run_reference
import pytest

def test_every_branch_is_met():
    params,group,gs = problem()
    for i,limits in enumerate((False,True)):
        _,objs = run_reference('rprop', {**REFS['rprop'][2][i], **DECAYS['none']}, params, group, gs)
        assert sum(o.grown for o in objs)>100 and sum(o.turned for o in objs)>100
        assert not limits or (sum(o.at_min for o in objs)>100 and sum(o.at_max for o in objs)>100)

@pytest.mark.parametrize('mode', ALL_MODES)
def test_tiny_gradients_have_signs(mode):
    "1e-30 squared is 0 in float32"
    got = take_steps(WithBackend(lambda p,lr: Rprop(p, lr, **flags(mode)), mode), [1.,1.], [1e-30,-1e-30], [1e-30,1e-30],
                     dtype=torch.float32)
    assert got.tolist()==pytest.approx([.78,1.1], rel=1e-6)

def test_lr_is_the_first_step_alone():
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = rprop()([p], lr=.1)
    for lr in (.1,0.,7.):
        opt.set_hyper('lr', lr)
        p.grad = torch.ones_like(p)
        opt.step()
    assert p.tolist()==pytest.approx([1-.1-.12-.144]*2, rel=1e-12)
    opt.clear_state()
    opt.step() # it begins anew, with the present lr
    assert p.tolist()==pytest.approx([1-.1-.12-.144-7.]*2, rel=1e-12)
