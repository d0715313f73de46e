"The stacker: its columns against a loop over slices, what neighbours teach it, and what shuffled labels do not."
import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, SLICE, STUDY
from rsnape_kit.competition.metric import competition_loss, loss_table
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.stacking import Stacker, cross_stack, fit_stacker, stack_columns
from rsnape_kit.testing import simulate_truth


def log_odds(p):
    p = min(max(p, 1e-4), 1 - 1e-4)
    return np.log(p / (1 - p))


def case(seed, exams=True):
    "Predictions of studies of 1 to 7 slices with rows in random order, and their table in another order."
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 8, 5)
    rows = [(f"s{i}", f"{i}-{k}", 10 + 3 * k) for i, n in enumerate(counts) for k in range(n)]
    table = pd.DataFrame(rows, columns=[STUDY, SLICE, "order"])
    images = pd.Series(rng.random(len(table)).round(2), slice_index(table))
    exams = pd.DataFrame(rng.random((5, 9)) if exams else np.nan, [f"s{i}" for i in rng.permutation(5)], EXAM_LABELS)
    return Predictions(exams, images.sample(frac=1, random_state=seed)), table.sample(frac=1, random_state=seed + 1)


@pytest.mark.parametrize("seed", range(3))
def test_columns_are_those_of_a_loop_over_slices(seed):
    pred, table = case(seed)
    other = Predictions(case(seed, exams=False)[0].exams, 1 - pred.images)
    images, exams = stack_columns({"a": pred, "b": other}, table, reach=2)
    order = table.set_index([STUDY, SLICE])["order"]
    found, pools = {}, {}
    for study in pred.exams.index:
        names = order[study].sort_values().index
        n = len(names)
        z = [(3 * k + .5) / (3 * (n - 1) + 1) for k in range(n)]  # `order` counts in threes
        rows = [[] for _ in names]
        pools[study] = []
        for model in (pred, other):
            p = [model.images[study, name] for name in names]
            x = [log_odds(value) for value in p]
            around = [[x[min(max(k + step, 0), n - 1)] for step in (-2, -1, 0, 1, 2)] for k in range(n)]
            p = [1 / (1 + np.exp(-value)) for value in x]
            statistics = [max(x), sum(x) / n, max(sum(some) / 5 for some in around), log_odds(sum(p) / n),
                          sum(a * b for a, b in zip(p, z)) / sum(p)]
            for row, own in zip(rows, around):
                row += own + statistics
            pools[study] += statistics
            if model is pred:
                pools[study] += [log_odds(value) for value in pred.exams.loc[study]]
        found |= {(study, name): row + [at, at**2] for name, row, at in zip(names, rows, z)}
    np.testing.assert_allclose(images, [found[key] for key in pred.images.index], atol=1e-12)
    np.testing.assert_allclose(exams, [pools[study] for study in pred.exams.index], atol=1e-12)


def competition(studies=160, seed=0):
    "Truth whose positive slices lie side by side, weak predictions of single slices, and the slices table."
    truth, rng = simulate_truth(studies, slices=(15, 25, 40), seed=seed), np.random.default_rng(seed)
    images = truth.images.to_numpy().copy()
    for rows in truth.images.groupby(level=0).indices.values():
        images[rows] = np.roll(np.sort(images[rows]), -rng.integers(0, len(rows) - int(images[rows].sum()) + 1))
    logits = images + rng.normal(0, 1, len(images)) - .5
    table = truth.images.index.to_frame(index=False)
    first = Predictions(truth.exams * np.nan, pd.Series(1 / (1 + np.exp(-logits)), truth.images.index))
    table["order"] = table.groupby(STUDY).cumcount()
    return Predictions(truth.exams, pd.Series(images, truth.images.index)), first, table


def test_neighbours_lower_the_image_loss_and_pools_tell_the_exam():
    truth, first, table = competition()
    alone, stacked = (cross_stack({"cnn": first}, truth, table, reach=reach) for reach in (0, 6))
    prior = loss_table(truth, constant_prior(truth, table)).loss
    by_label = [loss_table(truth, pred).loss for pred in (alone, stacked)]
    assert by_label[1][IMAGE_LABEL] < by_label[0][IMAGE_LABEL] - .05 < prior[IMAGE_LABEL] - .05
    assert by_label[1]["negative_exam_for_pe"] < prior["negative_exam_for_pe"] - .1


def test_shuffled_labels_teach_nothing():
    truth, first, table = competition()
    rng = np.random.default_rng(1)
    exams = truth.exams.set_axis(rng.permutation(truth.exams.index)).loc[truth.exams.index]
    within = pd.concat([truth.images[[study]].sample(frac=1, random_state=int(k)).set_axis(truth.images[[study]].index)
                        for k, study in enumerate(truth.exams.index)])
    dealt = Predictions(exams, within.loc[truth.images.index])
    stacked = cross_stack({"cnn": first}, dealt, table)
    assert competition_loss(dealt, stacked) > competition_loss(dealt, constant_prior(dealt, table)) - .003


def test_a_fold_is_predicted_without_its_own_labels():
    truth, first, table = competition(60)
    folds = pd.Series(np.arange(60) % 3, truth.exams.index)
    before = cross_stack({"cnn": first}, truth, table, folds)
    own = folds.index[folds == 0]
    exams, images = truth.exams.copy(), truth.images.copy()
    exams.loc[own] = 1 - exams.loc[own]
    images.loc[list(own)] = 1 - images.loc[list(own)]
    after = cross_stack({"cnn": first}, Predictions(exams, images), table, folds)
    np.testing.assert_array_equal(after.select(own).exams, before.select(own).exams)
    np.testing.assert_array_equal(after.select(own).images, before.select(own).images)
    assert (after.exams.loc[folds.index[folds == 1]] != before.exams.loc[folds.index[folds == 1]]).any(axis=None)


def test_a_saved_stacker_predicts_the_same(tmp_path):
    truth, first, table = competition(60)
    stacker = fit_stacker({"cnn": first}, truth, table)
    stacker.save(tmp_path / "stacker.json")
    found, expected = (each({"cnn": first}, table) for each in (Stacker.load(tmp_path / "stacker.json"), stacker))
    pd.testing.assert_frame_equal(found.exams, expected.exams, check_exact=True)
    pd.testing.assert_series_equal(found.images, expected.images, check_exact=True)


def test_a_label_that_no_study_has_gets_a_constant():
    truth, first, table = competition(60)
    none = Predictions(truth.exams.assign(chronic_pe=0.), truth.images * 0)
    stacked = fit_stacker({"cnn": first}, none, table)({"cnn": first}, table)
    np.testing.assert_allclose(stacked.exams["chronic_pe"], .5 / 61)
    np.testing.assert_allclose(stacked.images, .5)
