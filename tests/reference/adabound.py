import numpy as np

class AdaBound:
    """Luo, Xiong, Liu, Sun 2019 (1902.09843), algorithm 2, with what the authors' code adds: eps, the corrections of the bias, and bounds
    that follow a schedule as lr/base_lr. Choices: `base_lr` None is the first learning rate above 0; `amsbound` is AMSBound: the largest v
    so far. Decay: L2 in the gradient, or `decoupled` before the step."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, final_lr=.1, gamma=.001, amsbound=False, base_lr=None, lam=0.,
                 decoupled=False):
        self.theta,self.beta1,self.beta2,self.eps = np.array(theta, dtype=np.float64),beta1,beta2,eps
        self.final_lr,self.gamma,self.amsbound,self.base_lr,self.lam,self.decoupled = final_lr,gamma,amsbound,base_lr,lam,decoupled
        self.m,self.v,self.v_hat = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta)
        self.t,self.low,self.high,self.free,self.held = 0,0,0,0,0
    def step(self, g, lr):
        self.t += 1
        if self.base_lr is None and lr>0: self.base_lr = lr
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        self.held += (self.v_hat>self.v).sum()
        self.v_hat = np.maximum(self.v_hat, self.v)
        eta = lr*np.sqrt(1-self.beta2**self.t)/(1-self.beta1**self.t)/(np.sqrt(self.v_hat if self.amsbound else self.v) + self.eps)
        final = self.final_lr*lr/self.base_lr if self.base_lr else 0.
        lower,upper = final*(1-1/(self.gamma*self.t+1)),final*(1+1/(self.gamma*self.t))
        self.low,self.high = self.low+(eta<lower).sum(),self.high+((eta>upper)&(g!=0)).sum()
        self.free = self.free+((eta>=lower)&(eta<=upper)).sum()
        self.theta = self.theta - np.minimum(np.maximum(eta, lower), upper)*self.m
