#!/usr/bin/env python
"""Process the notebooks for the documentation: nbs/ -> _proc/, the input of Quarto and of tools/render_site.py.

Like `nbdev-proc-nbs`, but never tries to install Quarto. Runs import cells, exported cells and `show_doc` cells. All other cells keep the
output that was saved in the notebook."""
import argparse, os, sys
from functools import partial
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def show_all_docments():
    "Let `show_doc` print the docments of `*args` and `**kwargs`. fastcore 2.2 omits them, and gives the last one to the return value"
    from fastcore import docments
    docments.docments = partial(docments.docments, args_kwargs=True)

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--force', action='store_true', help='process all notebooks, including unchanged ones')
    args = ap.parse_args(argv)
    os.chdir(root)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    sys.path.insert(0, str(root))
    from nbdev.serve import proc_nbs
    from nbdev.quarto import refresh_quarto_yml
    show_all_docments()
    refresh_quarto_yml()
    # in this process: torch and fastai are imported once, which takes a third of the time of worker processes
    try: return proc_nbs(n_workers=0, force=args.force)
    except Exception as e:
        sys.exit(f"{e}\n\nThe documentation runs only cells that export, cells with an import, and show_doc. A cell with an import that "
                 "needs names from an ordinary cell fails here: move the import to a separate cell.")

if __name__=='__main__': print(f'processed notebooks are in {main()}')
