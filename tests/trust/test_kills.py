"""A stage that is killed at random moments, with all its processes, and started again, ends as one that never was.

In the gate, features and predictions are killed; the full set (`make trust`) has 40 kills in seven stages.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
from conftest import ROOT
from matrix import FULL, assert_same
from small_runs import keras_run, torch_run

from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.submission import check_submission
from rsnape_kit.competition.tables import read_csv
from rsnape_kit.inference.features import FeatureStore
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore

STORE = """
from rsnape_kit.store import build
build.STUDIES_PER_SHARD = 1
build.build_store({world}/"competition"/"train", {folder}/"store", size=64)
"""
KERAS = """
import keras
import rsnape_kit as rk

def mean(size, channels):
    inputs = keras.Input((size, size, channels), dtype="uint8")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(keras.layers.Dropout(.2)(x)))

rk.register_model("mean", mean)
store, truth = rk.SliceStore({world}/"store"), rk.Predictions.from_train_csv({world}/"competition"/"train.csv")
config = rk.KerasConfig(model="mean", pixels=rk.InputConfig((rk.PE,), size=32), mask=None, batch=8,
                        phases=(rk.Phase(12, 1e-2),))
rk.train("mean", store, 0, config, truth=truth, folds=rk.make_folds(truth.exams.index, truth, 2), out={folder}/"runs",
         earlier=(), weights=None, progress=False)
"""
TORCH = """
import rsnape_kit as rk
from petaformer_session import toy

source, truth = toy()
network = dict(width=.125, depth=.1, dim=24, layers=1, heads=4)
config = rk.PetaFormerConfig(network=network, pixels=rk.InputConfig((rk.PE,), "fixed", 32), groups=4, slices=3, batch=2,
                             phases=(rk.Phase(4, 1e-2, one_cycle=.25),), backbone_lr=1.)
folds = rk.make_folds(truth.exams.index, None, 4)
rk.train("petaformer", source, 0, config, truth=truth, folds=folds, out={folder}/"runs", earlier=(), device="cpu",
         progress=False)
"""
FEATURES = """
import rsnape_kit as rk
rk.compute_features({runs}[0], rk.SliceStore({world}/"store"), {folder}/"features", views=2, shard=1, progress=False)
"""
PREDICT = """
import rsnape_kit as rk
with warm.workers_in_forks():
    preds = rk.predict({runs}, {world}/"competition"/"test", tta=1, out={folder}/"results", progress=False)
for name, pred in preds.items():
    pred.save({folder}/"predictions"/name)
"""
SUBMIT = """
import rsnape_kit as rk
with warm.workers_in_forks():
    rk.submit({runs}, competition={world}/"competition", out={folder}/"submission.csv", tta=1, progress=False)
"""
DEMO = """
from rsnape_kit.demo import DemoSettings, demo
with warm.workers_in_forks():
    demo({folder}, DemoSettings(24, 3, 12, 128, recipe="quick", models=("petaformer",)), at_once=1)
