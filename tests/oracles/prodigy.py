"""Prodigy: a reference of the whole model, the authors' package and pytorch_optimizer's (of one learning rate for all groups, as they ask
for)"""
import math
import pytest
from oracles import peer
from reference.prodigy import Prodigy

WHOLE_MODEL = True # REFERENCE takes all tensors, and their decays; its `step` takes lists
def REFERENCE(ts, h, lams): return Prodigy(ts, h['mom'], h['sqr_mom'], h['beta3'], h['eps'], h['d0'], h['d_coef'], h['growth_rate'],
                                           h['safeguard_warmup'], h['use_bias_correction'], lams, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', s='s', x0='x0', step='t')
DEFAULTS = dict(mom=.9, sqr_mom=.999, beta3=None, eps=1e-8, d0=1e-6, d_coef=1., growth_rate=math.inf, safeguard_warmup=False,
                use_bias_correction=False, wd=0.)
_own = {k:v for k,v in DEFAULTS.items() if k!='wd'}
CASES = [{**_own, 'sqr_mom':.99, 'd0':.1, 'd_coef':10.}, # the estimate overtakes d0, and grows
         # the limit of the growth binds
         {**_own, 'mom':.5, 'beta3':.9, 'eps':1e-3, 'd0':.01, 'd_coef':100., 'growth_rate':1.1, 'safeguard_warmup':True,
          'use_bias_correction':True},
         {**_own, 'mom':0., 'sqr_mom':.9, 'd0':1., 'd_coef':.5, 'use_bias_correction':True}, _own]

def _args(h): return dict(lr=1., betas=(h['mom'],h['sqr_mom']), beta3=h['beta3'], eps=h['eps'], d0=h['d0'], d_coef=h['d_coef'],
                          growth_rate=h['growth_rate'], safeguard_warmup=h['safeguard_warmup'])

@peer(late=False, same_lr=True)
def prodigyopt(h):
    "It counts a group's steps"
    return lambda g: pytest.importorskip('prodigyopt').Prodigy(g, **_args(h), use_bias_correction=h['use_bias_correction'],
                                                               decouple=h['decouple_wd'])

@peer(late=False, same_lr=True, rtol=1e-5, atol=1e-5)
def po_prodigy(h):
    "It keeps its sums in float32"
    return lambda g: pytest.importorskip('pytorch_optimizer').Prodigy(g, **_args(h), bias_correction=h['use_bias_correction'],
                                                                      weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [*((prodigyopt, h, ('none','decoupled','L2')) for h in CASES), *((po_prodigy, h, ('none','decoupled')) for h in CASES[::3])]
