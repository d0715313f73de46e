"""Runs every notebook as `nbdev_test` does, each in a process of its own, and says which failed.

No notebook leans on what another imported. The processes are forked from one that has imported what nearly all of
them need, or each would begin with a second or two of that.

    python tests/notebooks.py                      # all, two at a time
    python tests/notebooks.py nbs/01_competition/04_metric.ipynb
"""
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 (for the notebooks)
import numba  # noqa: F401
import pandas  # noqa: F401
from nbdev.config import get_config
from nbdev.test import test_nb

ROOT = Path(__file__).parents[1]


def run(path: Path):
    "Run one notebook and end this process."
    os.chdir(path.parent)
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not passed)


def main(*names):
    "Run the named notebooks, or all; the last layers first, since theirs take longest."
    numbered = sorted([*ROOT.glob("nbs/[0-9]*.ipynb"), *ROOT.glob("nbs/[0-9]*/*.ipynb")], reverse=True)
    todo = [Path(name).absolute() for name in names] or [*numbered, *sorted(ROOT.glob("nbs/tutorials/*.ipynb"))]
    running, failed = {}, []
    while todo or running:
        while todo and len(running) < 2:
            process = multiprocessing.get_context("fork").Process(target=run, args=(todo[0],))
            process.start()
            running[process.sentinel] = process, todo.pop(0), time.time()
        for sentinel in wait(list(running)):
            process, path, began = running.pop(sentinel)
            process.join()
            failed += [str(path.relative_to(ROOT))] if process.exitcode else []
            name, ending = str(path.relative_to(ROOT / "nbs")), "   FAILED" if process.exitcode else ""
            print(f"{name:<44}{time.time() - began:>6.0f} s{ending}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
