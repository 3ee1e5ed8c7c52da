"QHM: a reference in the paper's notation, pytorch_optimizer"
import pytest
from reference.qhm import QHM
from . import peer

def REFERENCE(t, h, lam): return QHM(t, h['mom'], h['nu'], lam, h['decouple_wd'])
STATE = dict(grad_avg='g')
# the second is Nesterov's momentum, the third beyond the mean
CASES = [dict(mom=.999, nu=.7), dict(mom=.9, nu=.9), dict(mom=.5, nu=1.3), dict(mom=0., nu=.7)]
DEFAULTS = dict(mom=.999, nu=.7, wd=0., decouple_wd=False)

@peer()
def po_qhm(h):
    pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
    return lambda g: pytorch_optimizer.QHM(g, lr=1., momentum=h['mom'], nu=h['nu'], weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_qhm, h, ('none','decoupled','L2')) for h in CASES if h['nu']<=1] # it refuses a nu above 1
