import pytest
from oracles import peer
from reference.adopt import ADOPT

def REFERENCE(t, h, lam): return ADOPT(t, h['mom'], h['sqr_mom'], h['eps'], h['clip_exp'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
CASES = [dict(mom=.9, sqr_mom=.9999, eps=1e-6, clip_exp=.25), dict(mom=.5, sqr_mom=.9, eps=.5, clip_exp=.5),
         dict(mom=.9, sqr_mom=.99, eps=1e-2, clip_exp=0.)]
DEFAULTS = dict(mom=.9, sqr_mom=.9999, eps=1e-6, clip_exp=.25, wd=0.)

@peer()
def timm_adopt(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.Adopt(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], clip_exp=h['clip_exp'] or None,
                                decoupled=h['decouple_wd'], foreach=False)

@peer(late=False)
def po_adopt(h):
    "It clips to t^.25, not (t-1)^.25"
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.ADOPT(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'],
                                             foreach=False)

PEERS = [(timm_adopt, h, ('none','decoupled','L2')) for h in CASES]
DEVIATIONS = [(po_adopt, CASES[0], .01)]
