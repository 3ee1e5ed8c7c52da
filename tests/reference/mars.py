import numpy as np

class MARS:
    """Yuan et al. 2024 (2411.10438), algorithms 2 (MARS-AdamW) and 3 (MARS-Lion), approximate form: `g` before the first step equals the
    first. Choices: ||c|| is that of one tensor; less than two dimensions is AdamW with `betas_1d` at lr*scale, unless `all_dims` (the
    authors' code)."""
    def __init__(self, x, beta1=.95, beta2=.99, eps=1e-8, gamma=.025, kind='adamw', all_dims=False, betas_1d=(.9,.95), scale=1., lam=0.):
        self.x = np.array(x, dtype=np.float64)
        self.plain = self.x.ndim < 2 and not all_dims
        self.b1,self.b2 = betas_1d if self.plain else (beta1,beta2)
        self.eps,self.gamma,self.kind,self.scale,self.lam = eps,gamma,kind,scale if self.plain else 1.,lam
        self.m,self.v,self.last,self.t = np.zeros_like(self.x),np.zeros_like(self.x),None,0
    theta = property(lambda self: self.x)
    def step(self, g, lr):
        g,self.t,lr = np.array(g, dtype=np.float64),self.t+1,lr*self.scale
        c = g if self.plain or self.last is None else g + self.gamma*self.b1/(1-self.b1)*(g-self.last)
        if not self.plain and (size := np.sqrt(np.sum(c*c))) > 1: c = c/size
        self.last = g
        self.m,self.v = self.b1*self.m + (1-self.b1)*c,self.b2*self.v + (1-self.b2)*c*c
        if self.kind=='lion' and not self.plain: u = np.sign(self.m)
        else: u = self.m/(1-self.b1**self.t)/(np.sqrt(self.v/(1-self.b2**self.t)) + self.eps)
        self.x = self.x - lr*(u + self.lam*self.x)
