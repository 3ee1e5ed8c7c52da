"AccSGD: a short step and a long one"
from oracles import peer
from reference.accsgd import AccSGD

REFERENCE = lambda t,h,lam: AccSGD(t, h['kappa'], h['xi'], h['small_const'], lam, h['decouple_wd'])
STATE = dict(buf='w_bar')
CASES = [dict(kappa=1000., xi=10., small_const=.7), dict(kappa=20., xi=4., small_const=1.), dict(kappa=100., xi=10., small_const=.3)]
DEFAULTS = dict(kappa=1000., xi=10., small_const=.7, wd=0., decouple_wd=False)

@peer()
def po_accsgd(h):
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.AccSGD(g, lr=1., kappa=h['kappa'], xi=h['xi'], constant=h['small_const'], foreach=False)

PEERS = [(po_accsgd, c, ('none','L2')) for c in CASES] # its decay is always L2
