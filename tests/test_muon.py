"Muon: Newton-Schulz, which parameters take Adam, in a plain loop and through a Learner"
import copy,pickle

import numpy as np,pytest,torch
from fastai.callback import schedule # fit_one_cycle
from fastai.learner import Learner
from fastai.data.core import DataLoaders
from torch import nn
from fastxtend_opt.algorithms import muon as M
from fastxtend_opt.algorithms.muon import Muon,muon,muon_params,newton_schulz
from fastxtend_opt.engine.opaque import Opaque
from fastxtend_opt.definition.parameters import naming
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from helpers import assert_bitwise,assert_same,flags
from reference.muon import Muon as Reference

MODES = ('native','foreach','fused')

class Net(nn.Module):
    "An embedding, a kernel, matrices both ways, norms, a head"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed,self.conv,self.norm = nn.Embedding(11,6),nn.Conv1d(6,8,3,padding=1),nn.LayerNorm(8)
        self.up,self.down,self.head = nn.Linear(8,20),nn.Linear(20,8),nn.Linear(8,5)
    def forward(self, x):
        x = self.norm(self.conv(self.embed(x).transpose(1,2)).transpose(1,2))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))

def batches(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 11, (7,9), generator=gen), torch.randint(0, 5, (7,), generator=gen)) for _ in range(n)]

def fit(mode='native', steps=4, double=True, release=False, prepare=None, **kwargs):
    net = Net().double() if double else Net()
    with naming(net): opt = Muon(net.parameters(), lr=.02, wd=.1, **kwargs, **flags(mode))
    if prepare: prepare(net, opt)
    if release: prepare_for_gradient_release(net, opt)
    for x,y in batches(steps):
        nn.functional.cross_entropy(net(x), y).backward()
        if not release: opt.step()
        net.zero_grad()
    remove_gradient_release(net)
    return net,opt

def same(a, b, rtol=1e-9, atol=1e-9):
    assert_same([p.detach() for p in a[0].parameters()], [p.detach() for p in b[0].parameters()], rtol, atol)
    assert_same(a[1].state_dict()['state'], b[1].state_dict()['state'], rtol, atol)

# ---------------------------------------------------------------- the iteration
@pytest.mark.parametrize('shape', [(1,1),(1,5),(4,4),(3,5),(3,6),(3,17),(17,3),(9,4)])
@pytest.mark.parametrize('steps', [0,1,2,3,4,5,6,7])
def test_newton_schulz_is_the_polynomial(shape, steps):
    "Whatever way is taken, and for one matrix or many"
    gs = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.stack([torch.from_numpy(Reference(g.numpy(), steps=steps).orthogonal(g.numpy()).copy()) for g in gs])
    many = newton_schulz.f # as an opaque call has it; called itself, it takes one tensor, and flattens it
    assert_same(many(gs, steps), want, 1e-9, 1e-9)
    for g,w in zip(gs, want): assert_same(newton_schulz(g, steps), w, 1e-9, 1e-9)
    assert_same(many(gs.float(), steps), want.float(), 1e-3, 1e-4)

@pytest.mark.parametrize('shape', [(24,24),(24,96),(96,24)])
@pytest.mark.parametrize('kind', ['random','low rank','decaying'])
def test_bfloat16_is_about_as_exact_as_torchs(shape, kind):
    from torch.optim._muon import _zeropower_via_newtonschulz
    gen = torch.Generator().manual_seed(2)
    def new(*s): return torch.randn(*s, generator=gen)
    g = new(*shape)
    if kind=='low rank': g = new(shape[0],2)@new(2,shape[1]) + .1*g
    if kind=='decaying': u,s,v = torch.linalg.svd(g, full_matrices=False); g = u@torch.diag(1/torch.arange(1, len(s)+1))@v
    want = newton_schulz(g.double())
    def off(x): return ((x.double()-want).norm()/want.norm()).item()
    theirs,mine = off(_zeropower_via_newtonschulz(g, M.NS_COEFFICIENTS, 5, 1e-7)),off(newton_schulz(g.bfloat16()))
    # seen: .055 and .016 for long random matrices of 24, .023 and .011 of 384
    assert mine < max(1.2*theirs, 6e-2 if shape[0]!=shape[1] else 2.3e-2), (mine, theirs)
    assert off(newton_schulz(g)) < 1e-3

