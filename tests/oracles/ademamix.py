import pytest
from oracles import peer
from reference.ademamix import AdEMAMix

def REFERENCE(t, h, lam): return AdEMAMix(t, h['mom'], h['sqr_mom'], h['beta3'], h['alpha'], h['alpha_warmup'], h['beta3_warmup'], h['eps'],
                                          lam)
STATE = dict(grad_avg='m1', slow_avg='m2', sqr_avg='nu', step='t')
WARM = dict(mom=.9, sqr_mom=.999, beta3=.9999, alpha=5., alpha_warmup=20, beta3_warmup=20, eps=1e-8)
CASES = [dict(mom=.9, sqr_mom=.999, beta3=.9999, alpha=5., alpha_warmup=0, beta3_warmup=0, eps=1e-8), WARM,
         dict(mom=.5, sqr_mom=.9, beta3=.95, alpha=8., alpha_warmup=5, beta3_warmup=40, eps=1e-3),
         dict(mom=0., sqr_mom=.99, beta3=.9, alpha=2., alpha_warmup=10, beta3_warmup=0, eps=1e-6),
         dict(mom=.9, sqr_mom=.99, beta3=.8, alpha=1., alpha_warmup=0, beta3_warmup=10, eps=1e-6)] # mom > beta3: the cap binds
DEFAULTS = dict(mom=.9, sqr_mom=.999, beta3=.9999, alpha=5., alpha_warmup=0, beta3_warmup=0, eps=1e-8, wd=0.)

@peer(late=False)
def po_ademamix(h):
    "It counts a group's steps"
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdEMAMix(g, lr=1., betas=(h['mom'],h['sqr_mom'],h['beta3']), alpha=h['alpha'],
                                                t_alpha_beta3=h['alpha_warmup'] or None, eps=h['eps'], weight_decouple=True, foreach=False)

PEERS = [(po_ademamix, h, ('none','decoupled')) for h in (CASES[0], WARM, dict(WARM, mom=.5, sqr_mom=.9, beta3=.95, eps=1e-3))]
