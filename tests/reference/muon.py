import numpy as np

class Muon:
    """Jordan et al. 2024, *Muon: an optimizer for hidden layers in neural networks* (kellerjordan.github.io/posts/muon), exact
    Newton-Schulz in float64; scale 'match_rms_adamw' and decay: Liu et al. 2025 (2502.16982). Choices: B is an average (the authors' code)
    and not a sum; the factor of the rate is taken from the matrix after flattening; a tensor of fewer than two axes takes AdamW, with the
    authors' betas and eps."""
    def __init__(self, theta, mu=.95, nesterov=True, steps=5, match_rms=False, lam=0., aux_scale=.015, beta1=.9, beta2=.95, eps=1e-10):
        self.theta,self.mu,self.nesterov,self.steps = np.array(theta, dtype=np.float64),mu,nesterov,steps
        self.match_rms,self.lam = match_rms,lam
        self.aux_scale,self.beta1,self.beta2,self.eps,self.t = aux_scale,beta1,beta2,eps,0
        self.B,self.v = np.zeros_like(self.theta),np.zeros_like(self.theta)
    def orthogonal(self, G):
        X = G/(np.sqrt((G*G).sum()) + 1e-7)
        if X.shape[0] > X.shape[1]: X = X.T
        for _ in range(self.steps):
            A = X@X.T
            X = 3.4445*X + (-4.7750*A + 2.0315*A@A)@X
        return X.T if G.shape[0] > G.shape[1] else X
    def step(self, g, lr):
        g = np.array(g, dtype=np.float64)
        if g.ndim < 2: return self.adamw(g, lr*self.aux_scale)
        self.B = self.mu*self.B + (1-self.mu)*g
        O = self.orthogonal((self.mu*self.B + (1-self.mu)*g if self.nesterov else self.B).reshape(len(g), -1))
        rows,cols = O.shape
        k = .2*np.sqrt(max(rows, cols)) if self.match_rms else np.sqrt(max(1, rows/cols))
        self.theta = (1-lr*self.lam)*self.theta - lr*k*O.reshape(g.shape)
    def adamw(self, g, lr):
        self.t += 1
        self.B,self.v = self.beta1*self.B + (1-self.beta1)*g,self.beta2*self.v + (1-self.beta2)*g*g
        self.theta = (1-lr*self.lam)*self.theta - lr*self.B/(1-self.beta1**self.t)/(np.sqrt(self.v/(1-self.beta2**self.t)) + self.eps)
