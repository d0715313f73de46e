"Predictions against files as the competition writes them."
import io

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import AUX_LABELS, EXAM_LABELS, IMAGE_LABEL, SERIES, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import locate, slice_index

COLUMNS = [STUDY, SERIES, SLICE, IMAGE_LABEL, "negative_exam_for_pe", "qa_motion", "qa_contrast", "flow_artifact",
           "rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1", "leftsided_pe", "chronic_pe", "true_filling_defect_not_pe",
           "rightsided_pe", "acute_and_chronic_pe", "central_pe", "indeterminate"]


@pytest.fixture
def train(tmp_path):
    "A train.csv of 40 studies, shuffled; some ids are all digits, as 12 hexadecimal ones can be."
    rng = np.random.default_rng(0)
    rows = []
    for study in range(40):
        exam = dict(zip(COLUMNS[4:], rng.integers(0, 2, 13)))
        for _ in range(rng.integers(3, 9)):
            rows.append({STUDY: f"{study:012d}", SERIES: f"{study:012x}", SLICE: f"{len(rows):012d}",
                         IMAGE_LABEL: rng.integers(0, 2), **exam})
    table = pd.DataFrame(rows)[COLUMNS].sample(frac=1, random_state=1)
    table.to_csv(tmp_path / "train.csv", index=False)
    return tmp_path / "train.csv"


def test_from_train_csv_keeps_every_label_of_every_row(train):
    truth = Predictions.from_train_csv(train)
    with open(train) as file:
        header, *lines = (line.rstrip("\n").split(",") for line in file)
    assert len(truth.images) == len(lines)
    for line in lines:
        row = dict(zip(header, line))
        assert truth.images[row[STUDY], row[SLICE]] == int(row[IMAGE_LABEL])
        assert truth.exams.loc[row[STUDY]].to_dict() == {label: int(row[label]) for label in EXAM_LABELS + AUX_LABELS}


def test_table_and_file_give_equal_predictions(train):
    file, table = Predictions.from_train_csv(train), Predictions.from_train_csv(pd.read_csv(train, dtype=str).astype(
        {label: int for label in COLUMNS[3:]}))
    pd.testing.assert_frame_equal(file.exams, table.exams)
    pd.testing.assert_series_equal(file.images, table.images)


def test_submission_round_trip_through_csv_text(train):
    truth = Predictions.from_train_csv(train)
    rng = np.random.default_rng(2)
    pred = Predictions(truth.exams[list(EXAM_LABELS)] * 0 + rng.random((40, 9)), truth.images * 0 + .5 + 1e-6)
    text = pred.to_submission().sample(frac=1, random_state=3).to_csv(index=False)
    back = Predictions.from_submission(pd.read_csv(io.StringIO(text)), pd.read_csv(train, dtype=str)).align(pred)
    pd.testing.assert_frame_equal(back.exams, pred.exams)
    pd.testing.assert_series_equal(back.images, pred.images)
    assert (back.images > .5).all()


def test_locate_equals_the_lookup_of_pandas():
    rng = np.random.default_rng(4)
    pairs = pd.DataFrame({STUDY: rng.integers(0, 9, 300).astype(str), SLICE: rng.integers(0, 60, 300).astype(str)})
    pairs = pairs.drop_duplicates()
    here, there = slice_index(pairs[:150]), slice_index(pairs.sample(frac=.7, random_state=5))
    naive = pd.MultiIndex.from_frame(pairs[:150]).get_indexer(pd.MultiIndex.from_frame(there.to_frame()))
    assert (naive < 0).any() and (naive >= 0).any()
    assert locate(here, there).tolist() == naive.tolist()


def test_select_and_align_give_the_same_rows_as_pandas(train):
    truth = Predictions.from_train_csv(train)
    some = list(truth.exams.index[[7, 3, 21]])
    fold = truth.select(some)
    assert list(fold.exams.index) == some
    for study in some:
        pd.testing.assert_series_equal(fold.images[study], truth.images[study])
    assert len(fold.images) == sum(len(truth.images[study]) for study in some)
    pd.testing.assert_series_equal(truth.align(fold).images, fold.images)


@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, np.inf])
def test_values_outside_0_to_1_are_named(train, value):
    truth = Predictions.from_train_csv(train)
    study, name = truth.images.index[5]
    images, exams = truth.images.copy(), truth.exams.copy()
    images.iloc[5] = exams.loc[study, "chronic_pe"] = value
    with pytest.raises(ValueError, match=f"{name}.*is {value}"):
        Predictions(truth.exams, images)
    with pytest.raises(ValueError, match=f"chronic_pe of study {study} is {value}"):
        Predictions(exams, truth.images)


def test_duplicates_are_named(train):
    truth = Predictions.from_train_csv(train)
    twice = truth.images.iloc[[0, 1, 0]]
    with pytest.raises(ValueError, match=f"{twice.index[0][1]}.*appears twice"):
        Predictions(truth.exams, twice)
    with pytest.raises(ValueError, match="appears twice"):
        Predictions(truth.exams.iloc[[0, 0]], truth.images)
    rows = pd.read_csv(train, dtype=str)
    with pytest.raises(ValueError, match=f"slice '{rows[SLICE][0]}' of study .* appears twice"):
        Predictions.from_train_csv(pd.concat([rows, rows[:1]]))
