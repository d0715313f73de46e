"The original's blends by name, against the arithmetic written out, and the prior by position fitted without each fold."
import contextlib
import io

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.cli import main
from rsnape_kit.competition.labels import AUX_LABELS, EXAM_LABELS, IMAGE_LABEL, SLICE, STUDY
from rsnape_kit.competition.metric import competition_loss
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import best_constants, position_prior
from rsnape_kit.competition.submission import violations
from rsnape_kit.ensemble.blending import blend, preset_weights
from rsnape_kit.ensemble.ensemble import Ensemble, fit_preset, oof_blend
from rsnape_kit.inference.predict_runs import load_folds, load_oofs, plan_predictions
from rsnape_kit.inference.results import save_result
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.runs.config import KerasConfig, PetaFormerConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.testing import simulate_model


@pytest.fixture(scope="module")
def world():
    "200 studies, a third positive, with emboli around the middle; the table of their slices; folds."
    rng, rows = np.random.default_rng(0), []
    for study in range(200):
        n = int(rng.integers(20, 40))
        z, positive = (np.arange(n) + .5) / n, study % 3 == 0
        hit = (np.abs(z - rng.normal(.5, .08)) < .1) & positive
        rows.append(pd.DataFrame({STUDY: f"s{study}", SLICE: [f"{study}.{i}" for i in range(n)], "order": range(n),
                                  "y": hit * 1.}))
    slices = pd.concat(rows, ignore_index=True).sample(frac=1, random_state=0)  # in no order, like train.csv
    images = slices.set_index([STUDY, SLICE]).y
    positive = images.groupby(level=0, sort=False).max()
    exams = pd.DataFrame({label: positive * (label in ("rightsided_pe", "rv_lv_ratio_lt_1")) for label in EXAM_LABELS})
    truth = Predictions(exams.assign(negative_exam_for_pe=1 - positive), images)
    folds = pd.Series(np.arange(200) % 4, truth.exams.index)
    return truth, slices.drop(columns="y"), folds


def test_the_original_is_its_arithmetic(world):
    truth, slices, folds = world
    names = ("efficientnet", "petaformer", "efficientnet3d", "resnet3d")
    preds = {name: simulate_model(truth, .8, seed)[0] for seed, name in enumerate(names)}
    ensemble = fit_preset("original", preds, truth, folds)
    blended = ensemble.blend(preds)
    one, two = preds["efficientnet3d"].exams, preds["resnet3d"].exams
    written = {"negative_exam_for_pe": .71, "indeterminate": .05, "chronic_pe": .07, "acute_and_chronic_pe": .38,
               "central_pe": .28, "leftsided_pe": .78, "rightsided_pe": .71, "rv_lv_ratio_gte_1": .13,
               "rv_lv_ratio_lt_1": .45}
    for label, weight in written.items():
        np.testing.assert_allclose(blended.exams[label], weight * one[label] + (1 - weight) * two[label])
    np.testing.assert_allclose(blended.images, .6 * preds["efficientnet"].images + .4 * preds["petaformer"].images)
    assert ensemble.losses["blend"] == pytest.approx(competition_loss(truth, blended), rel=1e-9)
    assert not len(violations(ensemble(preds)))


def test_the_first_version_has_its_prior_by_position(world, tmp_path):
    truth, slices, folds = world
    preds = {"efficientnet": simulate_model(truth, .3, 0)[0]}
    fitted = fit_preset("first-version", preds, truth, folds, slices)
    fitted.save(tmp_path / "ensemble.json")
    ensemble = Ensemble.load(tmp_path / "ensemble.json")
    assert ensemble == fitted
    blended = ensemble.blend(preds, slices).align(truth)
    means = position_prior(truth, slices).align(truth)
    np.testing.assert_allclose(blended.images, .4 * means.images + .6 * preds["efficientnet"].images)
    np.testing.assert_allclose(blended.exams["rightsided_pe"], truth.exams["rightsided_pe"].mean())
    without = ensemble.blend(preds).images  # without the order of the slices: constants
    np.testing.assert_allclose(without, .4 * best_constants(truth)[1] + .6 * preds["efficientnet"].images)
    assert fitted.losses["blend"] < fit_preset("first-version", preds, truth, folds).losses["blend"] - .004


def test_the_prior_of_a_study_is_fitted_without_its_fold(world):
    truth, slices, folds = world
    preds = {"efficientnet": simulate_model(truth, .3, 0)[0]}
    members, blended = oof_blend(fit_preset("first-version", preds, truth, folds, slices), preds, truth, folds, slices)
    inside = folds.index[folds == 2]
    others = truth.select(folds.index[folds != 2])
    expected = position_prior(others, slices, slices[slices[STUDY].isin(inside)]).align(truth.select(inside)).images
    np.testing.assert_allclose(members["mean"].select(inside).images, expected)
    expected = .4 * expected + .6 * preds["efficientnet"].select(inside).images
    np.testing.assert_allclose(blended.select(inside).images, expected)
    with pytest.raises(ValueError, match="is not in the slices table"):
        fit_preset("first-version", preds, truth, folds, slices[5:])


