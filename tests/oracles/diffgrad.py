import pytest
from oracles import peer
from reference.diffgrad import DiffGrad

def REFERENCE(t, h, lam): return DiffGrad(t, h['mom'], h['sqr_mom'], h['eps'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', prev_grad='g_prev', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-8), dict(mom=.5, sqr_mom=.9, eps=1e-3), dict(mom=0., sqr_mom=.99, eps=1e-6)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, wd=0., decouple_wd=False)

@peer(late=False, rtol=1e-8, atol=2e-7)
def po_diffgrad(h):
    """It counts a group's steps, without gradients too, and adds 1e-15 to the average under the root: up to 1.1e-7 of difference, where a
    first gradient is near 0"""
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.DiffGrad(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'],
                                                foreach=False)

PEERS = [(po_diffgrad, h, ('none','decoupled','L2')) for h in CASES]
