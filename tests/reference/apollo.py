import numpy as np

class Apollo:
    """Ma 2020 (2009.13586), algorithm 1 as in the authors' code (XuezheMax/apollo): `theta`, `m`, `B`, `d` all start at 0; sigma is .01
    ('constant', with eps/.01), or the largest |g - m| ('belief', with eps/alpha added). Choices: L2 or a decay inside of the direction; the
    rate goes from `lr0` (lr/1000 if None) to `lr` in a straight line over `warmup` steps, the first of which is at `lr0`."""
    def __init__(self, theta, beta=.9, eps=1e-4, rebound='constant', warmup=0, lr0=None, lam=0., decoupled=False):
        self.theta,self.beta,self.eps,self.rebound = np.array(theta, dtype=np.float64),beta,eps,rebound
        self.warmup,self.lr0,self.lam,self.decoupled = warmup,lr0,lam,decoupled
        self.m,self.B,self.d,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta),0
    def step(self, g, lr):
        g,self.t = np.array(g, dtype=np.float64),self.t+1
        if not self.decoupled: g = g + self.lam*self.theta
        if self.t-1 < self.warmup:
            first = lr/1000 if self.lr0 is None else self.lr0
            lr = first + (lr-first)*(self.t-1)/self.warmup
        alpha = (1-self.beta)/(1-self.beta**self.t)
        before,self.m = self.m,self.m + alpha*(g-self.m)
        n = np.sum(self.d**4)**.25 + (self.eps/.01 if self.rebound=='constant' else self.eps)
        v,change = self.d/n,self.m-before
        y = -np.sum(change*v)/n - np.sum(self.B*v*v)
        self.B = self.B + y*v*v
        D = np.maximum(np.abs(self.B), .01) if self.rebound=='constant' else np.maximum(np.abs(self.B),
                                                                                        np.max(np.abs(g-before))) + self.eps/alpha
        self.d = self.m/D + (self.lam*self.theta if self.decoupled else 0)
        self.theta = self.theta - lr*self.d