def test_extremes():
    "No elements, zeros only, the largest and smallest gradients, and values that are not finite"
    assert newton_schulz(torch.zeros(0,3)).shape == (0,3) and newton_schulz.f(torch.zeros(2,3,0)).shape == (2,3,0)
    for dt in (torch.float32, torch.bfloat16):
        assert not newton_schulz(torch.zeros(4,3, dtype=dt)).any()
        g = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(dt)
        for scale in (1e-4,1e12):
            assert_same(newton_schulz(g*scale).float(), newton_schulz(g).float(), 0, 5e-2 if dt is torch.bfloat16 else 5e-3)
        assert newton_schulz(torch.full((2,2), float('nan'), dtype=dt)).isnan().all()

def test_chunks_on_a_cpu(monkeypatch):
    gs = torch.randn(7, 5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = newton_schulz.f(gs)
    for n in (1,2,3):
        monkeypatch.setattr(M, 'NS_CACHE', 60*n)
        assert_same(newton_schulz.f(gs), want, 1e-9, 1e-9)

# ---------------------------------------------------------------- modes
@pytest.mark.parametrize('mode', MODES[1:])
@pytest.mark.parametrize('kw', [dict(), dict(adjust_lr='match_rms_adamw', nesterov=False), dict(ns_dtype=torch.float32)],
                         ids=['defaults','match_rms','float32'])
def test_modes_agree(mode, kw): same(fit(mode, **kw), fit('native', **kw), *((1e-3,1e-4) if 'ns_dtype' in kw else (1e-9,1e-9)))

@pytest.mark.parametrize('mode', MODES[1:])
def test_bfloat16_iteration_in_each_mode(mode):
    a,b = fit(mode, double=False, ns_dtype=torch.bfloat16),fit('native', double=False, ns_dtype=torch.bfloat16)
    for p,q in zip(a[0].parameters(), b[0].parameters()): assert (p-q).abs().max() < 4*.02*.05 # four steps, of 5% at most

def test_one_call_a_shape():
    calls,run = [],Opaque.run
    ps = [nn.Parameter(torch.randn(s)) for s in ((8,4),(8,4),(8,2,2),(4,8),(3,))]
    opt = Muon(ps, lr=.1, foreach=True)
    for p in ps: p.grad = torch.randn_like(p)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Opaque, 'run', lambda self, vals, *a: (calls.append(tuple(vals[0].shape)), run(self, vals, *a))[1])
        opt.step()
    assert sorted(calls) == [(1,4,8), (3,8,4)]

@pytest.mark.parametrize('mode', MODES)
def test_gradient_release(mode): same(fit(mode, release=True), fit(mode))

@pytest.mark.parametrize('mode', MODES)
def test_resume(mode):
    net,opt = fit(mode)
    sd,other = pickle.loads(pickle.dumps(opt.state_dict())),copy.deepcopy(net)
    with naming(other): new = Muon(other.parameters(), lr=.02, wd=.1, **flags('foreach' if mode=='native' else 'native'))
    new.load_state_dict(sd)
    for x,y in batches(3, 7):
        for n,o in ((net,opt),(other,new)):
            nn.functional.cross_entropy(n(x), y).backward(); o.step(); n.zero_grad()
    same((net,opt), (other,new))

# ---------------------------------------------------------------- who takes Adam
def rule(opt): return {w or 'Muon' for w in opt.muon_why}

def test_the_default_rule():
    net,opt = fit(steps=1)
    got = {n:opt.muon_why[i] for i,(n,_) in enumerate(net.named_parameters())}
    assert {n for n,w in got.items() if not w} == {'conv.weight','up.weight','down.weight'}
    assert (got['embed.weight'] == 'embedding' and got['head.weight'] == 'head'
            and got['norm.weight'] == got['conv.bias'] == 'fewer than two axes')
    assert {n:'sqr_avg' in opt.state[p] for n,p in net.named_parameters()} == {n:bool(w) for n,w in got.items()}
    assert [(r['rule'],r['tensors'],r['algorithm']) for r in opt.rules.rows] == [('embedding',1,'Adam'), ('matrices',3,'Muon'),
                                                                                 ('fewer than two axes',6,'Adam'), ('head',1,'Adam')]

