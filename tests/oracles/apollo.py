"Apollo: the authors' algorithm, pytorch_optimizer without a warm-up"
import pytest
from reference.apollo import Apollo
from oracles import peer

REFERENCE = lambda t,h,lam: Apollo(t, h['mom'], h['eps'], h['rebound'], h['warmup'], h['init_lr'], lam, h['decouple_wd'])
STATE = dict(grad_avg='m', approx_hess='B', update='d', step='t')
DEFAULTS = dict(mom=.9, eps=1e-4, rebound='constant', warmup=500, init_lr=None, wd=0., decouple_wd=False)
CASES = [dict(mom=.9, eps=1e-4, rebound='constant', warmup=10, init_lr=None),
         dict(mom=.5, eps=1e-2, rebound='belief', warmup=0, init_lr=None),
         dict(mom=.9, eps=1e-2, rebound='constant', warmup=500, init_lr=1e-3),
         dict(mom=0., eps=1e-4, rebound='belief', warmup=5, init_lr=1e-4)]

@peer(late=False)
def po_apollo(h):
    po = pytest.importorskip('pytorch_optimizer')
    return lambda g: po.ApolloDQN(g, lr=1., beta=h['mom'], eps=h['eps'], rebound=h['rebound'], warmup_steps=h['warmup'],
                                  weight_decay_type='decoupled' if h['decouple_wd'] else 'l2', foreach=False)

PEERS = [(po_apollo, {**h, 'warmup':0, 'init_lr':None}, ('none','decoupled','L2')) for h in CASES[:2]]
DEVIATIONS = [(po_apollo, CASES[0], 1e-2)] # its warm-up is a step ahead, and goes to the constructor's lr
