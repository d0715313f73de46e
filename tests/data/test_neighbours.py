"Neighbouring slices as channels: pixels against stacked single slices, every backend, and whole runs."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import keras_run
from test_batches import synthetic

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, SERIES, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.data.base import batch_render_params
from rsnape_kit.data.batches import GroupBatches, ImageBatches, StudyBatches
from rsnape_kit.data.sampling import neighbour_rows
from rsnape_kit.models.keras_backend import import_keras, save_weights
from rsnape_kit.models.registry import build_model, register_model
from rsnape_kit.runs.config import KerasConfig, PetaFormerConfig, Phase, check_config
from rsnape_kit.runs.folder import load_config
from rsnape_kit.testing import ArraySource
from rsnape_kit.transforms.affine import MODES, AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.transforms.render import render_reference, render_slice
from rsnape_kit.transforms.windows import PE, PE_WINDOWS, SCALES


def two_series(rng, size=16):
    "A source of studies of one series or two, with irregular spacing, and its truth."
    rows = [(f"s{s}", f"s{s}.{t}", f"s{s}.{t}.{i}", i) for s, lengths in enumerate(((7, 4), (1,), (9,)))
            for t, n in enumerate(lengths) for i in range(n)]
    table = pd.DataFrame(rows, columns=[STUDY, SERIES, SLICE, "order"])
    table = table.assign(rows=512, columns=512, spacing_y=.7, spacing_x=.8)
    table["position"] = rng.integers(1, 30, len(table)) / 8
    table["position"] = table.groupby(SERIES)["position"].cumsum() - 90
    images = pd.Series(0., slice_index(table))
    exams = pd.DataFrame(0., pd.Index(table[STUDY].unique(), name=STUDY), EXAM_LABELS)
    slices = rng.integers(-4096, 6000, (len(table), size, size)).astype(np.int16)
    return ArraySource(slices, table), Predictions(exams, images)


def neighbour(table, row, k, step_mm):
    "The row of a neighbour by looking at every slice of the series."
    own = table.index[table[SERIES] == table[SERIES][row]]
    if step_mm is None:
        return own[np.clip(list(own).index(row) + k, 0, len(own) - 1)]
    away = (table["position"][own] - table["position"][row] - k * step_mm).abs()
    return row if k == 0 else min(own, key=lambda each: (away[each], abs(each - row)))


LOOKS = st.tuples(st.sampled_from(SCALES), st.sampled_from([8, 16, 20]), st.sampled_from(MODES))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), look=LOOKS, windows=st.integers(1, 3),
       neighbours=st.lists(st.integers(-4, 4), min_size=1, max_size=4, unique=True),
       step_mm=st.sampled_from([None, 1., 2.5]), volume=st.booleans(), workers=st.integers(1, 3))
def test_channels_are_stacked_single_slices(seed, look, windows, neighbours, step_mm, volume, workers):
    rng, size = np.random.default_rng(seed), look[1]
    source, truth = two_series(rng)
    before, single = source.slices.copy(), InputConfig(PE_WINDOWS[:windows], *look, crop=300)
    pixels = replace(single, neighbours=tuple(neighbours), step_mm=step_mm)
    kind, how = (StudyBatches, {"frames": 5}) if volume else (ImageBatches, {})
    batches = kind(source, truth, batch=2 if volume else 9, pixels=pixels, mask=SideMask(p=.7), affine=AffineRange(),
                   seed=seed % 99, workers=workers, **how)
    for i in range(len(batches)):
        rows, params = batches.rows(i), batch_render_params(batches, *batches._select(i))
        seen = batches[i][0]
        assert seen.shape == (*rows.shape, size, size, windows * len(neighbours))
        for picture, row, param in zip(seen.reshape(-1, *seen.shape[-3:]), rows.flat, params, strict=True):
            near = [neighbour(source.table, row, k, step_mm) for k in neighbours]
            parts = [render_reference(source[each].copy(), param, single) for each in near]
            np.testing.assert_array_equal(picture, np.concatenate(parts, -1))
    np.testing.assert_array_equal(source.slices, before)


