#!/usr/bin/env python
"""Render the processed notebooks (_proc/, see process_notebooks.py) to a static site with pandoc, which pypandoc-binary contains.

_quarto.yml defines the site. This script reads its sidebar, so that you can build and check the site without Quarto. It lists all faults
and fails if the sidebar names a page that does not exist, a page is missing from the sidebar, a link or an image inside the site is dead,
or a cell's output is an error."""
import argparse, base64, html, json, posixpath, re, shutil, sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pypandoc, yaml

root = Path(__file__).resolve().parent.parent
markdown = ('markdown+autolink_bare_uris+tex_math_single_backslash+lists_without_preceding_blankline'
            '-blank_before_header-blank_before_blockquote')   # common ground of notebooks (CommonMark) and Quarto

class SiteError(Exception):
    "All faults, one per line"
    def __init__(self, faults): super().__init__('\n'.join(faults)); self.faults = faults

@dataclass
class Page:
    src: str                                   # path in nbs/, with suffix .ipynb
    out: str                                   # path in the site
    title: str
    description: str = ''
    md: str = ''
    chunks: list = field(default_factory=list) # raw HTML, inserted after pandoc
    files: dict = field(default_factory=dict)  # name -> bytes
    body: str = ''
    headings: list = field(default_factory=list)

# --- reading ---------------------------------------------------------------------------------------------------------

def sidebar(cfg, names=None):
    "`[(section or None, [src, ...]), ...]` from the website.sidebar of _quarto.yml; adds the `text` that it gives a page to `names`"
    side = cfg['website']['sidebar']
    if isinstance(side, list): side = side[0]
    res = []
    def _href(o):
        if isinstance(o, str): return o
        src = o.get('href') or o['file']
        if 'text' in o and names is not None: names[src] = o['text']
        return src
    for o in side['contents']:
        if isinstance(o, dict) and 'section' in o: res.append((o['section'], [_href(c) for c in o['contents']]))
        elif res and res[-1][0] is None: res[-1][1].append(_href(o))
        else: res.append((None, [_href(o)]))
    return res

def _options(source):
    "Quarto's `#| key: value` lines at the start of a cell, and the other lines"
    opts, lines = {}, source.splitlines()
    while lines and re.match(r'#\s*\|', lines[0]):
        k, _, v = re.sub(r'^#\s*\|\s*', '', lines.pop(0)).partition(':')
        opts[k.strip()] = yaml.safe_load(v) if v.strip() else True
    return opts, '\n'.join(lines).strip('\n')

def _text(o): return ''.join(o) if isinstance(o, list) else o or ''
_ansi = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
def _plain(s):
    "Escaped text without color codes; of a line that was overwritten, its last state"
    return html.escape(_ansi.sub('', '\n'.join(l.rsplit('\r', 1)[-1] for l in s.rstrip('\n').split('\n'))), quote=False)

def _width(png):
    "The width in CSS pixels (96 per inch) from a PNG's resolution: notebooks store pictures at twice their size"
    i = png.find(b'pHYs')
    if i<0 or png[i+12]!=1: return ''
    px,per_metre = int.from_bytes(png[16:20], 'big'), int.from_bytes(png[i+4:i+8], 'big')
    return f' width="{round(px/per_metre/.0254*96)}"'

def _pre(txt, cls=''):
    wrap = ' wrap' if txt.count('\n')<4 else ''                          # wrap a message, let a table scroll
    return f'<pre class="output{wrap}{cls}"><code>{txt}</code></pre>'

