"Training with pixels made beside the network: the weights, and the files, that the host's pixels give."
import os
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = '''
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd

from rsnape_kit import config, fitting, train as training
from rsnape_kit.folds import folds
from rsnape_kit.labels import EXAM_LABELS, SLICE, STUDY
from rsnape_kit.models.backend import import_keras
from rsnape_kit.models.image import normalised
from rsnape_kit.pixels import Pixels
from rsnape_kit.predictions import Predictions

backend, devices, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])


def small(size, channels, expect, policy):
    keras = import_keras()
    inputs = keras.Input((size, size, channels), dtype="uint8")
    x = keras.layers.Conv2D(8, 3, 2, activation="relu")(normalised(channels)(inputs))
    x = keras.layers.Dropout(.3)(keras.layers.BatchNormalization(momentum=.9)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(x))


config.MODELS["small"] = small
names = np.repeat([f"study{i}" for i in range(12)], 6)
table = pd.DataFrame({STUDY: names, SLICE: [f"slice{i}" for i in range(72)], "intercept": -1024.})
rng = np.random.default_rng(0)
labels = pd.Series(rng.integers(0, 2, 72), pd.MultiIndex.from_frame(table[[STUDY, SLICE]]), dtype=float)
truth = Predictions(pd.DataFrame(0., pd.Index(np.unique(names), name=STUDY), EXAM_LABELS), labels)
stored = rng.normal(0, 600, (72, 32, 32)).astype(np.int16) + labels.to_numpy(np.int16)[:, None, None] * 400
source = SimpleNamespace(table=table, size=32, read=lambda rows, out: np.take(stored, rows, 0, out))
settings = config.TrainConfig(model="small", batch=16, phases=(config.Phase(2, .01), config.Phase(1, .003)), ema=.8,
                              pixels=Pixels(size=32))


def train(name, **more):
    return training.train("small", source, 0, settings, truth=truth, folds=folds(truth.exams.index, n=3), out=out / name,
                          earlier=(), devices=devices, progress=False, backend=backend, **more)


def stop(keeper, *_):
    raise fitting.OutOfTime("stopped after one epoch")


def state(run):
    with np.load(run / "checkpoint" / "state.npz") as arrays:
        return dict(arrays)


host = train("host", pixels_on_device=False)
with mock.patch.object(training, "on_tpu", lambda: True), mock.patch.object(training, "with_pixels", wraps=training.with_pixels) as used:
    there = train("device")
    assert used.call_count == 1  # a TPU's default
    with mock.patch.object(fitting.Keeper, "_report", stop):
        train("mixed")
mixed = train("mixed", pixels_on_device=False)
with mock.patch.object(fitting.Keeper, "_report", stop):
    train("other", pixels_on_device=False)
other = train("other", pixels_on_device=True)
expected = state(host)
for run in (there, mixed, other):
    found = state(run)
    assert found.keys() == expected.keys()
    worst = max(np.abs(found[name].astype(float) - value).max() for name, value in expected.items())
    print(run, worst, all(np.array_equal(found[n], v) for n, v in expected.items()))
    print((run / "history.csv").read_text() == (host / "history.csv").read_text(), (run / "config.json").read_text() == (host / "config.json").read_text())
print((host / "history.csv").read_text())
'''


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "devices"), [("tensorflow", 1), ("jax", 8)])
def test_a_run_may_change_where_its_pixels_are_made(tmp_path, backend, devices):
    pytest.importorskip(backend)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3",
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run([sys.executable, "-c", CODE, backend, str(devices), str(tmp_path)], env=env, capture_output=True,
                          text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
