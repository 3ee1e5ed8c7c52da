import numpy as np
from .decay import decay

class Grams:
    """Cao et al. 2024 (2412.17107): the absolute value of Adam's update with the sign of the gradient. Choices: eps added to the root of
    the corrected average; with L2 the sign is that of the gradient with the penalty's share; an element with a gradient of 0 stays.
    `turned` counts where momentum and gradient disagreed."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-6, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.m,self.v,self.t,self.turned = np.zeros_like(self.theta),np.zeros_like(self.theta),0,0
    def step(self, g, eta):
        self.t += 1
        self.theta,g = decay(self.theta, np.array(g, dtype=np.float64), eta, self.lam, self.decoupled)
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        u = self.m/(1-self.beta1**self.t)/(np.sqrt(self.v/(1-self.beta2**self.t)) + self.eps)
        self.turned += int((u*g < 0).sum())
        self.theta = self.theta - eta*np.abs(u)*np.sign(g)