def test_members_that_are_missing_leave_no_gap(world):
    truth, slices, _ = world
    weights = preset_weights("original", ["efficientnet", "petaformer", "efficientnet3d", "resnet3d"])
    only = simulate_model(truth, .8, 0)[0]
    blended = blend({"petaformer": only}, weights, slices).align(truth)
    np.testing.assert_allclose(blended.images, only.images)
    np.testing.assert_allclose(blended.exams.central_pe, only.exams.central_pe)


def rsnape(*words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(list(map(str, words)))
    return printed.getvalue()


def test_three_seeds_and_the_first_version_from_blend_to_submission(tmp_path):
    """Two seeds of fold 0 and one of fold 1, whose predictions are simulated: seeds of a fold are averaged as log-odds,
    and the submission is the blend with the prior by position of the test set's slices."""
    made = make_competition(tmp_path / "competition", 6, 2, slices=6, size=128, difficulty="demo")
    build_store(made / "train", tmp_path / "store")
    truth, source = Predictions.from_train_csv(made / "train.csv"), DicomSource(made / "test")
    halves, runs = np.split(truth.exams.index, 2), []
    for fold, seed in ((0, 0), (0, 1), (1, 0)):
        config = KerasConfig(model="efficientnet", fold=fold, seed=seed)
        runs.append(open_run(tmp_path / config.name, config))
        (runs[-1] / "best.npz").write_text("not loaded, since all predictions are there")
        oof = simulate_model(truth, .8, seed=10 * fold + seed)[0].select(halves[fold])
        Predictions(oof.exams * np.nan, oof.images).save(runs[-1] / "oof")
    oof = load_oofs(runs)["efficientnet"].align(truth)
    one, two = (Predictions.load(run / "oof").align(truth.select(halves[0])).images for run in runs[:2])
    odds = np.sqrt(one / (1 - one) * two / (1 - two))
    np.testing.assert_allclose(oof.select(halves[0]).images, odds / (1 + odds), rtol=1e-5)
    assert load_folds(runs)["efficientnet"].loc[truth.exams.index].tolist() == [0, 0, 0, 1, 1, 1]

    options = "--train-csv", made / "train.csv", "--store", tmp_path / "store"
    printed = rsnape("blend", *runs, "--preset", "first-version", *options, "--out", tmp_path / "ensemble.json")
    assert "chosen preset first-version" in printed
    rsnape("report", *runs, *options, "--ensemble", tmp_path / "ensemble.json", "--out", tmp_path / "report.html")
    plan = plan_predictions(runs, source, tmp_path / "out" / "work")
    test = Predictions.from_train_csv(source.table.assign(**dict.fromkeys([*EXAM_LABELS, *AUX_LABELS, IMAGE_LABEL], 0)))
    for seed, folder in enumerate(plan.folders.values()):
        for study, key in plan.index.keys.items():
            save_result(folder, key, simulate_model(test.select([study]), .8, seed)[0])
    pred = plan.gather()["efficientnet"]
    options = "--competition", made, "--ensemble", tmp_path / "ensemble.json", "--out", tmp_path / "out"
    assert "efficientnet: 3 runs, 2 studies" in rsnape("predict", *runs, *options)
    ensemble = Ensemble.load(tmp_path / "ensemble.json")
    train = DicomSource(made / "train").table
    by_position = position_prior(truth, train, source.table).align(pred).images
    blended = ensemble.blend({"efficientnet": pred}, source.table).align(pred)
    np.testing.assert_allclose(blended.images, .4 * by_position + .6 * pred.images)
    submitted = pd.read_csv(tmp_path / "out" / "submission.csv", dtype={"id": str}).set_index("id").label
    expected = ensemble({"efficientnet": pred}, source.table).images.droplevel(0)
    np.testing.assert_allclose(submitted[expected.index], expected, atol=1e-6)


def test_the_original_without_labels(tmp_path):
    names = "efficientnet", "resnet3d", "efficientnet3d"
    runs = [open_run(tmp_path / name, KerasConfig(model=name)) for name in names]
    with pytest.raises(SystemExit, match="the preset 'original' needs petaformer: give runs of it"):
        rsnape("blend", *runs, "--preset", "original", "--out", tmp_path / "ensemble.json")
    runs.append(open_run(tmp_path / "petaformer", PetaFormerConfig()))
    rsnape("blend", *runs, "--preset", "original", "--out", tmp_path / "ensemble.json")
    assert Ensemble.load(tmp_path / "ensemble.json").blend_weights == preset_weights("original")
