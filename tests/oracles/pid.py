"PID: pytorch_optimizer keeps the previous gradient as we do; without momentum it is plain SGD"
from oracles import peer
from reference.pid import PID

REFERENCE = lambda t,h,lam: PID(t, h['mom'], h['integral'], h['derivative'], lam, h['decouple_wd'])
STATE = dict(i_buf='I', d_buf='D', prev_grad='g')
CASES = [dict(mom=.9, integral=5., derivative=10.), dict(mom=.5, integral=1., derivative=100.), dict(mom=0., integral=2., derivative=3.)]
DEFAULTS = dict(mom=.9, integral=5., derivative=10., wd=0., decouple_wd=False)

@peer(late=False)
def po_pid(h):
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.PID(g, lr=1., momentum=h['mom'], integral=h['integral'], derivative=h['derivative'],
                                           weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_pid, c, ('none','decoupled','L2')) for c in CASES[:2]]
DEVIATIONS = [(po_pid, CASES[2], .05)]
