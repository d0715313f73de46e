"The competition's loss against a slow loop that follows the formula step by step."
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsnape_kit.competition.labels import EXAM_LABELS, EXAM_WEIGHTS, IMAGE_LABEL, IMAGE_WEIGHT
from rsnape_kit.competition.metric import competition_loss, log_loss, loss_table, metric_weights, positive_share
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index


def bce(y: float, p: float) -> float:
    return -math.log(p if y else 1 - p)


def slow_loss(truth, pred, image_weight=lambda q: IMAGE_WEIGHT * q, divide_by=None) -> float:
    "The loss as a loop over studies and images; the last two arguments reproduce known mistakes."
    total = weights = 0.
    for study in truth.exams.index:
        for label, weight in EXAM_WEIGHTS.items():
            total += weight * bce(truth.exams.loc[study, label], pred.exams.loc[study, label])
            weights += weight
        y, p = truth.images[study], pred.images[study]
        q = sum(y) / len(y)
        for name in y.index:
            total += image_weight(q) * bce(y[name], p[name])
            weights += image_weight(q)
    return total / (divide_by or weights)


@st.composite
def competitions(draw, positive=False):
    "A truth of a few studies and predictions for it, its rows in another order."
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    studies = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    index = slice_index((studies, [f"i{i}" for i in range(len(studies))]))
    images = rng.integers(0, 2, len(index))
    if positive:
        images[0] = 1
    exams = pd.DataFrame(rng.integers(0, 2, (len(sizes), 9)), index.levels[0], EXAM_LABELS)
    truth = Predictions(exams, pd.Series(images, index))
    pred = Predictions(pd.DataFrame(rng.uniform(.01, .99, exams.shape), exams.index, EXAM_LABELS),
                       pd.Series(rng.uniform(.01, .99, len(index)), index))
    order = rng.permutation(len(index))
    return truth, pred, Predictions(pred.exams[::-1], pred.images.iloc[order])


@given(competitions())
@settings(max_examples=200, deadline=None)
def test_equals_the_slow_loop_in_any_row_order(case):
    truth, pred, shuffled = case
    expected = slow_loss(truth, pred)
    assert competition_loss(truth, pred) == pytest.approx(expected, rel=1e-12)
    assert competition_loss(truth, shuffled) == pytest.approx(expected, rel=1e-12)
    assert competition_loss(truth.align(shuffled), pred) == pytest.approx(expected, rel=1e-12)


@given(competitions())
@settings(max_examples=50, deadline=None)
def test_half_everywhere_is_ln_2_and_the_truth_itself_is_0(case):
    truth, pred, _ = case
    half = Predictions(pred.exams * 0 + .5, pred.images * 0 + .5)
    assert competition_loss(truth, half) == pytest.approx(math.log(2), rel=1e-12)
    assert competition_loss(truth, truth) == pytest.approx(0, abs=1e-12)


@given(competitions(positive=True))
@settings(max_examples=50, deadline=None)
def test_three_common_mistakes_give_other_values(case):
    truth, pred, _ = case
    loss = competition_loss(truth, pred)
    twice = slow_loss(truth, pred, image_weight=lambda q: IMAGE_WEIGHT * IMAGE_WEIGHT * q)
    mean_of_terms = slow_loss(truth, pred, divide_by=len(truth.images) + 9 * len(truth.exams))
    assert abs(loss - twice) > 1e-12 and abs(loss - mean_of_terms) > 1e-12
    padded = truth.images.copy()  # padding slices: negative, and predicted so
    study = truth.images.index[int(truth.images.to_numpy().argmax())][0]
    padding = slice_index(([study] * 3, ["p0", "p1", "p2"]))
    padded = Predictions(truth.exams, pd.concat([truth.images, pd.Series(0., padding)]).pipe(reindexed))
    padded_pred = Predictions(pred.exams, pd.concat([pred.images, pd.Series(.01, padding)]).pipe(reindexed))
    assert abs(loss - competition_loss(padded, padded_pred)) > 1e-12


def reindexed(images: pd.Series) -> pd.Series:
    return images.set_axis(slice_index((images.index.get_level_values(0), images.index.get_level_values(1))))


@given(competitions())
@settings(max_examples=50, deadline=None)
def test_metric_weights_turn_log_loss_into_the_metric(case):
    truth, pred, _ = case
    weights = metric_weights(truth)
    exams = log_loss(truth.exams, pred.exams) * weights.exams.to_numpy()
    images = log_loss(truth.images, pred.images) * weights.images.to_numpy()
    mean = (exams.sum() + images.sum()) / (weights.exams.to_numpy().sum() + weights.images.sum())
    assert mean == pytest.approx(competition_loss(truth, pred), rel=1e-12)
    table = loss_table(truth, pred)
    assert table.loss.fillna(0) @ table.weight == pytest.approx(mean, rel=1e-12)


def test_images_of_studies_without_positives_have_no_weight():
    index = slice_index((["a", "a", "b", "b"], ["1", "2", "3", "4"]))
    truth = Predictions(pd.DataFrame(0, ["a", "b"], EXAM_LABELS), pd.Series([0, 1, 0, 0], index))
    assert positive_share(truth.images).tolist() == [.5, .5, 0, 0]
    good, bad = (Predictions(truth.exams + .1, pd.Series([.1, .9, p, p], index)) for p in (.01, .99))
    assert competition_loss(truth, good) == competition_loss(truth, bad)
    negative = truth.select(["b"])
    assert np.isnan(loss_table(negative, good).loss[IMAGE_LABEL])  # nothing to score
    assert competition_loss(negative, good) == pytest.approx(-math.log(.9))


def test_one_weight_an_image_and_scaling_by_study():
    "Doubling the slices of a positive study doubles the weight of its images, not of the other study's."
    def loss(n):
        index = slice_index((["a"] * n + ["b"], [f"{i}" for i in range(n + 1)]))
        truth = Predictions(pd.DataFrame(0, ["a", "b"], EXAM_LABELS), pd.Series([1] * n + [1], index))
        pred = Predictions(truth.exams + .5, pd.Series([.2] * n + [.7], index))
        return competition_loss(truth, pred)
    for n in (1, 2, 4):
        w = IMAGE_WEIGHT
        expected = 2 * math.log(2) * sum(EXAM_WEIGHTS.values()) - w * (n * math.log(.2) + math.log(.7))
        assert loss(n) == pytest.approx(expected / (2 * sum(EXAM_WEIGHTS.values()) + (n + 1) * w), rel=1e-12)
