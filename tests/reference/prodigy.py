import numpy as np
from types import SimpleNamespace

class Prodigy:
    """Mishchenko & Defazio 2023 (2306.06101), as in the authors' code, for all tensors of a model at once.
    Choices: the largest gamma drives d, and each tensor moves by its own; a tensor's x0 and t begin with its first gradient; a gamma of 0
    leaves a tensor out; lam in the paper's AdamW way, or L2."""
    def __init__(self, thetas, beta1=.9, beta2=.999, beta3=None, eps=1e-8, d0=1e-6, d_coef=1., growth=np.inf, safeguard=False,
                 correct=False, lams=None, decoupled=True):
        self.inner = [SimpleNamespace(theta=np.array(t, dtype=np.float64), t=0, lam=l) for t,l in zip(thetas, lams or [0.]*len(thetas))]
        self.betas,self.eps,self.d0,self.d_coef,self.growth = (beta1,beta2,np.sqrt(beta2) if beta3 is None else beta3),eps,d0,d_coef,growth
        self.safeguard,self.correct,self.decoupled,self.d,self.d_max,self.r = safeguard,correct,decoupled,d0,d0,0.
    def step(self, gs, gammas):
        b1,b2,b3 = self.betas
        d,r,norm,live,top = self.d,self.r*b3,0.,[],max(gammas)
        for o,g,gamma in zip(self.inner, gs, gammas):
            if g is None or gamma==0: continue
            g = np.array(g, dtype=np.float64) + (0. if self.decoupled else o.lam*o.theta)
            if o.t==0: o.x0,o.m,o.v,o.s = o.theta.copy(),*(np.zeros_like(o.theta) for _ in range(3))
            o.t += 1
            o.c = np.sqrt(1-b2**o.t)/(1-b1**o.t) if self.correct else 1.
            r += d/self.d0*d*top*o.c*np.sum(g*(o.x0-o.theta))
            o.m,o.v = b1*o.m + (1-b1)*d*g,b2*o.v + (1-b2)*(d*g)**2
            o.s = b3*o.s + d/self.d0*(d if self.safeguard else d*top*o.c)*g
            norm += np.abs(o.s).sum()
            live.append((o, gamma))
        if norm==0: return
        self.r,d_hat = r,self.d_coef*r/norm
        if d==self.d0: self.d = max(d, d_hat)
        self.d_max = max(self.d_max, d_hat)
        self.d = min(self.d_max, self.d*self.growth)
        for o,gamma in live:
            step = d*gamma*o.c
            if self.decoupled: o.theta = o.theta*(1-step*o.lam)
            o.theta = o.theta - step*o.m/(np.sqrt(o.v) + self.d*self.eps)
