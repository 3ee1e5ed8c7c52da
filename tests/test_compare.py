"The comparison: resumes, merges, records what goes wrong, and its reports from results with known numbers"
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch

from fastxtend_opt.tools import compare as C
from fastxtend_opt.tools.comparison import summary,tasks,workers
from fastxtend_opt.tools.cli import main

ROOT = Path(__file__).resolve().parents[1]
SHORT = dict(task_names=['table'], short=1/12, processes=0, progress=False)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def who(): return C.contestants(['adam','sgd'])


# --- jobs ----------------------------------------------------------------------------------------

def test_every_optimizer_takes_part_or_says_why():
    from fastxtend_opt.definition.registry import list_optimizers
    every = C.contestants()
    assert {o.name for o in list_optimizers()} | {'sam','svrg'} == set(every)
    for c in every.values():
        assert c.title and (c.skip or (c.lr>0 and c.source)), c
        if c.skip: assert any(w in c.skip for w in ('it needs', 'no recommended learning rate')), c
    assert sum(not c.skip for c in every.values())>=43
    assert not {'adam','sgd','lamb','adamw_schedulefree'} & {n for n,c in every.items() if c.skip}


def test_jobs(who):
    jobs = C.make_jobs(who)
    assert len(jobs)==len({C.job_key(j) for j in jobs})==2*3*3*3
    assert [j['seed'] for j in jobs]==sorted(j['seed'] for j in jobs)      # a seed is done before the next one
    assert {j['power'] for j in jobs[:6]}=={0}                             # the recommended rate before its neighbours
    assert {j['lr'] for j in jobs if j['optimizer']=='adam'}=={.000333,.001,.003}
    assert {j['steps']%j['epochs'] for j in jobs}=={0}


def test_fingerprint_has_what_decides(who):
    def prints(who=who, **kw): return {j['fingerprint'] for j in C.make_jobs(who, ['table'], 1, (0,), **kw)}
    base = prints()
    assert prints()==base and not prints(short=1/3)&base
    assert not prints({'adam':who['adam']._replace(lr=2e-3)})&base
    assert not prints({'adam':who['adam']._replace(hypers=dict(wd=0.))})&base
    assert not prints({'adam':who['adam']._replace(defaults='others')})&base


@pytest.mark.parametrize('kw,say', [(dict(task_names=['poetry']), 'poetry: there is no such task. There are text, digits, table'),
                                    (dict(seeds=0), 'seeds=0: it must be 1 or more')])
def test_bad_jobs(who, kw, say):
    with pytest.raises(ValueError, match=say): C.make_jobs(who, **kw)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match='adamw: there is no such optimizer'): C.contestants(['adam','adamw'])


# --- the tasks -----------------------------------------------------------------------------------

@pytest.mark.parametrize('task', list(C.tasks))
def test_tasks_are_the_same_for_all(task):
    from fastxtend_opt.all import adam, sgd
    a,b,c = (C.task_learner(task, o, seed) for o,seed in ((adam(),1), (sgd(),1), (sgd(),2)))
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p,q in zip(a.model.parameters(), c.model.parameters()))
    for _ in range(2): # each epoch has its own order, and the first two are the same for all
        xs,ys,zs = ([b[-1] for b in l.dls.train] for l in (a,b,c))
        assert len(xs)==len(a.dls.train) and all(torch.equal(x, y) for x,y in zip(xs, ys))
        assert any(not torch.equal(x, z) for x,z in zip(xs, zs))
    assert len(a.dls.train.new(shuffle=False, drop_last=False))*C.tasks[task].bs>=len(a.dls.train_ds) # SVRG's pass is over all


def test_text_is_pythons_own():
    text = C.stdlib_text()
    assert 'Command-line parsing library' in text and len(text)>250_000
    train,valid = tasks._text_data()
    assert (len(train),len(valid))==(2560,160) and 0<=int(train.tensors[0].min()) and int(train.tensors[0].max())<97
    assert torch.equal(train.tensors[0][:,1:], train.tensors[1][:,:-1])


# --- one training --------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def job(who): return C.make_jobs(who, ['table'], 1, (0,), 1/6)[0]


