"Exams by the maxima over slices: against numpy, in flipped views, out of fold, by `predict`, and in a blend."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, POSITIVE_LABELS, SIDES, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.data.batches import ImageBatches
from rsnape_kit.ensemble.ensemble import fit_ensemble
from rsnape_kit.inference.keras_predictor import infer, load_run, make_views, predict_batches
from rsnape_kit.inference.results import LoadedStudy, gather_results, index_studies
from rsnape_kit.inference.worker import Job, work
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.registry import register_model
from rsnape_kit.runs.config import KerasConfig, Phase
from rsnape_kit.runs.folder import run_views
from rsnape_kit.testing import ArraySource, simulate_truth
from rsnape_kit.training.trainer import train
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE

OTHER = {SIDES[0]: SIDES[1], SIDES[1]: SIDES[0]}
SWAPPED = [POSITIVE_LABELS.index(OTHER.get(label, label)) for label in POSITIVE_LABELS]
KNOWN = [EXAM_LABELS[0], *POSITIVE_LABELS]  # all but indeterminate


def sided(size, channels, outputs=1):
    "A network of slices whose outputs are not symmetric."
    keras = import_keras()
    inputs = keras.Input((size, size, channels), dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(8)(keras.layers.Rescaling(1 / 64)(inputs)))
    return keras.Model(inputs, keras.layers.Dense(outputs, "sigmoid", kernel_initializer="he_normal")(x))


