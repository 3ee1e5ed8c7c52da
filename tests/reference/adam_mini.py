import numpy as np

class AdamMini:
    """Zhang et al. 2024 (2406.16793), algorithm 1, with decoupled decay before the step.
    Choices: a block is a slice of the first axis ('neuron'), or the whole tensor ('tensor'; also where there is one axis or none); eps is
    added to the debiased root, as in the authors' code."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, partition='neuron', lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.rows = partition=='neuron' and self.theta.ndim>1
        self.m,self.t = np.zeros_like(self.theta),0
        self.v = np.zeros((len(self.theta),) + (1,)*(self.theta.ndim-1)) if self.rows else np.array(0.)
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: g = g + self.lam*self.theta
        self.t += 1
        self.m = self.beta1*self.m + (1-self.beta1)*g
        for b in range(len(self.v)) if self.rows else [...]: self.v[b] = self.beta2*self.v[b] + (1-self.beta2)*np.mean(g[b]**2)
        m,v = self.m/(1-self.beta1**self.t),self.v/(1-self.beta2**self.t)
        self.theta = self.theta - lr*m/(np.sqrt(v) + self.eps)
