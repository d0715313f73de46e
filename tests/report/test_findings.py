"predict --dicom without a network: what is left out, warned of and predicted reaches the files and the terminal."
import html
import json
import os
import shutil
import warnings

import numpy as np
import pandas as pd
import pydicom
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.report import findings
from rsnape_kit.report.answers import Answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A synthetic study with a localizer beside it."
    out = tmp_path_factory.mktemp("dicom")
    root = make_competition(out, 1, 1, slices=12, size=64, difficulty="demo", clean=True) / "test"
    first = next(root.rglob("*.dcm"))
    ds = pydicom.dcmread(first)
    ds.ImageType, ds.SeriesInstanceUID, ds.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "2.5", "2.5.1"
    ds.save_as(first.parent / "scout.dcm")
    return root


@pytest.fixture
def networks(monkeypatch):
    "A stand-in for trained runs: the middle slice is the most suspicious one; heat maps are a corner."
    def predict(runs, source, tta, out, time_budget):
        index = slice_index(source.table)
        p = .9 * np.exp(-(source.table["order"] - 6.)**2 / 8)
        exams = pd.DataFrame([np.linspace(.1, .9, 9)] * len(index.unique(0)), index.unique(0), EXAM_LABELS)
        return {"m": Predictions(exams, pd.Series(p.to_numpy(), index))}

    class Plan:
        def problems(self):
            return {}

    def corner(runs, source, rows, out, time_budget, method):
        return {row: np.pad(np.ones((8, 8), np.float32), (0, 56)) for row in rows}

    monkeypatch.setattr(findings, "predict", predict)
    monkeypatch.setattr(findings, "plan_predictions", lambda *args: Plan())
    monkeypatch.setattr(findings.study_heat_maps, "__defaults__", (None, "occlusion", corner))


def test_everything_is_written_and_told(folder, networks, tmp_path, capsys):
    answer = findings.predict_dicom([], folder, tmp_path / "out", heat=2)
    told = capsys.readouterr().out
    assert answer == Answer.load(tmp_path / "out" / "answer.json")
    study, = answer.studies
    used, scout = sorted(study.series, key=lambda each: not each.used)
    assert (used.slices, used.used, scout.slices, scout.used) == (12, True, 1, False) and "localizer" in scout.reason
    assert len(study.slices) == 12 and study.slices[6].blended == pytest.approx(.9)
    assert any("left out" in text and "localizer" in text for text in study.warnings)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"answer.json", "answer.csv", "report.html", "m", "heatmaps"}
    assert len(list((tmp_path / "out" / "heatmaps").glob("study1-slice*.png"))) == 2
    assert (tmp_path / "out" / "heatmaps" / "study1-slice7.png").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "localizer" in page and "heat-switch" in page and study.study in page
    assert all(label in told for label in EXAM_LABELS) and "localizer" in told and "not a medical device" in told
    assert pd.read_csv(tmp_path / "out" / "answer.csv", dtype=str)[STUDY].nunique() == 1


def failing(runs, source, rows, out, time_budget, method):
    raise RuntimeError("the GPU is gone")


def hasty(runs, source, rows, out, time_budget, method):
    warnings.warn("time is short", stacklevel=1)
    return {rows[0]: np.ones((64, 64), np.float32)}


@pytest.mark.parametrize(("maps", "missing", "reason"), [
    (failing, 2, "RuntimeError: the GPU is gone"), (hasty, 1, "it was not finished in")])
def test_missing_heat_maps_are_told_in_the_answer(folder, networks, tmp_path, monkeypatch, maps, missing, reason):
    monkeypatch.setattr(findings.study_heat_maps, "__defaults__", (None, "occlusion", maps))
    with pytest.warns(UserWarning, match="no heat map of slice"):
        answer = findings.predict_dicom([], folder, tmp_path / "out", time_budget=500, heat=2)
    saved, (study,) = Answer.load(tmp_path / "out" / "answer.json"), answer.studies
    assert saved == answer and len(study.slices) == 12 and study.slices[6].blended == pytest.approx(.9)
    told = [text for text in study.warnings if text.startswith("no heat map of slice ")]
    assert len(told) == missing and all(reason in text for text in told)
    pictures = {path.stem for path in (tmp_path / "out" / "heatmaps").glob("*.png")}
    lost = {f"study1-slice{text.split()[5].strip(':')}" for text in told}
    assert len(pictures) == 2 - missing and not lost & pictures
    assert ("time is short" in answer.warnings) == (maps is hasty)
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    table = pd.read_csv(tmp_path / "out" / "answer.csv")
    assert all(text in page for text in (*told, *answer.warnings)) and len(table) == 9 + 12


def test_json_is_all_that_is_printed(folder, networks, tmp_path, capsys):
    findings.predict_dicom([], folder, tmp_path / "out", json=True)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "answer.json").read_text())


def test_a_study_without_a_prediction_is_an_error_after_all_is_written(folder, networks, tmp_path, monkeypatch):
    whole = findings.predict

    def nothing(*args, **more):
        pred = whole(*args, **more)["m"]
        return {"m": Predictions(pred.exams * np.nan, pred.images * np.nan)}

    monkeypatch.setattr(findings, "predict", nothing)
    with pytest.raises(RuntimeError, match="1 of 1 studies were not predicted.*the time budget was used up"):
        findings.predict_dicom([], folder, tmp_path / "out")
    assert "No model predicted" in (tmp_path / "out" / "report.html").read_text()
    values = Answer.load(tmp_path / "out" / "answer.json").studies[0].labels
    assert {value.blended for value in values.values()} == {None}


def test_a_study_that_is_left_out_whole_is_a_warning_of_the_answer(folder, networks, tmp_path):
    first = next(folder.rglob("*.dcm"))
    other = tmp_path / "in"
    shutil.copytree(folder, other)
    ds = pydicom.dcmread(first)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.Modality = "2.7", "2.8", "2.9", "PT"
    ds.save_as(other / "pet.dcm")
    answer = findings.predict_dicom([], other, tmp_path / "out", json=True)
    assert "2.7" not in {study.study for study in answer.studies}
    assert any(text.startswith("study 2.7: left out") and "modality PT" in text for text in answer.warnings)


def test_a_report_that_cannot_be_made_costs_no_page(folder, networks, tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    (tmp_path / "in").mkdir()
    for path in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        del ds.SOPClassUID
        ds.save_as(tmp_path / "in" / path.name)
    with pytest.raises(ValueError, match=r"\.dcm cannot be referred to by a Structured Report"):
        findings.predict_dicom([], tmp_path / "in", tmp_path / "out", sr=True)
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "answer.json").exists()


def test_a_folder_for_results_that_is_not_utf8_is_refused_before_the_work(folder, tmp_path):
    with pytest.raises(ValueError, match="not UTF-8.*--out"):
        findings.predict_dicom([], folder, os.fsdecode(os.fsencode(tmp_path) + b"/\xfc"))
