"Yogi: the paper's averages, corrected for their start; the ports begin the first one elsewhere"
from oracles import peer
from reference.yogi import Yogi

REFERENCE = lambda t,h,lam: Yogi(t, h['mom'], h['sqr_mom'], h['eps'], h['init_acc'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', sqr_avg='v', step='t')
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-3, init_acc=1e-6), dict(mom=.5, sqr_mom=.9, eps=1e-2, init_acc=.5),
         dict(mom=0., sqr_mom=.5, eps=1e-6, init_acc=0.)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-3, init_acc=1e-6, wd=0., decouple_wd=False)

@peer(late=False)
def po_yogi(h):
    "Starts both averages at one value: the same as ours where that is 0"
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.Yogi(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'], initial_accumulator=h['init_acc'],
                                            weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_yogi, dict(mom=.9, sqr_mom=.999, eps=1e-3, init_acc=0.), ('none','decoupled','L2')),
         (po_yogi, dict(mom=.5, sqr_mom=.9, eps=1e-2, init_acc=0.), ('none','decoupled','L2'))]
DEVIATIONS = [(po_yogi, dict(mom=.9, sqr_mom=.999, eps=1e-3, init_acc=1e-6), 3e-5)]
