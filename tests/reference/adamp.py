import numpy as np

class _Projected:
    """Heo et al. 2020 (2006.08217), equation 12 and the authors' two views: rows (channels), then the whole tensor (layer); counts what was
    done"""
    def __init__(self, theta, eps, delta, wd_ratio, nesterov, lam):
        self.theta,self.eps,self.delta,self.wd_ratio = np.array(theta, dtype=np.float64),eps,delta,wd_ratio
        self.nesterov,self.lam = nesterov,lam
        self.m,self.t = np.zeros_like(self.theta),0
        self.channels = self.layers = self.neither = 0
    def project(self, g, u):
        if g.ndim < 2: return u,1.
        for view in ('channels','layers'):
            w,gv,uv = (x.reshape((len(x) if view=='channels' else 1, -1)) for x in (self.theta,g,u))
            norm = np.sqrt((w**2).sum(1))
            cos = np.abs((w*gv).sum(1))/(np.maximum(norm, self.eps)*np.maximum(np.sqrt((gv**2).sum(1)), self.eps))
            if cos.max() < self.delta/np.sqrt(w.shape[1]):
                setattr(self, view, getattr(self, view)+1)
                hat = w/(norm+self.eps)[:,None]
                return (uv - hat*(hat*uv).sum(1, keepdims=True)).reshape(u.shape),self.wd_ratio
        self.neither += 1
        return u,1.

class AdamP(_Projected):
    """Algorithm 2. Choices: eps is added to the debiased root; the cosine is of the gradient of this step; decoupled decay by lr*lam,
    wd_ratio of it where projected"""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, delta=.1, wd_ratio=.1, nesterov=False, lam=0.):
        super().__init__(theta, eps, delta, wd_ratio, nesterov, lam)
        self.beta1,self.beta2,self.v = beta1,beta2,np.zeros_like(self.theta)
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        self.t += 1
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        m = self.beta1*self.m + (1-self.beta1)*g if self.nesterov else self.m
        u,ratio = self.project(g, m/(np.sqrt(self.v/(1-self.beta2**self.t)) + self.eps))
        self.theta = self.theta*(1-lr*self.lam*ratio) - lr/(1-self.beta1**self.t)*u

class SGDP(_Projected):
    """Algorithm 1. Choices: the momentum itself is not projected (the authors' code does, in place); the decay is divided by 1-mu, as in
    their code"""
    def __init__(self, theta, mu=0., dampening=0., eps=1e-8, delta=.1, wd_ratio=.1, nesterov=False, lam=0.):
        super().__init__(theta, eps, delta, wd_ratio, nesterov, lam)
        self.mu,self.dampening = mu,dampening
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        self.m = self.mu*self.m + (1-self.dampening)*g
        u,ratio = self.project(g, g + self.mu*self.m if self.nesterov else self.m)
        self.theta = self.theta*(1-lr*self.lam*ratio/(1-self.mu)) - lr*u
