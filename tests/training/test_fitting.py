"Training killed with SIGKILL and started again, on both frameworks; several devices against one; pixels on the device."
import json
import signal

import numpy as np
import pandas as pd
import pytest
import warm

TOY = '''
import os, signal, sys
import numpy as np
from rsnape_kit.competition.metric import log_loss
from rsnape_kit.runs.config import Phase
from rsnape_kit.training.keras_fit import fit_phases
from rsnape_kit.inference.keras_predictor import predict_batch
from rsnape_kit.models.losses import pack_targets, weighted_bce
from rsnape_kit.models.keras_backend import all_devices, import_keras, jit

PHASES = (Phase(3, .01), Phase(3, .003, .0005))


class Toy:
    "Batches labelled by whether the left half is brighter. Order and noise follow from epoch and step."

    def __init__(self, die=None):
        self.die = die
        self.x = np.random.default_rng(9).normal(size=(40, 8)).astype("float32")
        self.y = (self.x[:, :4].sum(1) > self.x[:, 4:].sum(1)).astype("float32")[:, None]
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.epoch, self.order = epoch, np.random.default_rng([0, epoch]).permutation(40)

    def __len__(self):
        return 5

    def __getitem__(self, i):
        if (self.epoch, i) == self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = self.order[i * 8:i * 8 + 8]
        noise = np.random.default_rng([0, self.epoch, i]).normal(size=(8, 8)).astype("float32")
        return self.x[rows] + noise / 4, self.y[rows]


def make(dropout=.3, ema=.8, norm=True):
    keras = import_keras()
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dropout(dropout),
              keras.layers.Dense(1, "sigmoid")]
    if norm:
        layers.insert(2, keras.layers.BatchNormalization(momentum=.9))
    model = keras.Sequential(layers)
    optimizer = keras.optimizers.Adam(.01, use_ema=ema is not None, ema_momentum=ema or .9)
    model.compile(optimizer, weighted_bce(), jit_compile=jit())
    return model


def validate(model):
    toy = Toy()
    return {"val_loss": float(log_loss(toy.y, predict_batch(model, toy.x)).mean())}


def fit(run, batches, model):
    ready = lambda batch: (batch[0], pack_targets(batch[1], np.ones_like(batch[1])))
    return fit_phases(model, batches, run, PHASES, validate, ready, progress=False)
'''


def run(code, backend, **env):
    return warm.run(TOY + code, backend=backend, **env)


def history(path):
    "The text of a history without its times."
    return pd.read_csv(path, dtype=str).drop(columns=["seconds", "cpu_seconds"]).to_csv()


def checkpoint(folder):
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    with np.load(folder / "checkpoint" / "state.npz") as arrays:
        return dict(arrays), history(folder / "history.csv"), state


KILLED_WHILE_SAVING = '''
from unittest import mock
real, calls = os.replace, []
def replace(a, b):
    if str(b).endswith("checkpoint"):
        calls.append(b)
        if len(calls) == 2:  # the end of epoch 3, the first phase's last: the old folder is away, the new not yet there
            os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
with mock.patch("os.replace", replace):
    fit({run!r}, Toy(), make())
'''


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, backend):
    "Killed in an epoch; on TensorFlow also while it saves and in the next phase, which JAX does likewise."
    whole = run(f"fit({str(tmp_path / 'whole')!r}, Toy(), make())", backend)
    assert whole.returncode == 0, whole.stderr[-2000:]
    broken = str(tmp_path / "broken")
    assert run(f"fit({broken!r}, Toy(die=(1, 3)), make())", backend).returncode == -signal.SIGKILL
    if backend == "tensorflow":
        assert run(KILLED_WHILE_SAVING.format(run=broken), backend).returncode == -signal.SIGKILL
        assert not (tmp_path / "broken" / "checkpoint").exists() and (tmp_path / "broken" / "checkpoint.old").exists()
        assert run(f"fit({broken!r}, Toy(die=(3, 0)), make())", backend).returncode == -signal.SIGKILL
    end = run(f"fit({broken!r}, Toy(), make())", backend)
    assert end.returncode == 0, end.stderr[-2000:]
    (arrays, *rest), (arrays_again, *rest_again) = (checkpoint(tmp_path / name) for name in ("whole", "broken"))
    assert rest == rest_again  # history and best value, digit by digit
    for name, value in arrays.items():
        assert np.array_equal(value, arrays_again[name]), name


