import pytest,torch
from oracles import peer
from reference.adafactor import Adafactor

def REFERENCE(theta, h, lam):
    return Adafactor(theta, h['decay_rate'], h['eps1'], h['eps2'], h['clip_threshold'], h['scale_parameter'], lam, h['decouple_wd'])
STATE = dict(step='t') # row, col, sqr_avg, which not every tensor has: tests/test_adafactor.py
DEFAULTS = dict(decay_rate=-.8, eps1=None, eps2=1e-3, clip_threshold=1., scale_parameter=True, wd=0.)
CASES = [dict(decay_rate=-.8, eps1=None, eps2=1e-3, clip_threshold=1., scale_parameter=True),
         dict(decay_rate=-.5, eps1=1e-30, eps2=1e-3, clip_threshold=.5, scale_parameter=False),
         dict(decay_rate=-1., eps1=.01, eps2=.6, clip_threshold=2., scale_parameter=True)] # eps2: more than the size of some tensors

@peer()
def torch_adafactor(h):
    return lambda g: torch.optim.Adafactor(g, lr=1., beta2_decay=h['decay_rate'], eps=(None,h['eps2']), d=h['clip_threshold'],
                                           foreach=False)

def po(h, **kw):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.AdaFactor(g, lr=1., **{**dict(betas=(None,.9999), decay_rate=h['decay_rate'],
        eps1=h['eps1'] or 1e-30, eps2=h['eps2'], clip_threshold=h['clip_threshold'],
                                                 scale_parameter=h['scale_parameter'], relative_step=False, foreach=False), **kw})
@peer(late=False)
def po_adafactor(h): return po(h)
@peer(late=False)
def po_relative_step(h): return po(h, relative_step=True)

PEERS = [*[(torch_adafactor, dict(h, eps1=None, scale_parameter=True), ('none','decoupled')) for h in (CASES[0],CASES[2])],
         *[(po_adafactor, dict(h, eps1=h['eps1'] or 1e-30), ('none',)) for h in CASES]] # its decay is by another rate
DEVIATIONS = [(po_relative_step, CASES[0], .05)] # ignores lr
