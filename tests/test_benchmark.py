"The benchmark: what its results look like, that contestants take turns, that whoever is missing is a line, and its arithmetic by hand"
import json, os, subprocess, sys, time
from pathlib import Path

import pytest, torch
from torch import nn

import fastxtend_opt.all # before a test patches what it imports
from fastxtend_opt.tools import benchmark as B
from fastxtend_opt.tools.bench import catalogue,contestants,models,steps
from fastxtend_opt.tools.cli import main

ROOT = Path(__file__).resolve().parents[1]
ENV = dict(os.environ, PYTHONPATH=str(ROOT))
TINY = dict(tiny=[(0,1,(16,8)), (0,0,(16,)), (1,1,(4,16)), (1,0,(4,))])


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def result(): return B.bench_steps(TINY, ('adam','sgd'), (), ('torch',), ('one','groups'), rounds=4, warmup=1, progress=False)


def test_structure(result):
    assert {'format','kind','machine','rows','missing','orders','rounds','warmup'} <= set(result)
    assert len(result['rows'])==2*2*5 and len(result['orders'])==4
    for r in result['rows']:
        assert r['step']['n']==4
        assert 0 < r['step']['min'] <= r['step']['q1'] <= r['step']['median'] <= r['step']['q3']
        assert r['step_zero']['median'] >= r['step']['min']
        assert (r['tensors'],r['elements'])==(4, 128+16+64+4)
        assert r['gbps']==pytest.approx(r['bytes_per_element']*r['elements']/(r['step']['median']*1e6))
    base = [r for r in result['rows'] if r['contestant']=='fastai native']
    assert len(base)==4 and all(r['vs_fastai']==1 for r in base)
    limits = [r for r in result['rows'] if r['contestant']=='memory limit']
    assert len(limits)==4 and all(r['of_limit']==1 for r in limits)


def test_plain_types(result): assert json.loads(json.dumps(result))==result


def test_turns(monkeypatch):
    "Every contestant steps once per round, and each round starts with a different one"
    log = []
    class Opt:
        state = {}
        def __init__(self, name): self.name = name
        def step(self): log.append(self.name)
        def zero_grad(self): log.append(self.name+' zero')
    cs = [B.Contestant('torch', k, lambda pset, lr, k=k: Opt(k)) for k in 'abc']
    monkeypatch.setattr(steps, 'contestants', lambda *a, **k: (cs, []))
    res = B.bench_case(TINY['tiny'], rounds=4, warmup=0, limit=False)
    log = [o for o in log[3:] if 'zero' not in o] # the first three are first steps
    assert [''.join(log[i:i+3]) for i in range(0, 12, 3)]==['abc','bca','cab','abc']
    assert res['order'][1]==['torch b', 'torch c', 'torch a']


def test_gradients_come_back():
    "A contestant's zero_grad must not leave the next one with zeros, or with none"
    ps = B.ParamSet(TINY['tiny'])
    want = [g.clone() for g in ps.grads]
    for spoil in (lambda p: setattr(p, 'grad', None), lambda p: p.grad.zero_()):
        for p in ps.params: spoil(p)
        ps.restore()
        for p,w in zip(ps.params, want): assert torch.equal(p.grad, w)


def test_missing_peer_is_a_line(monkeypatch):
    def gone(name): raise ImportError("No module named 'nobody'")
    def broken(name): return [B.Contestant('torch', 'broken', lambda pset, lr: 1/0)]
    class Bad:
        state,n = {},0
        def step(self):
            Bad.n += 1
            if Bad.n>2: raise RuntimeError('tired')
        def zero_grad(self): pass
    def tired(name): return [B.Contestant('torch', 'tired', lambda pset, lr: Bad())]
    monkeypatch.setattr(contestants, 'bench_peers', dict(gone=gone, broken=broken, tired=tired))
    res = B.bench_steps(TINY, 'adam', (), ('gone','broken','tired'), rounds=3, warmup=0, limit=False, progress=False)
    assert [r['contestant'] for r in res['rows']]==['fastai native']
    assert {m['who']:m['why'] for m in res['missing']}=={'gone':"ImportError: No module named 'nobody'",
        'torch broken':'ZeroDivisionError: division by zero', 'torch tired':'RuntimeError: tired'}
    assert "- gone (adam): ImportError: No module named 'nobody'" in B.report(res)