def test_each_slice_gets_noise_of_its_own_with_the_quality_of_the_item():
    pytest.importorskip("imagecodecs")
    source, truth = two_series(np.random.default_rng(0), 32)
    single = InputConfig(size=32, jpeg=(30, 100))
    pixels = replace(single, neighbours=(-1, 1))
    batches = ImageBatches(source, truth, batch=8, shuffle=True, affine=AffineRange(), pixels=pixels)
    rows, params = batches.rows(0), batch_render_params(batches, *batches._select(0))
    assert len(set(params[:, 9])) > 1
    for picture, row, param in zip(batches[0][0], rows, params, strict=True):
        for c, k in ((0, -1), (3, 1)):
            alone = np.zeros((32, 32, 3), np.uint8)
            render_slice(source[neighbour(source.table, row, k, None)].copy(), param, single, alone)
            np.testing.assert_array_equal(picture[..., c:c + 3], alone)


def test_the_device_renders_the_same_pixels():
    "On TensorFlow; test_batches has the other backends."
    pytest.importorskip("keras")
    from rsnape_kit.models.input_layer import device_render

    source, truth = synthetic((9, 4), size=32)
    for pixels in (InputConfig(size=32, neighbours=(-1, 0, 1)),
                   InputConfig((PE,), "fixed", 24, "bilinear", neighbours=(2,))):
        for kind, how in ((ImageBatches, {"batch": 7}), (StudyBatches, {"batch": 2, "frames": 3})):
            how |= dict(pixels=pixels, mask=SideMask(p=.7), affine=AffineRange())
            raws, whole = kind(source, truth, device=True, **how), kind(source, truth, **how)
            for raw, seen in zip(raws, whole, strict=True):
                got = import_keras().ops.convert_to_numpy(device_render(raw[0]["stored"], raw[0]["params"], pixels))
                np.testing.assert_array_equal(got, seen[0])


@pytest.mark.parametrize("position", [[3., 2., 1., 0.], [0., 0., 0., 0.], [5., 5., 6., 6.], [0., 2., 1., 3.]])
def test_neighbours_at_steps_are_the_nearest_in_any_order_and_with_places_that_repeat(position):
    table = pd.DataFrame({STUDY: "a", SERIES: "a", SLICE: list("0123"), "position": position})
    found, offsets = neighbour_rows(table, (-1, 0, 1), 1.), (-1, 0, 1)
    assert found.tolist() == [[neighbour(table, row, k, 1.) for k in offsets] for row in range(4)]


def test_offsets_beyond_any_series_are_refused():
    with pytest.raises(ValueError, match="neighbours.0 is 9223372036854775807: expected an integer from -4,096"):
        InputConfig(neighbours=(2**63 - 1,))


def test_groups_refuse_neighbours():
    near = InputConfig((PE,), size=32, neighbours=(-1, 0, 1))
    with pytest.raises(ValueError, match=r"pixels.neighbours=\(-1, 0, 1\): groups have"):
        GroupBatches(synthetic()[0], pixels=near)
    with pytest.raises(ValueError, match=r"petaformer takes one window.* pixels.neighbours=\(-1, 0, 1\) has to be"):
        check_config(PetaFormerConfig(pixels=near))


def tiny(size, channels):
    "A network of slices that sees the mean of each channel."
    layers = import_keras().layers
    inputs = import_keras().Input((size, size, channels), dtype="uint8")
    x = layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 128, -1)(inputs))
    return import_keras().Model(inputs, layers.Dense(1, "sigmoid")(layers.Dense(16, "relu")(x)))


@pytest.fixture(scope="module", autouse=True)
def server():
    "Started before this process uses a framework."
    warm.server("both")


@pytest.fixture(scope="module")
def hidden():
    "Studies whose slices are bright or dark at random, labelled by the brightness of the slice above."
    register_model("tiny", tiny)
    rng, n = np.random.default_rng(1), 20
    bright = rng.integers(0, 2, (40, n))
    studies = np.repeat([f"s{i:02}" for i in range(40)], n)
    table = pd.DataFrame({STUDY: studies, SERIES: "only", "order": np.tile(np.arange(n), 40)})
    table[SLICE] = table[STUDY] + "." + table["order"].astype(str)
    table["position"] = .5 * table["order"]
    labels = pd.Series(np.concatenate([bright[:, 1:], bright[:, -1:]], 1).ravel().astype(float), slice_index(table))
    exams = pd.DataFrame(0., pd.Index(table[STUDY].unique(), name=STUDY), EXAM_LABELS)
    exams["rightsided_pe"] = exams["rv_lv_ratio_lt_1"] = 1.
    slices = np.where(bright.ravel()[:, None, None], 600, 0) + rng.normal(0, 200, (40 * n, 16, 16))
    return ArraySource(slices.astype(np.int16), table), Predictions(exams, labels)


