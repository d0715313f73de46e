"""Runs every notebook as `nbdev_test` does, each in a process of its own, and says which failed.

No notebook leans on what another imported. The processes are forked from one that has imported what nearly all of
them need, or half of the time would go into that.

    python tests/notebooks.py                      # all, two at a time
    python tests/notebooks.py nbs/004_metric.ipynb
"""
import multiprocessing
import os
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 (for the notebooks)
import numba  # noqa: F401
import pandas  # noqa: F401
from nbdev.test import test_nb

ROOT = Path(__file__).parents[1]


def run(path: Path) -> tuple:  # the path, whether it passed, seconds
    "Run one notebook in this process."
    os.chdir(ROOT / "nbs")
    return path, *test_nb(path, basepath=ROOT)


def main(*names):
    "Run the named notebooks, or all; the last layers first, since theirs take longest."
    numbered, tutorials = (sorted(ROOT.glob(f"nbs/{which}.ipynb"), reverse=True) for which in ("[0-9]*", "tutorials/*"))
    paths, failed = [Path(name).absolute() for name in names] or numbered + tutorials, []
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for path, passed, seconds in pool.imap_unordered(run, paths):
            print(f"{path.name:<40}{seconds:>6.0f} s{'' if passed else '   FAILED'}", flush=True)
            failed += [] if passed else [path.name]
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