def test_training_is_determined(job):
    a,b = C.run_training(job),C.run_training(job)
    assert a['status']=='ok' and a['train']==b['train'] and a['valid']==b['valid'] and len(a['valid'])==2
    assert a['bytes']==8 and a['untrained']>a['valid'][-1]
    assert json.loads(json.dumps(a))==a


def test_not_finite_is_a_divergence(job):
    r = C.run_training(dict(job, optimizer='sgd', lr=1e30))
    assert r['status']=='nan' and 'at step' in r['reason']
    assert json.loads(json.dumps(r, allow_nan=False))==r


def test_worse_than_untrained_is_a_divergence(job):
    r = C.run_training(dict(job, lr=10.))
    assert r['status']=='worse' and 'above the' in r['reason'], r


@pytest.mark.parametrize('change,say', [(dict(lr=-1.), 'lr=-1.0 is out of range'),
                                        (dict(optimizer='nonsense'), "There is no optimizer 'nonsense'")])
def test_error_is_a_result(job, change, say):
    r = C.run_training(dict(job, **change))
    assert r['status']=='error' and say in r['reason']


def test_schedule(job, monkeypatch):
    "Flat then cosine for all, a constant rate for a schedule-free optimizer, which has its BatchNorm statistics anew"
    from fastai.learner import Learner
    seen = []
    def _note(kind):
        def _f(self, *args, **kwargs):
            seen.append((kind, [c.recalibrate for c in self.cbs if type(c).__name__=='ScheduleFreeMode']))
            raise RuntimeError('enough')
        return _f
    monkeypatch.setattr(Learner, 'fit', _note('constant'))
    monkeypatch.setattr(Learner, 'fit_flat_cos', _note('flat_cos'))
    for name in ('adam','sgd_schedulefree'): assert C.run_training(dict(job, optimizer=name))['reason']=='RuntimeError: enough'
    assert seen==[('flat_cos',[]), ('constant',[True])]


def test_state_bytes_of_wrappers():
    from fastxtend_opt.all import SGD
    from torch import nn
    class Wrap:
        def __init__(self, opt): self.opt,self.kept = opt,[torch.zeros(8)]
        def all_params(self): return self.opt.all_params()
    p = nn.Parameter(torch.ones(8))
    opt = SGD([p], lr=.1, mom=.9)
    p.grad = torch.ones(8)
    opt.step()
    assert C.state_bytes(opt, 8)==4
    w = Wrap(opt)
    assert C.state_bytes(w, 8)==8
    w.kept = [p.data, p.grad] # those of the model are not the optimizer's
    assert C.state_bytes(w, 8)==4


# --- many trainings ------------------------------------------------------------------------------

def test_resumes_after_an_interrupt(who, tmp_path, monkeypatch):
    real,calls = C.run_training,[]
    def interrupted(job):
        if len(calls)==3: raise KeyboardInterrupt
        calls.append(C.job_key(job))
        return real(job)
    monkeypatch.setattr(workers, 'run_training', interrupted)
    with pytest.raises(KeyboardInterrupt): C.run_compare(who, tmp_path, seeds=1, **SHORT)
    file = tmp_path/'compare.jsonl'
    before = file.read_text()
    assert before.count('\n')==3
    file.write_text(before+before[:40]) # and in the middle of a line
    again = []
    monkeypatch.setattr(workers, 'run_training', lambda job: (again.append(C.job_key(job)), real(job))[1])
    rows = C.run_compare(who, tmp_path, seeds=1, **SHORT)
    assert len(rows)==6 and len(again)==3 and not set(again)&set(calls)
    assert file.read_text().startswith(before) and len(C.load_rows(tmp_path))==6
    monkeypatch.setattr(workers, 'run_training', None) # nothing is left to do
    assert C.run_compare(who, tmp_path, seeds=1, **SHORT)==rows


