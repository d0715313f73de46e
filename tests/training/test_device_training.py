"A run may render pixels on the host or the device, and change that when it resumes: files and weights are equal."
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

from rsnape_kit.runs import config
from rsnape_kit.training import keras_fit as fitting, keras_trainer as training, trainer
from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, SLICE, STUDY
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.efficientnet import normalised
from rsnape_kit.models.registry import register_model
from rsnape_kit.models.volume import add_heads
from rsnape_kit.transforms.render import InputConfig
from rsnape_kit.competition.predictions import Predictions

backend, devices, model, first, then, out = sys.argv[1:]


def features(inputs):
    layers = import_keras().layers
    x = layers.Conv2D(8, 3, 2, activation="relu") if inputs.ndim == 4 else layers.Conv3D(8, 3, (1, 2, 2), "same")
    x = layers.BatchNormalization(momentum=.9)(x(normalised(inputs.shape[-1])(inputs)))
    return layers.Dropout(.3)(x)


def slices(size, channels):
    keras = import_keras()
    inputs = keras.Input((size, size, channels), dtype="uint8")
    head = keras.layers.Dense(1, "sigmoid")
    return keras.Model(inputs, head(keras.layers.GlobalAveragePooling2D()(features(inputs))))


def studies(size, channels, frames, expect_exam, expect_image):
    keras = import_keras()
    inputs = keras.Input((frames, size, size, channels), dtype="uint8")
    return keras.Model(inputs, add_heads(features(inputs), expect_image, expect_exam))


register_model("slices", slices)
register_model("studies", studies)
rng, names = np.random.default_rng(0), np.repeat([f"study{i:02}" for i in range(24)], 6)
table = pd.DataFrame({STUDY: names, SLICE: [f"slice{i}" for i in range(144)], "intercept": -1024.})
labels = pd.Series(rng.integers(0, 2, 144), pd.MultiIndex.from_frame(table[[STUDY, SLICE]]), dtype=float)
exams = pd.DataFrame(rng.integers(0, 2, (24, 9)), pd.Index(np.unique(names), name=STUDY), EXAM_LABELS, float)
truth = Predictions(exams, labels)
stored = rng.normal(0, 600, (144, 32, 32)).astype(np.int16) + labels.to_numpy(np.int16)[:, None, None] * 400
source = SimpleNamespace(table=table, size=32, read=lambda rows, out: np.take(stored, rows, 0, out))
settings = config.KerasConfig(model=model, pixels=InputConfig(size=32), frames=4, batch=8, loss="metric", ema=.8,
                              clip=5., phases=(config.Phase(1, .01), config.Phase(1, .003)))


def train(name, **more):
    return trainer.train(model, source, 0, settings, truth=truth, folds=make_folds(exams.index, n=3), earlier=(),
                          out=Path(out) / name, devices=int(devices), progress=False, backend=backend, **more)


def stop(keeper, *_):
    raise fitting.OutOfTime("so far and no further")


def kept(run):
    with np.load(run / "checkpoint" / "state.npz") as state, np.load(run / "best.npz") as best:
        return {**state, **{f"best{name}": value for name, value in best.items()}}


where = {"host": False, "device": None}  # None: as the chip has it, which is a TPU now
host = train("host")
with mock.patch.object(training, "on_tpu", lambda: True), \
        mock.patch.object(training, "with_pixels", wraps=training.with_pixels) as wrapped:
    with mock.patch.object(fitting.ResumableCallback, "_report", stop):  # an epoch and no more
        other = train("other", pixels_on_device=where[first])
    assert not (other / "oof").exists() and wrapped.call_count == (first == "device")
    train("other", pixels_on_device=where[then])
assert wrapped.call_count == 1
for name in ("config.json", "history.csv"):
    assert (host / name).read_text() == (other / name).read_text(), name
expected, found = kept(host), kept(other)
assert expected.keys() == found.keys()
for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, name)
np.testing.assert_array_equal(*(Predictions.load(run / "oof").images for run in (host, other)))
'''


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tensorflow 1 slices device host", "jax 8 studies host device"])
def test_a_run_may_change_where_its_pixels_are_made(tmp_path, case):
    backend, devices, *_ = case.split()
    pytest.importorskip(backend)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3",
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    code = [sys.executable, "-c", CODE, *case.split(), str(tmp_path)]
    done = subprocess.run(code, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