def _output(page, o, opts):
    "One output of a cell as markdown; HTML and pictures go into `page.chunks`"
    def raw(s):
        page.chunks.append(s)
        return f'\n```{{=html}}\n<!--chunk:{len(page.chunks)-1}-->\n```\n'
    if o['output_type']=='stream':
        if o.get('name')=='stderr' and opts.get('warning') is False: return ''
        txt = _plain(_text(o['text']))
        return raw(_pre(txt, ' stderr' if o.get('name')=='stderr' else '')) if txt.strip() else ''
    data = o.get('data', {})
    for mime,ext in (('image/svg+xml','svg'), ('image/png','png'), ('image/jpeg','jpg')):
        if mime not in data: continue
        val = _text(data[mime])
        name = f"{Path(page.out).stem}-{len(page.files)+1}.{ext}"
        page.files[name] = val.encode() if ext=='svg' else base64.b64decode(val)
        cap,alt = opts.get('fig-cap', ''), opts.get('fig-alt') or opts.get('fig-cap') or f'Plot: {page.title}'
        cap = f'<figcaption>{html.escape(cap)}</figcaption>' if cap else ''
        width = _width(page.files[name]) if ext=='png' else ''
        return raw(f'<figure><img src="files/{name}" alt="{html.escape(alt)}"{width} loading="lazy">{cap}</figure>')
    if 'text/html' in data:
        # keep the script and style of a table, remove those of pandas and of progress bars
        txt = re.sub(r'<style scoped>.*?</style>|<style>[^<]*progress[^<]*</style>', '', _text(data['text/html']), flags=re.S|re.I).strip()
        return raw(f'<div class="output html">{txt}</div>') if txt else ''
    if 'text/markdown' in data: return f"\n{_text(data['text/markdown'])}\n"
    if 'text/latex' in data: return f"\n{_text(data['text/latex'])}\n"
    txt = _plain(_text(data.get('text/plain', '')))
    return raw(_pre(txt)) if txt.strip() else ''

def read_page(proc, path, faults):
    "The notebook at `path` as a `Page` with its markdown"
    src = path.relative_to(proc).as_posix()
    nb = json.loads(path.read_text(encoding='utf-8'))
    meta, parts = {}, []
    for cell in nb['cells']:
        m = re.match(r'---\s*\n(.*?)\n---\s*$', _text(cell.get('source')).strip(), re.S) if cell['cell_type']=='raw' else None
        if m: meta.update(yaml.safe_load(m.group(1)) or {})
    out = (Path(src).parent/meta.get('output-file', Path(src).with_suffix('.html').name)).as_posix()
    page = Page(src, out, str(meta.get('title', '')), str(meta.get('description', '')))
    if not page.title: faults.append(f'{src}: no title (a first cell "# Title")')
    for cell in nb['cells']:
        s = _text(cell.get('source'))
        if cell['cell_type']=='markdown' and s.strip() and not s.startswith('<!-- WARNING'): parts.append(s)
        elif cell['cell_type']=='code': page_cell(page, cell, s, parts, faults)
    # a blank line before the end of a callout, so that its last paragraph becomes one
    page.md = re.sub(r'\n(:{3,})[ \t]*(?=\n|$)', r'\n\n\1', '\n\n'.join(parts))
    return page

def page_cell(page, cell, s, parts, faults):
    opts, code = _options(s)
    if opts.get('include') is False: return
    for o in cell.get('outputs', []):
        if o['output_type']=='error' and not opts.get('error'):
            faults.append(f"{page.src}: a cell's output is an error: {o.get('ename')}: {o.get('evalue')} (run the notebook again)")
    sd = bool(re.match(r'\s*(nbdev\.showdoc\.)?show_doc\(', code))
    if opts.get('echo') is not False and code and not sd:
        block = f'```python\n{code}\n```'
        if opts.get('code-fold'):
            block = f'<details class="fold"><summary>{opts.get("code-summary", "Code")}</summary>\n\n{block}\n\n</details>'
        parts.append(block)
    if opts.get('output') is False: return
    out = ''.join(_output(page, o, opts) for o in cell.get('outputs', []) if o['output_type']!='error')
    if not out.strip(): return
    if sd: out = _document(re.sub(r'^\s*---\s*\n', '\n', out))
    tag = lambda t: f'\n```{{=html}}\n{t}\n```\n'   # a fenced div would take over the id of a heading at its start
    parts.append(tag(f'<div class="{"doc" if sd else "outputs"}">') + f'\n{out}\n' + tag('</div>'))

# --- signatures: show_doc puts docments into comments, which are too wide for a page; this makes a table of them -----------------

_signature = re.compile(r'```python\n(?P<head>(?:async )?(?:def|class) [^\n]*\()\n(?P<params>.*?)\n(?P<tail>\)[^\n]*)\n```', re.S)
_param = re.compile(r'^    (?P<name>\*{0,2}\w+|/|\*)(?P<rest>.*)$')

