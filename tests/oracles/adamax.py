"AdaMax: a reference in the paper's notation, torch.optim, pytorch_optimizer"
import pytest,torch
from reference.adamax import AdaMax
from . import peer

def REFERENCE(t, h, lam): return AdaMax(t, h['mom'], h['sqr_mom'], h['eps'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', inf_norm='u', step='t')
# in all of them the maximum is now the old one, now the new
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-8), dict(mom=.5, sqr_mom=.6, eps=1e-3), dict(mom=0., sqr_mom=.9, eps=1e-8)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, wd=0., decouple_wd=False)

@peer()
def torch_adamax(h): return lambda g: torch.optim.Adamax(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'])
@peer(late=False)
def po_adamax(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdaMax(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'],
                                              foreach=False)

# torch has no decoupled decay here
PEERS = [(f, h, ds) for f,ds in ((torch_adamax, ('none','L2')), (po_adamax, ('none','decoupled','L2'))) for h in CASES]
