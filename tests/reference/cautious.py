import numpy as np
from reference.adam import Adam
from reference.lion import Lion

class _Cautious:
    """Liang et al. 2024 (2411.16085), algorithm 1 around another one, whose step without decay is masked. Choices: the mask is divided by
    max(mean, 1e-3) (the authors' C-AdamW), decay comes first and is not masked, `g` is the gradient with L2."""
    def __init__(self, theta, *args, lam=0., decoupled=True, **kwargs):
        super().__init__(theta, *args, lam=0., **kwargs)
        self.weight_decay,self.apart = lam,decoupled
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.apart: self.theta = self.theta - lr*self.weight_decay*self.theta
        else: g = g + self.weight_decay*self.theta
        before = self.theta
        super().step(g, lr)
        u = before - self.theta
        phi = (u*g > 0).astype(np.float64)
        self.theta = before - u*phi/max(phi.mean(), 1e-3)

class CAdamW(_Cautious, Adam): "AdamW"
class CLion(_Cautious, Lion): "Lion"
