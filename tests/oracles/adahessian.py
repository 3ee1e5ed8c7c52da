"""AdaHessian with gradients instead of estimates, as a dry run has them: Adam with a power of its root. With estimates:
tests/test_adahessian.py"""
from oracles import peer
from reference.adahessian import AdaHessian

REFERENCE = lambda t,h,lam: AdaHessian(t, h['mom'], h['sqr_mom'], h['eps'], h['hessian_power'], lam)
STATE = dict(grad_avg='m', hess_sqr_avg='v', hess='D', step='t')
_same = dict(n_samples=1, update_each=1, avg_conv_kernel=False)
CASES = [dict(mom=.9, sqr_mom=.999, eps=1e-8, hessian_power=1., **_same), dict(mom=.5, sqr_mom=.9, eps=1e-3, hessian_power=.5, **_same),
         dict(mom=.9, sqr_mom=.99, eps=1e-2, hessian_power=0., **_same)]
DEFAULTS = dict(mom=.9, sqr_mom=.999, eps=1e-8, hessian_power=1., n_samples=1, update_each=1, avg_conv_kernel=False, wd=0.)

@peer()
def torch_adamw(h):
    "With the gradient as estimate and hessian_power=1 it is AdamW"
    import torch
    return lambda g: torch.optim.AdamW(g, lr=1., betas=(h['mom'],h['sqr_mom']), eps=h['eps'])

PEERS = [(torch_adamw, dict(mom=.9, sqr_mom=.999, eps=1e-8, hessian_power=1., **_same), ('none','decoupled'))]
