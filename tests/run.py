"""Run every notebook and every test file, each in a process of its own, as many at a time as there are cores.

What took longest is printed at the end.

Processes are forked from one that has imported what they need: a start of TensorFlow or PyTorch costs four CPU-seconds.
Files that name no framework, or need to import it themselves, start from a process without any. Before many files,
compiled functions are compiled once: processes that start together without a cache would each do it.

    python tests/run.py                                               # all
    python tests/run.py nbs/01_competition/04_metric.ipynb tests/dicom
"""
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIGHT = ("matplotlib.pyplot", "numba.typed", "pandas", "pydicom", "scipy.ndimage", "scipy.optimize", "scipy.stats",
         "pytest", "nbdev.test")
FRAMEWORKS = "torch._dynamo", "fastai.callback.all", "keras"  # PyTorch first: after TensorFlow it may crash
NEED_FRAMEWORKS = re.compile(r"\b(torch|keras|tensorflow|fastai|predict_runs)|^import warm$", re.M)
STARTS_WORKERS = re.compile(r"\b(demo|here|predict|submit|train_all)\(")
COLD = "03_adapters", "08_registry"  # look at which frameworks are imported
FIRST = "test_demo", "test_submit", "test_learning", "16_commands", "test_predict", "test_rehearse"  # the longest
AT_ONCE = min(max(2, os.cpu_count() or 2), 4)  # a process takes up to 3 GB
MANY = 10  # files for which it pays to compile first


class Times:
    "A pytest plugin that keeps the seconds of each test."

    def __init__(self):
        self.seconds = {}

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration


def run_notebook(path: Path) -> bool:
    "Run a notebook in its folder, as `nbdev_test` does, but with forks as worker processes; True if it passed."
    from nbdev.config import get_config
    from nbdev.test import test_nb
    if "COVERAGE_PROCESS_CONFIG" in os.environ:  # `make coverage`
        import covered_cells
        test_nb.__globals__["CaptureShell"] = covered_cells.CoveredShell
    os.chdir(path.parent)
    with warm_workers() if "keras" in sys.modules and STARTS_WORKERS.search(text_of(path)) else nullcontext():
        return test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)[0]


@contextmanager
def warm_workers():
    "Make training and prediction fork their worker processes from one with the frameworks imported."
    import warm
    warm.server("both")  # before this process uses a framework
    try:
        with warm.workers():
            yield
    finally:
        warm.close()


def run_tests(path: Path, note: Path) -> bool:
    "Run a file of tests and note the seconds of each; True if all passed."
    import pytest
    times = Times()
    failed = pytest.main(["-q", str(path)], plugins=[times])
    note.write_text(json.dumps(times.seconds))
    return not failed


def start(path: Path, folder: Path) -> int:
    "Fork a process that runs one file, with its output in `folder`, and return its id."
    pid = os.fork()
    if pid == 0:
        passed = False
        try:
            with open(folder / "output", "wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            passed = run_notebook(path) if path.suffix == ".ipynb" else run_tests(path, folder / "tests.json")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(not passed)
    return pid


def compile_functions(folder: Path):
    "Use what the library compiles: the first process fills the cache, later ones load it from there for their forks."
    from concurrent.futures import ThreadPoolExecutor

    import tqdm

    import rsnape_kit as rk

    tqdm.tqdm.monitor_interval = 0  # no thread, which forks would lack
    with ThreadPoolExecutor(1) as one, open(os.devnull, "w") as bars, redirect_stderr(bars):
        made = rk.make_competition(folder / "made", 4, 1, slices=6, size=64, difficulty="demo", executor=one)
        store = rk.SliceStore(rk.build_store(rk.scan(made / "train"), folder / "store", executor=one))
    truth = rk.Predictions.from_train_csv(made / "train.csv")
    for pixels in (rk.InputConfig(size=32), rk.InputConfig((rk.PE,), "fixed", 48, "bilinear")):
        rk.ImageBatches(store, truth, batch=4, pixels=pixels, mask=rk.SideMask(), affine=rk.AffineRange())[0]


def run(paths: list, imports: tuple, scratch: Path) -> list:
    "Run files from a process that has imported some modules; (name, passed, seconds, CPU-seconds) of each."
    for name in imports:
        importlib.import_module(name)
    if "keras" in imports:
        importlib.import_module("warm").trace_plainly()
    importlib.import_module("numba").njit(lambda: 0)()  # the first compiled function loads the rest of numba
    if len(paths) > MANY:
        compile_functions(scratch)
    gc.freeze()  # collections in the forks pass over what was imported
    waiting, running, done = list(paths), {}, []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            path, folder = waiting.pop(0), Path(tempfile.mkdtemp(dir=scratch))
            running[start(path, folder)] = path, folder, time.time()
        pid, status, usage = os.wait4(-1, 0)
        path, folder, began = running.pop(pid)
        name, cpu = str(path.relative_to(ROOT)), usage.ru_utime + usage.ru_stime
        print(f"{name:<48}{time.time() - began:>6.0f} s{cpu:>6.0f} CPU-s{'   FAILED' if status else ''}", flush=True)
        text = (folder / "output").read_text(errors="replace")
        if status or path.suffix == ".py":
            print("\n".join(text.splitlines()[-200 if status else -1:]), flush=True)
        done.append((name, not status, time.time() - began, cpu))
        if (folder / "tests.json").exists():
            seconds = json.loads((folder / "tests.json").read_text())
            done += [(test, True, seconds[test], 0) for test in seconds]
    return done


def in_a_fork(paths: list, imports: tuple) -> list:
    "`run` in a process of its own, so that its imports do not reach the next."
    with tempfile.TemporaryDirectory() as scratch:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                Path(scratch, "done.json").write_text(json.dumps(run(paths, imports, Path(scratch))))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the test runner itself failed")
        return json.loads(Path(scratch, "done.json").read_text())


def text_of(path: Path) -> str:
    "The code of a notebook or file."
    text = path.read_text()
    if path.suffix == ".py":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def files(names: list) -> list:
    "The named notebooks and tests and those below named folders, or all; the longest come first."
    roots = [ROOT / name for name in names or ("nbs", "tests")]
    found = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*")))
             if (path.suffix == ".ipynb" and path.parent.name != "kernels") or path.match("test_*.py")]
    return sorted(found, key=lambda path: (path.stem not in FIRST, FIRST.index(path.stem) if path.stem in FIRST else 0,
                                           path.parent.name == "tutorials", -len(text_of(path))))


def main(*names):
    paths = files(list(names))
    heavy = [path for path in paths if NEED_FRAMEWORKS.search(text_of(path)) and path.stem not in COLD]
    began, done = time.time(), []
    for group, imports in ((heavy, LIGHT + FRAMEWORKS), ([path for path in paths if path not in heavy], LIGHT)):
        done += in_a_fork(group, imports) if group else []
    print("\nthe slowest:")
    for name, _, seconds, _ in sorted(done, key=lambda each: -each[2])[:10]:
        print(f"{seconds:>6.0f} s  {name}")
    failed = [name for name, passed, *_ in done if not passed]
    counted = [name for name, *_ in done if "::" not in name]
    print(f"\n{time.time() - began:.0f} s, {sum(each[3] for each in done) / 60:.1f} CPU-minutes")
    print(f"{len(counted) - len(failed)} passed, {len(failed)} failed")
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as cache:  # what JAX compiled for one test serves the next
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                       "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        main(*sys.argv[1:])
