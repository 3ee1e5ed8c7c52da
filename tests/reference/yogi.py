import numpy as np

class Yogi:
    """Zaheer, Reddi, Sachan, Kale, Kumar 2018 (NeurIPS, no arXiv id), algorithm 2, with both averages corrected for their start as in Adam;
    the paper leaves that out, the ports do it. Choices: m_0 = 0 (the ports start it at v_0's value), v_0 = `v0` everywhere. Decay: L2 in
    the gradient, or `decoupled` before the step."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-3, v0=1e-6, lam=0., decoupled=False):
        self.theta,self.beta1,self.beta2,self.eps,self.lam,self.decoupled = np.array(theta, dtype=np.float64),beta1,beta2,eps,lam,decoupled
        self.m,self.v,self.t,self.risen,self.fallen = np.zeros_like(self.theta),np.full_like(self.theta, v0),0,0,0
    def step(self, g, lr):
        self.t += 1
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        self.m = self.beta1*self.m + (1-self.beta1)*g
        above = self.v - g**2
        self.risen,self.fallen = self.risen+(above<0).sum(),self.fallen+((above>0)&(g!=0)).sum()
        self.v = np.where(above>0, self.v-(1-self.beta2)*g**2, np.where(above<0, self.v+(1-self.beta2)*g**2, self.v))
        self.theta = self.theta - lr*(self.m/(1-self.beta1**self.t))/(np.sqrt(self.v/(1-self.beta2**self.t)) + self.eps)
