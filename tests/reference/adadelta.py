import numpy as np

class AdaDelta:
    """Zeiler 2012 (1212.5701), algorithm 1. Choices: a learning rate, which the paper lacks, multiplies the step but not what is averaged
    of it, as in torch; decay is theta*(1-lr*lam) before the step, or lam*theta in g."""
    def __init__(self, theta, rho=.95, eps=1e-6, lam=0., decoupled=False):
        self.theta,self.rho,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),rho,eps,lam,decoupled
        self.Eg2,self.Edx2 = np.zeros_like(self.theta),np.zeros_like(self.theta)
    def rms(self, x): return np.sqrt(x + self.eps)
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: g = g + self.lam*self.theta
        self.Eg2 = self.rho*self.Eg2 + (1-self.rho)*g**2
        dx = -self.rms(self.Edx2)/self.rms(self.Eg2)*g
        self.Edx2 = self.rho*self.Edx2 + (1-self.rho)*dx**2
        self.theta = self.theta + lr*dx
