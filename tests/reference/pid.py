import numpy as np

class PID:
    """An, Wang, Sun, Xu, Dai, Zhang 2018 (CVPR, no arXiv id): the update with proportional, integral and derivative terms. Choices: the
    previous gradient is kept from the first step on, so that the first change is 0 (the authors' code takes it as 0 at the second step);
    the change is averaged with weight 1-alpha; alpha=0 is no special case. Decay: L2 in the gradient, or `decoupled` before the step."""
    def __init__(self, theta, alpha=.9, K_i=5., K_d=10., lam=0., decoupled=False):
        self.theta,self.alpha,self.K_i,self.K_d,self.lam,self.decoupled = np.array(theta, dtype=np.float64),alpha,K_i,K_d,lam,decoupled
        self.I,self.D,self.g = np.zeros_like(self.theta),np.zeros_like(self.theta),None
    def step(self, g, lr):
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        e = g - (g if self.g is None else self.g)
        self.I = self.alpha*self.I + g
        self.D = self.alpha*self.D + (1-self.alpha)*e
        self.theta = self.theta - lr*(g + self.K_i*self.I + self.K_d*self.D)
        self.g = np.array(g)
