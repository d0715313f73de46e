"Faults of the machine: a full disk, a clock that jumps, two processes in one folder, workers that are killed."
import contextlib
import errno
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

from matrix import Case, error, fallback, refused, rsnape, sound, unchanged

DISK, CLOCK, LOCK, WORKER = "full disk", "clock that jumps", "two processes in one folder", "worker process that ends"


# A full disk: a file system of some KiB where mounting one is allowed, else a limit for the size of a file.
@contextlib.contextmanager
def full_disk(folder: Path, size: int = 16):  # KiB
    "Yield a folder in which there is place for some KiB."
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size << 10, hard))
    try:
        yield disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)  # lazily: an exception may hold a file open


def on_full_disk(write, folder: Path):
    "Write something to a full disk; fail if a part of a file is left there."
    with full_disk(folder) as disk:
        try:
            write(disk)
        finally:
            left = [path.name for path in disk.rglob("*") if path.is_file()]
            assert not {name for name in left if name == "result" or name.endswith((".new", ".tmp", ".part"))}, left


@sound
def studies(folder: Path):
    "Two training studies, and two to predict, as DICOM."
    from rsnape_kit.phantom.generate import make_competition

    make_competition(folder, 2, 2, slices=4, size=128, difficulty="demo", clean=True)


def numbers(count: int):
    import numpy as np

    return np.random.default_rng(0).normal(size=count)


def store(disk: Path):
    rsnape("store", studies(disk.parent) / "train", disk / "result")


def scan(disk: Path):
    with mock.patch("rsnape_kit.scan", lambda folder: _wide_table()):
        rsnape("scan", disk.parent, "--out", disk / "result")


def _wide_table():
    import pandas as pd

    return pd.DataFrame({"path": "a", "StudyInstanceUID": "a", "problem": "", "position": numbers(9000)})


def phantom(disk: Path):
    from rsnape_kit.phantom.generate import make_competition

    make_competition(disk / "study", 1, 1, slices=4, size=128, difficulty="demo", clean=True)


def checkpoint(disk: Path, torch: bool):
    from rsnape_kit.runs.folder import saving_checkpoint

    with saving_checkpoint(disk, {"epoch": 1}, [{"epoch": 0}]) as folder:
        if torch:
            import torch

            torch.save({"model": torch.zeros(100_000)}, folder / "state.pt")
        else:
            import numpy as np

            np.savez(folder / "state.npz", kernel=numbers(100_000))


def weights(disk: Path):
    import torch

    from rsnape_kit.utils.files import atomic_file

    with atomic_file(disk / "result") as fresh:
        torch.save({"model": torch.zeros(100_000)}, fresh)


def truth(count: int = 400):
    from rsnape_kit.testing import simulate_truth

    return simulate_truth(count, slices=(5, 8, 12))


def submission(disk: Path):
    from rsnape_kit.competition.submission import write_submission
    from rsnape_kit.competition.tables import sample_submission

    pred = truth()
    write_submission(pred, sample_submission(pred.images.index), disk / "result")


def result(disk: Path):
    from rsnape_kit.inference.results import save_result

    save_result(disk, "result", _long(truth(1)))


def _long(pred):
    "Predictions of one study of 4,000 slices."
    import pandas as pd

    from rsnape_kit.competition.predictions import Predictions

    slices = pd.MultiIndex.from_product([pred.exams.index, map(str, range(4000))], names=pred.images.index.names)
    return Predictions(pred.exams, pd.Series(.5, slices))


def settings(disk: Path):
    from rsnape_kit.ensemble.blending import preset_weights

    (disk / "filler").write_bytes(b"0" * (16 << 10))
    preset_weights("original").save(disk / "result")


