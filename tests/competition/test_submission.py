"submission.csv: every fault that would make it invalid is found before it is written."
import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.submission import SubmissionError, check_submission, write_submission
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.consistency import make_consistent
from rsnape_kit.testing import simulate_model, simulate_truth


@pytest.fixture
def world(tmp_path):
    "A consistent prediction whose ids are all digits, as 12 hexadecimal ones can be, and a sample on disk."
    truth = simulate_truth(30, slices=(3, 6, 9), seed=2)
    pred, _ = simulate_model(truth)
    studies = {s: f"{i:012d}" for i, s in enumerate(pred.exams.index)}
    pairs = [(studies[s], f"{i:012d}") for i, (s, _) in enumerate(pred.images.index, 1000)]
    index = slice_index(tuple(zip(*pairs)))
    pred = make_consistent(Predictions(pred.exams.rename(studies), pd.Series(pred.images.to_numpy(), index)))
    sample = pred.to_submission().assign(label=.5).sample(frac=1, random_state=0)
    sample.to_csv(tmp_path / "sample_submission.csv", index=False)
    return pred, tmp_path / "sample_submission.csv", tmp_path / "submission.csv"


def test_what_is_written_reads_back_to_the_last_bit(world):
    pred, sample, out = world
    write_submission(pred, sample, out)
    rows = [line.rstrip("\n").split(",") for line in open(out)]
    assert rows[0] == ["id", "label"]
    assert [row[0] for row in rows[1:]] == [line.split(",")[0] for line in open(sample)][1:]
    labels = dict(rows[1:])
    for (_, name), p in pred.images.items():
        assert float(labels[name]) == p
    for study in pred.exams.index:
        for label in EXAM_LABELS:
            assert float(labels[f"{study}_{label}"]) == pred.exams.loc[study, label]
    slices = pred.images.index.to_frame(index=False)
    assert check_submission(out, sample, slices) == []
    assert any(.5 < float(p) < .5 + 1e-5 for p in labels.values())  # some were moved across 0.5 and stay there


def test_extreme_values_survive_as_text(world):
    pred, sample, out = world
    images = pred.images.copy()
    tiny = [0., 1e-300, 1e-15, 5e-7, np.nextafter(.5, 0)]
    images[images < .5] = np.resize(tiny, (images < .5).sum())
    write_submission(Predictions(pred.exams, images), sample, out)
    back = pd.read_csv(out, dtype={"id": str}, float_precision="round_trip").set_index("id")["label"]
    assert (back[images.index.get_level_values(1)].to_numpy() == images.to_numpy()).all()


def test_all_faults_are_reported_at_once_and_nothing_is_written(world):
    pred, sample, out = world
    table = pd.read_csv(sample, dtype={"id": str})
    exams, images = pred.exams.copy(), pred.images.copy()
    exams.iloc[3] = .9
    images.iloc[7] = np.nan
    bad = Predictions(exams, images)
    sample = pd.concat([table[2:], table[10:11], pd.DataFrame({"id": ["f00"], "label": [.5]})])
    with pytest.raises(SubmissionError) as error:
        write_submission(bad, sample, out)
    text = str(error.value)
    for part in ("1 ids of the sample are missing, e.g. 'f00'", "2 ids are not in the sample",
                 "1 ids appear in the sample more than once", "1 ids have no value (NaN)"):
        assert part in text
    assert not out.exists() and not list(out.parent.glob("*.new"))
    images.iloc[7] = .1
    with pytest.raises(SubmissionError, match=f"1 studies break the rule .*{exams.index[3]}"):
        write_submission(Predictions(exams, images), table, out)
    assert not out.exists()


def test_a_full_disk_leaves_the_old_file(world, monkeypatch):
    pred, sample, out = world
    write_submission(pred, sample, out)
    before = out.read_bytes()
    original = pd.DataFrame.to_csv

    def cut_short(self, path, **kwargs):
        original(self[:-3], path, **kwargs)

    monkeypatch.setattr(pd.DataFrame, "to_csv", cut_short)
    with pytest.raises(SubmissionError, match="does not read back"):
        write_submission(pred, sample, out)
    assert out.read_bytes() == before


def test_a_file_from_elsewhere_is_checked_against_the_slices(world):
    pred, sample, out = world
    write_submission(pred, sample, out)
    table = pd.read_csv(out, dtype={"id": str})
    slices = pred.images.index.to_frame(index=False)
    negative = pred.exams["negative_exam_for_pe"].idxmax()
    table.loc[table["id"] == f"{negative}_central_pe", "label"] = .5  # a no elsewhere, but not here
    table.to_csv(out, index=False)
    assert check_submission(out, sample) == []
    assert "no PE label without a positive image" in check_submission(out, sample, slices)[0]
    table["label"] = table["label"].astype(str).where(table["id"] != f"{negative}_central_pe", "n/a?")
    table.to_csv(out, index=False)
    assert check_submission(out, sample, slices) == [f"- 1 ids have no value (NaN), e.g. '{negative}_central_pe'"]
    assert slices.columns.tolist()[0] == STUDY and pred.images.name == IMAGE_LABEL
