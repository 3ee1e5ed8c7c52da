import numpy as np
from .decay import decay

class AdaBelief:
    """Zhuang et al. 2020 (2010.07468), algorithm 2. Choices, the authors' code: eps enters s at each step and is added to its root again;
    `rectify` as RAdam where rho_t >= 5, then with eps beside the root of the uncorrected s, and a step along m_hat before."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-16, rectify=False, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps = np.array(theta, dtype=np.float64),beta1,beta2,eps
        self.rectify,self.lam,self.decoupled = rectify,lam,decoupled
        self.m,self.s,self.t,self.plain,self.rectified = np.zeros_like(self.theta),np.zeros_like(self.theta),0,0,0
    def step(self, g, alpha):
        self.t += 1
        self.theta,g = decay(self.theta, np.array(g, dtype=np.float64), alpha, self.lam, self.decoupled)
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.s = self.beta2*self.s + (1-self.beta2)*(g-self.m)**2 + self.eps
        c1,c2 = 1-self.beta1**self.t,1-self.beta2**self.t
        if not self.rectify: step = self.m/c1/(np.sqrt(self.s/c2) + self.eps)
        else:
            rho_inf = 2/(1-self.beta2) - 1
            rho = rho_inf - 2*self.t*self.beta2**self.t/c2
            if rho < 5: step,self.plain = self.m/c1,self.plain+1
            else:
                r = np.sqrt((rho-4)/(rho_inf-4)*(rho-2)/(rho_inf-2)*rho_inf/rho)
                step,self.rectified = r*np.sqrt(c2)*self.m/c1/(np.sqrt(self.s) + self.eps),self.rectified+1
        self.theta = self.theta - alpha*step
