import pytest
from oracles import peer
from reference.came import CAME

def REFERENCE(theta, h, lam): return CAME(theta, h['mom'], h['sqr_mom'], h['beta3'], h['eps1'], h['eps2'], h['clip_threshold'], lam)
STATE = dict(grad_avg='m') # row, col, res_row, res_col, sqr_avg, which not every tensor has: tests/test_came.py
DEFAULTS = dict(mom=.9, sqr_mom=.999, beta3=.9999, eps1=1e-30, eps2=1e-16, clip_threshold=1., wd=0.)
CASES = [dict(mom=.9, sqr_mom=.999, beta3=.9999, eps1=1e-30, eps2=1e-16, clip_threshold=1.),
         dict(mom=.5, sqr_mom=.9, beta3=.8, eps1=1e-3, eps2=1e-4, clip_threshold=.7),
         dict(mom=.8, sqr_mom=.5, beta3=.99, eps1=1e-30, eps2=1e-8, clip_threshold=3.)]

@peer()
def po_came(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.CAME(g, lr=1., betas=(h['mom'],h['sqr_mom'],h['beta3']), eps1=h['eps1'], eps2=h['eps2'],
                                            clip_threshold=h['clip_threshold'], foreach=False)

PEERS = [(po_came, h, ('none','decoupled')) for h in CASES]
