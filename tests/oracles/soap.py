import pytest
from oracles import peer
from reference.soap import SOAP

def REFERENCE(theta, h, lam):
    beta = h['shampoo_beta'] if h['shampoo_beta']>=0 else h['sqr_mom']
    return SOAP(theta, h['mom'], h['sqr_mom'], beta, h['eps'], h['precondition_frequency'], h['max_precond_dim'], h['merge_dims'],
                h['precondition_1d'], lam)
STATE = dict(step='t') # ours keeps the averages in the bases: tests/test_soap.py
DEFAULTS = dict(mom=.95, sqr_mom=.95, shampoo_beta=-1., eps=1e-8, precondition_frequency=10, max_precond_dim=10000, merge_dims=False,
                precondition_1d=False, aux=None, wd=.01)
# Up to 4 numbers an axis: matrices of one gradient have full rank then, and no rounding chooses eigenvectors of 0
CASES = [dict(mom=.95, sqr_mom=.95, shampoo_beta=-1., eps=1e-8, precondition_frequency=10, max_precond_dim=4, merge_dims=False,
              precondition_1d=False),
         dict(mom=.9, sqr_mom=.99, shampoo_beta=.8, eps=1e-4, precondition_frequency=1, max_precond_dim=4, merge_dims=True,
              precondition_1d=True),
         dict(mom=0., sqr_mom=.5, shampoo_beta=0., eps=1e-8, precondition_frequency=4, max_precond_dim=3, merge_dims=False,
              precondition_1d=False)]

def po(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.SOAP(g, lr=1., betas=(h['mom'],h['sqr_mom']),
        shampoo_beta=h['shampoo_beta'] if h['shampoo_beta']>=0 else None, eps=h['eps'], precondition_frequency=h['precondition_frequency'],
                                            max_precondition_dim=h['max_precond_dim'], merge_dims=h['merge_dims'],
                                            precondition_1d=h['precondition_1d'])
@peer(late=False)
def po_soap(h): return po(h)
@peer(late=False, rtol=1e-5, atol=1e-5)
def po_soap_qr(h):
    "Its QR decomposition is in float32 whatever the parameters are, at each step or every few"
    return po(h)

PEERS = [(po_soap, dict(CASES[0], precondition_frequency=100), ('none','decoupled')),
         *[(po_soap_qr, h, ('none','decoupled')) for h in CASES]]
