import numpy as np

class StableAdamW:
    """Wortsman et al. 2023 (2304.13013), algorithm 2, with the bias corrections in the betas, as there. The learning rate is divided by
    max(1, RMS) for a tensor, and the decay uses that rate. `decoupled=False` (ours): lambda theta is part of the gradient."""
    def __init__(self, theta, beta1=.9, beta2=.99, eps=1e-6, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.v,self.u,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),0
        self.clipped = 0 # how often the clip bound
    def step(self, g, lr):
        g = np.asarray(g, dtype=np.float64) + (0. if self.decoupled else self.lam*self.theta)
        self.t += 1
        b1,b2 = (b*(1 - b**(self.t-1))/(1 - b**self.t) for b in (self.beta1,self.beta2))
        self.v = b1*self.v + (1-b1)*g
        self.u = b2*self.u + (1-b2)*g**2
        rms = np.sqrt(np.mean(g**2/np.maximum(self.u, self.eps**2)))
        self.clipped += rms > 1.01
        eta = lr/max(1., rms)
        self.theta = self.theta - eta*(self.lam if self.decoupled else 0.)*self.theta - eta*self.v/(np.sqrt(self.u) + self.eps)
