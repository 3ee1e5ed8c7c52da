"Weight decay, run before everything else: decoupled (Loshchilov & Hutter 2017, 1711.05101, eq. 12) or as the gradient of an L2 penalty."

def decay(theta, g, lr, lam, decoupled):
    "Return `theta` and `g` after decay with coefficient `lam` (a tensor excluded from decay has `lam=0`)"
    return (theta - lr*lam*theta, g) if decoupled else (theta, g + lam*theta)
