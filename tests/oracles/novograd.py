"NovoGrad: the paper's algorithm, pytorch_optimizer (but for its first step with `grad_averaging`), timm"
import pytest
from reference.novograd import NovoGrad
from oracles import peer

REFERENCE = lambda t,h,lam: NovoGrad(t, h['mom'], h['sqr_mom'], h['eps'], lam, h['grad_averaging'], h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_norm='v')
DEFAULTS = dict(mom=.95, sqr_mom=.98, eps=1e-8, grad_averaging=False, wd=0., decouple_wd=False)
CASES = [dict(mom=.95, sqr_mom=.98, eps=1e-8, grad_averaging=False), dict(mom=.9, sqr_mom=.5, eps=1e-2, grad_averaging=True),
         dict(mom=0., sqr_mom=0., eps=1e-8, grad_averaging=False)]

@peer()
def po_novograd(h):
    po = pytest.importorskip('pytorch_optimizer')
    return lambda g: po.NovoGrad(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], weight_decouple=h['decouple_wd'],
                                 grad_averaging=h['grad_averaging'], foreach=False)

@peer(rtol=1e-6, atol=2e-7)
def timm_nvnovograd(h):
    "Its running squared norm is a float32"
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.NvNovoGrad(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], grad_averaging=h['grad_averaging'])

PEERS = [*[(po_novograd, h, ('none','decoupled','L2')) for h in (CASES[0],CASES[2])],
         *[(timm_nvnovograd, h, ('none','L2')) for h in CASES[:2]]]
DEVIATIONS = [(po_novograd, CASES[1], 1e-2)] # it leaves the first direction unweighed
