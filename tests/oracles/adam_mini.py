"Adam-mini: a reference in the paper's notation, the authors' package"
import pytest,torch
from torch import nn
from reference.adam_mini import AdamMini
from . import peer

def REFERENCE(t, h, lam): return AdamMini(t, h['mom'], h['sqr_mom'], h['eps'], h['partition'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', v_b='v', step='t')
CASES = [dict(mom=.9, sqr_mom=.99, eps=1e-5, partition='neuron'), dict(mom=.5, sqr_mom=.999, eps=1e-8, partition='tensor'),
         dict(mom=0., sqr_mom=.9, eps=1e-3, partition='neuron')]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, partition='neuron', wd=0.)

class Authors:
    "Their optimizer knows blocks by names, and rows of matrices only: a kernel is given to it as a matrix of the same memory"
    def __init__(self, groups, h):
        adam_mini = pytest.importorskip('adam_mini')
        self.param_groups,rows = groups,h['partition']=='neuron'
        self.params = [g['params'][0] for g in groups]
        self.views = [nn.Parameter(p.data.view(len(p), -1)) if rows and p.ndim>1 else p for p in self.params]
        self.opt = adam_mini.Adam_mini([(f"{'mlp' if rows and p.ndim>1 else 'other'}{i}", v) for i,
                                        (p,v) in enumerate(zip(self.params, self.views))],
            lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], verbose=False)
    def step(self):
        for p,v,mine,theirs in zip(self.params, self.views, self.param_groups, self.opt.param_groups):
            if v is not p: v.grad = None if p.grad is None else p.grad.view(v.shape)
            theirs.update(lr=mine['lr'], weight_decay=mine['weight_decay'])
        self.opt.step()

@peer()
def authors(h): return lambda g: Authors(g, h)

PEERS = [(authors, h, ('none','decoupled')) for h in CASES] # they have no L2
