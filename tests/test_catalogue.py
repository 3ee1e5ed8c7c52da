"""The catalogue is complete: for each registered optimizer a page, a formula, a figure, an oracle, a row, a measured speed; and the table
sorts

What is missing is named by the test that fails; `nbs/guides/add_an_optimizer.ipynb` says how to make each of them."""
import importlib, json, re, shutil, subprocess, sys
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import pytest, torch

import oracles
from fastxtend_opt.definition import registry
from fastxtend_opt.definition.registry import CATEGORIES, get_optimizer, list_optimizers
from fastxtend_opt.tools import benchmark as B, catalogue as C

ROOT = Path(__file__).resolve().parents[1]
NAMES = [o.name for o in list_optimizers()]
every = pytest.mark.parametrize('name', NAMES)
ORACLES = oracles.load()


@lru_cache(None)
def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']

def text(o): return ''.join(o) if isinstance(o, list) else o or ''

def page_of(info): return ROOT/'nbs'/re.sub(r'\.html$', '.ipynb', info.page)

def saved_catalogue():
    "The table on the site"
    outs = [text(o.get('data', {}).get('text/html')) for c in cells(ROOT/'nbs'/'catalogue.ipynb') if c['cell_type']=='code'
            for o in c['outputs']]
    return next((o for o in outs if 'class="catalogue"' in o), '')

def of_test_oracles():
    "The older optimizers' oracles are in test_oracles.py"
    import test_oracles
    return test_oracles.REFS

# --- one function per part: a description of what is missing, or None -----------------------------------

def page(o):
    nb,src = page_of(o),f'algorithms/{page_of(o).name}'
    if not nb.is_file(): return f'nbs/{src}: copy nbs/algorithms/_template.ipynb'
    if f'- {src}' not in (ROOT/'_quarto.yml').read_text(): return f'{src} in the sidebar of _quarto.yml'

def formula(o):
    if page_of(o).is_file() and any('$$' in text(c['source']) for c in cells(page_of(o)) if c['cell_type']=='markdown'): return
    return f'a displayed formula ($$) in {page_of(o).name}'

def figure(o):
    if page_of(o).is_file() and any('image/png' in out.get('data', {}) for c in cells(page_of(o)) if c['cell_type']=='code'
                                    for out in c['outputs']): return
    return f'a saved figure in {page_of(o).name}: plot_paths([...]) in it, then `nbdev-test nbs/algorithms/{page_of(o).name} --save`'

def oracle(o):
    if o.name not in ORACLES and o.name not in of_test_oracles(): return f'tests/oracles/{o.name}.py'
    mod,_,attr = o.oracle.rpartition('.')
    if mod=='reference': # the module has the class's name, or the optimizer's, or is one of the older ones
        import reference
        found = hasattr(reference, attr) or any(f'class {attr}' in p.read_text() for p in (ROOT/'tests'/'reference').glob('*.py'))
        return None if found else f'{attr} in tests/reference, which the registry names as oracle'
    try: return None if hasattr(importlib.import_module(mod), attr) else f'{o.oracle}, which the registry names as oracle'
    except ImportError: pytest.skip(f'{mod} is not installed')

def row(o):
    if f'<tr id="{o.name}">' not in saved_catalogue(): return f'a row in nbs/catalogue.ipynb: `nbdev-test nbs/catalogue.ipynb --save`'

def speed(o):
    if o.kind=='matrix': # measured by another command
        f = ROOT/'bench'/'results'/'matrices.json'
        if f.is_file() and any((r['optimizer'],r['contestant'])==(o.name,'fastxtend_opt fused')
                               for r in json.loads(f.read_text())['rows']): return
        return f'an entry with a fused step in bench/results/matrices.json: `fastxtend-opt bench --matrices --out bench/results`'
    f = ROOT/'bench'/'results'/'catalogue.json'
    e = json.loads(f.read_text())['optimizers'].get(o.name) if f.is_file() else None
    if not e or not e['step'].get('fastxtend_opt fused') or not e['of_limit']:
        return ('an entry with a fused step and a memory limit in bench/results/catalogue.json: '
                f'`fastxtend-opt bench --catalogue --optimizers {o.name} --out bench/results`')

