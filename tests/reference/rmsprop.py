import numpy as np
from .decay import decay

class RMSProp:
    """Tieleman & Hinton 2012, lecture 6e: MeanSquare(w,t) = rho MeanSquare(w,t-1) + (1-rho) g^2; the step divides by its root, not
    debiased. Choices: eps outside the root; momentum `mu` accumulates the raw gradient, undamped, before the division."""
    def __init__(self, theta, mu=0., rho=.99, eps=1e-8, lam=0., decoupled=True):
        self.theta,self.mu,self.rho,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),mu,rho,eps,lam,decoupled
        self.b,self.mean_square = np.zeros_like(self.theta),np.zeros_like(self.theta)
    def step(self, g, lr):
        self.theta,g = decay(self.theta, np.asarray(g, dtype=np.float64), lr, self.lam, self.decoupled)
        self.b = self.mu*self.b + g
        self.mean_square = self.rho*self.mean_square + (1-self.rho)*g**2
        self.theta = self.theta - lr*self.b/(np.sqrt(self.mean_square) + self.eps)
