import pytest
from oracles import peer
from reference.adamp import SGDP

def REFERENCE(theta, h, lam): return SGDP(theta, h['mom'], h['dampening'], h['eps'], h['delta'], h['wd_ratio'], h['nesterov'], lam)
STATE = dict(grad_avg='m')
DEFAULTS = dict(mom=0., dampening=0., eps=1e-8, delta=.1, wd_ratio=.1, nesterov=False, wd=0.)
CASES = [dict(mom=.9, dampening=0., eps=1e-8, delta=.1, wd_ratio=.1, nesterov=False),
         dict(mom=.9, dampening=.5, eps=1e-8, delta=1.2, wd_ratio=.1, nesterov=True),
         dict(mom=.7, dampening=0., eps=1e-3, delta=1.2, wd_ratio=.3, nesterov=False),
         dict(mom=0., dampening=0., eps=1e-8, delta=10., wd_ratio=0., nesterov=False)]

def _kw(h): return dict(lr=1., momentum=h['mom'], dampening=h['dampening'], eps=h['eps'], delta=h['delta'], wd_ratio=h['wd_ratio'],
                        nesterov=h['nesterov'])
@peer()
def po_sgdp(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.SGDP(g, **_kw(h))
@peer()
def timm_sgdp(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.SGDP(g, **_kw(h))
@peer()
def clovaai_sgdp(h):
    adamp = pytest.importorskip('adamp')
    return lambda g: adamp.SGDP(g, **_kw(h))

# with nesterov it makes a new tensor
PEERS = [*[(f, h, ('none','decoupled')) for f in (po_sgdp,timm_sgdp) for h in CASES], (clovaai_sgdp, CASES[1], ('none','decoupled'))]
DEVIATIONS = [(clovaai_sgdp, CASES[2], .02)] # projects the momentum buffer itself
