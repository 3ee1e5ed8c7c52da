"C-Lion: the paper's mask around Lion, timm's `caution=True`"
import pytest
from reference.cautious import CLion
from oracles import peer

REFERENCE = lambda t,h,lam: CLion(t, h['beta1'], h['beta2'], lam=lam)
STATE = dict(grad_avg='m')
DEFAULTS = dict(beta1=.9, beta2=.99, wd=.1)
CASES = [dict(beta1=.9, beta2=.99), dict(beta1=.95, beta2=.8)]
SIGNED = True

@peer()
def timm_lion(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.Lion(g, lr=1., betas=(h['beta1'],h['beta2']), caution=True, foreach=False)

@peer(late=False)
def po_lion(h):
    po = pytest.importorskip('pytorch_optimizer')
    return lambda g: po.Lion(g, lr=1., betas=(h['beta1'],h['beta2']), cautious=True, foreach=False)

PEERS = [(timm_lion, h, ('none','decoupled')) for h in CASES]
DEVIATIONS = [(po_lion, CASES[0], 5e-2)] # it divides by (number that agree + 1)/number
