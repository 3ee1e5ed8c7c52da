#!/usr/bin/env python
"""Write the parameter shapes of the benchmark's models to fastxtend_opt/tools/data/shapes.json.

    python tools/make_shapes.py [--out FILE]

Needs torchvision and fastai, and `transformers` for DeBERTa. No weights are downloaded: models are built from their configuration.
A model whose package is missing keeps the entry that the file already has, and the script says so.

Format: a model is a list of blocks `[repeat, [[group, decay, shape], ...]]`, parameters in the model's own order. `group` is the layer
group in the layout with layer groups, `decay` is 0 for the parameters that fastai excludes from weight decay (norms and biases).
"""
import argparse, json, sys, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
OUT = Path(__file__).resolve().parents[1]/'fastxtend_opt/tools/data/shapes.json'


def rows(model, group):
    "One `(group, decay, shape)` per parameter: `group` maps a parameter's name to its layer group"
    from fastai.torch_core import norm_types
    from torch import nn
    norms = {id(p) for m in model.modules() if isinstance(m, (norm_types, nn.GroupNorm)) for p in m.parameters(recurse=False)}
    return [(group(n), int(not (id(p) in norms or n.endswith('bias'))), tuple(p.shape)) for n,p in model.named_parameters()]


def compress(rs, max_period=40):
    "Greedy run-length coding of repeated sequences"
    out,i = [],0
    while i < len(rs):
        best = (0, 1, 1)
        for period in range(1, min(max_period, (len(rs)-i)//2)+1):
            n = 1
            while rs[i+n*period:i+(n+1)*period] == rs[i:i+period]: n += 1
            best = max(best, ((n-1)*period, -period, n))
        saved,period,n = best[0],abs(best[1]),best[2]
        if saved < 2: period,n = 1,1
        if n == 1 and out and out[-1][0] == 1: out[-1][1].append(rs[i])
        else: out.append([n, list(rs[i:i+period])])
        i += n*period
    return out


def expand(blocks): return [tuple(r) for n,b in blocks for _ in range(n) for r in b]


def head(prefix): return lambda n: int(n.startswith(prefix))


def xresnets():
    import fastai
    from fastai.vision.models import xresnet as x
    for name,title in (('xresnet18','XResNet18'), ('xresnet34','XResNet34'), ('xresnet50','XResNet50'), ('xse_resnext50','XSE-ResNeXt50'),
                       ('xresnet101','XResNet101')):
        m = getattr(x, name)()
        how = f'fastai {fastai.__version__}: fastai.vision.models.xresnet.{name}(), 1000 classes; groups: body, last Linear'
        yield name, title, how, m, head(f'{len(m)-1}.')


def torchvisions():
    import torch, torchvision as tv
    v = tv.__version__.split('+')[0]
    with torch.device('meta'):
        for name,title in (('convnext_tiny','ConvNeXt Tiny'), ('convnext_small','ConvNeXt Small')):
            how = f'torchvision {v}: {name}(), 1000 classes; groups: features, classifier'
            yield name, title, how, getattr(tv.models, name)(), head('classifier')
        kw = dict(image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
        how = f"torchvision {v}: VisionTransformer({', '.join(f'{k}={o}' for k,o in kw.items())}), 1000 classes; groups: body, heads"
        yield 'vit_s16', 'ViT-S/16', how, tv.models.VisionTransformer(**kw), head('heads')


def debertas():
    import torch, transformers
    # the published config.json of microsoft/deberta-base where it differs from the class's defaults
    kw = dict(relative_attention=True, pos_att_type='c2p|p2c', position_biased_input=False)
    with torch.device('meta'): m = transformers.DebertaModel(transformers.DebertaConfig(**kw))
    def group(n):
        parts = n.split('.')
        return 1+int(parts[2])//4 if parts[:2] == ['encoder','layer'] else 0
    how = (f"transformers {transformers.__version__}: DebertaModel(DebertaConfig({', '.join(f'{k}={o!r}' for k,o in kw.items())})), "
           "the settings of microsoft/deberta-base, without a head; groups: embeddings, layers 0-3, 4-7, 8-11")
    yield 'deberta_base', 'DeBERTa Base', how, m, group


def mlps():
    import torch
    from torch import nn
    with torch.device('meta'): m = nn.Sequential(*[nn.Linear(32, 32) for _ in range(2000)])
    how = f"torch {torch.__version__.split('+')[0]}: 2,000 x nn.Linear(32, 32); groups: first and second half"
    yield 'mlp2000', '2,000-layer MLP', how, m, lambda n: int(int(n.split('.')[0]) >= 1000)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', type=Path, default=OUT, help='file to write')
    a = ap.parse_args()
    old = json.loads(a.out.read_text())['models'] if a.out.exists() else {}
    models = {}
    for make,names in ((mlps, ['mlp2000']), (xresnets, ['xresnet18','xresnet34','xresnet50','xse_resnext50','xresnet101']),
                       (torchvisions, ['convnext_tiny','convnext_small','vit_s16']), (debertas, ['deberta_base'])):
        try:
            for name,title,how,m,group in make():
                rs = rows(m, group)
                blocks = compress(rs)
                assert expand(blocks) == rs, name
                models[name] = dict(title=title, how=how, tensors=len(rs), elements=sum(p.numel() for p in m.parameters()), blocks=blocks)
        except ImportError as e:
            print(f'{e}: kept as they were: {names}', file=sys.stderr)
            models |= {n:old[n] for n in names if n in old}
    lines = []
    for name,m in models.items():
        blocks = ',\n   '.join(json.dumps(b, separators=(',',':')) for b in m['blocks'])
        meta = ', '.join(f'{json.dumps(k)}: {json.dumps(o)}' for k,o in m.items() if k!='blocks')
        lines.append(f' {json.dumps(name)}: {{{meta}, "blocks": [\n   {blocks}]}}')
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text('{"format": 1, "made_by": "tools/make_shapes.py", "models": {\n' + ',\n'.join(lines) + '\n}}\n')
    for name,m in models.items(): print(f"{name:16} {m['tensors']:5} tensors {m['elements']/1e6:7.2f} M")


if __name__ == '__main__': main()
