import numpy as np
from .decay import decay

class LARS:
    """You, Gitman & Ginsburg 2017 (1708.03888), eq. 6: local lr lambda = lr eta ||w|| / (||g|| + beta ||w|| + eps); `clip`: LARC, at most
    `lr`. Choices (fastai's): the velocity holds unscaled gradients and the newest local lr multiplies all of it; the norms are taken after
    decay (and of the gradient with its L2 part); `denominator_lam`, the beta of the denominator, stays for a tensor that is not decayed."""
    def __init__(self, w, mu=.9, eta=.02, eps=1e-8, lam=0., clip=True, decoupled=True, denominator_lam=None):
        self.theta,self.mu,self.eta,self.eps,self.lam,self.clip,self.decoupled = np.array(w, dtype=np.float64),mu,eta,eps,lam,clip,decoupled
        self.beta = lam if denominator_lam is None else denominator_lam
        self.v,self.local_lr = np.zeros_like(self.theta),None
    def step(self, g, lr):
        self.theta,g = decay(self.theta, np.asarray(g, dtype=np.float64), lr, self.lam, self.decoupled)
        norm_w,norm_g = np.sqrt(np.sum(self.theta**2)),np.sqrt(np.sum(g**2))
        self.local_lr = lr*self.eta*norm_w/(norm_g + self.beta*norm_w + self.eps)
        if self.clip: self.local_lr = min(lr, self.local_lr)
        self.v = self.mu*self.v + g
        self.theta = self.theta - self.local_lr*self.v