@pytest.mark.slow
def test_eight_devices_follow_the_curve_of_one():
    result = run('''
import json, tempfile
curves = []
for devices in (1, 8):
    with all_devices(devices) as used:
        assert used == devices
        curves.append([(row["loss"], row["val_loss"]) for row in fit(tempfile.mkdtemp(), Toy(), make())])
print(json.dumps(curves))
''', "jax", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert result.returncode == 0, result.stderr[-2000:]
    one, eight = json.loads(result.stdout.splitlines()[-1])
    assert len(one) == 6
    np.testing.assert_allclose(one, eight, rtol=1e-4)  # with dropout, averages, and normalisation over the global batch


@pytest.mark.slow
def test_mirrored_devices_follow_the_curve_of_one():
    result = run('''
import json, tempfile
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
curves = []
for devices in (1, 2):
    with all_devices(devices):
        curves.append([(row["loss"], row["val_loss"]) for row in fit(tempfile.mkdtemp(), Toy(), make(0., norm=False))])
print(json.dumps(curves))
''', "tensorflow")
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(one, two, rtol=1e-4)


ACCUMULATED = '''
import tempfile
from rsnape_kit.models.keras_backend import use_precision
from rsnape_kit.models.registry import compile_model
from rsnape_kit.runs.config import KerasConfig
from rsnape_kit.training.keras_fit import OutOfTime

if keras_backend() == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


class Parts(Toy):
    "The same batches in parts."

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __len__(self):
        return 5 * self.parts

    def __getitem__(self, i):
        batch, part = divmod(i, self.parts)
        return tuple(np.split(each, self.parts)[part] for each in super().__getitem__(batch))


def trained(devices, parts, accumulate, precision="float32", stop=False):
    "Return the weights and their averages, and all that a checkpoint holds."
    keras, folder = import_keras(), tempfile.mkdtemp()
    with all_devices(devices):
        while True:
            keras.utils.set_random_seed(0)
            with use_precision(precision):
                model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"),
                                          keras.layers.Dense(1, "sigmoid", dtype="float32")])
            compile_model(model, KerasConfig(model="efficientnet", optimizer="adamw", phases=PHASES, ema=.8,
                                             accumulate=accumulate))
            ready = lambda batch: (batch[0], pack_targets(batch[1], np.ones_like(batch[1])))
            steps = iter(range(10**6))  # the clock counts steps: a session ends within the second epoch
            try:
                fit_phases(model, Parts(parts), folder, PHASES, validate, ready, deadline=7 if stop else 10**6,
                           progress=False, clock=lambda: next(steps))
                assert not stop
            except OutOfTime:
                stop = False
                continue
            with np.load(folder + "/checkpoint/state.npz") as state:
                return {name: state[name] for name in state.files}
'''


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_accumulated_passes_step_like_one_batch(backend):
    result = run(ACCUMULATED.replace("keras_backend()", repr(backend)) + '''
def distance(a, b):
    shared = [name for name in a if name.startswith("model")]
    return max(np.abs(a[name] - b[name]).max() for name in shared)

def averages(state):
    "The averages come before the accumulated gradients and after two counters."
    return [state[f"optimizer{i:05d}"] for i in range(2, 6)]

whole, parts, half = trained(1, 1, 1), trained(2, 2, 2), trained(2, 2, 2, "float16")
assert distance(whole, parts) < 1e-5
assert max(np.abs(x - y).max() for x, y in zip(averages(whole), averages(parts))) < 1e-5
assert distance(whole, half) < 2e-3 and len(half) > len(parts)  # the loss is scaled
at_once, again = trained(2, 1, 2), trained(2, 1, 2, stop=True)  # five passes an epoch, two a step
assert distance(whole, at_once) > 3e-2  # another training if batches are not divided
for name, value in at_once.items():
    assert np.array_equal(value, again[name]), name
''', backend, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert result.returncode == 0, result.stderr[-2000:]


TRAIN_ON_PIXELS = '''
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
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.augment import Augment
from rsnape_kit.transforms.input_config import InputConfig
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
settings = config.KerasConfig(model=model, pixels=InputConfig(size=32, neighbours=(-1, 0, 1)), frames=4, batch=8,
                              loss="metric", ema=.8, clip=5., phases=(config.Phase(1, .01), config.Phase(1, .003)),
                              affine=AffineRange(flip=.5), augment=Augment(.2, 20, 2))


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
assert (host / "config.json").read_text() == (other / "config.json").read_text()
rows = [pd.read_csv(run / "history.csv", dtype=str).drop(columns=["seconds", "cpu_seconds"]) for run in (host, other)]
assert rows[0].equals(rows[1])
expected, found = kept(host), kept(other)
assert expected.keys() == found.keys()
for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, name)
np.testing.assert_array_equal(*(Predictions.load(run / "oof").images for run in (host, other)))
'''


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tensorflow 1 slices device host", "jax 8 studies host device"])
def test_a_run_may_change_where_its_pixels_are_made(tmp_path, case):
    "With neighbours, flips, augmentation, on host or device, and resumed on the other: files and weights are equal."
    backend, devices, *_ = case.split()
    pytest.importorskip(backend)
    done = warm.run(TRAIN_ON_PIXELS, *case.split(), tmp_path, backend=backend,
                    XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    assert done.returncode == 0, done.stderr[-3000:]
