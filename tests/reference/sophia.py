import numpy as np

class SophiaG:
    """Liu et al. 2023 (2305.14342) in the form of the authors' code (sophia.py): `exp_avg`, `hessian` = ema of the squared gradient of
    sampled labels, and a step sign(m) min(|m|/(rho bs hessian + 1e-15), 1). Ours keeps bs*hessian. No package has it, so this is the
    oracle."""
    def __init__(self, theta, beta1=.965, beta2=.99, rho=.04, eps=1e-15, lam=0., bs=1):
        self.theta,self.beta1,self.beta2,self.rho,self.eps,self.lam,self.bs = np.array(theta, dtype=np.float64),beta1,beta2,rho,eps,lam,bs
        self.exp_avg,self.hessian = np.zeros_like(self.theta),np.zeros_like(self.theta)
        self.clipped = self.unclipped = 0
    def update_hessian(self, g): self.hessian = self.beta2*self.hessian + (1-self.beta2)*np.asarray(g, dtype=np.float64)**2
    def step(self, g, lr):
        self.theta = self.theta*(1 - lr*self.lam)
        self.exp_avg = self.beta1*self.exp_avg + (1-self.beta1)*np.asarray(g, dtype=np.float64)
        ratio = np.abs(self.exp_avg)/(self.rho*self.bs*self.hessian + self.eps)
        self.clipped,self.unclipped = self.clipped + np.sum(ratio>=1),self.unclipped + np.sum(ratio<1)
        self.theta = self.theta - lr*np.sign(self.exp_avg)*np.minimum(ratio, 1)