def test_results_of_two_runs_merge(who, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, 'run_training', lambda j: dict(j, status='ok', reason='', train=[1.], valid=[j['lr']], untrained=2.,
                                                                bytes=8., params=10, seconds=0., cpu=0.))
    a,b,both = tmp_path/'a',tmp_path/'b',tmp_path/'both'
    C.run_compare({'adam':who['adam']}, a, seeds=2, **SHORT)
    C.run_compare({'sgd':who['sgd']}, b, seeds=1, **SHORT)
    both.mkdir()
    (both/'compare.jsonl').write_text((a/'compare.jsonl').read_text()+(b/'compare.jsonl').read_text())
    assert len(C.load_rows(both))==6+3
    new = []
    monkeypatch.setattr(workers, 'run_training', lambda j: (new.append((j['optimizer'],j['seed'])),
                                                            dict(j, status='ok', reason='', train=[1.], valid=[1.], seconds=0.))[1])
    assert len(C.run_compare(who, both, seeds=2, **SHORT))==12
    assert set(new)=={('sgd',1)} and len(new)==3


def test_errors_are_tried_again_divergences_are_not(who, tmp_path, monkeypatch):
    status = dict(adam='error', sgd='nan')
    monkeypatch.setattr(workers, 'run_training', lambda j: dict(j, status=status[j['optimizer']], reason='why', train=[], valid=[],
                                                                seconds=0.))
    C.run_compare(who, tmp_path, seeds=1, **SHORT)
    ran = []
    monkeypatch.setattr(workers, 'run_training', lambda j: (ran.append(j['optimizer']),
                                                            dict(j, status='ok', reason='', train=[1.], valid=[1.], seconds=0.))[1])
    rows = C.run_compare(who, tmp_path, seeds=1, **SHORT)
    assert set(ran)=={'adam'} and len(ran)==3
    assert {(r['optimizer'],r['status']) for r in rows}=={('adam','ok'),('sgd','nan')}
    assert {(r['optimizer'],r['status']) for r in C.load_rows(tmp_path)}=={('adam','ok'),('sgd','nan')}


def test_a_process_that_dies(job, monkeypatch):
    "Its training is an error with the reason, another process does the next"
    class Dying(workers._Process):
        def run(self, job, limit):
            if job['optimizer']=='sgd':
                self.start()
                self.p.kill()
            return super().run(job, limit)
    monkeypatch.setattr(workers, '_Process', Dying)
    rows = []
    C.run_jobs([dict(job, optimizer='sgd'), job], rows.append, processes=1)
    assert [r['status'] for r in rows]==['error','ok'], rows
    assert 'the process ended with code -9' in rows[0]['reason']
    assert rows[1]['valid']==C.run_training(job)['valid']                   # the same in another process


def test_too_long(job, monkeypatch):
    class Slow(workers._Process):
        def start(self):
            self.err = open(os.devnull)
            self.p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      text=True)
    w = Slow()
    r = w.run(job, .3)
    assert r['status']=='error' and r['reason']=='took more than 0.3 s' and w.p is None


def test_a_failing_report_stops_the_run(job):
    def done(row): raise OSError('disk is full')
    with pytest.raises(OSError, match='disk is full'): C.run_jobs([job], done, processes=0)


def test_bar(who, capsys):
    jobs = C.make_jobs(who, ['table'], 2, (0,))
    bar = workers._Bar(jobs, 2)
    for j in jobs[:2]: bar(dict(j, seconds=10., status='ok', valid=[.5]))
    assert bar.left()==pytest.approx(2*10/2)
    bar(dict(jobs[2], seconds=10., status='nan', valid=[]))
    bar(dict(jobs[3], seconds=10., status='ok', valid=[.5]))
    err = capsys.readouterr().err
    assert '4/4' in err and '1 diverged' in err and bar.left()==0


# --- reports -------------------------------------------------------------------------------------

def _row(optimizer, power, seed, valid, status='ok', task='table', **kw):
    lr = dict(adam=.001, sgd=.1)[optimizer]*3.**power
    return dict(task=task, optimizer=optimizer, power=power, lr=round(lr, 6), seed=seed, epochs=2, steps=20, fingerprint='x', status=status,
                reason='' if status=='ok' else 'training loss nan at step 3',
                train=list(valid), valid=list(valid), untrained=4., params=100, bytes=dict(adam=8., sgd=4.)[optimizer], seconds=1., cpu=1.,
                **kw)


