import numpy as np

class AccSGD:
    """Kidambi, Netrapalli, Jain, Kakade 2018 (1803.05591), with its constant .7 as `c`; from Jain et al. 2017 (1704.08227).
    Choices: both lines use the iterate w of before the step. Decay: L2 in the gradient, or `decoupled` before the step (the average begins
    with the decayed weights)."""
    def __init__(self, theta, kappa=1000., xi=10., c=.7, lam=0., decoupled=False):
        self.theta,self.kappa,self.xi,self.c,self.lam = np.array(theta, dtype=np.float64),kappa,xi,c,lam
        self.decoupled,self.w_bar = decoupled,None
    def step(self, g, lr):
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        w,c,alpha = self.theta,self.c,1-self.c**2*self.xi/self.kappa
        if self.w_bar is None: self.w_bar = w
        self.w_bar = alpha*self.w_bar + (1-alpha)*(w - self.kappa*lr/c*g)
        self.theta = c/(c+1-alpha)*(w - lr*g) + (1-alpha)/(c+1-alpha)*self.w_bar
