import numpy as np

class Rprop:
    """Riedmiller, Braun 1993 (IEEE ICNN; no arXiv id). Choices: iRprop- of Igel, Hüsken 2000, as torch: where the sign changes the
    derivative counts as 0, and no step is taken back; the update-values start at the lr of the first step; decay, which the paper lacks, is
    theta*(1-lr*lam) before the step. It counts how often each branch and each limit was met."""
    def __init__(self, theta, eta_minus=.5, eta_plus=1.2, delta_min=1e-6, delta_max=50., lam=0.):
        self.theta,self.etas,self.limits,self.lam = np.array(theta, dtype=np.float64),(eta_minus,eta_plus),(delta_min,delta_max),lam
        self.dE_old,self.delta = np.zeros_like(self.theta),None
        self.grown = self.turned = self.at_min = self.at_max = 0
    def step(self, g, lr):
        dE,(eta_minus,eta_plus) = np.array(g, dtype=np.float64),self.etas
        if self.delta is None: self.delta = np.full_like(self.theta, lr)
        same,turned = dE*self.dE_old > 0,dE*self.dE_old < 0
        delta = np.where(same, eta_plus*self.delta, np.where(turned, eta_minus*self.delta, self.delta))
        self.delta = np.minimum(np.maximum(delta, self.limits[0]), self.limits[1])
        self.grown += same.sum()
        self.turned += turned.sum(); self.at_min += (delta<self.limits[0]).sum(); self.at_max += (delta>self.limits[1]).sum()
        dE = np.where(turned, 0., dE)
        self.theta = self.theta*(1 - lr*self.lam) - np.sign(dE)*self.delta
        self.dE_old = dE
