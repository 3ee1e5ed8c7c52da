import pytest,torch
from oracles import peer
from reference.shampoo import Shampoo

def REFERENCE(theta, h, lam): return Shampoo(theta, h['mom'], h['eps'], h['precondition_frequency'], h['max_precond_dim'], lam,
                                             h['decouple_wd'])
STATE = dict(step='t') # the matrices: tests/test_soap.py
DEFAULTS = dict(mom=0., eps=1e-4, precondition_frequency=1, max_precond_dim=4096, aux=None, wd=0., decouple_wd=False)
# A spike of 1e3 leaves 1e-8 of noise in all eigenvalues of a matrix: where there are fewer gradients than rows, that matters compared with
# `eps`. So there it is large, or matrices are small
CASES = [dict(mom=0., eps=1., precondition_frequency=1, max_precond_dim=4096),
         dict(mom=.5, eps=.1, precondition_frequency=4, max_precond_dim=4),
         dict(mom=.9, eps=1., precondition_frequency=3, max_precond_dim=3)] # 3: axes of both kinds in one tensor

# A sum of fewer gradients than rows has eigenvalues of `eps` next to large ones: in float32 rounding decides them (seen: .7% of a root). No
# gradient has a part in these directions, and the weights agree
ROUNDED = [f'inv_precond_{i}' for i in range(4)]

class WithVectors:
    "A torch optimizer that is given single numbers as vectors of one, as we take them"
    def __init__(self, make, groups):
        self.ps = [p for g in groups for p in g['params']]
        self.own = [torch.nn.Parameter(p.data.view(1)) if p.ndim==0 else p for p in self.ps]
        own = dict(zip(self.ps, self.own))
        self.opt = make([{**g, 'params':[own[p] for p in g['params']]} for g in groups])
        self.param_groups = self.opt.param_groups
    def step(self):
        for p,q in zip(self.ps, self.own): q.grad = None if p.grad is None else p.grad.view(q.shape)
        self.opt.step()

def po(h, **kw):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.Shampoo(g, lr=1., **{**dict(momentum=0., matrix_eps=h['eps'], preconditioning_compute_steps=1,
                                                                   weight_decouple=h['decouple_wd']), **kw})
@peer()
def po_shampoo(h): return lambda g: WithVectors(po(h), g)
@peer()
def po_numbers(h): return po(h)
@peer(late=False)
def po_momentum(h): return lambda g: WithVectors(po(h, momentum=h['mom']), g)
@peer(late=False)
def po_frequency(h): return lambda g: WithVectors(po(h, preconditioning_compute_steps=h['precondition_frequency']), g)

PEERS = [(po_shampoo, dict(CASES[0], eps=e), ('none','decoupled','L2')) for e in (1.,10.)]
DEVIATIONS = [(po_numbers, CASES[0], .05), # plain gradient descent for a single number
              (po_momentum, CASES[0] | dict(mom=.9), .05), # mixes the last update into the gradient
              (po_frequency, CASES[0] | dict(precondition_frequency=4), .05)] # does not move at first
