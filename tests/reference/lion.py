import numpy as np
from .decay import decay

class Lion:
    """Chen et al. 2023 (2302.06675), algorithm 2: update with beta1, then track with beta2; decay decoupled, before the step as everywhere
    here (the same as in lambda theta_{t-1} of line 6)"""
    def __init__(self, theta, beta1=.9, beta2=.99, lam=0.):
        self.theta,self.beta1,self.beta2,self.lam = np.array(theta, dtype=np.float64),beta1,beta2,lam
        self.m = np.zeros_like(self.theta)
    def step(self, g, lr):
        g = np.asarray(g, dtype=np.float64)
        c = self.beta1*self.m + (1-self.beta1)*g
        self.theta = self.theta - lr*(np.sign(c) + self.lam*self.theta)
        self.m = self.beta2*self.m + (1-self.beta2)*g
