"Features of slices: against the network's inner layer, interrupted and damaged folders, folders of other weights."
import json
import shutil

import numpy as np
import pytest
from small_runs import keras_run, torch_run

from rsnape_kit.competition.labels import SLICE, STUDY
from rsnape_kit.inference import features as module
from rsnape_kit.inference.features import FeatureStore, compute_features
from rsnape_kit.inference.keras_predictor import load_run, make_views
from rsnape_kit.inference.results import index_studies
from rsnape_kit.models.keras_backend import import_keras, save_weights
from rsnape_kit.models.registry import build_model, register_model
from rsnape_kit.runs.config import KerasConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.testing import ArraySource, simulate_truth
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE


def tiny(size, channels):
    "A network of slices: one convolution."
    layers = import_keras().layers
    inputs = import_keras().Input((size, size, channels), dtype="uint8")
    x = layers.Conv2D(6, 5, 3, activation="relu")(layers.Rescaling(1 / 255)(inputs))
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    return import_keras().Model(inputs, layers.Dense(1, "sigmoid")(x))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Seven studies of different lengths and an untrained image run."
    register_model("tiny", tiny)
    config = KerasConfig(model="tiny", pixels=InputConfig((PE,), "fixed", 32), batch=8)
    run = open_run(tmp_path_factory.mktemp("runs") / config.name, config)
    save_weights(build_model(config), run / "best.npz")
    truth = simulate_truth(7, slices=(4, 7, 11))
    table = truth.images.index.to_frame(index=False)
    table = table.assign(order=table.groupby(STUDY).cumcount(), intercept=-1024.)
    table["position"] = -100 + 1.25 * table["order"]
    slices = np.rint(4 * np.random.default_rng(0).normal(0, 200, (len(table), 32, 32))).astype(np.int16)
    return ArraySource(slices, table), run


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    source, run = world
    return compute_features(run, source, tmp_path_factory.mktemp("features"), views=2, shard=3, progress=False)


@pytest.fixture
def counted(monkeypatch):
    "The studies that a network computes."
    seen, real = [], module.FeatureExtractor._compute

    def compute(self, source, rows, views):
        seen.extend(rows)
        return real(self, source, rows, views)

    monkeypatch.setattr(module.FeatureExtractor, "_compute", compute)
    return seen


def test_vectors_and_logits_are_those_of_the_networks_own_layers(world, whole):
    source, run = world
    config, model = load_run(run)
    inner = import_keras().Model(model.input, model.get_layer("pool").output)
    for view, batches in enumerate(make_views(config, source, numbers=range(2), batch=len(source.table))):
        x = batches[0]
        vectors, p = np.asarray(inner(x)), np.asarray(model(x))[:, 0].astype(float)
        for study, rows in index_studies(source).rows.items():
            found = whole.study(study)
            np.testing.assert_allclose(found.features[view], vectors[rows], rtol=2e-3, atol=1e-4)  # float16
            np.testing.assert_allclose(found.logits[view], np.log(p / (1 - p))[rows], rtol=1e-4, atol=1e-5)
            assert found.slices.tolist() == source.table[SLICE].iloc[rows].tolist()
            np.testing.assert_array_equal(found.z, source.table["position"].iloc[rows])


def test_an_interrupted_call_is_resumed_and_gives_the_same_files(world, whole, tmp_path, counted, monkeypatch):
    source, run = world
    real, calls = module.write_shard, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "write_shard", fail)
    with pytest.raises(KeyboardInterrupt):
        compute_features(run, source, tmp_path / "f", views=2, shard=3, progress=False)
    assert len(FeatureStore(tmp_path / "f").studies) == 3
    monkeypatch.setattr(module, "write_shard", real)
    counted.clear()
    found = compute_features(run, source, tmp_path / "f", views=2, shard=3, progress=False)
    assert counted == list(index_studies(source).rows)[3:]
    for study in whole.studies:
        for name in ("features", "logits"):
            np.testing.assert_allclose(getattr(found.study(study), name), getattr(whole.study(study), name), atol=1e-3)


@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_damaged_shard_is_named_and_the_same_call_repairs_it(world, whole, tmp_path, counted, damage):
    source, run = world
    folder = shutil.copytree(whole.folder, tmp_path / "f")
    shard = folder / "00001.npz"
    raw = bytearray(shard.read_bytes())
    at = raw.index(whole.study(whole.studies[3]).features.tobytes())
    raw[at + 11] ^= 4
    shard.write_bytes(raw if damage == "a bit" else raw[:at])
    if damage == "gone":
        shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.npz is damaged .*call compute_features again"):
        FeatureStore(folder).study(whole.studies[3])
    repaired = compute_features(run, source, folder, views=2, shard=3, progress=False)
    assert counted == list(whole.studies[3:6])
    np.testing.assert_allclose(repaired.study(whole.studies[3]).logits, whole.study(whole.studies[3]).logits, atol=1e-4)


def test_features_of_other_weights_or_slices_are_never_taken(world, whole, tmp_path, counted):
    source, run = world
    other = shutil.copytree(run, tmp_path / "other")
    model = load_run(run)[1]
    model.layers[-1].bias.assign([1.])
    save_weights(model, other / "best.npz")
    with pytest.raises(ValueError, match=r"holds features of tiny-fold0-seed0 \w{12} with 2 views, not of tiny"):
        compute_features(other, source, whole.folder, views=2, progress=False)
    folder = shutil.copytree(whole.folder, tmp_path / "f")
    shorter = ArraySource(source.slices[1:], source.table[1:].reset_index(drop=True))  # the first study lacks a slice
    found = compute_features(run, shorter, folder, views=2, progress=False)
    assert counted == [source.table[STUDY][0]]
    assert len(found.study(counted[0])) == len(whole.study(counted[0])) - 1


def test_runs_of_other_models_are_refused(tmp_path, world):
    with pytest.raises(ValueError, match="resnet3d, a model of kind 'volume': it reads .* take a run of efficientnet"):
        compute_features(keras_run(tmp_path, "resnet3d"), world[0], tmp_path / "f")
    with pytest.raises(ValueError, match="petaformer, a model of kind 'groups': its slices get their logits after"):
        compute_features(torch_run(tmp_path), world[0], tmp_path / "f")
    assert not (tmp_path / "f" / "features.json").exists()


def test_a_folder_says_what_it_holds(whole):
    meta = json.loads((whole.folder / "features.json").read_text())
    assert meta["views"] == whole.views == 2
    assert meta["size"] == whole.size == whole.study(whole.studies[0]).features.shape[2]
    assert "7 studies" in repr(whole) and meta["run"] in repr(whole)
