import numpy as np
from .adam import Adam

class QHAdam(Adam):
    "Ma & Yarats 2018 (1810.06801), algorithm 2: quasi-hyperbolic averages with immediate discounts nu1, nu2."
    def __init__(self, theta, beta1=.999, beta2=.999, nu1=.7, nu2=1., eps=1e-8, lam=0., decoupled=True):
        super().__init__(theta, beta1, beta2, eps, lam, decoupled)
        self.nu1,self.nu2 = nu1,nu2
    def step(self, g, lr):
        g,g_hat,s_hat = self.moments(g, lr)
        num = (1-self.nu1)*g + self.nu1*g_hat
        self.theta = self.theta - lr*num/(np.sqrt((1-self.nu2)*g**2 + self.nu2*s_hat) + self.eps)
