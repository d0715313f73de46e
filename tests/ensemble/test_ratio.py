"A member that knows the RV/LV ratio of studies with an embolus only: product rule, weights, calibration, and no leaks."
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from rsnape_kit.competition.labels import EXAM_LABELS, NOT_POSITIVE, RV_LV
from rsnape_kit.competition.metric import loss_table
from rsnape_kit.competition.predictions import Predictions, positive_studies, ratio_only
from rsnape_kit.ensemble.blending import LABELS
from rsnape_kit.ensemble.calibration import cross_calibrate, fit_calibration, fit_scaling
from rsnape_kit.ensemble.ensemble import Ensemble, default_ensemble, fit_ensemble, fit_preset, nested_blend
from rsnape_kit.ensemble.weight_fitting import blend_oof, fit_weights, loss_by_label
from rsnape_kit.testing import simulate_model, simulate_truth

OTHERS = [label for label in LABELS if label not in RV_LV]


def right_heart(truth, slope=1., seed=0):
    "A calibrated model of the ratio for positive studies, which says anything for others; slope: of its log-odds."
    rng = np.random.default_rng(seed)
    evidence = np.where(truth.exams[RV_LV[0]] == 1, 2., -2.) + 2 * rng.standard_normal(len(truth.exams))
    wild = 3 * rng.standard_normal(len(truth.exams))
    positive = truth.exams.index.isin(positive_studies(truth).exams.index)
    p = expit(slope * np.where(positive, evidence + np.log(.425 / .575), wild))
    return Predictions(pd.DataFrame({RV_LV[0]: p, RV_LV[1]: 1 - p}, truth.exams.index), truth.images * np.nan)


@pytest.fixture(scope="module")
def world():
    "A truth, two members for everything or for images only, one for the ratio, and folds."
    truth = simulate_truth(400, slices=(3, 4, 6), seed=5)
    whole, images = (simulate_model(truth, skill, seed)[0] for seed, skill in ((1, .6), (2, .9)))
    images = Predictions(images.exams * np.nan, images.images)
    members = {"whole": whole, "images": images, "rvlv": right_heart(truth)}
    return truth, members, pd.Series(np.arange(400) % 4, truth.exams.index)


def test_only_a_model_of_the_ratio_is_one(world):
    truth, members, _ = world
    assert [ratio_only(pred) for pred in members.values()] == [False, False, True]
    shown = positive_studies(truth).exams
    assert list(shown.index) == list(truth.exams.index[(truth.exams[list(NOT_POSITIVE)] == 0).all(axis=1)])


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_ratio_gains_and_other_labels_stay(world, space):
    truth, members, folds = world
    with_it, without = (fit_weights(some, truth, folds, space) for some in (
        members, {name: members[name] for name in ("whole", "images")}))
    tables = [loss_by_label(weights).loc[list(LABELS)] for weights in (with_it, without)]
    assert (tables[0].blend[list(RV_LV)] < tables[1].blend[list(RV_LV)] - .005).all()
    np.testing.assert_allclose(tables[0].blend[OTHERS], tables[1].blend[OTHERS], rtol=1e-9)
    assert tables[0]["rvlv"].drop(list(RV_LV)).isna().all()
    for label in OTHERS:
        assert with_it.blend_weights[label][2] == 0
    assert min(with_it.blend_weights[label][2] for label in RV_LV) > .3


def test_alone_it_sums_to_the_probability_of_an_embolus(world):
    "By hand, study by study, with weights of 1 for the ratio."
    truth, members, _ = world
    only = {label: (1., 0., 0.) for label in LABELS} | {label: (0., 0., 1.) for label in RV_LV}
    ensemble = default_ensemble(tuple(members), truth)
    weights = type(ensemble.blend_weights)(ensemble.blend_weights.models, only, ensemble.blend_weights.prior)
    blended = Ensemble(weights).blend(members).exams
    for study, row in members["whole"].exams.iloc[:50].iterrows():
        embolus = max(0, 1 - row["negative_exam_for_pe"] - row["indeterminate"])
        given = members["rvlv"].exams.loc[study, RV_LV[0]]
        assert blended.loc[study, RV_LV[0]] == pytest.approx(given * embolus, abs=1e-9)
        assert blended.loc[study, list(RV_LV)].sum() == pytest.approx(embolus, abs=1e-9)


def test_equal_weights_take_it_as_a_product(world):
    "An ensemble that was never fitted, as a submission without one has it."
    truth, members, _ = world
    blended = default_ensemble(tuple(members), truth).blend(members).exams
    assert (blended[list(RV_LV)].sum(axis=1) < 1 - .5 * blended["negative_exam_for_pe"]).all()


def test_calibration_takes_studies_with_an_embolus_only(world):
    truth, _, folds = world
    bold = right_heart(truth, slope=2.)
    shown = truth.exams.index.isin(positive_studies(truth).exams.index)
    other = bold.exams.copy()
    other.loc[~shown, list(RV_LV)] = .5
    other = Predictions(other, bold.images)
    fitted = fit_scaling(bold, truth).coefficients
    assert fitted == fit_scaling(other, truth).coefficients
    assert fitted[RV_LV[0]][0] == pytest.approx(.5, abs=.15) and fitted["central_pe"] == (1., 0.)
    losses = fit_calibration(bold, truth, folds).losses[RV_LV[0]]
    assert losses["after"] < losses["before"]
    sums = cross_calibrate(bold, truth, folds).exams[list(RV_LV)].sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-3)  # either label says the same


def test_a_study_is_predicted_without_the_truth_of_its_fold(world):
    truth, members, folds = world
    members = members | {"rvlv": right_heart(truth, slope=2.)}
    held = folds.index[folds == 1]
    exams = truth.exams.copy()
    exams.loc[held, list(EXAM_LABELS)] = exams.loc[held[::-1], list(EXAM_LABELS)].to_numpy()
    other = Predictions(exams, truth.images)
    for blended in (lambda t: blend_oof(members, t, folds), lambda t: nested_blend(members, t, folds)[1]):
        one, two = blended(truth).select(held), blended(other).select(held)
        assert (one.exams.to_numpy() == two.exams.to_numpy()).all() and (one.images == two.images).all()


def test_an_ensemble_with_it_is_fitted_saved_and_consistent(world, tmp_path):
    truth, members, folds = world
    ensemble = fit_ensemble(members | {"rvlv": right_heart(truth, slope=3.)}, truth, folds)
    ensemble.save(tmp_path / "ensemble.json")
    loaded = Ensemble.load(tmp_path / "ensemble.json")
    assert loaded(members).exams.equals(ensemble(members).exams) and ensemble.losses["chosen"] == "calibrated"
    part = {name: pred.select(truth.exams.index[:40]) for name, pred in members.items()}
    whole, missing = loaded(part), loaded({name: part[name] for name in ("whole", "images")})
    assert whole.exams.notna().all(axis=None) and missing.exams.notna().all(axis=None)
    table = loss_table(truth.select(truth.exams.index[:40]), loaded.blend(part))
    assert table.loss.notna().all()


def test_a_preset_refuses_it(world):
    truth, members, folds = world
    with pytest.raises(ValueError, match="the preset 'first-version' has no weight for rvlv: leave its runs out"):
        fit_preset("first-version", members, truth, folds)
