"The quick demo, killed once and resumed; then its models on real CT."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pydicom
import pytest
import warm
from conftest import ROOT

from rsnape_kit.competition.labels import EXAM_LABELS, SERIES, SLICE, STUDY
from rsnape_kit.competition.submission import check_submission
from rsnape_kit.competition.tables import read_csv, sample_submission, slice_index
from rsnape_kit.demo import SIZES
from rsnape_kit.dicom.slices import scan
from rsnape_kit.utils.files import complete_folder

CT = Path(os.environ.get("RSNAPE_CT", ROOT.parent / "shared" / "data"))
SERIES_OF = {"lidc1": "lidc_small/LIDC-IDRI-0001", "lidc2": "lidc_small/LIDC-IDRI-0002",  # the second without contrast
             "lidc3": "lidc_small/LIDC-IDRI-0003", "small": "cip_ct64_series/dcm"}  # the last of 64 x 64 pixels


def rsnape(*words):
    "The command, in a process of its own."
    command = [sys.executable, "-m", "rsnape_kit.cli", *map(str, words)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def output_of(*words) -> str:
    "What the command prints."
    done = warm.command(*words)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder of a finished quick demo, and its output; it was killed when its first training was done.

    The first processes start as a user's do, those of the second call as forks with the frameworks imported.
    """
    warm.server("both")
    folder = tmp_path_factory.mktemp("demo")
    first = rsnape("demo", "--size", "quick", "--folder", folder)
    while not any(complete_folder(run / "oof") for run in folder.glob("runs/*")):
        assert first.poll() is None, first.communicate()[0][-3000:]
        time.sleep(.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".dcm", ".slices")}
    text = output_of("demo", "--size", "quick", "--folder", folder)
    assert len(kept) > 500 and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    return folder, text


def test_the_demo_goes_on_where_it_was_killed_and_ends_with_a_valid_submission(demo):
    folder, text = demo
    competition = folder / "competition"
    assert check_submission(folder / "submission.csv", competition / "sample_submission.csv",
                            read_csv(competition / "test.csv")) == []
    scores = pd.read_csv(folder / "scores.csv", index_col=0)
    others = {"constant prior", "position prior", "blend", "consistent blend"}
    assert set(scores.index) == {*SIZES["quick"].models} | others
    assert scores.violations["consistent blend"] == 0 and scores.loss.drop("efficientnet").notna().all()
    assert "held-out studies of difficulty 'demo', seed 0" in text and "trained for a few steps only" in text
    done = json.loads((folder / "submit.json").read_text())
    assert done["finished"] and done["studies"]["by every model"] == SIZES["quick"].test_studies
    once = {"done": 1, "wanted": 1}  # as many views as the held-out predictions that the ensemble was fitted on
    assert done["views"] == dict.fromkeys(SIZES["quick"].models, once)
    assert json.loads((folder / "ensemble.json").read_text())["views"] == dict.fromkeys(SIZES["quick"].models, 0)
    report = (folder / "report.html").read_text()
    assert "<img" in report and "Views predicted (the plain one and augmented ones): efficientnet 1 of 1, " in report


@pytest.fixture
def real(tmp_path):
    "Real series in the competition's layout; one lacks its positions."
    if not CT.exists():
        pytest.skip(f"no real CT at {CT}")
    for study, where in SERIES_OF.items():
        shutil.copytree(CT / where, tmp_path / "test" / study / "1", ignore=shutil.ignore_patterns("*.txt"))
    for path in sorted((tmp_path / "test" / "lidc3").rglob("*.dcm")):
        ds = pydicom.dcmread(path)
        del ds.ImagePositionPatient
        ds.save_as(path)
    with pytest.warns(UserWarning, match="no ImagePositionPatient"):
        table = scan(tmp_path / "test")
    table[[STUDY, SERIES, SLICE]].to_csv(tmp_path / "test.csv", index=False)
    sample_submission(slice_index(table)).to_csv(tmp_path / "sample_submission.csv", index=False)
    return tmp_path


def test_the_demos_models_predict_real_ct(demo, real):
    folder, _ = demo
    text = output_of("predict", *folder.glob("runs/*"), "--competition", real, "--ensemble", folder / "ensemble.json",
                     "--out", real / "out")
    test = read_csv(real / "test.csv")
    assert check_submission(real / "out" / "submission.csv", real / "sample_submission.csv", test) == [], text
    done = json.loads((real / "out" / "submit.json").read_text())
    assert done["finished"] and done["studies"]["by every model"] == len(SERIES_OF) == test[STUDY].nunique(), done


def test_one_study_is_read_out_with_a_warning_that_this_is_not_a_medical_device(demo, real):
    folder, _ = demo
    text = output_of("predict", *folder.glob("runs/sequence*"), "--dicom", real / "test" / "lidc1",
                     "--out", real / "out")
    assert all(label in text for label in EXAM_LABELS) and "not a medical device" in text
    page = (real / "out" / "report.html").read_text()
    assert "not a medical device" in page and page.count("<img") >= 3
