"Rprop: a reference in the paper's notation, torch.optim"
import torch
from reference.rprop import Rprop
from . import peer

def REFERENCE(t, h, lam): return Rprop(t, h['eta_minus'], h['eta_plus'], h['step_min'], h['step_max'], lam)
STATE = dict(prev_grad='dE_old', step_size='delta')
# in the second both limits bind
CASES = [dict(eta_minus=.5, eta_plus=1.2, step_min=1e-6, step_max=50.), dict(eta_minus=.3, eta_plus=1.9, step_min=3e-4, step_max=2e-3)]
# the signature of the specification has no wd, its text asks for one
DEFAULTS = dict(eta_minus=.5, eta_plus=1.2, step_min=1e-6, step_max=50., wd=0.)

@peer()
def torch_rprop(h):
    def _make(groups): # it refuses to know of weight_decay
        for g in groups: g.pop('weight_decay')
        return torch.optim.Rprop(groups, lr=1., etas=(h['eta_minus'],h['eta_plus']), step_sizes=(h['step_min'],h['step_max']))
    return _make

PEERS = [(torch_rprop, h, ('none',)) for h in CASES]
