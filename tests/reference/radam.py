import numpy as np
from .adam import Adam

class RAdam(Adam):
    """Liu et al. 2019 (1908.03265), algorithm 2: rho_inf = 2/(1-beta2) - 1, rho_t = rho_inf - 2 t beta2^t/(1-beta2^t), rectification r_t.
    Choices: rectify where rho_t > 5 (the paper: 4); eps beside the root as in Adam. `beta`: SAdam (Tong et al. 2019, 1908.00700),
    softplus(x) = log(1 + exp(beta x))/beta over the denominator."""
    def __init__(self, theta, beta1=.9, beta2=.99, eps=1e-5, lam=0., beta=0., decoupled=True):
        super().__init__(theta, beta1, beta2, eps, lam, decoupled)
        self.beta,self.rho_inf = beta,2/(1-beta2) - 1
    def step(self, g, lr):
        _,m_hat,v_hat = self.moments(g, lr)
        rho_t = self.rho_inf - 2*self.t*self.beta2**self.t/(1-self.beta2**self.t)
        if rho_t <= 5: self.theta = self.theta - lr*m_hat
        else:
            r_t = np.sqrt((rho_t-4)*(rho_t-2)*self.rho_inf/((self.rho_inf-4)*(self.rho_inf-2)*rho_t))
            den = np.sqrt(v_hat) + self.eps
            if self.beta: den = np.logaddexp(0, self.beta*den)/self.beta
            self.theta = self.theta - lr*r_t*m_hat/den