def test_no_compiler_is_a_line(monkeypatch, tmp_path):
    from fastxtend_opt.engine import build
    monkeypatch.setattr(build, '_libs', {})
    monkeypatch.setenv('CXX', '/nowhere/c++')
    monkeypatch.setenv('FASTXTEND_OPT_CACHE', str(tmp_path))
    res = B.bench_steps(TINY, 'adam', (), (), rounds=2, warmup=0, progress=False)
    assert res['missing'][0]['who']=='memory limit' and 'no C++ compiler' in res['missing'][0]['why']
    assert res['rows'][0]['of_limit'] is None and '–' in B.report(res)


@pytest.mark.parametrize('n_state,kw,want', [
    (0, {}, 12),                      # plain SGD: read p, g; write p
    (1, {}, 20),                      # momentum or RMSProp: read p, g, s; write p, s
    (2, {}, 28),                      # Adam: read p, g, m, v; write p, m, v
    (2, dict(itemsize=2), 14),        # in bfloat16
    (2, dict(reduction=True), 40),    # LAMB: reads p, m, v again
    (1, dict(reduction=True), 28),    # LARC
    (2, dict(slow_every=6), 28+8/6),  # Ranger: slow weights read and written every sixth step
    (1, dict(n_read=1), 24),          # Sophia: read p, g, m, h; write p, m
    (4, {}, 44),                      # Adan: read p, g, m, v, n, prior g; write p, m, v, n, prior g
    (0, dict(reduction=True), 16)])   # nothing of the parameter's size: read p, g; write p; read p again
def test_bytes(n_state, kw, want): assert B.step_bytes(n_state, **kw)==pytest.approx(want)


@pytest.mark.parametrize('optimizer,want', [('sgd',20), ('rmsprop',20), ('adam',28), ('radam',28), ('qhadam',28), ('larc',28), ('lamb',40),
                                            ('ranger',28+8/6), ('adan',44), ('lion',20), ('sophia',24), ('stableadam',40),
                                            ('adamw_schedulefree',28)])
def test_bytes_of_real_states(optimizer, want):
    "The count of states is that of the optimizer that ran"
    rows = B.bench_case(TINY['tiny'], optimizer, ('foreach',), (), rounds=1, warmup=0)['rows']
    assert {r['contestant'] for r in rows}>={'fastxtend_opt foreach', 'memory limit'} # which moves as many
    assert all(r['bytes_per_element']==pytest.approx(want) for r in rows)


@pytest.mark.parametrize('optimizer', ['adam', *(pytest.param(o, marks=pytest.mark.slow) for o in ('lamb','ranger'))])
def test_own_modes(optimizer):
    res = B.bench_case(TINY['tiny'], optimizer, ('native','foreach','jit','fused'), (), 'groups', rounds=2, warmup=0)
    assert not res['missing']
    rows = {r['contestant']:r for r in res['rows']}
    assert set(rows)=={'fastai native','memory limit', *(f'fastxtend_opt {m}' for m in ('native','foreach','jit','fused'))}
    want = dict(adam=28, lamb=40, ranger=28+8/6)[optimizer]
    assert all(r['bytes_per_element']==pytest.approx(want) for r in rows.values())


def test_python_cost():
    for _ in range(3): # a busy machine may make the longer step the faster one
        c = B.python_cost(rounds=2)
        if c['us_param']>0 and c['us_cohort']>0: break
    assert set(c['ms'])=={'1000 tensors, 1 groups','4000 tensors, 1 groups','1000 tensors, 101 groups'}
    assert c['us_param']==pytest.approx((c['ms']['4000 tensors, 1 groups']-c['ms']['1000 tensors, 1 groups'])/3)
    assert 0<c['us_param']<50 and 0<c['us_cohort']<5000


