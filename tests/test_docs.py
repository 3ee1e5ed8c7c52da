"""The documentation: render the site from the notebooks and check it. `make docs` renders the same site. tools/render_site.py refuses dead
links and pages that the sidebar lacks, which is tested here too."""
import ast, dataclasses, fcntl, html, importlib, importlib.util, inspect, json, os, pickle, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
from test_docments import INTERNAL

root = Path(__file__).resolve().parent.parent
pytest.importorskip('pypandoc')
pytestmark = pytest.mark.xdist_group('docs')      # one site for all of these tests

def _load(name):
    spec = importlib.util.spec_from_file_location(name, root/'tools'/f'{name}.py')
    m = importlib.util.module_from_spec(spec)
    sys.modules[name] = m
    spec.loader.exec_module(m)
    return m
rs = _load('render_site')
nav = rs.sidebar(rs.yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8')))
sources = [s for _,srcs in nav for s in srcs]
algorithms = [s for s in sources if s.startswith('algorithms/')]
modules = [s for s in sources if s.startswith(('engine/','optimizer/','definition/','algorithms/','training/','tools/'))]

def processed():
    "Process the notebooks that have changed; the folder of all processed ones"
    with open(root/'.docs.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        r = subprocess.run([sys.executable, str(root/'tools'/'process_notebooks.py')], capture_output=True, text=True)
        assert r.returncode==0, r.stderr[-3000:]
    (root/'.docs.lock').unlink(missing_ok=True)
    return root/'_proc'

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The rendered site and its pages, made once per session: the first process makes it, and others wait for it"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    out,known = shared/'site',shared/'site.pickle'
    with open(shared/'site.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if not known.exists(): known.write_bytes(pickle.dumps({p.src: p for p in rs.render(processed(), out)}))
    return out, pickle.loads(known.read_bytes())

class Document(HTMLParser):
    "The contents of a page, read from its HTML"
    def __init__(self, text):
        super().__init__()
        self.refs,self.ids,self.headings,self.images,self.math,self.text,self._h,self._main = [],set(),[],0,0,'',None,0
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if 'id' in d: self.ids.add(d['id'])
        self.refs += [d[k] for k in ('href','src') if d.get(k)]
        if tag=='main': self._main = 1
        if not self._main: return
        if tag=='img': self.images += 1
        if tag=='math': self.math += d.get('display')=='block'
        if tag in ('h1','h2','h3'): self._h = tag; self.headings.append([tag,''])
    def handle_endtag(self, tag):
        if tag==self._h: self._h = None
        if tag=='main': self._main = 0
    def handle_data(self, data):
        if self._h: self.headings[-1][1] += data
        if self._main: self.text += data

def documents(out): return {p.relative_to(out).as_posix(): Document(p.read_text(encoding='utf-8')) for p in out.rglob('*.html')}

def test_site_has_every_page(site):
    out,pages = site
    # a template is no page
    nbs = {p.relative_to(root/'nbs').as_posix() for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
           and p.name[0]!='_'}
    assert set(sources) == nbs == set(pages)
    for p in pages.values(): assert (out/p.out).is_file()

def test_no_dead_links(site):
    "Independently of the renderer: every link of every page, including source pages, leads to a file and an element in it"
    out,_ = site
    docs,dead = documents(out),[]
    for name,d in docs.items():
        for r in d.refs:
            u = urlsplit(r)
            if u.scheme in ('http','https','mailto','data'): continue
            assert not u.scheme and not u.path.startswith('/'), f'{name}: {r} is not relative'
            path = ((out/name).parent/unquote(u.path)).resolve() if u.path else out/name
            if not path.is_file(): dead.append(f'{name}: {r}')
            elif u.fragment and path.suffix=='.html' and unquote(u.fragment) not in docs[
                path.relative_to(out.resolve()).as_posix()].ids: dead.append(f'{name}: {r} (no such element)')
    assert not dead, '\n'.join(dead)

def test_links_in_markdown_files():
    for f in ('README.md','CONTRIBUTING.md','CHANGELOG.md','tests/README.md'):
        for target in re.findall(r'\]\(([^)#\s]+)\)', (root/f).read_text(encoding='utf-8')):
            if not urlsplit(target).scheme: assert ((root/f).parent/target).exists(), f'{f}: {target}'

@pytest.mark.parametrize('src', sources)
def test_page(site, src):
    "A title, a one-line description, text; no error among the outputs, no directive or markdown left over"
    out,pages = site
    p = pages[src]
    d = Document((out/p.out).read_text(encoding='utf-8'))
    assert [h[1] for h in d.headings if h[0]=='h1'] == [p.title]
    assert p.description, f'{src}: no "> one line summary" under its title'
    assert len(d.text)>500, f'{src} is almost empty'
    prose = re.sub(r'<pre.*?</pre>|<code.*?</code>|<annotation.*?</annotation>', '', (out/p.out).read_text(encoding='utf-8'), flags=re.S)
    for left in (':::', '#|', '$$', '```', 'Traceback (most recent call last)'):
        assert left not in prose, f'{src}: {left!r} is left in the text'

@pytest.mark.parametrize('src', modules)
def test_page_documents_its_names(site, src):
    "Every exported function and class has its heading on the page"
    nb = json.loads((root/'nbs'/src).read_text(encoding='utf-8'))
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']
    exported = [s for s in cells if re.search(r'^#\s*\|\s*exports?\b', s, re.M)]
    def _private(n): # methods that are patched onto a private class are private too
        owner = n.args.args[0].annotation if isinstance(n, ast.FunctionDef) and n.args.args else None
        return n.name.startswith('_') or (isinstance(owner, ast.Name) and owner.id.startswith('_'))
    names = [n.name for s in exported for n in ast.parse(s).body if isinstance(n, (ast.FunctionDef,ast.ClassDef)) and not _private(n)]
    d = Document((site[0]/site[1][src].out).read_text(encoding='utf-8'))
    heads = {h[1].rstrip('#').strip().rpartition('.')[2] for h in d.headings} # a patched method is headed Learner.fit_flat_varied
    missing = [n for n in names if n not in heads]
    assert not missing, f'{src}: not documented: {missing}'

def _parameter_rows(text):
    "Names in the tables of a page's documented functions: name to list"
    res = {}
    for doc in text.split('<div class="doc">')[1:]:
        doc = re.split(r'<h[1-4]\b', doc, maxsplit=2)  # what is before its heading, its own part, what follows
        name = html.unescape(re.sub('<[^>]+>', '', doc[1].partition('</h')[0].partition('>')[2])).removesuffix('#')
        res[name] = [html.unescape(r).lstrip('*') for r in re.findall(r'<tr>\s*<td><code>([^<]+)</code>', doc[1])]
    return res

def _parameters(o):
    "Names of the parameters that a page has to explain: those of functions, and of classes with a constructor of their own"
    own = '__init__' in vars(o) and not dataclasses.is_dataclass(o) if inspect.isclass(o) else inspect.isfunction(o)
    if not own or o.__name__ in INTERNAL: return []
    return [p.name for p in inspect.signature(o).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

@pytest.mark.parametrize('src', modules)
def test_every_parameter_has_a_row(site, src):
    "The table of each exported function names all parameters, and its signature shows a bare * or / as Python does"
    text = (site[0]/site[1][src].out).read_text(encoding='utf-8')
    code = ''.join(''.join(c['source'])+'\n' for c in json.loads((root/'nbs'/src).read_text(encoding='utf-8'))['cells'])
    mod = importlib.import_module('fastxtend_opt.'+re.search(r'^#\s*\|\s*default_exp (\S+)', code, re.M)[1])
    rows = _parameter_rows(text)
    here = {n: getattr(mod, n) for n in mod.__all__ if getattr(getattr(mod, n), '__module__', '')==mod.__name__ and n in rows}
    missing = {n: lacking for n,o in here.items() if (lacking := [p for p in _parameters(o) if p not in rows[n]])}
    assert not missing, f'{src}: parameters without a row (is there a docment?): {missing}'
    signatures = re.sub('<[^>]+>', '', ''.join(re.findall(r'<div class="doc">.*?</pre>', text, re.S)))
    assert '*=' not in signatures and '/=' not in signatures

def test_signatures_with_markers():
    "show_doc prints a bare * or / on the line of the next parameter, here with and without docments"
    md = rs._document('```python\ndef f(\n    x, # A\n    /, y:int=1, # B\n    *, foreach:bool=False, # C\n    **kw, # D\n)->int: # E\n```')
    assert 'def f(x, /, y=1, *, foreach=False, **kw)->int:' in md
    for row in ('| `x` | | | A |', '| `y` | <code>int</code> | <code>1</code> | B |',
                '| `foreach` | <code>bool</code> | <code>False</code> | C |', '| `**kw` | | | D |', '| *returns* | <code>int</code> | | E |'):
        assert re.sub(' +', ' ', row) in re.sub(' +', ' ', md), row
    assert md.count('\n| ')==6 # these five and the head of the table
    assert 'def f(x, /, y, *, z=2):' in rs._document('```python\ndef f(\n    x, /, y, *, z=2\n):\n```')

@pytest.mark.parametrize('src', algorithms)
def test_docments_of_kwargs(site, src):
    "The docment of `**kwargs` is not taken for that of the value that a function returns"
    text = (site[0]/site[1][src].out).read_text(encoding='utf-8')
    returned = re.findall(r'<td><em>returns</em></td>\s*<td>.*?</td>\s*<td></td>\s*<td>(.*?)</td>', text, re.S)
    assert not [o for o in returned if o.startswith('Mode and storage')]

def test_there_are_algorithms(): assert len(algorithms) >= 9

def section(d, *words): return [h for h in d.headings if any(w in h[1].lower() for w in words)]

@pytest.mark.parametrize('src', algorithms)
def test_algorithm_page_reads_like_the_others(site, src):
    out,pages = site
    d = Document((out/pages[src].out).read_text(encoding='utf-8'))
    text = d.text.lower()
    faults = []
    if not section(d, 'formula'): faults.append('a heading Formula')
    if not d.math: faults.append('a displayed formula')
    if not section(d, 'recommend', 'hyper'): faults.append('a heading about recommended settings')
    if not section(d, 'differ'): faults.append('a heading about what differs')
    if not section(d, 'reference'): faults.append('a heading References')
    if not d.images: faults.append('a figure (run the notebook with nbdev-test --save)')
    if 'when' not in text: faults.append('when to use it')
    for m in ('foreach','jit','fused'):
        if m not in text: faults.append(f'the mode {m}')
    assert not faults, f'{src} lacks: ' + ', '.join(faults)

def test_index_has_a_picture(site):
    d = Document((site[0]/'index.html').read_text(encoding='utf-8'))
    assert d.images>=1 and section(d, 'install') and section(d, 'first fit')

# --- faults that the renderer refuses ----------------------------------------------------------

def _nb(*cells, title='A page'):
    md = lambda s: dict(cell_type='markdown', metadata={}, source=s)
    raw = dict(cell_type='raw', metadata={}, source=f'---\ntitle: {title}\ndescription: Something\n---\n')
    return json.dumps(dict(cells=[raw, *[md(c) if isinstance(c, str) else c for c in cells]], metadata={}, nbformat=4, nbformat_minor=5))

def _site(tmp_path, pages, contents):
    for name,nb in pages.items():
        (tmp_path/'proc'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'proc'/name).write_text(nb, encoding='utf-8')
    (tmp_path/'q.yml').write_text(rs.yaml.safe_dump(dict(website=dict(sidebar=dict(contents=contents)))), encoding='utf-8')
    return lambda: rs.render(tmp_path/'proc', tmp_path/'out', tmp_path/'q.yml')

@pytest.mark.parametrize('pages,contents,fault', [
    ({'index.ipynb': _nb('x')}, ['index.ipynb','gone.ipynb'], 'gone.ipynb: in the sidebar'),
    ({'index.ipynb': _nb('x'), 'other.ipynb': _nb('x')}, ['index.ipynb'], 'other.ipynb: a page, but not in the sidebar'),
    ({'index.ipynb': _nb('x')}, ['index.ipynb','index.ipynb'], 'twice in the sidebar'),
    ({'index.ipynb': _nb('[x](nowhere.ipynb)')}, ['index.ipynb'], "dead link 'nowhere.ipynb'"),
    ({'index.ipynb': _nb('[x](sub/other.ipynb#gone)'), 'sub/other.ipynb': _nb('## Here\n\nx')}, ['index.ipynb','sub/other.ipynb'],
     "no element 'gone'"),
    ({'index.ipynb': _nb('![x](missing.png)')}, ['index.ipynb'], "dead link 'missing.png'"),
    ({'index.ipynb': _nb('[x](/blob/main/fastxtend_opt/gone.py#L3)')}, ['index.ipynb'], 'dead link'),
    ({'index.ipynb': _nb('x', title="''")}, ['index.ipynb'], 'no title'),
    ({'index.ipynb': _nb(dict(cell_type='code', source='1/0', metadata={},
                              outputs=[dict(output_type='error', ename='ZeroDivisionError', evalue='division by zero', traceback=[])]))},
        ['index.ipynb'], 'ZeroDivisionError'),
    ({'a/02_x.ipynb': _nb('x').replace('title: A page', 'title: A page\\noutput-file: x.html'),
      'a/07_x.ipynb': _nb('x').replace('title: A page', 'title: A page\\noutput-file: x.html')},
        ['a/02_x.ipynb','a/07_x.ipynb'], 'becomes a/x.html'),
])
def test_renderer_refuses(tmp_path, pages, contents, fault):
    with pytest.raises(rs.SiteError, match=re.escape(fault)): _site(tmp_path, pages, contents)()

def test_renderer_renders(tmp_path):
    "Links, formulas, callouts, code and pictures of a small site, read from its HTML"
    png = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=='
    code = dict(cell_type='code', metadata={}, source='#| fig-cap: A dot\nx = 1',
                outputs=[dict(output_type='display_data', metadata={}, data={'image/png': png})])
    hidden = dict(cell_type='code', metadata={}, source='#| echo: false\nsecret = 1',
                  outputs=[dict(output_type='stream', name='stdout', text='a < b\n')])
    sig = ('---\n\n### f\n\n```python\ndef f(\n    params:list, # Parameters\n    lr:float=0.1, # Learning rate, 0 | 1\n'
           ')->int: # The answer\n```\n\n*Does it*')
    doc = dict(cell_type='code', metadata={}, source='#| echo: false\n#| output: asis\nshow_doc(f)',
               outputs=[dict(output_type='execute_result', metadata={}, data={'text/markdown': sig})])
    pages = {'index.ipynb': _nb('## Part\n\n[there](sub/01_other.ipynb#f) $x^2$\n\n$$y=\\frac12$$\n\n::: {.callout-note}\nMind\n:::\n',
                                code, hidden),
             'sub/01_other.ipynb': _nb('[back](../index.ipynb)', doc).replace('title: A page', 'title: Other\\noutput-file: other.html')}
    _site(tmp_path, pages, ['index.ipynb', dict(section='More', contents=['sub/01_other.ipynb'])])()
    index,other = ((tmp_path/'out'/n).read_text(encoding='utf-8') for n in ('index.html','sub/other.html'))
    for text in ('href="sub/other.html#f"', '<math display="block"', '<div class="callout-note">', '<figcaption>A dot</figcaption>',
                 'src="files/index-1.png"', 'a &lt; b', '<h2>More</h2>'):
        assert text in index, text
    assert 'secret' not in index and 'fig-cap' not in index
    for text in ('href="../index.html"', 'id="f"', '<td>Learning rate, 0 | 1</td>', '<em>returns</em>', 'def'): assert text in other, text
    assert (tmp_path/'out'/'files'/'index-1.png').read_bytes().startswith(b'\x89PNG')