def test_heads_without_a_name():
    body = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3))
    with naming(body): opt = Muon(body.parameters(), lr=.1)
    assert opt.muon_why[2] == 'head: the last linear layer' and opt.muon_why[0] == ''
    assert rule(Muon(body.parameters(), lr=.1)) == {'Muon','fewer than two axes'} # nothing is known
    assert rule(Muon(body.named_parameters(), lr=.1)) == {'Muon','fewer than two axes'} # names without meaning
    assert rule(Muon([('attn.multihead.weight', body[0].weight)], lr=.1)) == {'Muon'} # a head of another kind
    assert rule(Muon([('lm_head.weight', body[0].weight)], lr=.1)) == {'head'} == rule(Muon([('classifier.2.weight', body[0].weight)],
        lr=.1))
    assert rule(Muon([('pos_embed', nn.Parameter(torch.ones(1,3,4)))], lr=.1)) == {'embedding'}

def test_a_rule_of_ones_own():
    for aux,adam in (('*up*', {'up.weight'}), ('Embedding|Linear', {'embed.weight','up.weight','down.weight','head.weight'}),
                     (nn.Conv1d, {'conv.weight'}),
                     (lambda o: o.param.numel()>150, {'up.weight','down.weight'}), (('up.*', nn.Conv1d), {'up.weight','conv.weight'})):
        net,opt = fit(steps=0, aux=aux)
        assert {n for (n,p),w in zip(net.named_parameters(), opt.muon_why) if w and p.ndim>1} == adam
    with pytest.raises(TypeError, match='pattern 3'): fit(steps=0, aux=3)

@pytest.mark.parametrize('mode', MODES)
def test_by_hand(mode):
    def first(net, opt): muon_params(opt, [net.up.weight, net.conv.weight])
    def other(net, opt): opt.state[net.up.weight]['use_muon'] = opt.state[net.conv.weight]['use_muon'] = False
    a,b,c = fit(mode, prepare=first),fit(mode, prepare=other),fit('native', aux='*embed*|head*|up*|conv*')
    same(a, b); same(a, c)
    assert [r['rule'] for r in a[1].rules.rows] == ['embedding','set by hand','fewer than two axes','matrices','head']
    a[1].clear_state()
    assert a[1].state[a[0].up.weight] == dict(use_muon=False)
    muon_params(a[1], a[0].up.weight, True)
    assert a[1].state[a[0].up.weight]['use_muon'] is True

def test_aux_rate_and_coefficients():
    p,q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    opt = Muon([p], lr=.1, aux_lr_scale=.5, aux_mom=.5, aux_sqr_mom=.9, aux_eps=1e-3, wd=.2)
    ref = torch.optim.AdamW([q], lr=.05, betas=(.5,.9), eps=1e-3, weight_decay=.2)
    for t in range(4):
        for o in (p,q): o.grad = torch.tensor([1.,-2.,t], dtype=torch.float64)
        opt.step(); ref.step()
    assert_same(p.detach(), q.detach(), 1e-12, 1e-12)
    assert (Muon([p], lr=.1).hypers[0]['aux_lr_scale'] == .015
            and Muon([p], lr=.1, adjust_lr='match_rms_adamw').hypers[0]['aux_lr_scale'] == 1.)

@pytest.mark.parametrize('mode', MODES)
def test_through_a_learner(mode, capsys):
    "Names are known by themselves, through a splitter's groups too, and the table is printed once"
    data = [(x[i],y[i]) for x,y in batches(4) for i in range(7)]
    dls = DataLoaders.from_dsets(data, data[:7], bs=7, device='cpu')
    def split(m): return [[*m.embed.parameters(), *m.conv.parameters()],
                          [p for n,p in m.named_parameters() if not n.startswith(('embed','conv'))]]
    learn = Learner(dls, Net(), loss_func=nn.CrossEntropyLoss(), opt_func=muon(**flags(mode)), splitter=split)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, slice(.002,.02))
        said = capsys.readouterr().out
        learn.fit(1, .01)
    opt = learn.opt
    assert opt.hypers[0]['lr'] != opt.hypers[1]['lr'] or len(opt.hypers) == 2
    assert {n for n,p in learn.model.named_parameters() if opt.state[p]['use_muon']} == {'conv.weight','up.weight','down.weight'}
    assert said.count('| embedding') == 1 and '| embedding' not in capsys.readouterr().out
    assert all(opt.state[p]['do_wd'] is False for n,p in learn.model.named_parameters() if n.startswith('norm') or n.endswith('bias'))

def test_cautious_and_decoupled():
    net,opt = fit('foreach', cautious=True)
    same((net,opt), fit('native', cautious=True))
    with pytest.warns(UserWarning, match='decouple_lr'): a = fit('fused', decouple_lr=True)
    with pytest.warns(UserWarning, match='decouple_lr'): same(a, fit('native', decouple_lr=True))
