import numpy as np

class NovoGrad:
    """Ginsburg et al. 2019 (1905.11286), algorithm 1 with a tensor as a layer: `v` starts with the first squared norm, `m` with the first
    direction, and nothing is debiased. Choices: `averaging` weighs each direction by 1-beta1, the first one too (the authors' code);
    `decoupled` takes lr*d of the weights in the place of adding d*w to the divided gradient."""
    def __init__(self, theta, beta1=.95, beta2=.98, eps=1e-8, d=0., averaging=False, decoupled=False):
        self.w,self.beta1,self.beta2,self.eps,self.d = np.array(theta, dtype=np.float64),beta1,beta2,eps,d
        self.averaging,self.decoupled = averaging,decoupled
        self.v,self.m = None,np.zeros_like(self.w)
    theta = property(lambda self: self.w)
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        size = np.sum(g*g)
        self.v = size if self.v is None else self.beta2*self.v + (1-self.beta2)*size
        u = g/(np.sqrt(self.v) + self.eps)
        if self.decoupled: self.w = self.w - lr*self.d*self.w
        else: u = u + self.d*self.w
        self.m = self.beta1*self.m + (1-self.beta1 if self.averaging else 1)*u
        self.w = self.w - lr*self.m
