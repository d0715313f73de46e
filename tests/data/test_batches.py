"Batches in each framework, from real DICOM files, and their reuse of memory."
import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, POSITIVE_LABELS, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.data.batches import GroupBatches, ImageBatches, StudyBatches
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.testing import ArraySource
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask

SETUP = '''
import sys
sys.path[:0] = {tests!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}: raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import numpy as np
from test_batches import *
'''


def synthetic(lengths=(20, 7, 33, 12), size=32, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(f"s{s}", f"{s}.{i}", i) for s, n in enumerate(lengths) for i in range(n)]
    table = pd.DataFrame(rows, columns=[STUDY, SLICE, "order"])
    slices = rng.integers(-4096, 6000, (len(table), size, size)).astype(np.int16)
    images = pd.Series((table[STUDY].isin(["s0", "s2"]) & (table["order"] > 5)).to_numpy(float), slice_index(table))
    yes = images.groupby(level=0, sort=False).max()
    exams = pd.DataFrame({label: yes * (label in ("rightsided_pe", "rv_lv_ratio_lt_1")) for label in EXAM_LABELS})
    return ArraySource(slices, table), Predictions(exams.assign(negative_exam_for_pe=1 - yes), images)


def test_exam_labels_on_slices_are_the_products_of_both_labels_weighted_as_the_metric_does():
    source, truth = synthetic()
    settings = dict(batch=9, pixels=InputConfig(size=8), weights=True, balanced=True, shuffle=True)
    batches, plain = ImageBatches(source, truth, exam_labels=.7, **settings), ImageBatches(source, truth, **settings)
    weights = {"central_pe": .1877, "leftsided_pe": .06257, "rightsided_pe": .06257, "rv_lv_ratio_gte_1": .2346,
               "rv_lv_ratio_lt_1": .0782, "chronic_pe": .1042, "acute_and_chronic_pe": .1042}  # the competition's page
    for i, ((x, y, w), (x0, y0, w0)) in enumerate(zip(batches, plain, strict=True)):
        np.testing.assert_array_equal(x, x0)
        np.testing.assert_array_equal(y[:, :1], y0)
        np.testing.assert_allclose(w[:, 0], w0, rtol=1e-6)
        for row, found, weight in zip(batches.rows(i), y, w, strict=True):
            study, image = source.table[STUDY][row], truth.images.iloc[row]
            assert found[1:].tolist() == [image * truth.exams.loc[study, label] for label in POSITIVE_LABELS]
            share = np.array([weights[label] for label in POSITIVE_LABELS]) / sum(weights.values())
            np.testing.assert_allclose(weight[1:], .7 * weight[0] * share, rtol=2e-3)
    assert y[:, 1:].any() or y0.any()