def submit_with_full_work_folder(folder: Path):
    "The folder for predictions is full, the one of submission.csv is not."
    from small_runs import torch_run

    from rsnape_kit.competition.submission import check_submission
    from rsnape_kit.competition.tables import read_csv
    from rsnape_kit.dicom.slices import scan
    from rsnape_kit.kaggle.submitter import submit

    made, run = studies(folder), torch_run(folder / "runs")
    table = scan(made / "test")
    with full_disk(folder) as disk:
        (disk / "filler").write_bytes(b"0" * (12 << 10))
        state = submit([run], source=table, competition=made, out=folder / "submission.csv", work=disk / "work",
                       progress=False)
    print("; ".join(state.problems.values()))
    return (state.finished, check_submission(folder / "submission.csv", *(read_csv(made / f"{name}.csv") for name in (
        "sample_submission", "test")))), (False, [])


# The wall clock is set forward by a day each time that it is read.
@contextlib.contextmanager
def jumping_clock():
    days = iter(range(1, 10**9))
    real = time.time()
    with mock.patch("time.time", lambda: real + 86400 * next(days)):
        yield


def under_jumping_clock(measure, folder: Path) -> tuple:
    "Return a result with the clock that jumps, and one without."
    with jumping_clock():
        got = measure(folder)
    return got, measure(folder)


def supervised(folder: Path) -> int:
    "How often a worker is looked at that is done at the third time."
    from rsnape_kit.inference.supervisor import run_workers

    class Done:
        looks = 0

        def start(self):
            pass

        def alive(self):
            self.looks += 1
            return self.looks < 3

        def stop(self):
            pass

    worker = Done()
    run_workers([worker], time.monotonic() + 3600)
    return worker.looks


def predicted(folder: Path) -> list:
    "The studies that a worker begins."
    import numpy as np
    import pandas as pd

    from rsnape_kit.inference.worker import Job, _studies
    from rsnape_kit.testing import ArraySource

    table = pd.DataFrame({"StudyInstanceUID": list("abc"), "SOPInstanceUID": list("012")})
    studies = tuple((name, [i]) for i, name in enumerate("abc"))
    source, in_an_hour = ArraySource(np.zeros((3, 8, 8), np.int16), table), time.monotonic() + 3600
    job = Job("keras", source, studies, {("run", 0): folder}, in_an_hour)
    return [key for key, *_ in _studies(job)]


def stops(folder: Path) -> bool:
    "Whether a PyTorch training with an hour left ends before an epoch."
    from fastai.callback.core import CancelFitException

    from rsnape_kit.training.torch_checkpoint import Checkpoint

    hook = Checkpoint(folder, time.monotonic() + 3600)
    hook.history, hook.learn = [{"seconds": 60}], mock.Mock(n_epoch=3, dls=mock.Mock(device="cpu"))
    try:
        hook.stop_in_time()
    except CancelFitException:
        return True
    return False


def epochs(folder: Path) -> bool:
    "Whether a Keras training with an hour left goes on after a step; `fit_phases` gives it its own clock."
    import inspect

    from rsnape_kit.training.keras_fit import OutOfTime, ResumableCallback, fit_phases

    clock = inspect.signature(fit_phases).parameters["clock"].default
    state = ResumableCallback(None, folder, [], 0, None, 1, None, [], time.monotonic() + 3600, False, clock)
    state.bar, state.epoch = mock.Mock(), 0
    try:
        state.step(0, .5)
    except OutOfTime:
        return False
    return True