def exports(o):
    "Is what the notebook exports part of `fastxtend_opt.all`?"
    mod = o.func.__module__.removeprefix('fastxtend_opt.')
    if f'from .{mod} import *' not in (ROOT/'fastxtend_opt'/'all.py').read_text(): return f'`from .{mod} import *` in fastxtend_opt/all.py'

def data(o):
    lacks = [k for k in ('title','paper','year','authors','settings') if not getattr(o, k)]
    if o.factory is None: lacks.append('factory')
    if lacks: return f"{', '.join(lacks)} in its `register` call"

PARTS = dict(page=page, formula=formula, figure=figure, oracle=oracle, row=row, exports=exports, data=data)

@every
@pytest.mark.parametrize('part', PARTS)
def test_has(name, part):
    fault = PARTS[part](get_optimizer(name))
    assert not fault, f'{name} lacks {fault}'

@every
def test_is_measured(name):
    fault = speed(get_optimizer(name))
    assert not fault, f'{name} lacks {fault}'

@every
def test_contestants_can_be_made(name):
    "Every mode and peer that the table names can be made and stepped; peers that are not installed are reported as missing"
    rows = [(0,1,(8,4)), (0,0,(8,))]
    found,missing = B.contestants(name, ('native','foreach','jit','fused'))
    have = {c.label for c in found}
    assert {f'fastxtend_opt {m}' for m in get_optimizer(name).modes}<=have, f'{name}: made {sorted(have)}; missing: {missing}'
    for w,why in missing: assert 'No module named' in why or why.startswith('NotImplementedError'), f'{name}: {w}: {why}'
    for c in found:
        if c.mode in ('jit','fused') and c.lib=='fastxtend_opt': continue # compiled in test_benchmark
        ps = B.ParamSet(rows)
        try: c.make(ps, 1e-4).step()
        except Exception as e: pytest.fail(f'{name}: {c.label} does not step: {type(e).__name__}: {e}')

def test_missing_parts_are_named():
    "For an optimizer that is only registered, everything that it lacks is named"
    ghost = registry.OptimizerInfo(name='ghost', func=get_optimizer('sgd').func, title='Ghost', paper='', year=2020, category='fixed',
                                   kind='elementwise', state=(),
                                   oracle='reference.Ghost', page='algorithms/ghost.html')
    said = {k:f(ghost) for k,f in (PARTS | dict(speed=speed)).items()}
    assert said['page']=='nbs/algorithms/ghost.ipynb: copy nbs/algorithms/_template.ipynb'
    assert (said['oracle']=='tests/oracles/ghost.py' and 'formula' in said['formula']
            and 'nbdev-test nbs/algorithms/ghost.ipynb --save' in said['figure'])
    assert ('nbs/catalogue.ipynb' in said['row'] and '--optimizers ghost' in said['speed']
            and said['data']=='paper, authors, settings, factory in its `register` call')
    assert said['exports'] is None # it is SGD's module

# --- the table ------------------------------------------------------------------------------------

class Table(HTMLParser):
    "Rows of cells: their sort keys, texts and links"
    def __init__(self, src):
        super().__init__()
        self.heads,self.rows,self.cell = [],[],None
        self.feed(src)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if tag=='tr': self.rows.append((d.get('id'), []))
        if tag=='td': self.cell = dict(sort=d['data-sort'], text='', links=[]); self.rows[-1][1].append(self.cell)
        if tag=='th': self.cell = dict(text=''); self.heads.append(self.cell)
        if tag=='a': self.cell['links'].append(d['href'])
    def handle_endtag(self, tag):
        if tag in ('td','th'): self.cell = None
    def handle_data(self, s):
        if self.cell is not None: self.cell['text'] += s