@pytest.fixture
def result(who):
    rows = [_row('adam', 0, s, [2., v]) for s,v in enumerate((1.,1.2,1.4))]
    rows += [_row('adam', 1, s, [3., v]) for s,v in enumerate((2.,2.,2.))]
    rows += [_row('sgd', -1, s, [2., v]) for s,v in enumerate((.6,.6,.6))]
    rows += [_row('sgd', 0, 0, [1., .4]), _row('sgd', 0, 1, [], 'nan'), _row('sgd', 0, 2, [1., .4])]
    times = dict(table=dict(adam=dict(batch=dict(median=2.), vs_adam=1.), sgd=dict(batch=dict(median=1.), vs_adam=.5)))
    return C.summarize(rows, who, times)


def test_cells_by_hand(result):
    c = {(c['optimizer'],c['power']):c for c in result['cells']}
    assert c['adam',0]['final']==dict(mean=pytest.approx(1.2), std=pytest.approx(.2), min=1., max=1.4, n=3)
    assert c['adam',1]['best']['mean']==2. and c['sgd',0]['ok']==2
    assert c['sgd',0]['diverged']==[dict(seed=1, status='nan', reason='training loss nan at step 3')]
    # 4 - .95*(4-1.2) = 1.34: from 2 at step 10 to 1, 1.2, 1.4 at 20, so after 16.6, 18.25 and never
    assert result['tasks']['table']['target']==pytest.approx(1.34)
    assert c['adam',0]['to_target']['n']==2 and c['adam',0]['to_target']['mean']==pytest.approx((16.6+18.25)/2, abs=.06)
    # from 2 to .6: .66/1.4 of the second epoch
    assert c['sgd',-1]['to_target']['mean']==pytest.approx(10+10*.66/1.4, abs=.06)


def test_best_rate_has_no_divergence(result):
    assert result['best']=={'table':{'adam':0, 'sgd':-1}}
    assert C.rate_counts(result)=={'table':{-1:1, 0:1, 1:0}}
    assert result['diverged']==1 and result['trainings']==12


def test_beside_adam(result):
    assert C.beside_adam(result, 'table', 'adam')==(1., False)
    ratio,chance = C.beside_adam(result, 'table', 'sgd')
    assert ratio==pytest.approx(.5) and not chance                         # .6 apart, 2*sqrt(.04/3) = .23
    assert C.near_best(result, 'table')==['sgd']


def test_chance():
    def s(mean, std): return dict(mean=mean, std=std, n=3)
    assert summary._chance(s(1., .3), s(1.4, .3)) and not summary._chance(s(1., .3), s(1.5, .3))     # twice the standard error is .49
    assert summary._chance(s(1., None), s(2., .1)) is None


def test_steps_to():
    assert C.steps_to(4., [2.,1.], 10, 3.)==5 and C.steps_to(4., [2.,1.], 10, .5) is None and C.steps_to(4., [None], 10, 3.) is None


def test_tables(result):
    lines = C.compare_table(result, 'table').split('\n')
    assert lines[2].startswith('| SGD | 0.033333 (÷3) | 0.6 ± 0 |')
    assert '1 of 3 at 0.1' in lines[2] and '(2 of 3)' in lines[3] and '1.2 ± 0.2' in lines[3]
    lines = C.compare_summary(result).split('\n')
    assert [l.split(' | ')[0] for l in lines[2:]]==['| SGD','| Adam/AdamW']
    assert '0.50 (÷3)' in lines[2] and '| 1.0 | 1 of 6 | 4 | 0.50 |' in lines[2]
    assert '| 2.0 | 0 | 8 | 1.00 |' in lines[3]
    assert all(l.count('|')==lines[0].count('|') for l in lines)
    assert '[SGD](../algorithms/sgd.ipynb)' in C.compare_summary(result, '../')


def test_report(result, tmp_path):
    md = C.compare_report(result)
    assert ('12 trainings, 1 of them diverged' in md and '| table | SGD | 0.1 | 1 | training loss nan at step 3 |' in md
            and 'Target: 1.34.' in md)
    files = C.save_compare(result, tmp_path)
    assert ([f.name for f in files]==['compare.json','compare.md','compare.png','compare_curves.png']
            and all(f.stat().st_size for f in files))
    again = json.loads(files[0].read_text())
    assert C.compare_report(again)==md                                     # what a page reads from the file says the same
    C.plot_rates(again); C.plot_curves(again)


