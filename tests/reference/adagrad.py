import numpy as np

class AdaGrad:
    """Duchi, Hazan, Singer 2011 (JMLR 12; no arXiv id), figure 1 with the diagonal matrix, no regularizer and no projection. Choices: delta
    is added to the root; s starts at `s0`; the rate falls by 1/(1+(t-1)*gamma), as in torch; decay, which the paper lacks, is
    theta*(1-lr*lam) before the step, or lam*theta in g."""
    def __init__(self, theta, gamma=0., s0=0., delta=1e-10, lam=0., decoupled=False):
        self.theta,self.gamma,self.delta,self.lam,self.decoupled = np.array(theta, dtype=np.float64),gamma,delta,lam,decoupled
        self.s,self.t = np.full_like(self.theta, s0),0
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: g = g + self.lam*self.theta
        self.t += 1
        self.s = self.s + g**2
        self.theta = self.theta - lr/(1 + (self.t-1)*self.gamma)*g/(self.delta + np.sqrt(self.s))
