import numpy as np
from .decay import decay

class SGD:
    """Heavy ball (Polyak 1964) as Sutskever et al. 2013 write it with v of the opposite sign: v_t = mu v_{t-1} + g_t, theta_t = theta_{t-1}
    - lr v_t"""
    def __init__(self, theta, mu=0., lam=0., decoupled=True):
        self.theta,self.mu,self.lam,self.decoupled = np.array(theta, dtype=np.float64),mu,lam,decoupled
        self.v = np.zeros_like(self.theta)
    def step(self, g, lr):
        self.theta,g = decay(self.theta, np.asarray(g, dtype=np.float64), lr, self.lam, self.decoupled)
        self.v = self.mu*self.v + g
        self.theta = self.theta - lr*self.v
