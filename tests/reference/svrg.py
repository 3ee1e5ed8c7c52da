import numpy as np

class SVRG:
    """Johnson and Zhang 2013 (NIPS, no arXiv id), with the coefficient of Yin, Xu, Liu, Liu 2023 (2311.05589). `grad(w, batch)` is the mean
    gradient over a batch, `full` the batch of all data. Choices: the snapshot is the last iterate; SGD with momentum v = mu v + g', w = w -
    lr v takes the step. No package has it."""
    def __init__(self, w, grad, full, alpha=1., momentum=0.):
        self.w,self.grad,self.full,self.alpha,self.momentum,self.v = np.array(w, dtype=np.float64),grad,full,alpha,momentum,0.
        self.snapshot()
    def snapshot(self):
        self.w_tilde = self.w.copy()
        self.mu = self.grad(self.w_tilde, self.full)
    def step(self, batch, lr):
        g = self.grad(self.w, batch) - self.alpha*(self.grad(self.w_tilde, batch) - self.mu)
        self.v = self.momentum*self.v + g
        self.w = self.w - lr*self.v
