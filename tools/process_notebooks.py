#!/usr/bin/env python
"""Process the notebooks for the documentation: nbs/ -> _proc/, which is what Quarto, or tools/render_site.py, renders.

Like `nbdev-proc-nbs`, but never tries to install Quarto. Runs import cells, exported cells and `show_doc` cells;
everything else keeps the output that was saved in the notebook."""
import argparse, os, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--force', action='store_true', help='process every notebook, also unchanged ones')
    ap.add_argument('--n-workers', type=int, default=0,
                    help='processes; 0, the default: this one, which takes a third of the time of another')
    args = ap.parse_args(argv)
    os.chdir(root)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    sys.path.insert(0, str(root))
    from nbdev.serve import proc_nbs
    from nbdev.quarto import refresh_quarto_yml
    refresh_quarto_yml()
    try: return proc_nbs(n_workers=args.n_workers, force=args.force)
    except Exception as e:
        sys.exit(f'{e}\n\nThe documentation runs the cells that export, the cells with an import, and show_doc; no others. '
            'A cell with an import that needs names from an ordinary cell fails here: give the import a cell of its own.')

if __name__=='__main__': print(f'processed notebooks are in {main()}')