@pytest.fixture(scope='module')
def table(): return Table(C.catalogue_html())

def test_table_has_every_optimizer_once(table):
    ids = [i for i,_ in table.rows if i]
    assert sorted(ids)==sorted(NAMES) and all(len(c)==len(table.heads)==9 for i,c in table.rows if i)

@every
def test_row_says_what_the_registry_says(table, name):
    o,cs = get_optimizer(name),next(c for i,c in table.rows if i==name)
    assert cs[0]['text']==f'{o.title}{name}' and cs[1]['text']==str(o.year)==cs[1]['sort']
    assert o.paper in cs[2]['text'] and cs[2]['links']==([f'https://arxiv.org/abs/{o.arxiv}'] if o.arxiv else [])
    assert cs[3]['text']==CATEGORIES[o.category] and cs[4]['text']==o.kind
    assert cs[5]['text']==('all four' if len(o.modes)==4 else ', '.join(o.modes))
    assert float(cs[6]['sort'])==pytest.approx(o.state_bytes(), abs=1e-3)
    assert cs[7]['sort']==str(len(o.settings)) and '`' not in cs[7]['text']
    for _,_,source in o.settings: assert re.sub(r'\[([^\]]+)\]\([^)]*\)', r'\1', source).replace('`', '') in cs[7]['text']
    assert cs[8]['text']==(o.needs.replace('`', '') or 'nothing')
    (link,) = cs[0]['links']
    assert (ROOT/'nbs'/re.sub(r'\.html$', '.ipynb', link)).is_file(), f'{name}: the link {link} leads to no page'

def test_a_part_of_the_table():
    rows = C.catalogue_rows('reduction')
    assert {'lamb','larc'}<={r['name'] for r in rows} and all(r['kind']=='reduction' for r in rows)
    assert json.loads(json.dumps(rows))==rows
    assert 'id="lamb"' in C.catalogue_table(kind='reduction').data and 'id="adam"' not in C.catalogue_table(kind='reduction').data
    with pytest.raises(ValueError, match="category='slow' is unknown"): C.catalogue_rows(category='slow')

def test_what_is_written_in_settings_is_escaped():
    r = dict(C.catalogue_row(get_optimizer('sgd')), title='<b>&', paper='"<i>"',
             settings=[['a < b', '`x<y`', '[s](https://x.org/?a=1&b=2)']], needs='<script>')
    page = C.catalogue_html([r])
    for bad in ('<b>', '<i>', 'x<y', 'a < b'): assert bad not in page
    assert page.count('<script>')==1 and '<a href="https://x.org/?a=1&amp;b=2">s</a>' in page and '<code>x&lt;y</code>' in page

def test_it_sorts():
    "The script in a real browser, if there is one: a click on a heading sorts, another reverses the order"
    node,chromium = shutil.which('node'),shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    assert re.search(r'<[a-zA-Z]', C._script.replace('<script>', ''))is None # the renderer would take it for a tag
    if not chromium: pytest.skip('needs chromium to run the script')
    check = '''<script>const t = document.querySelector('table.catalogue'), 
    years = () => [...t.tBodies[0].rows].map(r => r.cells[1].textContent).join();
    const b = t.tHead.rows[0].cells[1].querySelector('button'); b.click(); const up = years(); b.click();
    document.title = 'done'; const aria = t.tHead.rows[0].cells[1].getAttribute('aria-sort');
    document.body.innerHTML = '<p id=up>' + up + '</p><p id=down>' + years() + '</p><p id=aria>' + aria + '</p>'</script>'''
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'t.html'
        f.write_text(f'<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>{C.catalogue_html()}{check}</body></html>',
                     encoding='utf-8')
        r = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom', f'--user-data-dir={d}/profile',
                            f.as_uri()], capture_output=True, text=True, timeout=120)
    got = {k:re.search(rf'<p id="{k}">([^<]*)</p>', r.stdout)[1] for k in ('up','down','aria')}
    years = sorted(str(o.year) for o in list_optimizers())
    assert got==dict(up=','.join(years), down=','.join(years[::-1]), aria='descending')

