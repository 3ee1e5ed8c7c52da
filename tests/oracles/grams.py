import pytest
from oracles import peer
from reference.grams import Grams

def REFERENCE(t, h, lam): return Grams(t, h['mom'], h['sqr_mom'], h['eps'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-6), dict(mom=.5, sqr_mom=.9, eps=1e-3), dict(mom=.95, sqr_mom=.99, eps=1e-8)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-6, wd=0.)

@peer(late=False)
def po_grams(h):
    "It counts a group's steps; as L2 its decay comes after the averages, which is another algorithm"
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.Grams(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=True, foreach=False)

PEERS = [(po_grams, h, ('none','decoupled')) for h in CASES]
