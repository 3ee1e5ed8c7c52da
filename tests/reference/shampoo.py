import numpy as np

class Shampoo:
    """Gupta et al. 2018 (1802.09568), algorithm 2, for tensors of any order k: H_i += G_(i) G_(i)^T, and the gradient multiplied by
    H_i^(-1/(2k)) along each axis. Choices: a single number is a vector of one; an axis longer than `longest`, or of length 1, keeps the
    diagonal of H_i; other roots are computed at the first step and each that `every` divides; momentum adds up the preconditioned
    updates."""
    def __init__(self, theta, mu=0., eps=1e-4, every=1, longest=10**9, lam=0., decoupled=False):
        self.theta,self.mu,self.eps,self.every,self.longest = np.array(theta, dtype=np.float64),mu,eps,every,longest
        self.lam,self.decoupled = lam,decoupled
        shape = self.theta.shape or (1,)
        self.H = [eps*np.eye(n) if 1 < n <= longest else np.full(n, eps) for n in shape]
        self.roots,self.b,self.t = [None]*len(shape),np.zeros(shape),0
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        G = u = g.reshape(self.theta.shape or (1,))
        self.t += 1
        for i in range(G.ndim):
            rows = np.moveaxis(G, i, 0).reshape(G.shape[i], -1)
            self.H[i] = self.H[i] + (rows @ rows.T if self.H[i].ndim == 2 else (rows**2).sum(1))
            if self.H[i].ndim == 1: R = np.diag(self.H[i]**(-1/(2*G.ndim)))
            elif self.t == 1 or self.t%self.every == 0:
                val,vec = np.linalg.eigh(self.H[i])
                R = self.roots[i] = vec @ np.diag(val**(-1/(2*G.ndim))) @ vec.T
            else: R = self.roots[i]
            u = np.moveaxis(np.tensordot(R, u, axes=(1, i)), 0, i)
        self.b = self.mu*self.b + u
        self.theta = self.theta - lr*self.b.reshape(self.theta.shape)
