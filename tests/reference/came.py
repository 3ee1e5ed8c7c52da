import numpy as np

def _rms(x): return np.sqrt(np.mean(x**2))

class CAME:
    """Luo et al. 2023 (2307.02047), algorithm 2, with means in place of sums, as the authors' code has them.
    Choices: decoupled decay by lr*lam before the step; no correction of the averages; a tensor of one axis or none is not factored and has
    no confidence; axes but the last two number the matrices."""
    def __init__(self, theta, beta1=.9, beta2=.999, beta3=.9999, eps1=1e-30, eps2=1e-16, d=1., lam=0.):
        self.theta,self.betas,self.eps1,self.eps2,self.d,self.lam = np.array(theta, dtype=np.float64),(beta1,beta2,beta3),eps1,eps2,d,lam
        self.m = np.zeros_like(self.theta)
        self.r = self.c = self.v = self.R = self.C = 0.
        self.clipped = self.unclipped = 0
    def step(self, g, lr):
        g,(b1,b2,b3) = np.array(g, dtype=np.float64),self.betas
        self.theta = self.theta - lr*self.lam*self.theta
        sq = g**2 + self.eps1
        if g.ndim >= 2:
            self.r = b2*self.r + (1-b2)*sq.mean(-1)
            self.c = b2*self.c + (1-b2)*sq.mean(-2)
            v = np.einsum('...i,...j->...ij', self.r, self.c)/self.r.mean(-1)[...,None,None]
        else: v = self.v = b2*self.v + (1-b2)*sq
        u = g/np.sqrt(v)
        self.clipped += _rms(u)>self.d; self.unclipped += _rms(u)<self.d
        u = u/max(1., _rms(u)/self.d)
        self.m = b1*self.m + (1-b1)*u
        if g.ndim < 2: self.theta = self.theta - lr*self.m; return
        U = (u-self.m)**2 + self.eps2
        self.R = b3*self.R + (1-b3)*U.mean(-1)
        self.C = b3*self.C + (1-b3)*U.mean(-2)
        S = np.einsum('...i,...j->...ij', self.R, self.C)/self.R.mean(-1)[...,None,None]
        self.theta = self.theta - lr*self.m/np.sqrt(S)