@pytest.mark.parametrize('rows', [[_row('sgd', 0, 0, [1., .4])], [_row('sgd', 0, 0, [], 'nan')],
                                  [_row('adam', 0, 0, [2., 1.]), _row('sgd', 0, 0, [], 'error')], []])
def test_partial_results(who, rows):
    r = json.loads(json.dumps(C.summarize(rows, who)))
    assert '# Comparison' in C.compare_report(C.summarize(rows, who))
    if rows: C.plot_rates(C.summarize(rows, who)); C.plot_curves(C.summarize(rows, who))
    assert r['trainings']==len(rows)


def test_a_failing_time_is_a_line(who):
    t = C.measure_times(dict(adam=who['adam'], sgd=who['sgd']._replace(lr=-1.)), ['table'], rounds=1, batches=2, progress=False)['table']
    assert t['adam']['vs_adam']==1 and t['adam']['batch']['n']==1 and t['adam']['step']['median']<t['adam']['batch']['median']
    assert 'out of range' in t['sgd']['error']


# --- the command ---------------------------------------------------------------------------------

def test_cli(tmp_path, capsys):
    args = ['compare', '--quick', '--only', 'adam,sgd', '--tasks', 'table', '--jobs', '0', '--out', str(tmp_path), '--quiet']
    assert main(args)==0
    out = capsys.readouterr().out
    assert '| Adam/AdamW | 0.001 | 1.00 |' in out and '2 trainings, 0 of them diverged' in out
    lines = (tmp_path/'compare.jsonl').read_text()
    times = json.loads((tmp_path/'compare_times.json').read_text())
    assert lines.count('\n')==2 and set(times['table'])=={'adam','sgd'}
    assert (main(args)==0 and (tmp_path/'compare.jsonl').read_text()==lines
            and json.loads((tmp_path/'compare_times.json').read_text())==times)
    assert (main([*args, '--times'])==0 and (tmp_path/'compare.jsonl').read_text()==lines
            and json.loads((tmp_path/'compare_times.json').read_text())!=times)
    r = json.loads((tmp_path/'compare.json').read_text())
    assert r['times']['table']['adam']['vs_adam']==1 and set(r['optimizers'])=={'adam','sgd'}


@pytest.mark.parametrize('args,say', [(['--only','adamw'], 'adamw: there is no such optimizer'), (['--tasks','poetry'], 'no such task'),
                                      (['--quick','--seeds','2'], '--quick takes one seed, not 2'),
                                      (['--jobs','-1'], '--jobs -1: it must be 0 or more'), (['--seeds','0','--no-times'], 'seeds=0')])
def test_cli_bad_arguments(args, say, tmp_path, capsys):
    assert main(['compare', '--out', str(tmp_path/'o'), *args])==2
    assert say in capsys.readouterr().err and not (tmp_path/'o').exists()


@pytest.mark.slow
def test_interrupted_from_the_keyboard(tmp_path):
    "Ctrl-C leaves the finished trainings and a report, and no process; the same command continues"
    cmd = [sys.executable, '-m', 'fastxtend_opt', 'compare', '--only', 'adam,lion', '--tasks', 'table', '--seeds', '2', '--out',
           str(tmp_path), '--no-times']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    p = subprocess.Popen(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    file,end = tmp_path/'compare.jsonl',time.time()+300
    while not file.exists() or file.read_text().count('\n')<3:
        assert time.time()<end and p.poll() is None
        time.sleep(.05)
    p.send_signal(signal.SIGINT)
    out,_ = p.communicate(timeout=60)
    assert p.returncode==130 and 'the same command continues from there' in out and (tmp_path/'compare.md').exists()
    before = file.read_text()
    assert before.count('\n')<12
    subprocess.run(cmd, env=env, check=True, capture_output=True)
    assert file.read_text().startswith(before) and file.read_text().count('\n')==12