NEAR = {"neighbours": (0, 1)}


def config(pixels):
    return KerasConfig(model="tiny", pixels=InputConfig((PE,), "fixed", 16, **pixels), batch=64, mask=None, affine=None,
                       phases=(Phase(12, .02),), validate=12, optimizer="adamw")


def trained(hidden, folder, pixels, **more):
    from rsnape_kit.training.trainer import train
    source, truth = hidden
    folds = make_folds(truth.exams.index, n=4)
    return train("tiny", source, 0, config(pixels), truth=truth, folds=folds, out=folder, earlier=(),
                 progress=False, **more)


@pytest.fixture(scope="module")
def runs(hidden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: trained(hidden, folder / name, pixels)
            for name, pixels in (("alone", {}), ("near", NEAR), ("mm", NEAR | {"step_mm": .5}))}


def test_a_network_with_neighbours_learns_what_only_they_show(hidden, runs):
    _, truth = hidden

    def accuracy(name):
        pred = Predictions.load(runs[name] / "oof").images
        return ((pred > .5) == truth.images[pred.index]).mean()

    assert accuracy("alone") < .7 and min(accuracy("near"), accuracy("mm")) > .9


def test_a_run_keeps_its_neighbours_and_an_old_one_has_none(runs, tmp_path):
    assert load_config(runs["mm"]).pixels == InputConfig((PE,), "fixed", 16, neighbours=(0, 1), step_mm=.5)
    old = json.loads((runs["alone"] / "config.json").read_text())
    assert old["settings"]["pixels"].pop("neighbours") == [0] and old["settings"]["pixels"].pop("step_mm") is None
    (tmp_path / "config.json").write_text(json.dumps({"settings": old["settings"]}))
    assert load_config(tmp_path) == load_config(runs["alone"])


def test_a_run_resumes_and_may_change_where_its_pixels_are_made(hidden, runs, tmp_path):
    from unittest import mock

    from rsnape_kit.training import keras_fit as fitting

    def stop(keeper, *_):
        raise fitting.OutOfTime("so far and no further")

    with mock.patch.object(fitting.ResumableCallback, "_report", stop):  # an epoch and no more
        other = trained(hidden, tmp_path, NEAR, pixels_on_device=True)
    assert not (other / "oof").exists()
    with pytest.raises(ValueError, match="neighbours"):
        trained(hidden, tmp_path, {"neighbours": (0, -1)})
    trained(hidden, tmp_path, NEAR)
    np.testing.assert_array_equal(*(Predictions.load(run / "oof").images for run in (runs["near"], other)))


def test_features_and_heat_maps_see_the_neighbours(hidden, runs, tmp_path):
    from rsnape_kit.inference.features import compute_features
    from rsnape_kit.inference.heatmaps import blurred, heat_maps
    from rsnape_kit.inference.keras_predictor import infer

    source, _ = hidden
    at, study = 45, source.table[STUDY][45]
    pred = infer(runs["near"], source, [study]).images
    kept = compute_features(runs["near"], source, tmp_path, [study], progress=False).study(study)
    np.testing.assert_allclose(1 / (1 + np.exp(-kept.logits[0].astype(float))), pred, atol=2e-3)

    def here(runs, copies, tta, out, time_budget):
        return {str(run): infer(run, copies, tta=0) for run in runs}

    maps = {name: heat_maps([run], source, [at], 8, 8, out=tmp_path / name, predict=here)[at]
            for name, run in runs.items()}
    assert maps["alone"].shape == maps["near"].shape == (16, 16) and np.abs(maps["near"]).max() > .1
    for name in ("near", "mm"):  # the slice and the one above with a patch occluded, by hand
        odds = []
        for patch in (None, slice(0, 8)):
            pair = source[np.array([at, at + 1])].copy()
            if patch:
                pair[:, patch, patch] = blurred(pair, 8)[:, patch, patch]
            table = source.table.iloc[[at, at + 1]].reset_index(drop=True)
            p = infer(runs[name], ArraySource(pair, table)).images.iloc[0]
            odds.append(np.log(p / (1 - p)))
        np.testing.assert_allclose(maps[name][0, 0], odds[0] - odds[1], atol=1e-4)
    other = source[np.arange(len(source.table))].copy()
    other[at + 1] = other[at + 1].T
    sources = source, ArraySource(other, source.table)
    cams = {name: [heat_maps([run], each, [at], method="gradcam")[at] for each in sources]
            for name, run in runs.items()}
    assert cams["near"][0].shape == (16, 16) and cams["near"][0].any() and (cams["near"][0] != cams["near"][1]).any()
    np.testing.assert_array_equal(*cams["alone"])


