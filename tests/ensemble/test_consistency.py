"make_consistent against brute force, with an independent implementation of the label rules."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import xlogy

from rsnape_kit.competition.labels import EXAM_LABELS, EXAM_WEIGHTS, IMAGE_WEIGHT, allowed_combinations
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.submission import violations
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.consistency import (
    MARGIN,
    PositiveShareModel,
    expected_cost,
    fit_positive_share,
    make_consistent,
)

PE = ("rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1", "central_pe", "leftsided_pe", "rightsided_pe", "chronic_pe",
      "acute_and_chronic_pe")


def contradicts(exam: dict, images) -> bool:
    "Whether a study breaks a rule; the rules as the competition's page states them."
    if max(images) > .5:
        if (exam["rv_lv_ratio_gte_1"] > .5) == (exam["rv_lv_ratio_lt_1"] > .5):
            return True
        if not (exam["central_pe"] > .5 or exam["leftsided_pe"] > .5 or exam["rightsided_pe"] > .5):
            return True
        if exam["chronic_pe"] > .5 and exam["acute_and_chronic_pe"] > .5:
            return True
        return exam["negative_exam_for_pe"] > .5 or exam["indeterminate"] > .5
    if (exam["negative_exam_for_pe"] > .5) == (exam["indeterminate"] > .5):
        return True
    return any(exam[label] >= .5 for label in PE)


def price(p: float, c: np.ndarray) -> np.ndarray:
    "Expected log loss of predicting c minus that of predicting p."
    return xlogy(p, p) + xlogy(1 - p, 1 - p) - xlogy(p, c) - xlogy(1 - p, 1 - c)


GRID = np.r_[np.linspace(1e-3, .5 - MARGIN, 120), np.linspace(.5 + MARGIN, 1 - 1e-3, 120)]


def brute_force(p: np.ndarray, q: float) -> float:
    "Minimum cost over all choices of sides with a fine grid for each value; p: nine exam labels, then images."
    weights = np.r_[list(EXAM_WEIGHTS.values()), np.full(len(p) - 9, IMAGE_WEIGHT * q)]
    options = [np.r_[GRID, value] for value in p]
    costs = [w * price(value, c) for w, value, c in zip(weights, p, options)]
    sides = (np.arange(2**len(p))[:, None] >> np.arange(len(p))) & 1 == 1
    representative = np.where(sides, .9, .1)
    fits = np.array([not contradicts(dict(zip(EXAM_LABELS, row)), row[9:]) for row in representative])
    total = np.zeros(len(sides))
    positive = sides[:, 9:].any(1)
    for i, (c, cost) in enumerate(zip(options, costs)):
        yes, no = cost[c > .5].min(), cost[c <= .5].min()
        strict_no = cost[c < .5].min() if i < 9 and EXAM_LABELS[i] in PE else no
        total += np.where(sides[:, i], yes, np.where(positive, no, strict_no))
    return total[fits].min()


edges = st.sampled_from([0., 1., .5, .5 + MARGIN, .5 - MARGIN, .5 + 1e-9, .5 - 1e-9, .2, .8])
probability = st.one_of(edges, st.floats(.001, .999))


@st.composite
def cases(draw, most=3):
    "Some studies, their slices in random row order, and a q for each."
    counts = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    study = np.repeat([f"s{i}" for i in range(len(counts))], counts)
    exams = np.array(draw(st.lists(probability, min_size=9 * len(counts), max_size=9 * len(counts)))).reshape(-1, 9)
    images = np.array(draw(st.lists(probability, min_size=len(study), max_size=len(study))))
    order = np.array(draw(st.permutations(range(len(study)))))
    index = slice_index((study[order], [f"i{i}" for i in order]))
    names = draw(st.permutations([f"s{i}" for i in range(len(counts))]))
    pred = Predictions(pd.DataFrame(exams, names, EXAM_LABELS), pd.Series(images[order], index))
    q = draw(st.lists(st.floats(0, 1), min_size=len(counts), max_size=len(counts)))
    return pred, pd.Series(q, names)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_no_consistent_prediction_is_expected_to_cost_less(case):
    pred, q = case
    fixed = make_consistent(pred, q)
    cost = expected_cost(pred, fixed, q)
    for study in pred.exams.index:
        p = np.r_[pred.exams.loc[study].to_numpy(), pred.images[study].to_numpy()]
        assert cost[study] == pytest.approx(brute_force(p, q[study]), abs=1e-9)


