import numpy as np

class AdaMod:
    """Ding, Ren, Luo, Sun 2019 (1910.12249), algorithm 1. Choices: s_0 = 0 without a correction (the paper's); decay `decoupled` before the
    step, or L2 in the gradient."""
    def __init__(self, theta, beta1=.9, beta2=.999, beta3=.999, eps=1e-8, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.beta3,self.eps = np.array(theta, dtype=np.float64),beta1,beta2,beta3,eps
        self.lam,self.decoupled = lam,decoupled
        self.m,self.v,self.s,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta),0
        self.cut,self.uncut = 0,0
    def step(self, g, lr):
        self.t += 1
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        eta = lr*np.sqrt(1-self.beta2**self.t)/(1-self.beta1**self.t)/(np.sqrt(self.v) + self.eps)
        self.s = self.beta3*self.s + (1-self.beta3)*eta
        self.cut,self.uncut = self.cut+(eta>self.s).sum(),self.uncut+(eta<=self.s).sum()
        self.theta = self.theta - np.minimum(eta, self.s)*self.m
