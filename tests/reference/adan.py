import numpy as np

class Adan:
    """Xie et al. 2022 (2208.06677), algorithm 1, with the bias corrections of the authors' code; the betas here are the paper's, 1 minus
    what the code and we call so. Choices: `g_prior`, the gradient before the first, equals the first (the paper's and the code's); with
    `zero_prior` it is 0 (fastxtend's default)."""
    def __init__(self, theta, beta1=.02, beta2=.08, beta3=.01, eps=1e-8, lam=0., zero_prior=False):
        self.theta,self.betas,self.eps,self.lam,self.zero_prior = np.array(theta, dtype=np.float64),(beta1,beta2,beta3),eps,lam,zero_prior
        self.m,self.v,self.n,self.g_prior,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta),None,0
    def step(self, g, lr):
        g,(b1,b2,b3) = np.array(g, dtype=np.float64),self.betas
        if self.t==0: self.g_prior = np.zeros_like(g) if self.zero_prior else g
        self.t += 1
        d = g - self.g_prior
        self.m = (1-b1)*self.m + b1*g
        self.v = (1-b2)*self.v + b2*d
        self.n = (1-b3)*self.n + b3*(g + (1-b2)*d)**2
        m,v,n = (x/(1-(1-b)**self.t) for x,b in zip((self.m,self.v,self.n), self.betas))
        self.theta = (self.theta - lr*(m + (1-b2)*v)/(np.sqrt(n) + self.eps))/(1 + lr*self.lam)
        self.g_prior = g
