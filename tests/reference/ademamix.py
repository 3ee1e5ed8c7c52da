import numpy as np

class AdEMAMix:
    """Pagliardini et al. 2024 (2409.03137), algorithm 1 with its schedulers: alpha(t) = min(t alpha/T, alpha), beta3(t) = min(exp(ln
    beta_start ln beta3/((1-t/T) ln beta3 + t/T ln beta_start)), beta3). Choices: T of alpha and of beta3 apart, 0 for none; beta_start
    given, as beta1 may be scheduled; m2 uncorrected; eps beside the root of the corrected average."""
    def __init__(self, theta, beta1=.9, beta2=.999, beta3=.9999, alpha=5., T_alpha=0, T_beta3=0, eps=1e-8, lam=0., beta_start=None):
        self.theta,self.beta1,self.beta2,self.beta3 = np.array(theta, dtype=np.float64),beta1,beta2,beta3
        self.alpha,self.T_alpha,self.T_beta3,self.eps,self.lam = alpha,T_alpha,T_beta3,eps,lam
        self.beta_start = beta1 if beta_start is None else beta_start
        self.m1,self.m2,self.nu,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),np.zeros_like(self.theta),0
    def schedule(self):
        alpha = min(self.t*self.alpha/self.T_alpha, self.alpha) if self.T_alpha else self.alpha
        if not self.T_beta3 or self.t >= self.T_beta3: return alpha,self.beta3
        a,b,x = np.log(self.beta_start),np.log(self.beta3),self.t/self.T_beta3
        return alpha,min(np.exp(a*b/((1-x)*b + x*a)), self.beta3)
    def step(self, g, eta):
        self.t += 1
        g = np.array(g, dtype=np.float64)
        alpha,beta3 = self.schedule()
        self.m1 = self.beta1*self.m1 + (1-self.beta1)*g
        self.m2 = beta3*self.m2 + (1-beta3)*g
        self.nu = self.beta2*self.nu + (1-self.beta2)*g**2
        u = (self.m1/(1-self.beta1**self.t) + alpha*self.m2)/(np.sqrt(self.nu/(1-self.beta2**self.t)) + self.eps)
        self.theta = self.theta - eta*(u + self.lam*self.theta)
