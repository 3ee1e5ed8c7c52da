"C-AdamW: the paper's mask around Adam, timm's `caution=True`"
import pytest
from reference.cautious import CAdamW
from oracles import peer

REFERENCE = lambda t,h,lam: CAdamW(t, h['mom'], h['sqr_mom'], h['eps'], lam=lam, decoupled=h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
DEFAULTS = dict(mom=.9, sqr_mom=.99, eps=1e-5, wd=.01)
CASES = [dict(mom=.9, sqr_mom=.99, eps=1e-5), dict(mom=.5, sqr_mom=.999, eps=1e-8), dict(mom=.95, sqr_mom=.9, eps=1e-3)]

@peer()
def timm_adamw(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.AdamWLegacy(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], caution=True)

PEERS = [(timm_adamw, h, ('none','decoupled')) for h in CASES]
