import numpy as np

class ScheduleFree:
    """Defazio et al. 2024 (2405.15682), equations 3 to 5, with all three sequences kept: z is stepped, x is the weighted mean of all z,
    gradients are taken at y. Choices, of the authors' package: w_t = t^r gamma_max^rho, of each tensor's own t; decay at y, beside the
    normalised gradient; gamma warmed up linearly."""
    def __init__(self, theta, beta=.9, lam=0., warmup=0, r=0., rho=2.):
        self.z = self.x = self.y = np.array(theta, dtype=np.float64)
        self.beta,self.lam,self.warmup,self.r,self.rho = beta,lam,warmup,r,rho
        self.t,self.W,self.gamma_max = 0,0.,0.
    theta = property(lambda self: self.y)
    def gamma(self, lr): return lr*min(1, self.t/self.warmup) if self.warmup else lr
    def u(self, g): return g
    def step(self, g, lr):
        g = np.asarray(g, dtype=np.float64)
        self.t += 1
        gamma = self.gamma(lr)
        self.z = self.z - gamma*(self.u(g) + self.lam*self.y)
        self.gamma_max = max(self.gamma_max, gamma)
        w = self.t**self.r*self.gamma_max**self.rho
        self.W += w
        c = w/self.W if self.W else 0
        self.x = (1-c)*self.x + c*self.z
        self.y = (1-self.beta)*self.z + self.beta*self.x

class SGDScheduleFree(ScheduleFree): "u = g"

class AdamWScheduleFree(ScheduleFree):
    "u = g/(sqrt(v_hat) + eps), v_hat debiased"
    def __init__(self, theta, beta=.9, beta2=.999, eps=1e-8, lam=0., warmup=0, r=0., rho=2.):
        super().__init__(theta, beta, lam, warmup, r, rho)
        self.beta2,self.eps,self.v = beta2,eps,np.zeros_like(self.z)
    def u(self, g):
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
        return g/(np.sqrt(self.v/(1-self.beta2**self.t)) + self.eps)

class RAdamScheduleFree(AdamWScheduleFree):
    "gamma times the rectification of RAdam where rho_t > 4; before, 0 (silent) or u = g"
    def __init__(self, theta, beta=.9, beta2=.999, eps=1e-8, lam=0., r=0., rho=2., silent=True):
        super().__init__(theta, beta, beta2, eps, lam, 0, r, rho)
        self.silent,self.rho_inf = silent,2/(1-beta2) - 1
    @property
    def rho_t(self): return self.rho_inf - 2*self.t*self.beta2**self.t/(1-self.beta2**self.t)
    def gamma(self, lr):
        if self.rho_t <= 4: return 0. if self.silent else lr
        return lr*np.sqrt((self.rho_t-4)*(self.rho_t-2)*self.rho_inf/((self.rho_inf-4)*(self.rho_inf-2)*self.rho_t))
    def u(self, g):
        scaled = super().u(g)
        return scaled if self.rho_t > 4 else g