def test_a_heat_map_of_a_lone_slice_shows_that_slice_only(hidden, tmp_path):
    "The neighbours of a slice without any are itself, not other copies of it."
    from rsnape_kit.inference.heatmaps import blurred, heat_maps
    from rsnape_kit.inference.keras_predictor import infer
    from rsnape_kit.runs.folder import open_run

    near, rng = config({"neighbours": (-1, 0, 1)}), np.random.default_rng(0)
    run, network = open_run(tmp_path / "run", near), build_model(near)
    network.set_weights([rng.normal(0, 1, weight.shape) for weight in network.get_weights()])
    save_weights(network, run / "best.npz")
    table = pd.DataFrame({STUDY: ["a"], SERIES: "a", SLICE: "a.0", "order": 0})
    source = ArraySource(rng.normal(0, 400, (1, 16, 16)).astype(np.int16), table)

    def here(runs, copies, tta, out, time_budget):
        return {str(run): infer(run, copies, tta=0) for run in runs}

    hidden = source[:].copy()
    hidden[:, :8, :8] = blurred(hidden, 8)[:, :8, :8]
    p = [infer(run, each).images.iloc[0] for each in (source, ArraySource(hidden, table))]
    heat = heat_maps([run], source, [0], 8, 8, out=tmp_path / "heat", predict=here)[0]
    np.testing.assert_allclose(heat[0, 0], np.log(p[0] / (1 - p[0])) - np.log(p[1] / (1 - p[1])), atol=1e-4)


def near_run(folder, model, pixels):
    "An untrained run with neighbours."
    from rsnape_kit.runs.folder import open_run
    settings = load_config(keras_run(folder / "plain", model))
    settings = replace(settings, pixels=pixels)
    run = open_run(folder / settings.name, settings)
    save_weights(build_model(settings), run / "best.npz")
    return run


@pytest.mark.slow
def test_dicom_is_predicted_with_neighbours_up_to_the_answer(tmp_path):
    "By worker processes from DICOM, as in this process; the volume model takes neighbours too."
    from rsnape_kit.inference.keras_predictor import infer
    from rsnape_kit.phantom.generate import make_competition
    from rsnape_kit.report.answers import Answer
    from rsnape_kit.report.findings import predict_dicom
    from rsnape_kit.store.dicom_source import DicomSource

    root = make_competition(tmp_path / "dicom", 1, 1, slices=9, size=64, difficulty="demo", clean=True) / "test"
    pixels = InputConfig((PE,), "fixed", 32, neighbours=(-1, 0, 1), step_mm=6.)
    runs = [near_run(tmp_path, model, pixels) for model in ("efficientnet", "resnet3d")]
    with warm.workers():
        predict_dicom(runs, root, tmp_path / "out", heat=1)
    answer = Answer.load(tmp_path / "out" / "answer.json").studies[0]
    assert len(answer.slices) == 9 and list((tmp_path / "out" / "heatmaps").glob("*.png"))
    for run in runs:
        kept = Predictions.load(next((tmp_path / "out").glob(f"{run.name.split('-')[0]}*"))).images
        here = infer(run, DicomSource(root)).images
        np.testing.assert_allclose(kept.to_numpy(), here[kept.index].to_numpy(), atol=1e-6)
