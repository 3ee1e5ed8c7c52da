"SWATS without a switch, which the tensors of a group share: with it in `tests/test_swats.py`"
import pytest
from reference.swats import SWATS
from oracles import peer

REFERENCE = lambda t,h,lam: SWATS(t, h['mom'], h['sqr_mom'], h['eps'], h['switch_tol'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='a', lam='lam', step='k')
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-9, switch_tol=1e-6, wd=0., decouple_wd=False)
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-9, switch_tol=0.), dict(mom=.5, sqr_mom=.9, eps=1e-3, switch_tol=0.)]

@peer(late=False, rtol=1e-6, atol=1e-6)
def po_swats(h):
    "It adds 1e-15 under the root, seen where a gradient is some 1e-5; its eps is the tolerance too"
    po = pytest.importorskip('pytorch_optimizer')
    return lambda g: po.SWATS(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_swats, CASES[0], ('none',))]