def _split(rest):
    "`:type=default, # meaning` -> type, default, meaning"
    rest,_,doc = (rest if '# ' in rest else rest+' # ').partition(' # ')
    rest = rest.strip().removesuffix(',')
    typ,dflt,depth = '', '', 0
    for i,c in enumerate(rest):
        depth += (c in '([{<') - (c in ')]}>')
        if c=='=' and not depth: typ,dflt = rest[:i],rest[i+1:]; break
    else: typ = rest
    return typ.lstrip(':').strip(), dflt.strip(), doc.strip()

def _document(md):
    "The markdown of a `show_doc`: short signature, docstring, table of parameters"
    m = _signature.search(md)
    if not m: return md
    sig,table = _sig_table(m)
    return f'{md[:m.start()]}{sig}{md[m.end():]}\n\n{table}\n'

def _sig_table(m):
    rows = []
    for l in m.group('params').splitlines():
        marker = re.match(r'    (\*|/), (?=\S)', l) # show_doc puts a bare * or / on the line of the next parameter
        if marker: rows.append((marker[1], '', '', '')); l = '    '+l[marker.end():]
        for part in ([l] if '# ' in l else ['    '+o.strip() for o in re.split(r',\s(?![^(\[{]*[)\]}])', l.strip())]):
            p = _param.match(part)
            if not p: return m.group(0),''
            rows.append((p.group('name'), *_split(p.group('rest'))))
    ret,_,retdoc = m.group('tail').partition(' # ')
    short = [n if not d else f'{n}={d}' for n,_,d,_ in rows]
    sig = m.group('head') + ', '.join(short) + ret.rstrip()
    if len(sig)>78: sig = m.group('head') + '\n' + _wrap(short) + '\n' + ret.rstrip()
    sig = f'```python\n{sig}\n```'
    if not retdoc and not any(r[3] for r in rows): return sig,''
    code = lambda s: f'`{s}`' if s else ''
    cell = lambda s: s.replace('|', '\\|')
    typ = lambda s: f'<code>{html.escape(s).replace("|", "&#124;")}</code>' if s else ''
    # without a docment *args and **kwargs need no row
    body = [f'| {code(n)} | {typ(t)} | {typ(d)} | {cell(doc)} |'
            for n,t,d,doc in rows if n not in '/*' and (t or d or doc or n[0]!='*')]
    if retdoc: body.append(f"| *returns* | {typ(ret.rstrip(': ').partition('->')[2].strip())} | | {cell(retdoc.strip())} |")
    return sig,'| | type | default | |\n|---|---|---|---|\n' + '\n'.join(body)

def _wrap(items, width=74):
    lines = ['']
    for o in items:
        if lines[-1] and len(lines[-1])+len(o)+2>width: lines.append('')
        lines[-1] += f'{o}, '
    return '\n'.join('    '+l.rstrip() for l in lines).removesuffix(',')

# --- rendering -------------------------------------------------------------------------------------------------------

def to_html(md): return pypandoc.convert_text(md, 'html5', format=markdown, extra_args=['--mathml', '--wrap=none', '--section-divs=false'])

_tag = re.compile(r'<[a-zA-Z][^<>]*>')
_ref = re.compile(r'\b(href|src)="([^"]*)"')
_id = re.compile(r'\bid="([^"]+)"')
_head = re.compile(r'<h([234])\b([^>]*)>(.*?)</h\1>', re.S)

def ids(body): return {m for t in _tag.findall(body) for m in _id.findall(t)}

def _strip(s): return html.unescape(re.sub(r'<[^>]+>', '', re.sub(r'<annotation.*?</annotation>', '', s, flags=re.S))).strip()

def render_body(page):
    body = to_html(page.md)
    body = re.sub(r'<!--chunk:(\d+)-->', lambda m: page.chunks[int(m.group(1))], body)
    def heading(m):
        lvl, attrs, txt = int(m.group(1)), m.group(2), m.group(3)
        i = _id.search(attrs)
        if not i: return m.group(0)
        page.headings.append((lvl, i.group(1), _strip(txt)))
        return f'<h{lvl}{attrs}>{txt}<a class="anchor" href="#{i.group(1)}" aria-label="Link to this section">#</a></h{lvl}>'
    body = re.sub(r'<colgroup>.*?</colgroup>', '', body, flags=re.S)   # pandoc guesses widths from the dashes of the source
    page.body = re.sub(r'<table\b.*?</table>', lambda m: f'<div class="table">{m.group(0)}</div>', _head.sub(heading, body), flags=re.S)

