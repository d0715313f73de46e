"Structured Reports, read back with pydicom: patient and study of the images, values of the answer, marks of research."
import gzip
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.ensemble import default_ensemble
from rsnape_kit.report.answers import NOTE, make_answer, predict_stages
from rsnape_kit.report.structured_report import RESEARCH, write_structured_reports

UID = "1.2.826.0.1.3680043.10.9"


def write_slices(folder, count=6, **attributes) -> pd.DataFrame:
    "Write headers of CT slices; return a slices table."
    rows = []
    for i in range(count):
        ds = pydicom.Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.CTImageStorage, f"{UID}.3.{i}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = f"{UID}.1", f"{UID}.2", "CT"
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.save_as(folder / f"{i}.dcm", enforce_file_format=True)
        rows.append((ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, i, str(folder / f"{i}.dcm")))
    return pd.DataFrame(rows, columns=[STUDY, "SeriesInstanceUID", "SOPInstanceUID", "order", "path"])


def answer_of(table: pd.DataFrame, exams=True, p=(.5, .2, .3, .9, .3, np.nan)):
    "An answer with simple probabilities, the highest on slice 4, and another that is marked on slice 1."
    index = slice_index(table)
    values = np.linspace(.05, .45, 9) if exams else np.full(9, np.nan)
    exam = pd.DataFrame([values], index.unique(0), EXAM_LABELS)
    pred = Predictions(exam, pd.Series(p, index))
    stages = predict_stages({"m": pred}, default_ensemble(["m"]), table)
    return make_answer(stages, table, warnings=["one thing is odd"])


def items(ds, kind: str) -> list:
    "All content items of a value type, at any depth."
    found = []
    for item in ds.get("ContentSequence", ()):
        found += [item] * (item.ValueType == kind) + items(item, kind)
    return found


def meaning(item) -> str:
    return item.ConceptNameCodeSequence[0].CodeMeaning


def test_it_says_what_the_answer_says(tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    table = write_slices(tmp_path, PatientID="p1", PatientName="Doe^Jane", StudyDate="20200101", PatientSex="F")
    answer = answer_of(table)
    path, = write_structured_reports(tmp_path / "sr", answer, table, count=2)
    ds = pydicom.dcmread(path)
    assert (ds.Modality, ds.PatientID, ds.PatientName, ds.StudyDate, ds.StudyInstanceUID) == (
        "SR", "p1", "Doe^Jane", "20200101", f"{UID}.1")
    assert ds.SeriesInstanceUID != f"{UID}.2" and ds.SeriesDescription == RESEARCH
    assert (ds.CompletionFlag, ds.VerificationFlag, ds.PreliminaryFlag) == ("PARTIAL", "UNVERIFIED", "PRELIMINARY")
    texts = [item.TextValue for item in items(ds, "TEXT")]
    assert NOTE in texts and "one thing is odd" in texts
    numbers = [(meaning(item), float(item.MeasuredValueSequence[0].NumericValue)) for item in items(ds, "NUM")]
    study = answer.studies[0]
    expected = [(label.replace("_", " "), round(value.blended, 6)) for label, value in study.labels.items()]
    assert [name for name, _ in numbers[:9]] == [name for name, _ in expected]
    assert [p for _, p in numbers[:9]] == pytest.approx([p for _, p in expected], abs=1e-6)
    assert sorted(numbers[9:]) == [("pe present on image", .5), ("pe present on image", .9)]
    codes = {meaning(item): item.ConceptCodeSequence[0].CodeMeaning for item in items(ds, "CODE")}
    for label, value in study.labels.items():
        assert codes[label.replace("_", " ")] == ("Yes" if value.yes else "No")
    images = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items(ds, "IMAGE")}
    assert images == {f"{UID}.3.0", f"{UID}.3.3"}
    listed = ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == images


@pytest.mark.parametrize(("p", "places"), [
    ((.46, .2, .3, .9, .3, np.nan), {0, 3}), ((.44, .2, .3, .9, .3, np.nan), {3}),  # half of the highest
    ((.02, .01, .02, .03, .02, .09), {5}), ((.09, .01, .02, .11, .02, np.nan), {3})])  # below .1
def test_it_refers_to_the_marked_slices_or_the_highest(tmp_path, p, places):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    table = write_slices(tmp_path)
    path, = write_structured_reports(tmp_path / "sr", answer_of(table, p=p), table)
    images = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items(pydicom.dcmread(path), "IMAGE")}
    assert images == {f"{UID}.3.{place}" for place in places}


@pytest.mark.parametrize("exams", [True, False])
def test_images_without_a_patient_and_models_without_exam_labels(tmp_path, exams):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    table = write_slices(tmp_path)
    path, = write_structured_reports(tmp_path / "sr", answer_of(table, exams), table)
    ds = pydicom.dcmread(path)
    assert not ds.PatientID and len(items(ds, "NUM")) == (9 if exams else 0) + 2


def test_a_validator_of_the_standard_finds_no_error(tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    if shutil.which("dciodvfy") is None:
        pytest.skip("no dciodvfy on this machine: apt-get install dicom3tools")
    patient = {"PatientID": "p1", "PatientName": "Doe^Jane", "StudyDate": "20200101", "StudyTime": "12", "StudyID": "1"}
    table = write_slices(tmp_path, **patient)
    path, = write_structured_reports(tmp_path / "sr", answer_of(table), table)
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True).stderr
    assert "ComprehensiveSR" in said and not [line for line in said.splitlines() if line.startswith("Error")]


def test_slices_without_files_are_refused_by_name(tmp_path):
    table = write_slices(tmp_path)
    answer = answer_of(table)
    if importlib.util.find_spec("highdicom") is None:
        with pytest.raises(ImportError, match=r"pip install 'rsnape_kit\[sr\]'"):
            write_structured_reports(tmp_path, answer, table)
        return
    with pytest.raises(ValueError, match="--dicom"):
        write_structured_reports(tmp_path, answer, table.drop(columns="path"))


def test_packed_files_are_referred_to(tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    table = write_slices(tmp_path, PatientID="p1")
    packed = [f"{path}.gz" for path in table["path"]]
    for path, target in zip(table["path"], packed):
        Path(target).write_bytes(gzip.compress(Path(path).read_bytes()))
    path, = write_structured_reports(tmp_path / "sr", answer_of(table), table.assign(path=packed), count=1)
    assert pydicom.dcmread(path).PatientID == "p1"


def test_studies_that_were_not_predicted_have_no_report(tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    table = write_slices(tmp_path)
    index = slice_index(table)
    pred = Predictions(pd.DataFrame(np.nan, index.unique(0), EXAM_LABELS), pd.Series(np.nan, index))
    answer = make_answer(predict_stages({"m": pred}, default_ensemble(["m"]), table), table)
    assert write_structured_reports(tmp_path / "sr", answer, table) == []
