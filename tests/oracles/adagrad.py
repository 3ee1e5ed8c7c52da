"AdaGrad: a reference in the paper's notation, torch.optim"
import torch
from reference.adagrad import AdaGrad
from . import peer

def REFERENCE(t, h, lam): return AdaGrad(t, h['lr_decay'], h['init_acc'], h['eps'], lam, h['decouple_wd'])
STATE = dict(sqr_sum='s', step='t')
CASES = [dict(lr_decay=0., init_acc=0., eps=1e-10), dict(lr_decay=.1, init_acc=0., eps=1e-3), dict(lr_decay=0., init_acc=.1, eps=1e-7),
         dict(lr_decay=.02, init_acc=2., eps=0.)]
DEFAULTS = dict(lr_decay=0., init_acc=0., eps=1e-10, wd=0., decouple_wd=False)

@peer()
def torch_adagrad(h): return lambda g: torch.optim.Adagrad(g, lr=1., lr_decay=h['lr_decay'], initial_accumulator_value=h['init_acc'],
                                                           eps=h['eps'])

PEERS = [(torch_adagrad, h, ('none','L2')) for h in CASES] # torch has no decoupled decay here
