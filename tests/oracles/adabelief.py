import pytest
from oracles import peer
from reference.adabelief import AdaBelief

def REFERENCE(t, h, lam): return AdaBelief(t, h['mom'], h['sqr_mom'], h['eps'], h['rectify'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', var_avg='s', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-16, rectify=False), dict(mom=.5, sqr_mom=.9, eps=1e-4, rectify=False),
         dict(mom=.9, sqr_mom=.99, eps=1e-8, rectify=True),
         dict(mom=.8, sqr_mom=.5, eps=1e-8, rectify=True)] # rho_inf = 3: never rectified
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-16, rectify=False, wd=0.)

@peer()
def timm_adabelief(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.AdaBelief(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], rectify=h['rectify'],
                                    decoupled_decay=h['decouple_wd'], foreach=False)

@peer(late=False)
def po_adabelief(h):
    "It counts a group's steps, without gradients too"
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdaBelief(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'],
                                                 foreach=False)

PEERS = [*[(timm_adabelief, h, ('none','decoupled','L2')) for h in CASES],
         *[(po_adabelief, h, ('none','decoupled','L2')) for h in CASES if not h['rectify']]]