def session_left(folder: Path) -> bool:
    "Whether a session of twelve hours has some left, by its start."
    from rsnape_kit.kaggle.runtime import session

    here = session(folder, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    return abs(here.left() - (12 * 3600 - (time.monotonic() - here.started))) < 60


# Two processes in one folder: this one holds the lock that another would.
def second_training(folder: Path, model: str):
    import numpy as np

    import rsnape_kit as rk
    from rsnape_kit.utils.processes import exclusive

    labels = truth(40)
    table = labels.images.index.to_frame(index=False)
    source = rk.ArraySource(np.zeros((len(table), 8, 8), np.int16), table)
    folds = rk.make_folds(labels.exams.index, labels, 2)
    with exclusive(folder / "runs" / f"{model}-fold0-seed0"):
        rk.train(model, source, 0, truth=labels, folds=folds, out=folder / "runs", weights=None)


def second_build(folder: Path):
    from rsnape_kit.utils.processes import exclusive

    with exclusive(folder / "store"):
        rsnape("store", studies(folder) / "train", folder / "store")


def second_prediction(folder: Path):
    from small_runs import torch_run

    from rsnape_kit.inference.predict_runs import exclusive_folder

    run = torch_run(folder / "runs")
    with exclusive_folder(folder / "out" / "results"):
        rsnape("predict", run, "--dicom", studies(folder) / "test", "--out", folder / "out")


# A worker whose processes end at once; what the supervisor does then is what is tested.
def supervise(folder: Path, *ends: str) -> tuple:
    "Run a worker of one run, whose processes execute some code; return the number of starts, and why it was given up."
    from rsnape_kit.inference.supervisor import Worker, run_workers
    from rsnape_kit.inference.worker import Job

    class Short(Worker):
        starts = 0

        def start(self):
            self.left, code = self.job.left(), ends[min(self.starts, len(ends) - 1)]
            self.starts += 1
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=log, stderr=log)

    results = folder / "results"
    results.mkdir()
    job = Job("torch", None, (("study", [0]),), {(str(folder / "run"), 0): results}, note=folder / "now")
    worker = Short(job, None, folder)
    run_workers([worker], time.monotonic() + 60)
    note = results / "unusable"
    return worker.starts, note.read_text() if note.exists() else ""


KILLED, DONE = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "pass"


def killed_while_loading(folder: Path, times: int) -> tuple:
    return supervise(folder, *[KILLED] * times, DONE), (times + 1, "")


def never_loads(folder: Path):
    starts, note = supervise(folder, KILLED)
    print(note)
    return starts, 3


def disk_of_results_is_full(folder: Path):
    supervise(folder, f"import sys; sys.exit({errno.ENOSPC})")


def full(what: str, write, *words: str, how=error) -> Case:
    expected = refused(*words, "free space") if how is refused else error(OSError, *words, "free space")
    return Case(DISK, what, partial(on_full_disk, write), expected)


CASES = [
    full("store", store, "disk/result", how=refused),
    full("slices table", scan, "disk/result", how=refused),
    full("synthetic competition", phantom, "disk/study"),
    full("checkpoint of Keras", partial(checkpoint, torch=False), "disk/checkpoint"),
    full("checkpoint of PyTorch", partial(checkpoint, torch=True), "disk/checkpoint"),
    full("weights of PyTorch", weights, "disk/result"),
    full("submission.csv", submission, "disk/result"),
    full("out-of-fold predictions", lambda disk: truth(4000).save(disk / "result"), "disk/result"),
    full("predictions for one study", result, "disk/result"),
    full("blend weights", settings, "disk/result"),
    Case(DISK, "predictions of a submission", submit_with_full_work_folder, fallback("disk/work", "free space")),
    Case(DISK, "predictions of a worker", disk_of_results_is_full, error(OSError, "No space left", "free space")),
    *(Case(CLOCK, what, partial(under_jumping_clock, measure), unchanged()) for what, measure in (
        ("workers", supervised), ("studies of a worker", predicted), ("training with PyTorch", stops),
        ("training with Keras", epochs), ("session", session_left))),
    *(Case(LOCK, f"train {model}", partial(second_training, model=model),
           error(RuntimeError, f"{model}-fold0-seed0", "another process")) for model in ("efficientnet", "petaformer")),
    Case(LOCK, "store", second_build, refused("store", "another process")),
    Case(LOCK, "predict", second_prediction, refused("results", "another process")),
    *(Case(WORKER, f"killed {times} while it loads", partial(killed_while_loading, times=n), unchanged())
      for n, times in ((1, "once"), (2, "twice"))),
    Case(WORKER, "killed whenever it loads", never_loads, fallback("again and again", "tries it again")),
]
