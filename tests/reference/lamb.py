import numpy as np
from .adam import Adam

class LAMB(Adam):
    """You et al. 2019 (1904.00962), algorithm 2, phi = identity on the ratio, which is kept at or below 10 (and is 1 where a norm is 0).
    Choice (fastai's): the decay is decoupled and stays outside the trust ratio; the paper adds lambda x to the ratio r."""
    def step(self, g, lr):
        _,m_hat,v_hat = self.moments(g, lr)
        r = m_hat/(np.sqrt(v_hat) + self.eps)
        norm_x,norm_r = np.sqrt(np.sum(self.theta**2)),np.sqrt(np.sum(r**2))
        trust = 1. if norm_x==0 or norm_r==0 else min(norm_x/norm_r, 10.)
        self.theta = self.theta - lr*trust*r
