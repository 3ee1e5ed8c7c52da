import numpy as np

class SWATS:
    """Keskar & Socher 2017 (1712.07628), algorithm 1, of one tensor. Choices: the test is relative (|Lambda - gamma| <= tol*|gamma|) and
    needs Lambda > 0; `found` is what it found in the last step, `rate` (Lambda over the alpha of that step) is set from outside, for the
    next step; a later alpha scales it; Adam's moments go on. eps is added to the root of what is not debiased (the paper's)."""
    def __init__(self, w, beta1=.9, beta2=.999, eps=1e-9, tol=1e-6, lam=0., decoupled=False):
        self.w,self.beta1,self.beta2,self.eps,self.tol = np.array(w, dtype=np.float64),beta1,beta2,eps,tol
        self.weight_decay,self.decoupled = lam,decoupled
        self.m,self.a,self.b,self.lam,self.k = np.zeros_like(self.w),np.zeros_like(self.w),np.zeros_like(self.w),0.,0
        self.rate,self.found = 0.,0.
    theta = property(lambda self: self.w)
    def step(self, g, alpha):
        g,self.k,self.found = np.array(g, dtype=np.float64),self.k+1,0.
        if self.decoupled: self.w = self.w - alpha*self.weight_decay*self.w
        else: g = g + self.weight_decay*self.w
        self.m,self.a = self.beta1*self.m + (1-self.beta1)*g,self.beta2*self.a + (1-self.beta2)*g*g
        if self.rate:
            self.b = self.beta1*self.b + g
            self.w = self.w - self.rate*alpha*(1-self.beta1)*self.b
            return
        u = -alpha*np.sqrt(1-self.beta2**self.k)/(1-self.beta1**self.k)*self.m/(np.sqrt(self.a) + self.eps)
        self.w = self.w + u
        if (dot := np.sum(u*g)) == 0: return
        gamma = np.sum(u*u)/-dot
        self.lam = self.beta2*self.lam + (1-self.beta2)*gamma
        Lambda = self.lam/(1-self.beta2**self.k)
        if self.k > 1 and Lambda > 0 and abs(Lambda-gamma) <= self.tol*abs(gamma): self.found = Lambda/alpha

def agree(group):
    "The tensors of a group after a step: the first rate that was found in a step counts, of several that of the last tensor"
    rate = max(o.rate for o in group) or next((o.found for o in reversed(group) if o.found), 0.)
    for o in group:
        if o.k: o.rate,o.found = rate,0.