CONFIG = KerasConfig(model="sided", pixels=InputConfig((PE,), "fixed", 32), batch=5, loss="metric", balanced=True,
                     mask=None, affine=AffineRange(2, 0, .02, 0, flip=.5), exam_labels=1., phases=(Phase(1, 1e-3),),
                     steps=3, tta=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A source, its truth and folds, and the two folds of an image model trained with and without `exam_maxima`."
    register_model("sided", sided)
    truth = simulate_truth(12, slices=(4, 7, 11))
    table = truth.images.index.to_frame(index=False)
    table = table.assign(order=table.groupby(STUDY).cumcount(), intercept=-1024.)
    slices = np.rint(4 * np.random.default_rng(0).normal(0, 200, (len(table), 32, 32))).astype(np.int16)
    source, folds = ArraySource(slices, table), make_folds(truth.exams.index, truth, 2)
    out, how = tmp_path_factory.mktemp("runs"), dict(truth=truth, folds=folds, progress=False)
    runs = {on: [train("sided", source, fold, replace(CONFIG, exam_maxima=on), out=out / str(on), **how)
                 for fold in (0, 1)] for on in (False, True)}
    return source, truth, folds, runs


def outputs_of(run, source, view: int) -> np.ndarray:  # [slices, 8]; sides are those of the patient
    "The network's own outputs for a view, slice by slice."
    config, model = load_run(run)
    affine = config.affine if view else None
    batches = ImageBatches(source, pixels=config.pixels, seed=config.seed, batch=1, affine=affine)
    batches.set_epoch(view)
    p = np.concatenate([np.asarray(model(x), float) for x in batches])
    if view:
        flips = np.concatenate([batches.flips(i) for i in range(len(batches))])
        assert 0 < flips.sum() < len(flips)
        p[flips, 1:] = p[flips, 1:][:, SWAPPED]
    return p


def slow_exams(views: list, table: pd.DataFrame) -> pd.DataFrame:
    "Maxima by loops, then the mean of the log-odds over the views."
    rows = {}
    for study in table[STUDY].unique():
        own = np.flatnonzero(table[STUDY] == study)
        each = np.array([[1 - max(p[own, 0]), *(max(p[own, k]) for k in range(1, 8))] for p in views])
        rows[study] = 1 / (1 + np.exp(-np.log(each / (1 - each)).mean(0)))
    return pd.DataFrame.from_dict(rows, orient="index", columns=KNOWN)


def same(pred: Predictions, expected: pd.DataFrame):
    np.testing.assert_allclose(pred.exams.loc[expected.index, list(expected)], expected, rtol=1e-4, atol=1e-6)
    assert pred.exams["indeterminate"].isna().all()


def test_they_are_those_of_the_networks_outputs_with_sides_swapped_back_and_studies_over_several_batches(world):
    source, _, _, runs = world
    run = runs[True][0]
    views = [outputs_of(run, source, view) for view in range(3)]
    for tta in (0, 2):
        same(infer(run, source, tta=tta), slow_exams(views[:tta + 1], source.table))
    assert max(np.abs(v[:, 1:] - v[:, 1:][:, SWAPPED]).max() for v in views) > .05  # a swap is seen
    assert np.unique(make_views(CONFIG, source)[0].rows(1)).size == 5  # studies of 4, 7 and 11 slices share batches


def test_out_of_fold_predictions_have_them_and_training_and_images_do_not_change(world):
    source, truth, folds, runs = world
    for fold, (off, on) in enumerate(zip(*runs.values())):
        plain, pred = Predictions.load(off / "oof"), Predictions.load(on / "oof")
        pd.testing.assert_series_equal(pred.images, plain.images, check_exact=True)
        assert plain.exams.isna().all(axis=None) and set(pred.exams.index) == set(folds.valid(fold))
        studies = source.table[STUDY].isin(folds.valid(fold)).to_numpy()
        views = [outputs_of(on, source, view)[studies] for view in run_views(on)]
        same(pred, slow_exams(views, source.table[studies]))
        same(infer(on, source, pred.exams.index), pred.exams[KNOWN])


def test_a_worker_keeps_them_and_slices_without_pixel_data_do_not_count(world, tmp_path):
    source, _, _, runs = world
    run, index = runs[True][0], index_studies(source)
    units = {(run, view): tmp_path / f"view{view}" for view in range(3)}
    for folder in units.values():
        folder.mkdir()
    work(Job("keras", source, tuple((key, index.rows[study]) for study, key in index.keys.items()), units))
    assert not list(tmp_path.glob("*/*.failed")) and len(list(tmp_path.glob("*/*"))) == 3 * 12
    same(gather_results([list(units.values())], index), infer(run, source, tta=2).exams[KNOWN])
    study = index.rows[source.table[STUDY][0]]
    p = outputs_of(run, source, 0)[study]
    lost = np.arange(len(study)) == p[:, 1:].max(1).argmax()
    problem = "no slice of the series could be read; filled with air"
    table = source.table.iloc[study].assign(problem=np.where(lost, problem, ""))
    loaded = LoadedStudy(table, source[study])
    assert loaded.lost.tolist() == lost.tolist()
    same(infer(run, loaded, tta=0), slow_exams([p[~lost]], table[~lost]))


def test_nan_names_the_slice(world):
    source, _, _, runs = world
    config, model = load_run(runs[True][0])

    class Broken:
        def predict_on_batch(self, x):
            p = np.array(model.predict_on_batch(x))
            p[2, 5] = np.nan  # not the image label
            return p

    with pytest.raises(FloatingPointError, match=f"slice '{source.table[SLICE][2]}' of study"):
        predict_batches(Broken(), make_views(config, source), exam_maxima=True)
    predict_batches(Broken(), make_views(config, source))  # the image label is whole


def test_a_blend_takes_the_labels_that_are_there(world):
    _, truth, folds, runs = world
    own = [Predictions.load(run / "oof") for run in runs[True]]
    maxima = Predictions(pd.concat([pred.exams for pred in own]), pd.concat([pred.images for pred in own])).align(truth)
    rng = np.random.default_rng(0)
    exams = pd.DataFrame(rng.uniform(.1, .9, (len(truth.exams), 9)), truth.exams.index, EXAM_LABELS)
    other = Predictions(exams, truth.images * 0 + .4)
    ensemble = fit_ensemble({"sided": maxima, "other": other}, truth, folds)
    assert ensemble.blend_weights.blend_weights["indeterminate"] == (0, 1)
    assert ensemble.blend({"sided": maxima, "other": other}).exams.notna().all(axis=None)