class Links:
    "Makes the links of a page relative, and notes dead ones"
    def __init__(self, pages, out, faults):
        self.by_src = {p.src: p.out for p in pages}
        self.ids = {p.out: ids(p.body) for p in pages}
        self.out, self.faults, self.sources = out, faults, {}

    def resolve(self, page, url):
        "The relative link for `page`; notes a fault if it is dead"
        u = urlsplit(url)
        if u.scheme or u.netloc or url.startswith('data:'): return url
        if not u.path: path = page.out
        elif u.path.startswith('/blob/'): return self.source(page, u)
        elif u.path.startswith('/'): path = posixpath.normpath(u.path.lstrip('/'))
        else: path = posixpath.normpath(posixpath.join(posixpath.dirname(page.out), unquote(u.path)))
        if path.endswith('.ipynb'):
            if path not in self.by_src: return self.dead(page, url)
            path = self.by_src[path]
        if path in self.ids:
            if u.fragment and unquote(u.fragment) not in self.ids[path]: return self.dead(page, url, f'no element {u.fragment!r} in {path}')
        elif not (self.out/path).is_file(): return self.dead(page, url)
        rel = posixpath.relpath(path, posixpath.dirname(page.out) or '.') if u.path else ''
        return rel + (f'#{u.fragment}' if u.fragment else '')

    def source(self, page, u):
        "Replace a link to a file of the repository by one to a page with its text"
        name = u.path.split('/', 3)[3]
        if not (root/name).is_file(): return self.dead(page, u.geturl())
        out = f'source/{name}.html'
        if name not in self.sources:
            text = (root/name).read_text(encoding='utf-8')
            body = to_html(f'~~~~~~~~~~ {{#L .python .numberLines .lineAnchors}}\n{text}\n~~~~~~~~~~\n')
            self.sources[name] = Page(name, out, name, body=body)
        frag = f'#L-{u.fragment[1:]}' if u.fragment.startswith('L') else ''
        return posixpath.relpath(out, posixpath.dirname(page.out) or '.')+frag

    def dead(self, page, url, why='no such page or file'):
        self.faults.append(f'{page.src}: dead link {url!r} ({why})')
        return url

    def rewrite(self, page):
        def ref(m): return f'{m.group(1)}="{html.escape(self.resolve(page, html.unescape(m.group(2))))}"'
        page.body = _tag.sub(lambda m: _ref.sub(ref, m.group(0)), page.body).replace(' target="_blank"', '')

def nav_html(nav, names, pages, cur):
    def item(p):
        here = ' class="here" aria-current="page"' if cur and p.out==cur.out else ''
        return f'<li><a{here} href="{rel(cur, p.out)}">{html.escape(names.get(p.src, p.title))}</a></li>'
    res = []
    for sec,srcs in nav:
        if sec: res.append(f'<h2>{html.escape(sec)}</h2>')
        res.append('<ul>'+''.join(item(pages[s]) for s in srcs)+'</ul>')
    return '\n'.join(res)

def rel(cur, out): return posixpath.relpath(out, posixpath.dirname(cur.out) or '.')

def toc_html(page):
    hs = [h for h in page.headings if h[0]<4]
    if len(hs)<2: return ''
    return '<nav class="toc" aria-label="On this page"><h2>On this page</h2><ul>' + ''.join(
        f'<li class="l{l}"><a href="#{i}">{html.escape(t)}</a></li>' for l,i,t in hs) + '</ul></nav>'

def near_html(page, names, pages, order):
    "Links to the previous and the next page"
    if page.src not in order: return ''
    i = order.index(page.src)
    def near(j, cls, word):
        if not 0<=j<len(order): return '<span></span>'
        other = pages[order[j]]
        return f'<a class="{cls}" href="{rel(page, other.out)}"><span>{word}</span>{html.escape(names.get(order[j], other.title))}</a>'
    return f'<nav class="near">{near(i-1, "prev", "Previous")}{near(i+1, "next", "Next")}</nav>'