def run_isolated(code, blocked=(), KERAS_BACKEND=None):
    "Run code in a process of its own, in which some packages cannot be imported."
    folders = [str(Path(__file__).parents[up]) for up in (0, 1)]
    setup = SETUP.format(tests=folders, blocked=tuple(blocked)) + textwrap.dedent(code)
    if KERAS_BACKEND:
        done = warm.run(setup, backend=KERAS_BACKEND, KERAS_BACKEND=KERAS_BACKEND)
    else:
        done = subprocess.run([sys.executable, "-c", setup], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRAINING = dict(batch=8, pixels=InputConfig(size=32), mask=SideMask(), affine=AffineRange(), shuffle=True, seed=3)


def test_torch_without_keras():
    run_isolated("""
        import torch
        source, truth = synthetic()
        plain, batches = (ImageBatches(source, truth, weights=True, **TRAINING) for _ in range(2))
        loader = batches.torch()
        for epoch in range(2):
            plain.set_epoch(epoch)
            seen = list(loader)
            assert len(seen) == len(loader) == len(plain) == 9
            for (x, y, w), (x0, y0, w0) in zip(seen, plain):
                assert x.shape == (8, 3, 32, 32) and x.dtype == torch.uint8
                assert (x.permute(0, 2, 3, 1).numpy() == x0).all()
                assert (y.numpy() == y0).all() and (w.numpy() == w0).all()
        one = InputConfig(InputConfig().windows[:1], size=32)
        x, y = next(iter(GroupBatches(source, truth, groups=8, pixels=one).torch()))
        assert x.shape == (1, 8, 5, 32, 32) and y["images"].shape == (1, 8, 5) and y["exams"].shape == (1, 9)
        x = next(iter(StudyBatches(source, frames=6, pixels=InputConfig(size=32)).torch()))
        assert x.shape == (1, 6, 3, 32, 32)
        assert "keras" not in sys.modules and "tensorflow" not in sys.modules
    """, blocked=("keras", "tensorflow", "jax"), KERAS_BACKEND="torch")


def test_a_missing_framework_is_named():
    out = run_isolated("""
        batches = ImageBatches(synthetic()[0])
        for wrap in (batches.torch, batches.keras):
            try: wrap()
            except ImportError as error: print(error)
    """, blocked=("torch", "keras"))
    assert "pip install 'rsnape_kit[torch]'" in out and "pip install 'rsnape_kit[keras]'" in out


@pytest.mark.slow
def test_keras_on_tensorflow():
    "fit gets the batches of every epoch, in order, with their weights; predict and rendering on the device likewise."
    run_isolated("""
        import keras
        from rsnape_kit.models.input_layer import PixelLayer, device_render

        class Watch(keras.Model):
            seen = []
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1, "sigmoid")
            def call(self, x):
                return self.dense(keras.ops.cast(x[:, 0, 0], "float32"))
            def train_step(self, data):
                import tensorflow as tf
                x, y, w = data
                tf.numpy_function(lambda *arrays: self.seen.append([a.copy() for a in arrays]), [x, y, w], [])
                return super().train_step(data)

        source, truth = synthetic()
        plain, batches = (ImageBatches(source, truth, weights=True, **TRAINING) for _ in range(2))
        model = Watch()
        model.compile("sgd", "binary_crossentropy", jit_compile=False)
        for workers, first in ((1, 0), (3, 2)):
            Watch.seen.clear()
            batches.set_epoch(first)
            model.fit(batches.keras(workers=workers), epochs=2, shuffle=False, verbose=0)
            expected = []
            for epoch in (first, first + 1):
                plain.set_epoch(epoch)
                expected += list(plain)
            assert len(Watch.seen) == len(expected) == 18, len(Watch.seen)
            for got, wanted in zip(Watch.seen, expected):
                for a, b in zip(got, wanted):
                    np.testing.assert_array_equal(a, b)

        raw = ImageBatches(source, device=True, batch=16, pixels=TRAINING["pixels"], affine=AffineRange())
        inputs = {"stored": keras.Input((32, 32), dtype="int16", name="stored"),
                  "params": keras.Input((9,), dtype="int32", name="params")}
        net = keras.Model(inputs, PixelLayer(raw.pixels)(inputs))
        same = ImageBatches(source, batch=16, pixels=raw.pixels, affine=AffineRange())
        np.testing.assert_array_equal(net.predict(raw.keras(), verbose=0), np.concatenate(list(same)))
        import tempfile, os
        with tempfile.TemporaryDirectory() as folder:
            net.save(os.path.join(folder, "net.keras"))
            again = keras.models.load_model(os.path.join(folder, "net.keras"))
            raw.set_epoch(0)  # augmented: after a pass, predict is in the next epoch
            np.testing.assert_array_equal(again.predict(raw.keras(), verbose=0), np.concatenate(list(same)))
    """, KERAS_BACKEND="tensorflow")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_fit_trains_on_the_same_epochs_with_every_backend(backend):
    "An epoch is a whole pass, also of evaluate, whichever batches a backend takes before it begins."
    pytest.importorskip(backend)
    run_isolated("""
        import keras

        class Numbered(ImageBatches):
            def __getitem__(self, i):
                x, y = super().__getitem__(i)
                return np.full((len(x), 1), 100 * self.epoch + i, np.float32), y

        class Sums(keras.layers.Layer):
            def build(self, shape):
                self.total = self.add_weight(shape=(64,), initializer="zeros", trainable=False)
                self.step = self.add_weight(shape=(), initializer="zeros", trainable=False)
            def call(self, x):
                here = keras.ops.cast(keras.ops.arange(64) == keras.ops.cast(self.step, "int32"), "float32")
                self.total.assign(self.total + here * keras.ops.max(x))
                self.step.assign(self.step + 1)
                return x

        source, truth = synthetic()

        sums = Sums()
        model = keras.Sequential([sums, keras.layers.Dense(1, "sigmoid")])
        model.compile("sgd", "binary_crossentropy", jit_compile=False)

        def trained(batches, workers=1, **settings):
            if sums.built:
                for value in (sums.total, sums.step):
                    value.assign(keras.ops.zeros_like(value))
            data = batches.keras(workers=workers)
            model.fit(data, shuffle=False, verbose=0, **settings)
            total = keras.ops.convert_to_numpy(sums.total).astype(int)
            return data, total[:int(sums.step)].tolist()

        for workers in (1, 3):
            batches = Numbered(source, truth, batch=8, pixels=InputConfig(size=8), shuffle=True)
            data, shown = trained(batches, workers, epochs=3)
            assert shown == [100 * epoch + i for epoch in range(3) for i in range(9)], shown
            assert batches.epoch == 3
            model.evaluate(data, verbose=0)
            assert batches.epoch == 4
            batches.set_epoch(7)
            _, shown = trained(batches, workers)
            assert shown == [700 + i for i in range(9)] and batches.epoch == 8, shown
        for extra in ({"balanced": True}, {"affine": AffineRange()}, {}):
            batches = Numbered(source, truth, batch=8, pixels=InputConfig(size=8), **extra)
            trained(batches, epochs=2)
            assert batches.epoch == 2 * batches.varies == 2 * bool(extra), extra
        batches = Numbered(source, truth, batch=8, pixels=InputConfig(size=8), shuffle=True)
        _, shown = trained(batches, epochs=3, steps_per_epoch=3)
        assert shown == list(range(9)) and batches.epoch == 1, (shown, batches.epoch)
    """, KERAS_BACKEND=backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_device_pixels_on_every_backend(backend):
    pytest.importorskip(backend)
    run_isolated("""
        import itertools
        import keras
        from rsnape_kit.transforms.augment import Augment
        from rsnape_kit.models.input_layer import device_render
        from rsnape_kit.transforms.windows import PE
        source, truth = synthetic(size=64)
        every = itertools.product((InputConfig(size=64), InputConfig((PE,), "fixed", 48, "bilinear")),
                                  ((0., None), (.5, Augment(.3, 40, 3))))
        near = InputConfig(size=64, neighbours=(-1, 0, 1)), InputConfig((PE,), "fixed", 48, "bilinear", neighbours=(2,))
        for pixels, (flip, augment) in (*every, *((pixels, (0., None)) for pixels in near)):
            how = dict(batch=30, pixels=pixels, mask=SideMask(p=.7), affine=AffineRange(flip=flip), augment=augment)
            for raw, seen in zip(ImageBatches(source, truth, device=True, **how), ImageBatches(source, truth, **how)):
                got = keras.ops.convert_to_numpy(device_render(raw[0]["stored"], raw[0]["params"], pixels))
                np.testing.assert_array_equal(got, seen[0])
            if keras.backend.backend() == "torch":  # a device whose data numpy cannot access, like a GPU
                with keras.device("meta"):
                    got = device_render(raw[0]["stored"], raw[0]["params"], pixels)
                assert got.device.type == "meta" and got.shape == seen[0].shape
    """, KERAS_BACKEND=backend)


def test_memory_in_use_is_never_reused():
    torch = pytest.importorskip("torch")
    source, truth = synthetic()
    batches, kept = ImageBatches(source, truth, **TRAINING), []
    rng = np.random.default_rng(0)
    addresses = set()
    for step in range(40):
        x = batches[step % len(batches)][0]
        addresses.add(x.ctypes.data)
        holder = (x, torch.from_numpy(x), x[2:5, ::2].T, memoryview(x))[step % 4]
        kept.append((holder, np.array(holder)))
        del x, holder
        if len(kept) > 5:
            kept.pop(int(rng.integers(len(kept))))
        if step % 8 == 0:
            gc.collect()
        for holder, copy in kept:
            np.testing.assert_array_equal(np.asarray(holder), copy)
    assert len(addresses) < 20, "memory is not reused"


def test_no_study_on_both_sides_of_a_fold():
    rng = np.random.default_rng(0)
    source, truth = synthetic(tuple(rng.integers(3, 9, 40)))
    split = make_folds(truth.exams.index, truth)
    seen = []
    for fold in range(5):
        train, valid = (ImageBatches(source, truth, studies, batch=16, pixels=InputConfig(size=32))
                        for studies in (split.train(fold), split.valid(fold)))
        rows = [{row for i in range(len(part)) for row in part.rows(i)} for part in (train, valid)]
        studies = [set(source.table[STUDY].iloc[list(part)]) for part in rows]
        assert not studies[0] & studies[1] and not rows[0] & rows[1]
        assert len(rows[0]) + len(rows[1]) == len(source.table)
        seen += list(rows[1])
    assert sorted(seen) == list(range(len(source.table)))


def test_every_process_count_shows_the_same_epoch():
    source, truth = synthetic()
    for extra in (dict(shuffle=True), dict(balanced=True, shuffle=True)):
        how = {**TRAINING, **extra, "batch": 1}

        def shown(shard, how=how):
            batches = ImageBatches(source, truth, shard=shard, **how)
            return [(int(batches.rows(i)[0]), batches[i][0].tobytes()) for i in range(len(batches))]

        whole = shown((0, 1))
        for of in (2, 3):
            parts = [shown((i, of)) for i in range(of)]
            assert [part[k] for k in range(len(parts[0])) for part in parts] == whole[:len(whole) - len(whole) % of]


def test_all_slices_of_every_study_are_predicted():
    source, _ = synthetic(tuple(range(1, 40)) + (80, 81, 160), size=8)
    groups = GroupBatches(source, groups=8, width=5, batch=3, pixels=InputConfig(InputConfig().windows[:1], size=8))
    images = ImageBatches(source, batch=7, pixels=InputConfig(size=8))
    for batches in (groups, images):
        shown = np.concatenate([batches.rows(i).ravel() for i in range(len(batches))])
        assert set(shown) == set(range(len(source.table)))
    for i in range(len(groups)):
        for item in groups.rows(i):
            assert source.table[STUDY].iloc[item.ravel()].nunique() == 1
    studies = StudyBatches(source, frames=16, pixels=InputConfig(size=8))
    for i in range(len(studies)):
        assert source.table[STUDY].iloc[studies.rows(i).ravel()].nunique() == 1


def test_real_files_and_their_store_give_the_same_batches(real_ct, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    files = DicomSource(real_ct / "lidc_small")
    with ThreadPoolExecutor(2) as pool:
        build_store(files, tmp_path / "store", executor=pool)
    built = SliceStore(tmp_path / "store")
    for kind, how in ((ImageBatches, {}), (GroupBatches, {"groups": 4}), (StudyBatches, {"frames": 5})):
        a, b = (kind(source, batch=2, affine=AffineRange(), **how) for source in (files, built))
        assert len(a) == len(b)
        for i in range(len(a)):
            np.testing.assert_array_equal(a[i], b[i])
    cropped = ImageBatches(built, batch=4, pixels=InputConfig(size=96, crop=213, mode="bilinear"))[0]
    whole = ImageBatches(built, batch=4, pixels=InputConfig(size=96, mode="bilinear"))[0]
    assert cropped.shape == whole.shape == (4, 96, 96, 3)
    assert (cropped[..., 0] == 0).mean() < (whole[..., 0] == 0).mean(), "a crop holds less air"