def test_limit_touches_all_and_changes_nothing():
    ps = B.ParamSet([(0,1,(33000,)), (0,1,(5,7))])
    before,lim = [p.detach().clone() for p in ps.params],B.MemoryLimit(ps, 2)
    lim.step()
    assert all(torch.equal(a, p) for a,p in zip(before, ps.params))
    assert sum(n for _,_,n in lim.chunks)==33035
    with pytest.raises(ValueError, match='give a number of states >= 0, or a list with one entry for each of the 2 parameters'):
        B.MemoryLimit(ps, -1)
    with pytest.raises(ValueError, match='one entry for each of the 2 parameters'): B.MemoryLimit(ps, [1])


@pytest.mark.parametrize('written', [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize('read', [0, 1, 2])
def test_limit_walks_every_stream(written, read):
    "k=1: every element that is written gets what was read added, once"
    ps = B.ParamSet([(0,1,(33000,)), (0,1,(5,7))])
    before,lim = [p.detach().clone() for p in ps.params],B.MemoryLimit(ps, B.Streams(written, read))
    for ss in lim.state:
        for i,s in enumerate(ss): s.fill_(i if i>=written else 0)
    lim.step(1.)
    for p,a,g,ss in zip(ps.params, before, ps.grads, lim.state):
        # streams that are only read are counted in addition: at most one at a time, and never more than four written
        assert torch.allclose(p.detach(), a+g+(written if read else 0), atol=1e-5)
        got = [(s-g).mean().item() for s in ss[:written]]
        goes = [written+i//4 if i//4<read else 0 for i in range(written)]
        assert got==pytest.approx(goes, abs=1e-4)
        assert all(torch.equal(s, torch.full_like(s, float(written+i))) for i,s in enumerate(ss[written:]))


@pytest.mark.parametrize('written', [0, 2, 6])
def test_limit_of_a_reduction_passes_twice(written):
    "k=1: the states get gradient and parameter in the first pass, the parameter gets the states in the second"
    ps = B.ParamSet([(0,1,(33000,)), (0,1,(5,7))])
    before = [p.detach().clone() for p in ps.params]
    lim = B.MemoryLimit(ps, [B.Streams(written, reduction=True), B.Streams(written)])
    lim.step(1.)
    p,a,g,ss = ps.params[0].detach(),before[0],ps.grads[0],lim.state[0]
    for i,s in enumerate(ss): assert torch.allclose(s, g+a if i<4 else g, atol=1e-6)
    assert torch.allclose(p, a+sum(ss), atol=1e-5)
    assert lim.sink[0]!=0 # the sum that keeps the compiler from leaving the reading out
    p,a,g,ss = ps.params[1].detach(),before[1],ps.grads[1],lim.state[1] # no reduction: one pass
    assert torch.equal(p, a+g) and all(torch.equal(s, g) for s in ss)


def test_limit_with_slow_weights():
    "Every sixth step a further state is written"
    ps = B.ParamSet([(0,1,(50,))])
    lim = B.MemoryLimit(ps, B.Streams(2, slow=1, every=6))
    for i in range(12):
        lim.step(1.)
        assert torch.allclose(lim.state[0][2], ps.grads[0]*((i+1)//6), atol=1e-6)
        assert torch.allclose(lim.state[0][0], ps.grads[0]*(i+1), atol=1e-5)


def test_streams_are_measured():
    "States are counted as they behave, whatever they are called"
    S = B.Streams
    assert B.state_streams('adam', (64,3,7,7))==S(2) and B.state_streams('sgd', (5,))==S(1)
    assert B.state_streams('sophia', (4,4))==S(1, read=1) # the Hessian is read, and written where it is estimated
    assert B.state_streams('ranger', (4,4))==S(2, slow=1, every=6)
    assert B.state_streams('larc', (4,4))==S(1, reduction=True) # local_lr is a number a tensor
    assert B.state_streams('radam_schedulefree', (4,4))==S(2) # z does not move in the first steps, and does later
    assert S(2, slow=1, every=6).bytes()==pytest.approx(28+8/6) and S(2, reduction=True).bytes(2)==20


# ---------------------------------------------------------------- the table of peers
SMALL = [(0,1,(16,8)), (0,0,(16,)), (0,1,(6,16,3,3)), (0,0,(4,)), (0,1,(20,18))]

def trajectory(c, n=15):
    "How far each parameter goes in `n` steps"
    ps,gen = B.ParamSet(SMALL),torch.Generator().manual_seed(1)
    start,opt = [p.detach().clone() for p in ps.params],c.make(ps, 1e-4)
    for _ in range(n):
        ps.restore()
        for g in ps.grads: g.copy_(torch.randn(g.shape, generator=gen)*.01)
        opt.step()
    return torch.cat([(p.detach()-s).flatten() for p,s in zip(ps.params, start)]).double()

def algorithms():
    from fastxtend_opt.definition.registry import list_optimizers
    return [o.name for o in list_optimizers()]

@pytest.mark.parametrize('optimizer', algorithms())
@pytest.mark.engine
def test_contestants_are_the_same_algorithm(optimizer):
    "Every mode and every peer goes where native goes, without decay and with it; whoever does not is said to differ, in the table"
    for wd in (0.,.01):
        found,missing = B.contestants(optimizer, ('native','foreach','jit','fused'), wd=wd)
        reasons = {l:r for l,r in B.peer_table.get(optimizer, {}).items() if isinstance(r, str)}
        assert {w:y for w,y in missing if 'No module named' not in y}=={l:f'NotImplementedError: {r}' for l,r in reasons.items()}
        ref = trajectory(next(c for c in found if c.label=='fastxtend_opt native'))
        assert ref.abs().max()>0
        for c in found:
            d = ((trajectory(c)-ref).abs().max()/ref.abs().max()).item()
            note = '' if c.lib in ('fastai','fastxtend_opt') else (*B.peer_table.get(optimizer, {}).get(c.lib, ('','','')), '')[2]
            if c.lib=='fastxtend' or note: assert d<100, f'{c.label}: {d}' # runs, and moves as far
            # float32: wd*lr is 1e-6 of a weight, ten roundings of it; eps matters where a gradient is small
            else: assert d<.02, f'{c.label}, wd={wd}: {d:.2g} of the way beside; the same algorithm? If it is not, say so in peer_table'

def test_peer_table_is_used():
    "No row of the table is left over from an algorithm that is gone"
    for o,row in B.peer_table.items():
        assert set(row)<=set(B.bench_peers), o
        for lib,r in row.items():
            assert isinstance(r, str) or (len(r) in (2,3) and isinstance(r[0], str) and isinstance(r[1], dict)), (o,lib)
    assert ('torch','AdamW','betas=(0.9, 0.99), eps=1e-05','') in B.peer_rows('adam') and B.peer_rows('nobody')==[]
    assert B.peer_rows('sophia')[0][:2]==('pytorch_optimizer','')


# ---------------------------------------------------------------- the catalogue
ONE = [(0,1,(16,8)), (0,0,(16,))]

def test_catalogue_resumes(tmp_path, monkeypatch):
    "Results are saved at once; an interrupted run continues with the rest, and a complete one starts again"
    from fastxtend_opt.definition import registry
    rows = [registry.get_optimizer(o) for o in ('adam','lamb','sgd')]
    monkeypatch.setattr(registry, 'list_optimizers', lambda *a, **k: rows)
    real,asked = B.bench_case,[]
    def case(model, o, *a, **k):
        asked.append(o)
        if o=='lamb' and asked.count('lamb')==1: raise KeyboardInterrupt
        return real(model, o, *a, **k)
    monkeypatch.setattr(catalogue, 'bench_case', case)
    run = lambda **kw: B.bench_catalogue(tmp_path, model=ONE, modes=('foreach','fused'), peers=('torch',), rounds=2, warmup=0,
                                         progress=False, **kw)
    with pytest.raises(KeyboardInterrupt): run()
    half = json.loads((tmp_path/'catalogue.json').read_text())
    assert list(half['optimizers'])==['adam'] and not half['complete'] and 'Not complete' in (tmp_path/'catalogue.md').read_text()
    res = run()
    assert asked==['adam','lamb','lamb','sgd'] and res['complete'] and 'Not complete' not in (tmp_path/'catalogue.md').read_text()
    assert res['optimizers']['adam']==half['optimizers']['adam'] and json.loads((tmp_path/'catalogue.json').read_text())==res
    assert sorted(f.name for f in tmp_path.iterdir())==['catalogue.json','catalogue.md','catalogue.png']
    again = run(optimizers='Lamb') # one of them, again
    assert (asked[4:]==['lamb'] and again['optimizers']['sgd']==res['optimizers']['sgd']
            and again['optimizers']['lamb']!=res['optimizers']['lamb'])
    run()
    assert asked[5:]==['adam','lamb','sgd'] # it was complete


def test_catalogue_does_not_mix_settings(tmp_path, monkeypatch):
    from fastxtend_opt.definition import registry
    monkeypatch.setattr(registry, 'list_optimizers', lambda *a, **k: [registry.get_optimizer('adam')])
    run = lambda r, **kw: B.bench_catalogue(tmp_path, kw.pop('optimizers', None), ONE, (), ('torch',), r, 0, progress=False)
    run(1)
    with pytest.raises(ValueError, match=r'measured with other settings .*rounds=1, .* would be lost'): run(2, optimizers=('adam',))
    assert json.loads((tmp_path/'catalogue.json').read_text())['rounds']==1
    assert run(2)['rounds']==2 # all of them: anew


def test_catalogue_by_hand():
    from fastxtend_opt.definition.registry import get_optimizer
    def row(who, ms, bytes_=28):
        lib,mode = ('','memory limit') if who=='memory limit' else who.split()
        return dict(contestant=who, lib=lib, mode=mode, step=dict(median=ms), bytes_per_element=bytes_)
    rows = [row('fastai native', 100.), row('fastxtend_opt native', 90.), row('fastxtend_opt foreach', 50.), row('fastxtend_opt jit', 40.),
            row('fastxtend_opt fused', 20.),
            row('torch loop', 60.), row('torch fused', 22.), row('timm foreach', 45.), row('memory limit', 14.)]
    e = catalogue._catalogue_entry(dict(rows=rows, missing=[dict(who='po', why='gone', optimizer='adam')]), get_optimizer('adam'),
                                   [1.,1.,1.], 3.)
    assert e['of_limit']==.7 and e['of_limit_goal']==.75 and e['of_limit_reached'] is False
    assert e['best_peer']=='torch fused' and e['vs_best_peer']==dict(foreach=22/50, jit=22/40, fused=1.1) and e['none_slower'] is False
    assert e['best_unfused_peer']=='timm foreach' and e['vs_best_unfused_peer']==dict(foreach=.9, jit=45/40, fused=2.25)
    lamb = catalogue._catalogue_entry(dict(rows=rows, missing=[]), get_optimizer('lamb'), None, 3.)
    assert lamb['of_limit_goal']==.6 and lamb['of_limit_reached'] is True
    # neither peer nor limit: neither reached nor missed
    alone = catalogue._catalogue_entry(dict(rows=rows[:5], missing=[]), get_optimizer('adam'), None, 3.)
    assert alone['best_peer'] is None and alone['none_slower'] is None and alone['of_limit_reached'] is None
    text = B.catalogue_report(dict(optimizers=dict(adam=e, lamb=lamb, alone=alone), model='custom', complete=True, rounds=1,
                                   machine=B.machine_info()))
    assert ('| adam | elementwise | 28 | 20 | 14 | 0.70 | >= 0.75 | **no** |' in text
            and '| lamb | reduction | 28 | 20 | 14 | 0.70 | >= 0.6 | yes |' in text)
    assert ('1 of 2 reach the goal' in text and '- po (adam): gone' in text
            and '| adam | torch fused | **0.44** | **0.55** | 1.1 | **no** | timm foreach | **0.90** | 1.12 | 2.25 |' in text)


def test_cli_catalogue(tmp_path, capsys):
    argv = 'bench --catalogue --optimizers sgd --models mlp2000 --modes fused --peers --rounds 1 --warmup 0 --threads 1 --out'.split()
    assert main([*argv, str(tmp_path)])==0
    out = capsys.readouterr().out
    assert 'of the memory limit' in out and 'Not complete' in out
    res = json.loads((tmp_path/'catalogue.json').read_text())
    assert res['model']=='mlp2000' and list(res['optimizers'])==['sgd'] and 0<res['optimizers']['sgd']['of_limit']<3
    assert (tmp_path/'catalogue.png').read_bytes()[:4]==b'\x89PNG'
    assert main('bench --catalogue --optimizers nobody --quiet'.split())==2 and "no optimizer 'nobody'" in capsys.readouterr().err
    assert main('bench --catalogue --models xresnet18 mlp2000 --quiet'.split())==2 and 'one model' in capsys.readouterr().err


def test_layer_groups_and_weight_decay():
    "Norms and biases are left out of weight decay in both styles of optimizer"
    ps = B.ParamSet(TINY['tiny'], 'groups')
    assert [[tuple(p.shape) for p in g] for g in ps.lists()]==[[(16,8),(16,)], [(4,16),(4,)]]
    got = [(g['weight_decay'], tuple(g['params'][0].shape)) for g in ps.torch_groups(.01)]
    assert got==[(.01,(16,8)), (0.,(16,)), (.01,(4,16)), (0.,(4,))]
    found,_ = B.contestants('adam', (), ('torch',))
    opt = next(c for c in found if c.lib=='fastai').make(ps, 1e-3)
    assert [opt.state[p].get('do_wd', True) for p in ps.params]==[True, False, True, False]
    with pytest.raises(ValueError, match="'one' or 'groups'"): B.ParamSet(TINY['tiny'], 'two')


def test_stored_shapes():
    for name,m in models._shapes().items():
        rows = B.model_rows(name)
        assert len(rows)==m['tensors'] and sum(torch.Size(s).numel() for _,_,s in rows)==m['elements'], name
        assert m['how'] and {d for _,d,_ in rows}=={0,1}
    assert set('xresnet18 xresnet34 xresnet50 xresnet101 xse_resnext50 convnext_tiny convnext_small vit_s16 deberta_base mlp2000'.split()) \
        <= set(models._shapes())
    mlp = B.model_rows('mlp2000')
    assert len(mlp)==4000 and mlp[:2]==[(0,1,(32,32)), (0,0,(32,))]


def test_stored_shapes_are_the_models():
    xresnet = pytest.importorskip('fastai.vision.models.xresnet')
    m = xresnet.xresnet18()
    assert [(d,s) for _,d,s in B.model_rows('xresnet18')]==[(d,s) for _,d,s in B.model_rows(m)]


def test_any_module():
    assert B.model_rows(nn.Sequential(nn.Linear(2,3), nn.LayerNorm(3)))==[(0,1,(3,2)), (0,0,(3,)), (0,0,(3,)), (0,0,(3,))]
    with pytest.raises(ValueError, match="'resnet' is not one of mlp2000"): B.model_rows('resnet')


def test_goals_by_hand():
    def row(who, ms, zero): return dict(model='xresnet50', layout='one', optimizer='adam', contestant=who, bytes_per_element=28,
                                        step=dict(median=ms), step_zero=dict(median=zero))
    rows = [row('fastai native', 100., 110.), row('torch fused', 22., 22.), row('fastxtend_opt fused', 20., 24.),
            row('memory limit', 16., 16.)]
    gs = {(g['goal'],g['case']):g for g in B.goal_rows(dict(rows=rows, python=[dict(optimizer='adam', us_param=.5, us_cohort=200.)]))}
    share = gs['of the memory limit','xresnet50 adam']
    assert share['value']==.8 and not share['reached']
    assert gs['of the memory limit, with zero_grad','xresnet50 adam']['value']==pytest.approx(16*32/28/24)
    assert gs['x torch fused','xresnet50 adam']['value']==1.1 and gs['x torch fused','xresnet50 adam']['reached']
    assert gs['x torch fused, with zero_grad','xresnet50 adam']['at_least']==.8
    assert gs['x torch fused','xresnet50 adam']['at_limit']==22/16
    assert gs['x fastai','xresnet50 adam']['reached'] and gs['x fastai','mlp2000 adam']['reached'] is None
    assert gs['Python, us per parameter','adam']['reached'] and not gs['Python, us per cohort','adam']['reached']


def test_memory_of_a_step():
    "torch's foreach keeps a temporary as large as the parameters, a fused step none"
    rows = [(0,1,(512,512))]*8
    torchs,own = B.step_memory('adam', 'foreach', 'torch', rows),B.step_memory('adam', 'fused', model=rows)
    for m in (torchs,own): assert m['params_kb']==8192 and m['state_kb']==2*8192
    assert torchs['peak_kb']>7000, torchs
    assert own['peak_kb']<1500 and 0<own['tables_kb']<500, own


@pytest.mark.slow
def test_first_step_of_a_fresh_process():
    f = B.first_step('sgd', 'fused')
    assert f['cold_ms']>5*f['warm_ms'] and f['warm_ms']>=f['steady_ms']>0 # a compiler's run against a file that is there
    with pytest.raises(RuntimeError, match='has no lamb here'): B.first_step('lamb', 'fused', 'torch')


def test_files(result, tmp_path):
    files = B.save_result(result, tmp_path)
    assert [f.name for f in files]==['steps.json','steps.md','steps.png']
    assert json.loads(files[0].read_text())==result
    assert 'quartiles' in files[1].read_text() and files[2].read_bytes()[:4]==b'\x89PNG'


def test_nobody_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, 'contestants', lambda *a, **k: ([], [('everybody', 'gone')]))
    res = B.bench_steps(TINY, rounds=1, warmup=0, limit=False, progress=False)
    assert [f.name for f in B.save_result(res, tmp_path)]==['steps.json','steps.md']
    assert '- everybody (adam): gone' in (tmp_path/'steps.md').read_text()


def test_cli(tmp_path, capsys):
    argv = 'bench --models mlp2000 --modes --peers --rounds 1 --warmup 0 --quiet --threads 1 --out'.split()
    assert main([*argv, str(tmp_path)])==0
    out = capsys.readouterr().out
    assert '2,000-layer MLP, adam, one group' in out and 'fastai native' in out
    assert sorted(p.name for p in tmp_path.iterdir())==['steps.json','steps.md','steps.png']


@pytest.mark.parametrize('argv,say', [
    (['bench','--models','resnet','--quiet'], "'resnet' is not one of"),
    (['bench','--peers','jax','--models','mlp2000','--quiet'], "'jax' is not one of torch"),
    (['bench','--models'], 'expected at least one argument'),
    (['bench','--modes','quick'], "invalid choice: 'quick'"),
    (['bench','--goals','--tables'], 'not allowed with'),
    (['bench','--fast'], 'unrecognized arguments: --fast')])
def test_cli_bad_arguments(argv, say, capsys):
    try: rc = main(argv)
    except SystemExit as e: rc = e.code
    assert rc==2 and say in capsys.readouterr().err


def test_help_imports_no_torch():
    code = ("import sys\nfrom fastxtend_opt.tools.cli import main\ntry: main(['bench','--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules")
    t = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=ENV)
    assert time.perf_counter()-t < 2


def test_python_m():
    r = subprocess.run([sys.executable, '-m', 'fastxtend_opt', '--version'], cwd=ROOT, capture_output=True, text=True, env=ENV)
    from fastxtend_opt import __version__
    assert r.stdout.strip()==__version__ and r.returncode==0


def test_progress_bar(capsys):
    B.bench_steps(TINY, 'adam', (), (), rounds=2, warmup=0, progress=True)
    assert '100' in capsys.readouterr().out


def test_moved_parameters_come_back():
    "A peer that gives a parameter other memory must not leave the next contestants, or the memory limit's addresses, with it"
    from fastxtend_opt.tools.benchmark import ParamSet
    ps = ParamSet([(0, 1, (3,)), (0, 0, (2,2))])
    home = [t.data_ptr() for t in ps.params + ps.grads]
    for t in ps.params + ps.grads: t.data = t.data.clone()
    assert [t.data_ptr() for t in ps.params + ps.grads] != home
    ps.restore()
    assert [t.data_ptr() for t in ps.params + ps.grads] == home and all(p.grad is g for p,g in zip(ps.params, ps.grads))