def full_html(site, page, nav, names, pages, order, wide=False):
    "The whole document of a page"
    esc = html.escape
    title = site['title'] if page.out=='index.html' else f"{page.title} – {site['title']}"
    desc = re.sub('`([^`]+)`', r'<code>\1</code>', f'<p class="lead">{esc(page.description)}</p>') if page.description else ''
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<meta name="description" content="{esc(page.description or site['description'])}">
<link rel="stylesheet" href="{rel(page, 'site.css')}">
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header class="top"><a class="brand" href="{rel(page, 'index.html')}">{esc(site['title'])}</a>
<span class="version">{esc(site['version'])}</span>
<label class="menu" for="menu">Menu</label></header>
<input type="checkbox" id="menu" aria-label="Show the list of pages">
<div class="frame{' wide' if wide else ''}">
<nav class="side" aria-label="Pages">
{nav_html(nav, names, pages, page)}
</nav>
<main id="main">
<h1>{esc(page.title)}</h1>
{desc}
{page.body}
{near_html(page, names, pages, order)}
</main>
{toc_html(page)}
</div>
</body>
</html>
'''

def sidebar_faults(order, pages):
    "Differences between the sidebar and the pages, and pages with one place in the site"
    faults = [f'{s}: in the sidebar of _quarto.yml, but there is no such page' for s in order if s not in pages]
    faults += [f'{s}: a page, but not in the sidebar of _quarto.yml' for s in pages if s not in order]
    faults += [f'{s}: twice in the sidebar of _quarto.yml' for s in sorted({s for s in order if order.count(s)>1})]
    outs = {}
    for p in pages.values():
        if p.out in outs: faults.append(f'{p.src}: becomes {p.out}, like {outs[p.out]}')
        outs[p.out] = p.src
    return faults

def render(proc, out, quarto_yml=root/'_quarto.yml', settings=root/'settings.ini'):
    "Render the notebooks of `proc` into the folder `out`: the pages in the sidebar's order. Raises `SiteError` with all faults"
    from configparser import ConfigParser
    proc, out, faults = Path(proc), Path(out), []
    ini = ConfigParser(delimiters=['='])
    ini.read(settings, encoding='utf-8')
    site = dict(title=ini['DEFAULT']['lib_name'], version=ini['DEFAULT']['version'], description=ini['DEFAULT']['description'])
    names = {}
    nav = sidebar(yaml.safe_load(Path(quarto_yml).read_text(encoding='utf-8')), names)
    order = [s for _,srcs in nav for s in srcs]
    found = sorted(p for p in proc.rglob('*.ipynb') if not any(o.startswith('.') for o in p.relative_to(proc).parts))
    pages = {p.src: p for p in (read_page(proc, f, faults) for f in found)}

    faults += sidebar_faults(order, pages)
    if faults: raise SiteError(faults)

    if out.exists(): shutil.rmtree(out)
    out.mkdir(parents=True)
    shutil.copy(root/'tools'/'site.css', out/'site.css')
    for p in pages.values():
        render_body(p)
        folder = out/Path(p.out).parent
        for name,data in p.files.items():
            (folder/'files').mkdir(parents=True, exist_ok=True)
            (folder/'files'/name).write_bytes(data)
    for f in proc.rglob('*'):                                    # pictures that notebooks refer to
        if f.suffix in ('.png', '.svg', '.jpg', '.gif'):
            (out/f.relative_to(proc)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, out/f.relative_to(proc))
    links = Links(pages.values(), out, faults)
    for p in pages.values(): links.rewrite(p)
    if faults: raise SiteError(faults)
    for p in [*pages.values(), *links.sources.values()]:
        f = out/p.out
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(full_html(site, p, nav, names, pages, order, wide=p.src in links.sources), encoding='utf-8')
    return [pages[s] for s in order]

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--proc', default=root/'_proc', type=Path, help='folder with the processed notebooks')
    ap.add_argument('--out', default=root/'_site_preview', type=Path, help='folder of the site (emptied first)')
    args = ap.parse_args(argv)
    try: pages = render(args.proc, args.out)
    except SiteError as e:
        print(f'{len(e.faults)} fault(s) in the documentation:\n{e}', file=sys.stderr)
        return 1
    print(f'{len(pages)} pages in {args.out}; view them with: python -m http.server -d {args.out}')

if __name__=='__main__': sys.exit(main())
