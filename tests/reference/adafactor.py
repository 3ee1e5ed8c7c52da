import numpy as np

class Adafactor:
    """Shazeer & Stern 2018 (1804.04235), algorithms 4 and 5, with means of squares in place of sums (the factor cancels in V).
    Choices: alpha_t is relative to RMS(X) before the decay, rho_t = min(lr, 1/sqrt(t)) as in torch; `eps1=None` clamps the root and the
    mean of R at the dtype's eps, as torch does; a number is added to the squares, as in the paper. Axes but the last two number the
    matrices."""
    def __init__(self, theta, c=-.8, eps1=None, eps2=1e-3, d=1., scale=True, lam=0., decoupled=True):
        self.theta,self.c,self.eps1,self.eps2,self.d,self.scale = np.array(theta, dtype=np.float64),c,eps1,eps2,d,scale
        self.lam,self.decoupled = lam,decoupled
        self.R = self.C = self.V = 0.
        self.t = self.clipped = self.unclipped = self.capped = self.small = 0
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64) + (0. if self.decoupled else self.lam*self.theta)
        self.t += 1
        beta2,floor = 1-float(self.t)**self.c,np.finfo(np.float64).eps if self.eps1 is None else 0.
        sq = g**2 + (self.eps1 or 0.)
        if g.ndim >= 2:
            self.R = beta2*self.R + (1-beta2)*np.mean(sq, axis=-1)
            self.C = beta2*self.C + (1-beta2)*np.mean(sq, axis=-2)
            V = np.einsum('...i,...j->...ij', self.R, self.C)/np.maximum(self.R.mean(-1), floor)[...,None,None]
        else: V = self.V = beta2*self.V + (1-beta2)*sq
        U = g/np.maximum(np.sqrt(V), floor)
        over = np.sqrt(np.mean(U**2))/self.d
        rho,size = min(lr, 1/np.sqrt(self.t)),np.sqrt(np.mean(self.theta**2))
        self.clipped += over>1; self.unclipped += over<1; self.capped += rho<lr; self.small += size<self.eps2
        alpha = rho*(max(self.eps2, size) if self.scale else 1.)
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        self.theta = self.theta - alpha*U/max(1., over)
