import numpy as np

class QHM:
    """Ma, Yarats 2018 (1810.06801), equations 3 and 4: the buffer is a mean of the gradients, without correction for its start at 0.
    Choice: decay is theta*(1-lr*lam) before the step, or lam*theta in the gradient."""
    def __init__(self, theta, beta=.999, nu=.7, lam=0., decoupled=False):
        self.theta,self.beta,self.nu,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta,nu,lam,decoupled
        self.g = np.zeros_like(self.theta)
    def step(self, grad, lr):
        grad = np.array(grad, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: grad = grad + self.lam*self.theta
        self.g = self.beta*self.g + (1-self.beta)*grad
        self.theta = self.theta - lr*((1-self.nu)*grad + self.nu*self.g)
