"The original's blends by name, against the arithmetic written out, and the prior by position fitted without each fold."
import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, SLICE, STUDY
from rsnape_kit.competition.metric import competition_loss
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import best_constants, position_prior
from rsnape_kit.competition.submission import violations
from rsnape_kit.ensemble.blending import blend, preset_weights
from rsnape_kit.ensemble.ensemble import Ensemble, fit_preset, oof_blend
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
