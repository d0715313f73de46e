"Training killed with SIGKILL and started again, on both frameworks; several devices against one."
import json
import signal

import numpy as np
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


def checkpoint(folder):
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    with np.load(folder / "checkpoint" / "state.npz") as arrays:
        return dict(arrays), (folder / "history.csv").read_text(), state


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, backend):
    whole = run(f"fit({str(tmp_path / 'whole')!r}, Toy(), make())", backend)
    assert whole.returncode == 0, whole.stderr[-2000:]
    broken = str(tmp_path / "broken")
    in_an_epoch = run(f"fit({broken!r}, Toy(die=(1, 3)), make())", backend)
    at_a_boundary_while_saving = run(f'''
from unittest import mock
real, calls = os.replace, []
def replace(a, b):
    if str(b).endswith("checkpoint"):
        calls.append(b)
        if len(calls) == 2:  # the end of epoch 3, the first phase's last: the old folder is away, the new not yet there
            os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
with mock.patch("os.replace", replace):
    fit({broken!r}, Toy(), make())
''', backend)
    assert [p.returncode for p in (in_an_epoch, at_a_boundary_while_saving)] == [-signal.SIGKILL] * 2
    assert not (tmp_path / "broken" / "checkpoint").exists() and (tmp_path / "broken" / "checkpoint.old").exists()
    in_the_next_phase = run(f"fit({broken!r}, Toy(die=(3, 0)), make())", backend)
    assert in_the_next_phase.returncode == -signal.SIGKILL
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
from types import SimpleNamespace
from rsnape_kit.models.keras_backend import use_precision
from rsnape_kit.models.registry import compile_model
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
            compile_model(model, SimpleNamespace(optimizer="adamw", phases=PHASES, clip=None, ema=.8, is_volume=False,
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
