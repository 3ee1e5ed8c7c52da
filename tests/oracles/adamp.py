import pytest
from oracles import peer
from reference.adamp import AdamP

def REFERENCE(theta, h, lam): return AdamP(theta, h['mom'], h['sqr_mom'], h['eps'], h['delta'], h['wd_ratio'], h['nesterov'], lam)
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, delta=.1, wd_ratio=.1, nesterov=False, wd=0.)
BASE = dict(mom=.9, sqr_mom=.999, eps=1e-8)
CASES = [dict(BASE, delta=.1, wd_ratio=.1, nesterov=False),
         dict(BASE, delta=1.2, wd_ratio=.1, nesterov=True),   # rows, the whole and neither, by turns
         dict(mom=.5, sqr_mom=.9, eps=1e-3, delta=10., wd_ratio=.3, nesterov=False)] # rows always

def _betas(h): return dict(lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], delta=h['delta'], wd_ratio=h['wd_ratio'],
                           nesterov=h['nesterov'])
@peer()
def clovaai_adamp(h):
    adamp = pytest.importorskip('adamp')
    return lambda g: adamp.AdamP(g, **_betas(h))
@peer()
def timm_adamp(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.AdamP(g, **_betas(h))
@peer(late=False)
def po_adamp(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdamP(g, **_betas(h))

PEERS = [*[(f, h, ('none','decoupled')) for f in (clovaai_adamp,timm_adamp) for h in CASES],
         *[(po_adamp, dict(h, eps=1e-30), ('none','decoupled')) for h in CASES]] # it adds eps before the debiasing
DEVIATIONS = [(po_adamp, dict(CASES[2], eps=1e-2), 1e-4)]
