"AggMo: velocities side by side"
from oracles import peer
from reference.aggmo import AggMo

REFERENCE = lambda t,h,lam: AggMo(t, h['betas'], lam, h['decouple_wd'])
STATE = dict(grad_avg_1='sum1', grad_avg_2='sum2')
CASES = [dict(betas=(0.,.9,.99)), dict(betas=(.3,.5,.9)), dict(betas=(0.,.9,.99,.999))]
DEFAULTS = dict(betas=(0.,.9,.99), wd=0., decouple_wd=False)

@peer()
def po_aggmo(h):
    import pytorch_optimizer
    return lambda g: pytorch_optimizer.AggMo(g, lr=1., betas=h['betas'], weight_decouple=h['decouple_wd'], foreach=False)

PEERS = [(po_aggmo, c, ('none','decoupled','L2')) for c in CASES]
