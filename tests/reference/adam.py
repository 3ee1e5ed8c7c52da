import numpy as np
from .decay import decay

class Adam:
    "Kingma & Ba 2014 (1412.6980), algorithm 1, with the decay of 1711.05101. `t` counts this tensor's own steps."
    def __init__(self, theta, beta1=.9, beta2=.99, eps=1e-5, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.m,self.v,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),0
    def moments(self, g, lr):
        "Decay, update the moments, and return g_t and the bias-corrected moments"
        self.t += 1
        self.theta,g = decay(self.theta, np.asarray(g, dtype=np.float64), lr, self.lam, self.decoupled)
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        return g, self.m/(1-self.beta1**self.t), self.v/(1-self.beta2**self.t)
    def step(self, g, lr):
        _,m_hat,v_hat = self.moments(g, lr)
        self.theta = self.theta - lr*m_hat/(np.sqrt(v_hat) + self.eps)
