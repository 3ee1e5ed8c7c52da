from .radam import RAdam

class Lookahead:
    """Zhang et al. 2019 (1907.08610), algorithm 1, over inner objects of any kind: after each k-th step phi += alpha (theta - phi), theta =
    phi. Choices: the count is one for all tensors, which are all synchronised, those without a gradient too; the inner moments are kept."""
    def __init__(self, inner, k=6, alpha=.5):
        self.inner,self.k,self.alpha,self.count = list(inner),k,alpha,0
        self.phi = [o.theta.copy() for o in self.inner]
    def step(self, gs, lrs):
        for o,g,lr in zip(self.inner, gs, lrs):
            if g is not None: o.step(g, lr)
        self.count += 1
        if self.count % self.k: return
        for i,o in enumerate(self.inner):
            self.phi[i] = self.phi[i] + self.alpha*(o.theta - self.phi[i])
            o.theta = self.phi[i].copy()

def Ranger(thetas, beta1=.95, beta2=.99, eps=1e-6, lam=.01, k=6, alpha=.5, beta=0., decoupled=True):
    "Wright 2019: Lookahead over RAdam, without gradient centralisation. `lam` is a number, or one a tensor."
    lams = lam if isinstance(lam, (list, tuple)) else [lam]*len(thetas)
    return Lookahead([RAdam(o, beta1, beta2, eps, l, beta, decoupled) for o,l in zip(thetas, lams)], k, alpha)
