import pytest
from oracles import peer
from reference.madgrad import MADGRAD

def REFERENCE(t, h, lam): return MADGRAD(t, h['mom'], h['eps'], lam, h['decouple_wd'])
STATE = dict(grad_sum_sq='nu', s='s', step='k')
CASES = [dict(mom=.9, eps=1e-6), dict(mom=.5, eps=1e-3), dict(mom=0., eps=1e-6), dict(mom=.9, eps=0.)]
DEFAULTS = dict(mom=.9, eps=1e-6, wd=0., decouple_wd=False)

@peer(late=False)
def authors_madgrad(h):
    "It counts the optimizer's steps"
    madgrad = pytest.importorskip('madgrad')
    return lambda g: madgrad.MADGRAD(g, lr=1., momentum=h['mom'], eps=h['eps'], decouple_decay=h['decouple_wd'])

@peer(late=False)
def timm_madgrad(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.MADGRAD(g, lr=1., momentum=h['mom'], eps=h['eps'], decoupled_decay=h['decouple_wd'])

@peer(late=False)
def po_madgrad(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.MADGRAD(g, lr=1., momentum=h['mom'], eps=h['eps'], weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [*[(authors_madgrad, h, ('none','decoupled','L2')) for h in CASES],
         *[(f, h, ('none','L2')) for f in (timm_madgrad,po_madgrad) for h in CASES[:3]]]
