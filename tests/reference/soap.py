import numpy as np

class SOAP:
    """Vyas et al. 2024 (2409.11321), algorithms 3 and 4, for tensors of any order, with the choices of the authors' code: the first
    gradient only starts L, R and their eigenvectors; weights decay after the step, L and R are updated after that; the columns of Q and V
    are sorted by the diagonal of Q^T L Q before each QR. M is kept as in the paper, in the parameter's coordinates. `longest`: axes above
    it have no Q; `merge`: neighbouring axes are one while their product is at most `longest`; vectors have a Q with `vectors` alone."""
    def __init__(self, theta, beta1=.95, beta2=.95, beta_s=.95, eps=1e-8, every=10, longest=10**9, merge=False, vectors=False, lam=0.):
        self.theta,self.betas,self.eps,self.every,self.lam = np.array(theta, dtype=np.float64),(beta1,beta2,beta_s),eps,every,lam
        shape = self.theta.shape
        if merge and len(shape) > 1:
            sizes = [1]
            for n in shape: sizes = sizes[:-1] + ([sizes[-1]*n] if sizes[-1]*n <= longest or sizes[-1] == 1 else [sizes[-1], n])
            shape = tuple(sizes)
        self.shape,self.axes = shape,[i for i,n in enumerate(shape) if n <= longest and (self.theta.ndim > 1 or vectors)]
        self.L,self.Q = {i:np.zeros((shape[i],)*2) for i in self.axes},None
        self.M,self.V,self.t = np.zeros(shape),np.zeros(shape),0
    def _rotate(self, x, back=False):
        for i in self.axes: x = np.moveaxis(np.tensordot(self.Q[i] if back else self.Q[i].T, x, axes=(1, i)), 0, i)
        return x
    def step(self, g, lr):
        G,(b1,b2,bs) = np.array(g, dtype=np.float64).reshape(self.shape),self.betas
        self.t += 1
        if self.t > 1:
            t = self.t-1
            self.M = b1*self.M + (1-b1)*G
            self.V = b2*self.V + (1-b2)*self._rotate(G)**2
            N = self._rotate(self._rotate(self.M)/(np.sqrt(self.V) + self.eps), back=True)
            self.theta = self.theta - lr*np.sqrt(1-b2**t)/(1-b1**t)*N.reshape(self.theta.shape)
            self.theta = self.theta - lr*self.lam*self.theta
        for i in self.axes:
            rows = np.moveaxis(G, i, 0).reshape(G.shape[i], -1)
            self.L[i] = bs*self.L[i] + (1-bs)*rows @ rows.T
        if self.t == 1: self.Q = {i:np.linalg.eigh(self.L[i])[1][:,::-1] for i in self.axes}
        elif (self.t-1)%self.every == 0:
            for i in self.axes:
                order = np.argsort(-np.diag(self.Q[i].T @ self.L[i] @ self.Q[i]), kind='stable')
                self.V = np.take(self.V, order, axis=i)
                self.Q[i] = np.linalg.qr(self.L[i] @ self.Q[i][:,order])[0]
