import numpy as np

class AggMo:
    """Lucas, Sun, Zemel, Grosse 2018 (1804.00325), equation 2: velocities without dampening, v_0 = 0. Choices: `lr` is that of the present
    step, and not part of the velocities (the paper's form). Decay: L2 in the gradient, or `decoupled` before the step."""
    def __init__(self, theta, betas=(0.,.9,.99), lam=0., decoupled=False):
        self.theta,self.betas,self.lam,self.decoupled = np.array(theta, dtype=np.float64),betas,lam,decoupled
        self.v = [np.zeros_like(self.theta) for _ in betas]
    def step(self, g, lr):
        if self.decoupled: self.theta = self.theta*(1-lr*self.lam)
        else: g = g + self.lam*self.theta
        self.v = [b*v - g for b,v in zip(self.betas, self.v)]
        self.theta = self.theta + lr/len(self.betas)*sum(self.v)
        self.sums = [-v for v in self.v] # what is kept in a program: the signs are the gradient's
    sum1,sum2 = property(lambda self: self.sums[1]),property(lambda self: self.sums[2])
