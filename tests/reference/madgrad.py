import numpy as np

class MADGRAD:
    """Defazio & Jelassi 2021 (2101.11075), algorithm 1: s and nu sum gradients and squares with weights lambda_k = gamma sqrt(k+1), z = x_0
    - s/(cbrt(nu) + eps), x moves c of the way to z. Choices, the authors' code: gamma + eps in the place of gamma, where that is not 0; eps
    beside the root; decoupled decay by gamma lam of the old x after the step. x_0 is always kept here."""
    def __init__(self, theta, momentum=.9, eps=1e-6, lam=0., decoupled=False):
        self.theta,self.c,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),1-momentum,eps,lam,decoupled
        self.x0,self.s,self.nu,self.k = self.theta,np.zeros_like(self.theta),np.zeros_like(self.theta),0
        self.moved = np.zeros_like(self.theta)
    t = property(lambda self: self.k)
    def step(self, g, gamma):
        g = np.array(g, dtype=np.float64) + (0 if self.decoupled else self.lam*self.theta)
        gamma = gamma + self.eps if gamma != 0 else 0.
        weight = gamma*np.sqrt(self.k+1)
        self.s = self.s + weight*g
        self.nu = self.nu + weight*g**2
        den = np.cbrt(self.nu) + self.eps
        z = self.x0 - self.s/np.where(den == 0, np.inf, den)
        x = (1-self.c)*self.theta + self.c*z
        if self.decoupled:
            if self.c == 1: self.x0 = self.x0 - gamma*self.lam*self.theta # without momentum the start is worked out from x, decay included
            x = x - gamma*self.lam*self.theta
        self.theta = x
        self.k += 1
