"MARS: the paper's approximate form, timm, and how far pytorch_optimizer is"
import pytest
from reference.mars import MARS
from oracles import peer

REFERENCE = lambda t,h,lam: MARS(t, h['mom'], h['sqr_mom'], h['eps'], h['gamma'], h['mars_type'], h['optimize_1d'],
                                 (h['mom_1d'],h['sqr_mom_1d']), h['lr_1d_factor'], lam)
STATE = dict(grad_avg='m', step='t')
DEFAULTS = dict(mom=.95, sqr_mom=.99, eps=1e-8, gamma=.025, mars_type='adamw', optimize_1d=False, mom_1d=.9, sqr_mom_1d=.95,
                lr_1d_factor=1., wd=0.)
CASES = [{**DEFAULTS}, {**DEFAULTS, 'mars_type':'lion', 'lr_1d_factor':.5},
         {**DEFAULTS, 'optimize_1d':True, 'mom':.8, 'sqr_mom':.9, 'gamma':.5, 'eps':1e-3},
         {**DEFAULTS, 'optimize_1d':True, 'mars_type':'lion', 'gamma':.1}]
for c in CASES: del c['wd']

@peer()
def timm_mars(h):
    timm = pytest.importorskip('timm.optim')
    return lambda g: timm.Mars(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], gamma=h['gamma'], mars_type=h['mars_type'],
                               optimize_1d=h['optimize_1d'],
                               betas_1d=(h['mom_1d'],h['sqr_mom_1d']), lr_1d_factor=h['lr_1d_factor'])

@peer()
def po_mars(h):
    "It adds eps to the root of the average before bias correction"
    po = pytest.importorskip('pytorch_optimizer')
    return lambda g: po.MARS(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], gamma=h['gamma'], mars_type=h['mars_type'],
                             optimize_1d=h['optimize_1d'], foreach=False)

PEERS = [(timm_mars, h, ('none','decoupled')) for h in CASES]
DEVIATIONS = [(po_mars, {**CASES[2], 'eps':1e-8}, 1e-2)] # it takes the gradient before the first as 0
