"AdaBound: the authors' rule; pytorch_optimizer takes the base learning rate at construction, or the first above 0 if that is 0"
from oracles import peer
from reference.adabound import AdaBound

REFERENCE = lambda t,h,lam: AdaBound(t, h['mom'], h['sqr_mom'], h['eps'], h['final_lr'], h['gamma'], h['amsbound'], h.get('base_lr'), lam,
                                     h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-8, final_lr=.1, gamma=.001, amsbound=False), # the authors' defaults
         dict(mom=.9, sqr_mom=.99, eps=1e-8, final_lr=3e-3, gamma=.5, amsbound=False), # bounds that close in fast and bind on both sides
         dict(mom=.5, sqr_mom=.9, eps=1e-4, final_lr=2e-3, gamma=.1, amsbound=True),
         dict(mom=.9, sqr_mom=.99, eps=1e-6, final_lr=.5, gamma=.3, amsbound=False, base_lr=1.)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, final_lr=.1, gamma=.001, amsbound=False, base_lr=None, wd=0., decouple_wd=False)

@peer(late=False)
def po_adabound(h):
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.AdaBound(g, lr=h.get('base_lr', 0.), betas=(h['mom'],h['sqr_mom']), eps=h['eps'],
                                                final_lr=h['final_lr'], gamma=h['gamma'], ams_bound=h['amsbound'],
                                                weight_decouple=h['decouple_wd'], foreach=False)

@peer(late=False, rtol=1e-10, atol=1e-9)
def po_adabound_small_eps(h):
    "It adds 1e-15 to the average of squares: where that is 1e-9, as for a gradient of 1e-3 at the first step, 5e-7 of a step of 1e-3"
    return po_adabound(h)

PEERS = [(po_adabound_small_eps if i==0 else po_adabound, c, ('none','decoupled','L2')) for i,c in enumerate(CASES)]
