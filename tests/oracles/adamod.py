"AdaMod: the rate and its average"
from oracles import peer
from reference.adamod import AdaMod

REFERENCE = lambda t,h,lam: AdaMod(t, h['mom'], h['sqr_mom'], h['beta3'], h['eps'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', lr_avg='s', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, beta3=.999, eps=1e-8), dict(mom=.9, sqr_mom=.99, beta3=.5, eps=1e-6),
         dict(mom=.5, sqr_mom=.9, beta3=.9, eps=1e-3)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, beta3=.999, eps=1e-8, wd=0.)

@peer(late=False)
def po_adamod(h):
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.AdaMod(g, lr=1., betas=(h['mom'],h['sqr_mom'],h['beta3']), eps=h['eps'],
                                              weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_adamod, c, ('none','decoupled','L2')) for c in CASES]
