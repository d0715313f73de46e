"Blending and calibration against simple reference implementations, and no leaks between folds."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL
from rsnape_kit.competition.metric import competition_loss, loss_table
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.ensemble.blending import LABELS, BlendWeights, blend, combine
from rsnape_kit.ensemble.calibration import calibrate, fit_calibration
from rsnape_kit.ensemble.weight_fitting import blend_oof, fit_weights, loss_by_label
from rsnape_kit.testing import simulate_model, simulate_truth

FIVE = np.arange(5)


@pytest.fixture(scope="module")
def world():
    "A truth, three simulated models, and their folds."
    truth = simulate_truth(400, slices=(4, 8, 12), seed=1)
    models = {f"m{i}": simulate_model(truth, skill, i)[0] for i, skill in enumerate((1., .8, .5))}
    return truth, models, pd.Series(np.resize(FIVE, 400), truth.exams.index)


@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from(["probability", "logit"]))
@settings(max_examples=100, deadline=None)
def test_combine_equals_a_loop_over_values(models, seed, space):
    rng = np.random.default_rng(seed)
    p = rng.uniform(.01, .99, (models, 12))
    p[rng.random(p.shape) < .4] = np.nan
    weights = rng.dirichlet(np.ones(models))
    result = combine(p, weights, space)
    for column, value in zip(p.T, result):
        pairs = [(w, v) for w, v in zip(weights, column) if not np.isnan(v)]
        if not pairs:
            assert np.isnan(value)
        elif space == "probability":
            assert value == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs), rel=1e-9)
        else:
            odds = np.prod([(v / (1 - v)) ** (w / sum(w for w, _ in pairs)) for w, v in pairs])
            assert value == pytest.approx(odds / (1 + odds), rel=1e-9)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_no_weights_on_a_grid_do_better(world, space):
    truth, models, folds = world
    fitted = fit_weights(models, truth, folds, space, shrinkage=0)
    best = loss_table(truth, blend(models, fitted)).loss
    steps = np.arange(0, 1.01, .05)
    for a in steps:
        for b in steps[steps <= 1.001 - a]:
            other = BlendWeights(tuple(models), dict.fromkeys(LABELS, (a, b, max(0, 1 - a - b))), fitted.prior, space)
            assert (best <= loss_table(truth, blend(models, other)).loss + 1e-6).all()


def test_nested_losses_equal_a_loop_over_folds(world):
    truth, models, folds = world
    whole = blend_oof(models, truth, folds)
    pieces = []
    for fold in FIVE:
        out, inside = folds.index[folds != fold], folds.index[folds == fold]
        weights = fit_weights({name: m.select(out) for name, m in models.items()}, truth.select(out))
        for label in ("central_pe", "negative_exam_for_pe"):
            pairs = zip(weights.blend_weights[label], models.values())
            expected = sum(w * m.exams.loc[inside, label] for w, m in pairs)
            assert whole.exams.loc[inside, label].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-9)
        expected = sum(w * m.select(inside).images for w, m in zip(weights.blend_weights[IMAGE_LABEL], models.values()))
        pieces.append(expected)
    assert whole.images.to_numpy() == pytest.approx(pd.concat(pieces)[whole.images.index].to_numpy(), abs=1e-9)
    table = loss_by_label(fit_weights(models, truth, folds))
    assert table.loc["all", "blend"] == pytest.approx(competition_loss(truth, whole), rel=1e-9)
    for name, model in models.items():
        assert table.loc["all", name] == pytest.approx(competition_loss(truth, model), rel=1e-9)


def test_the_truth_of_a_fold_cannot_reach_its_own_prediction(world):
    truth, models, folds = world
    inside = folds.index[folds == 2]
    exams, images = truth.exams.copy(), truth.images.copy()
    exams.loc[inside] = 1 - exams.loc[inside]
    images[images.index.get_level_values(0).isin(inside)] = 1.
    changed = Predictions(exams, images)
    true, other = blend_oof(models, truth, folds), blend_oof(models, changed, folds)
    pd.testing.assert_frame_equal(true.select(inside).exams, other.select(inside).exams, check_exact=True)
    pd.testing.assert_series_equal(true.select(inside).images, other.select(inside).images, check_exact=True)
    assert (true.exams != other.exams).any(axis=None)  # the other folds were fitted on the changed truth


def test_calibration_is_judged_fold_by_fold(world):
    truth, models, folds = world
    oof, parts = models["m1"], []
    for fold in FIVE:
        inside, out = folds.index[folds == fold], folds.index[folds != fold]
        parts.append(calibrate(oof.select(inside), fit_calibration(oof.select(out), truth.select(out))))
    expected = Predictions(pd.concat([p.exams for p in parts]), pd.concat([p.images for p in parts]))
    losses = fit_calibration(oof, truth, folds).losses
    for label, loss in loss_table(truth, expected).loss.items():
        assert losses[label]["after"] == pytest.approx(loss, rel=1e-9)
        assert losses[label]["before"] == pytest.approx(loss_table(truth, oof).loss[label], rel=1e-9)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_any_mixture_of_gaps_blends_to_a_complete_prediction(world, space, tmp_path):
    truth, models, folds = world
    rng = np.random.default_rng(0)
    gappy = {}
    for name, model in models.items():
        studies = rng.permutation(model.exams.index)[:350]
        exams = model.exams.where(rng.random(model.exams.shape) < .7)
        images = model.images.where(rng.random(len(model.images)) < .7)
        gappy[name] = Predictions(exams, images).select(studies)
    like = truth.images.index.to_frame(index=False)
    weights = fit_weights(models, truth, folds, space)
    weights.save(tmp_path / "weights.json")
    weights = BlendWeights.load(tmp_path / "weights.json")
    result = blend(gappy, weights, like)
    assert result.exams[list(EXAM_LABELS)].notna().all(axis=None) and result.images.notna().all()
    assert result.images.index.equals(truth.images.index)
    for study in truth.exams.index[:40]:
        p = np.array([[m.exams["leftsided_pe"].get(study, np.nan)] for m in gappy.values()])
        expected = combine(p, weights.blend_weights["leftsided_pe"], space)[0]
        expected = weights.prior["leftsided_pe"] if np.isnan(expected) else expected
        assert result.exams.loc[study, "leftsided_pe"] == pytest.approx(expected, rel=1e-12)
    assert competition_loss(truth, result) < competition_loss(truth, blend({}, weights, like))


def test_weights_fitted_with_gaps_minimise_the_loss_of_the_blend(world):
    "With gaps in the OOFs, no change of one label's weights lowers the loss of the blend itself."
    truth, models, folds = world
    rng = np.random.default_rng(4)
    gappy = {name: Predictions(m.exams.where(rng.random(m.exams.shape) < .8),
                               m.images.where(rng.random(len(m.images)) < .8)) for name, m in models.items()}
    weights = fit_weights(gappy, truth, folds, shrinkage=0)
    best = loss_table(truth, blend(gappy, weights)).loss
    for step in ((.02, -.02, 0), (-.02, .02, 0), (0, .02, -.02), (0, -.02, .02), (.02, 0, -.02), (-.02, 0, .02)):
        moved = {}
        for label, w in weights.blend_weights.items():
            w = np.clip(np.add(w, step), 0, None)
            moved[label] = tuple(w / w.sum())
        other = loss_table(truth, blend(gappy, BlendWeights(weights.models, moved, weights.prior))).loss
        assert (best <= other + 1e-6).all()