# --- the template and the guide -------------------------------------------------------------------

def test_template_runs():
    "Run every code cell of the template in order, in a separate process: the code that it shows works"
    code = ("import sys; from execnb.shell import CaptureShell; s = CaptureShell(); s.execute(sys.argv[1], exc_stop=True); "
            "assert 'signum' in s.user_ns, 'nothing ran'; assert s.user_ns['get_optimizer']('signum').title=='Signum'")
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(ROOT/'nbs'/'algorithms'/'_template.ipynb')], capture_output=True,
                       text=True, cwd=ROOT)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]

GUIDE = ROOT/'nbs'/'guides'/'add_an_optimizer.ipynb'
def blocks(lang): return re.findall(rf'```{lang}\n(.*?)```', '\n'.join(text(c['source'])
                                                                       for c in cells(GUIDE) if c['cell_type']=='markdown'), re.S)

def test_guide_names_what_exists():
    src = '\n'.join(text(c['source']) for c in cells(GUIDE))
    for name in set(re.findall(r'`(test_\w+\.py)`', src)): assert (ROOT/'tests'/name).is_file(), name
    for name in set(re.findall(r'`((?:nbs|tests|fastxtend_opt)/[\w/]+\.(?:py|ipynb))`', src)) - {'tests/reference/signum.py',
        'tests/oracles/signum.py'}:
        assert (ROOT/name).is_file(), name
    assert f"cp {(ROOT/'nbs'/'algorithms'/'_template.ipynb').relative_to(ROOT)} " in src
    from fastxtend_opt.tools.cli import _parser
    for line in re.findall(r'^fastxtend-opt (.*)$', '\n'.join(blocks('bash')), re.M): _parser().parse_args(line.split())

def test_guides_reference_is_the_templates_optimizer(monkeypatch):
    "The reference and the oracle that the guide prints, against the template's steppers"
    import numpy as np
    ref,oracle = (next(b for b in blocks('python') if k in b) for k in ('class Signum', 'REFERENCE'))
    ns = {}
    exec(ref, ns)
    nb = [text(c['source']) for c in cells(ROOT/'nbs'/'algorithms'/'_template.ipynb') if c['cell_type']=='code']
    own = {'__name__':'signum_of_the_template'}
    kept = dict(registry._registry)
    try:
        for s in nb:
            if re.match(r'#\|\s*export', s): exec(s, own)
    finally:
        registry._registry.clear(); registry._registry.update(kept)
    ons = {}
    exec(oracle.replace('from reference.signum import Signum', '').replace('from . import peer', 'from oracles import peer'), ons)
    ons['Signum'] = ns['Signum']
    assert {k:v for k,v in ons['DEFAULTS'].items()}=={k:p.default for k,
        p in __import__('inspect').signature(own['Signum']).parameters.items() if k in ons['DEFAULTS']}
    for h in ons['CASES']:
        for decouple_wd in (True,False):
            p = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
            obj = ons['REFERENCE'](p.detach().numpy(), {**h, 'decouple_wd':decouple_wd}, .1)
            opt,gen = own['Signum']([p], lr=.01, wd=.1, decouple_wd=decouple_wd, **h),np.random.default_rng(0)
            for _ in range(20):
                g = gen.normal(size=7)
                p.grad = torch.tensor(g)
                opt.step(); obj.step(g, .01)
            assert np.allclose(p.detach().numpy(), obj.theta, rtol=1e-12, atol=1e-14)
            for ours,theirs in ons['STATE'].items(): assert np.allclose(opt.state[p][ours].numpy(), getattr(obj, theirs))
