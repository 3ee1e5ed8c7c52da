import numpy as np

class NAdam:
    """Dozat 2016 (ICLR workshop; no arXiv id), algorithm 2. Choices: m is averaged with beta1 and not with mu_t, as in torch; n-hat is
    n/(1-nu^t); eps is added to the root; mu_t = beta1*(1 - .5*.96^(t*psi)); decay, which the paper lacks, is theta*(1-lr*lam) before the
    step, or lam*theta in g. `mus` holds every mu so far."""
    def __init__(self, theta, beta1=.9, nu=.999, eps=1e-8, psi=.004, lam=0., decoupled=False):
        self.theta,self.beta1,self.nu,self.eps,self.psi = np.array(theta, dtype=np.float64),beta1,nu,eps,psi
        self.lam,self.decoupled = lam,decoupled
        self.m,self.n,self.mus = np.zeros_like(self.theta),np.zeros_like(self.theta),[]
    def mu(self, t): return self.beta1*(1 - .5*.96**(t*self.psi))
    t = property(lambda self: len(self.mus))
    product = property(lambda self: np.prod(self.mus))
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if self.decoupled: self.theta = self.theta*(1 - lr*self.lam)
        else: g = g + self.lam*self.theta
        t = self.t + 1
        self.mus.append(self.mu(t))
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.n = self.nu*self.n + (1-self.nu)*g**2
        g_hat = g/(1 - np.prod(self.mus))
        m_hat = self.m/(1 - np.prod(self.mus + [self.mu(t+1)]))
        m_bar = (1-self.mu(t))*g_hat + self.mu(t+1)*m_hat
        self.theta = self.theta - lr*m_bar/(np.sqrt(self.n/(1 - self.nu**t)) + self.eps)
