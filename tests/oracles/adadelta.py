"AdaDelta: a reference in the paper's notation, torch.optim, pytorch_optimizer"
import pytest,torch
from reference.adadelta import AdaDelta
from . import peer

def REFERENCE(t, h, lam): return AdaDelta(t, h['sqr_mom'], h['eps'], lam, h['decouple_wd'])
STATE = dict(sqr_avg='Eg2', acc_delta='Edx2')
CASES = [dict(sqr_mom=.9, eps=1e-6), dict(sqr_mom=.95, eps=1e-2), dict(sqr_mom=.5, eps=1.)] # steps of .003 and up to those of order 1
DEFAULTS = dict(sqr_mom=.9, eps=1e-6, wd=0., decouple_wd=False)

@peer()
def torch_adadelta(h): return lambda g: torch.optim.Adadelta(g, lr=1., rho=h['sqr_mom'], eps=h['eps'])
@peer()
def po_adadelta(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdaDelta(g, lr=1., rho=h['sqr_mom'], eps=h['eps'], weight_decouple=h['decouple_wd'], foreach=False)

# torch has no decoupled decay here
PEERS = [(f, h, ds) for f,ds in ((torch_adadelta, ('none','L2')), (po_adadelta, ('none','decoupled','L2'))) for h in CASES]