@given(cases(6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_result_is_consistent_and_a_second_pass_changes_nothing(case, default_q):
    pred, q = case
    q = None if default_q else q
    fixed = make_consistent(pred, q)
    for study in pred.exams.index:
        assert not contradicts(fixed.exams.loc[study], fixed.images[study])
    assert violations(fixed).empty
    again = make_consistent(fixed, q)
    pd.testing.assert_frame_equal(again.exams, fixed.exams, check_exact=True)
    pd.testing.assert_series_equal(again.images, fixed.images, check_exact=True)
    for before, after in ((pred.exams.to_numpy(), fixed.exams.to_numpy()),
                          (pred.images.to_numpy(), fixed.images.to_numpy())):
        moved = before != after
        assert np.isin(after[moved], [.5 - MARGIN, .5 + MARGIN]).all()
    assert fixed.images.index.equals(pred.images.index) and fixed.exams.index.equals(pred.exams.index)


@given(cases(6))
@settings(max_examples=200, deadline=None)
def test_violations_are_the_competitions(case):
    pred, _ = case
    wrong = {study for study in pred.exams.index if contradicts(pred.exams.loc[study], pred.images[study])}
    assert set(violations(pred)["StudyInstanceUID"]) == wrong
    fixed = make_consistent(pred)
    for study in set(pred.exams.index) - wrong:  # consistent studies are unchanged, bit by bit
        assert (fixed.exams.loc[study] == pred.exams.loc[study]).all()
        assert (fixed.images[study] == pred.images[study]).all()


def regular(studies: int, slices: int) -> pd.MultiIndex:
    "An index with the same number of slices in every study."
    study = np.repeat([f"s{i}" for i in range(studies)], slices)
    return slice_index((study, [f"i{i}" for i in range(studies * slices)]))


def some_consistent(rng, studies: int, slices: int) -> Predictions:
    "Random predictions that obey the rules, anywhere on their side of 0.5."
    yes, positive = allowed_combinations()
    combination = rng.integers(0, len(yes), studies)
    index = regular(studies, slices)
    image_yes = (rng.random((studies, slices)) < .4) & positive[combination, None]
    image_yes[positive[combination], rng.integers(0, slices)] = True

    def values(yes):
        return np.where(yes, rng.uniform(.5 + 1e-12, 1, yes.shape), rng.uniform(0, .5 - 1e-12, yes.shape))

    return Predictions(pd.DataFrame(values(yes[combination]), index.levels[0], EXAM_LABELS),
                       pd.Series(values(image_yes).ravel(), index))


def test_a_consistent_prediction_comes_back_to_the_last_bit():
    pred = some_consistent(np.random.default_rng(0), 5000, 4)
    assert violations(pred).empty
    for q in (None, pd.Series(0., pred.exams.index), pd.Series(1., pred.exams.index)):
        fixed = make_consistent(pred, q)
        pd.testing.assert_frame_equal(fixed.exams, pred.exams, check_exact=True)
        pd.testing.assert_series_equal(fixed.images, pred.images, check_exact=True)


def test_thousands_of_random_consistent_predictions_cost_more():
    rng = np.random.default_rng(1)
    assumed = some_consistent(rng, 2000, 4)
    assumed = Predictions(assumed.exams * 0 + rng.random(assumed.exams.shape),
                           assumed.images * 0 + rng.random(len(assumed.images)))
    q = pd.Series(rng.random(2000), assumed.exams.index)
    best = expected_cost(assumed, make_consistent(assumed, q), q)
    for _ in range(20):
        other = expected_cost(assumed, some_consistent(rng, 2000, 4), q)
        assert (best <= other + 1e-12).all()


def test_expected_cost_is_the_mean_of_realised_costs():
    "Draw truths of one study from the assumed probabilities, q included, and apply the formula of the metric."
    rng = np.random.default_rng(2)
    draws, q_values = 200_000, np.array([.25, .5])
    assumed_q = rng.choice(q_values, draws)  # a study of four slices, one or two of them positive
    first = assumed_q == .25
    y = np.zeros((draws, 4))
    y[first, rng.choice(4, first.sum(), p=[.6, .2, .1, .1])] = 1
    y[~first] = rng.permuted(np.tile([1., 1, 0, 0], ((~first).sum(), 1)), axis=1)
    image_p = (assumed_q[:, None] * y).mean(0) / assumed_q.mean()  # E[q y] / E[q], the best prediction for the metric
    exam_p = rng.random(9)
    exams = rng.random((draws, 9)) < exam_p
    to_exam, to_image = rng.uniform(.05, .95, 9), rng.uniform(.05, .95, 4)

    def numerator(exam_c, image_c):
        weights = np.array(list(EXAM_WEIGHTS.values()))
        bce = -np.where(exams, np.log(exam_c), np.log(1 - exam_c)) @ weights
        return bce - IMAGE_WEIGHT * assumed_q * np.where(y > 0, np.log(image_c), np.log(1 - image_c)).sum(1)

    index = slice_index((["s"] * 4, list("abcd")))
    pred, to = (Predictions(pd.DataFrame([e], ["s"], EXAM_LABELS), pd.Series(i, index))
                for e, i in ((exams.mean(0), image_p), (to_exam, to_image)))
    realised = (numerator(to_exam, to_image) - numerator(exams.mean(0), image_p)).mean()
    expected = expected_cost(pred, to, pd.Series({"s": assumed_q.mean()}))["s"]
    assert expected == pytest.approx(realised, rel=1e-9)


def shares(law: PositiveShareModel, studies=400, slices=500, seed=3, vary=()):
    "Random images, *negative* and labels `vary`, and a truth whose share of positive slices follows the law."
    rng, index = np.random.default_rng(seed), regular(studies, slices)
    exams = pd.DataFrame(.1, index.levels[0], EXAM_LABELS)
    exams["negative_exam_for_pe"], exams["indeterminate"] = rng.uniform(0, .95, studies), .01
    for label in vary:
        exams[label] = rng.uniform(.02, .98, studies)
    oof = Predictions(exams, pd.Series(np.repeat(rng.uniform(.02, .6, studies), slices), index))
    count = np.rint(law(oof).to_numpy() * slices).astype(int)
    shown = np.tile(np.arange(slices), studies) < np.repeat(count, slices)
    return oof, Predictions(exams * 0, pd.Series(shown * 1., index))


def test_fit_positive_share_recovers_the_parameters():
    found = fit_positive_share(*shares(PositiveShareModel(offset=-.4, slope=.8, power=1.3)), shrinkage=np.inf)
    assert [found.offset, found.slope, found.power] == pytest.approx([-.4, .8, 1.3], abs=.03)
    assert not found.exams


def test_fit_positive_share_recovers_what_the_exam_labels_tell():
    law = PositiveShareModel(-.4, .8, 1.3, exams={"rv_lv_ratio_gte_1": .6, "rv_lv_ratio_lt_1": -.4})
    oof, truth = shares(law, vary=(*PE[:2], "chronic_pe"))
    found = fit_positive_share(oof, truth, shrinkage=.01)
    assert [found.exams[label] for label in PE[:2]] == pytest.approx([.6, -.4], abs=.05)
    assert found.exams["chronic_pe"] == pytest.approx(0, abs=.05)
    np.testing.assert_allclose(found(oof), law(oof), atol=.01)
    shrunk = fit_positive_share(oof, truth, shrinkage=1000).exams
    assert all(abs(shrunk[label]) < abs(found.exams[label]) for label in PE[:2])


def test_q_never_rises_with_negative_or_indeterminate_whatever_it_was_fitted_on():
    contrary = PositiveShareModel(-.4, .8, 0., exams={"negative_exam_for_pe": .7})  # more where the exam is negative
    oof, truth = shares(contrary)
    fitted = fit_positive_share(oof, truth)
    before = fitted(oof)
    for label in ("negative_exam_for_pe", "indeterminate"):
        assert fitted.exams[label] <= 0
        raised = Predictions(oof.exams.assign(**{label: np.minimum(oof.exams[label] + .04, 1)}), oof.images)
        assert (fitted(raised) <= before + 1e-12).all()
    assert (fitted(Predictions(oof.exams, oof.images + .1)) >= before - 1e-12).all()


def test_positive_share_models_without_exam_coefficients_load(tmp_path):
    (tmp_path / "q.json").write_text('{"offset": -0.5, "slope": 0.9, "power": 1.2, "studies": 7}')
    oof, _ = shares(PositiveShareModel(0., 1., 1.), studies=5)
    mean = oof.images.groupby(level=0).mean()
    positive = 1 - oof.exams["negative_exam_for_pe"] - oof.exams["indeterminate"]
    expected = positive**1.2 / (1 + np.exp(.5 - .9 * np.log(mean / (1 - mean))))
    np.testing.assert_allclose(PositiveShareModel.load(tmp_path / "q.json")(oof), expected[oof.exams.index], rtol=1e-9)
