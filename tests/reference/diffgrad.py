import numpy as np
from .decay import decay

class DiffGrad:
    """Dubey et al. 2019 (1909.11015), algorithm 1: Adam's step times the friction coefficient xi = 1/(1+exp(-|g_{t-1} - g_t|)).
    Choices: g_0 = 0; eps beside the root of the uncorrected average, as in the authors' code; with L2 both gradients have the penalty's
    share."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, lam=0., decoupled=False):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.m,self.v,self.g_prev,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta),0
    def step(self, g, alpha):
        self.t += 1
        self.theta,g = decay(self.theta, np.array(g, dtype=np.float64), alpha, self.lam, self.decoupled)
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        xi = 1/(1 + np.exp(-np.abs(self.g_prev - g)))
        alpha_t = alpha*np.sqrt(1-self.beta2**self.t)/(1-self.beta1**self.t)
        self.theta = self.theta - alpha_t*xi*self.m/(np.sqrt(self.v) + self.eps)
        self.g_prev = g
