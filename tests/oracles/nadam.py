"NAdam: a reference in the paper's notation, torch.optim, timm"
import pytest,torch
from reference.nadam import NAdam
from . import peer

def REFERENCE(t, h, lam): return NAdam(t, h['mom'], h['sqr_mom'], h['eps'], h['momentum_decay'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='n', mu_product='product', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-8, momentum_decay=.004), dict(mom=.99, sqr_mom=.9, eps=1e-3, momentum_decay=.5),
         dict(mom=.5, sqr_mom=.99, eps=1e-5, momentum_decay=0.)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, momentum_decay=.004, wd=0., decouple_wd=False)

@peer(rtol=1e-6, atol=1e-6)
def torch_nadam(h):
    "It keeps the product of the schedule in float32, so its float64 results are good to about 1e-7 only"
    return lambda g: torch.optim.NAdam(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], momentum_decay=h['momentum_decay'],
                                       decoupled_weight_decay=h['decouple_wd'])
@peer()
def timm_nadam(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.NAdamLegacy(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], schedule_decay=h['momentum_decay'])

PEERS = [(f, h, ds) for f,ds in ((torch_nadam, ('none','decoupled','L2')), (timm_nadam, ('none','L2'))) for h in CASES]

@peer(late=False)
def timm_nadamw(h):
    "Another algorithm: no schedule of the momentum"
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.NAdamW(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], foreach=False)
DEVIATIONS = [(timm_nadamw, CASES[0], .1)]
