import numpy as np

class ADOPT:
    """Taniguchi et al. 2024 (2411.02853), algorithm 2, the clipped one: v_0 = g_0^2, then m_t = beta1 m + (1-beta1)
    clip(g_t/max(sqrt(v_{t-1}), eps), c_t), theta_t = theta - alpha m_t, v_t after its use. Choices: c_t = t^clip_exp, which counts from the
    step after g_0 (0: no clip); decoupled decay not with g_0, L2 with it. `clipped` counts elements."""
    def __init__(self, theta, beta1=.9, beta2=.9999, eps=1e-6, clip_exp=.25, lam=0., decoupled=True):
        self.theta,self.beta1,self.beta2,self.eps = np.array(theta, dtype=np.float64),beta1,beta2,eps
        self.clip_exp,self.lam,self.decoupled = clip_exp,lam,decoupled
        self.m,self.v,self.t,self.clipped = np.zeros_like(self.theta),None,0,0
    def step(self, g, alpha):
        self.t += 1
        g = np.array(g, dtype=np.float64) + (0 if self.decoupled else self.lam*self.theta)
        if self.v is None:
            self.v = g**2
            return
        if self.decoupled: self.theta = self.theta - alpha*self.lam*self.theta
        ratio = g/np.maximum(np.sqrt(self.v), self.eps)
        c = (self.t-1)**self.clip_exp if self.clip_exp else np.inf
        self.clipped += int((np.abs(ratio) > c).sum())
        self.m = self.beta1*self.m + (1-self.beta1)*np.clip(ratio, -c, c)
        self.theta = self.theta - alpha*self.m
        self.v = self.beta2*self.v + (1-self.beta2)*g**2