"""


def trained(folder: Path):
    run, = (folder / "runs").iterdir()
    history = pd.read_csv(run / "history.csv", float_precision="round_trip")
    return Predictions.load(run / "oof"), history.drop(columns=["seconds", "cpu_seconds"])


def features(folder: Path):
    store, names = FeatureStore(folder / "features"), ("slices", "z", "features", "logits")
    return {uid: [getattr(store.study(uid), name) for name in names] for uid in sorted(store.studies)}


def predictions(folder: Path):
    return {name: Predictions.load(folder / "predictions" / name) for name in ("efficientnet", "petaformer")}


def submission(folder: Path):
    assert json.loads((folder / "submit.json").read_text())["finished"]
    return (folder / "submission.csv").read_bytes()


def stored(folder: Path):
    store = SliceStore(folder / "store")
    return store.table, store[:]


@dataclass(frozen=True)
class Stage:
    "Code that a process runs, what it leaves, how often it is killed in the full set and in the gate."
    code: str
    read: object
    kills: int
    in_gate: int = 0


STAGES = {"store": Stage(STORE, stored, 6), "train with Keras": Stage(KERAS, trained, 6),
          "train with PyTorch": Stage(TORCH, trained, 6), "features": Stage(FEATURES, features, 6, 1),
          "predict": Stage(PREDICT, predictions, 6, 1), "submit": Stage(SUBMIT, submission, 6),
          "demo": Stage(DEMO, submission, 4)}
LEFT_OUT = "in the full set: make trust"
CHOSEN = [pytest.param(name, marks=pytest.mark.skipif(not (FULL or stage.in_gate), reason=LEFT_OUT))
          for name, stage in STAGES.items()]


class World:
    "A competition, a store of its training studies, and a run of each framework."

    def __init__(self, folder: Path):
        self.folder = folder
        made = make_competition(folder / "competition", 6, 3, 6, 128, 1, "demo", clean=True)  # emboli in both folds
        build_store(made / "train", folder / "store", size=64)
        self.runs = [keras_run(folder / "runs", "efficientnet"), torch_run(folder / "runs")]
        self.tables = [read_csv(made / f"{name}.csv") for name in ("sample_submission", "test")]

    def start(self, stage: Stage, folder: Path) -> warm.Process:
        "Start a stage in a process group of its own."
        paths = {"folder": f"Path({str(folder)!r})", "world": f"Path({str(self.folder)!r})"}
        paths["runs"] = list(map(str, self.runs))
        code = f"import sys, warm\nfrom pathlib import Path\n{stage.code.format(**paths)}"
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "KERAS_BACKEND": "tensorflow"}
        with open(folder / "log", "w") as log:
            return warm.popen([sys.executable, "-c", code], env=env, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    warm.server("both")  # before this process uses a framework
    return World(tmp_path_factory.mktemp("world"))


def finish(world: World, stage: Stage, folder: Path) -> float:
    "Run a stage to its end; return the seconds."
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    assert world.start(stage, folder).wait(600) == 0, (folder / "log").read_text()[-3000:]
    return time.monotonic() - began


def killed(world: World, stage: Stage, folder: Path, after: float) -> bool:
    "Start a stage and kill it with all its processes after some seconds; return whether it still ran."
    folder.mkdir(exist_ok=True)
    process = world.start(stage, folder)
    try:
        assert process.wait(after) == 0, (folder / "log").read_text()[-3000:]
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


@pytest.mark.parametrize("name", CHOSEN)
def test_killed_at_random_moments_and_started_again_it_ends_the_same(world, tmp_path, name):
    "A stage that ends before the moment of its kill starts anew in an empty folder, with earlier moments."
    stage, rng, folder, kills = STAGES[name], random.Random(name), tmp_path / "0", 0
    until = finish(world, stage, tmp_path / "unbroken")
    while kills < (stage.kills if FULL else stage.in_gate):
        if killed(world, stage, folder, rng.uniform(.02, .98) * until):
            kills += 1
            if name == "submit" and (folder / "submission.csv").exists():
                assert check_submission(folder / "submission.csv", *world.tables) == []
            continue
        assert_same(stage.read(folder), stage.read(tmp_path / "unbroken"))
        folder, until = tmp_path / str(int(folder.name) + 1), .7 * until
    finish(world, stage, folder)
    assert_same(stage.read(folder), stage.read(tmp_path / "unbroken"))


BEFORE_THE_HISTORY = """
import os, signal
from rsnape_kit.runs import folder
real = folder.atomic_write

def write(path, text, **how):
    if path.name == "history.csv" and text.count(chr(10)) == {rows}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, text, **how)

folder.atomic_write = write
"""  # at the end of the last epoch: its checkpoint is there, the run's own history lacks its row


@pytest.mark.skipif(not FULL, reason=LEFT_OUT)
@pytest.mark.parametrize(("name", "epochs"), [("train with Keras", 12), ("train with PyTorch", 4)])
def test_killed_between_its_last_checkpoint_and_its_history_it_ends_the_same(world, tmp_path, name, epochs):
    stage = STAGES[name]
    finish(world, stage, tmp_path / "unbroken")
    (tmp_path / "killed").mkdir()
    dying = Stage(BEFORE_THE_HISTORY.replace("{rows}", str(1 + epochs)) + stage.code, stage.read, 1)
    assert world.start(dying, tmp_path / "killed").wait(600) == -signal.SIGKILL
    finish(world, stage, tmp_path / "killed")
    assert_same(stage.read(tmp_path / "killed"), stage.read(tmp_path / "unbroken"))


def children_of(pid: int) -> list:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def runs(pid: int) -> bool:
    "Whether a process exists and is no zombie."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


ALL_FOLDS = """
from dataclasses import replace
import rsnape_kit as rk
rk.RECIPES["demo"]["petaformer"] = replace(rk.RECIPES["demo"]["petaformer"], batch=2, slice_warmup=None)
from rsnape_kit.training.cross_validation import CrossValidation
train_csv = {world}/"competition"/"train.csv"
with warm.workers_in_forks():
    rk.train_all(CrossValidation({world}/"store", train_csv, {folder}/"runs", ("petaformer",), 2, "demo"), 2)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the child processes")
def test_the_trainings_of_a_killed_parent_end_by_themselves(world, tmp_path):
    "Only the parent is killed; each training is in a process of its own."
    parent = world.start(Stage(ALL_FOLDS, None, 1), tmp_path)
    while len(list(tmp_path.glob("logs/*.steps"))) < 2:  # both have begun to train
        assert parent.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(.05)
    children = children_of(parent.pid)
    assert len(children) == 2 and all(map(runs, children))
    os.kill(parent.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(map(runs, children)) and time.monotonic() < end:
        time.sleep(.05)
    left = [pid for pid in children if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not np.any([(run / "oof").exists() for run in (tmp_path / "runs").iterdir()])
