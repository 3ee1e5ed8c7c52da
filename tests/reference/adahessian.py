import numpy as np

class AdaHessian:
    """Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2020 (2006.00719), algorithm 2 without its spatial averaging: D_t is the estimate of
    the Hessian's diagonal. `step(g, lr, D)`: without D the gradient stands for it, as in a dry run of ours. Choices: eps outside of the
    root, decay decoupled and before the step."""
    def __init__(self, theta, beta1=.9, beta2=.999, eps=1e-8, k=1., lam=0.):
        self.theta,self.beta1,self.beta2,self.eps,self.k,self.lam = np.array(theta, dtype=np.float64),beta1,beta2,eps,k,lam
        self.m,self.v,self.D,self.t = np.zeros_like(self.theta),np.zeros_like(self.theta),None,0
    def step(self, g, lr, D=None):
        self.t += 1
        self.D = np.asarray(g if D is None else D, dtype=np.float64)
        self.theta = self.theta*(1-lr*self.lam)
        self.m = self.beta1*self.m + (1-self.beta1)*g
        self.v = self.beta2*self.v + (1-self.beta2)*self.D**2
        mhat,vhat = self.m/(1-self.beta1**self.t),self.v/(1-self.beta2**self.t)
        self.theta = self.theta - lr*mhat/(np.sqrt(vhat)**self.k + self.eps)
