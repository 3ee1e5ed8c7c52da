import numpy as np

class AdaMax:
    """Kingma, Ba 2014 (1412.6980), algorithm 2. Choices: eps, which the paper lacks, is added to |g|, as in torch; decay is
    theta*(1-lr*lam) before the step, or lam*theta in g. `old` counts the elements whose maximum was the old one, `new` the others."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, lam=0., decoupled=False):
        self.theta,self.betas,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),(beta1,beta2),eps,lam,decoupled
        self.m,self.u,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),0
        self.old = self.new = 0
    def step(self, g, lr):
        g,(b1,b2) = np.array(g, dtype=np.float64),self.betas
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: g = g + self.lam*self.theta
        self.t += 1
        self.m = b1*self.m + (1-b1)*g
        old,new = b2*self.u,np.abs(g) + self.eps
        self.old += (old>new).sum(); self.new += (old<=new).sum()
        self.u = np.where(old>new, old, new)
        self.theta = self.theta - lr/(1 - b1**self.t)*self.m/self.u
