"The kernels, run on a folder laid out as Kaggle mounts it."
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from rsnape_kit.labels import AUX_LABELS, EXAM_LABELS, IMAGE_LABEL, SLICE, STUDY
from rsnape_kit.predictions import Predictions

COMPETITION = "rsna-str-pulmonary-embolism-detection"


def competition(folder):
    "Two training studies, two to predict, as csv files."
    folder.mkdir(parents=True)
    train = pd.DataFrame({STUDY: ["a1", "a1", "a2"], SLICE: ["b1", "b2", "b3"], IMAGE_LABEL: [0, 1, 0]})
    train[list(EXAM_LABELS + AUX_LABELS)] = 0
    train["negative_exam_for_pe"] = (train[STUDY] == "a2").astype(int)
    test = pd.DataFrame({STUDY: ["c1", "c2", "c1"], SLICE: ["d1", "d2", "d3"]})
    empty = Predictions(pd.DataFrame(.5, ["c1", "c2"], EXAM_LABELS),
                        pd.Series(.5, pd.MultiIndex.from_frame(test))).to_submission().sample(frac=1, random_state=0)
    for name, table in (("train", train), ("test", test), ("sample_submission", empty)):
        table.to_csv(folder / f"{name}.csv", index=False)
    return empty


@pytest.mark.parametrize("prefixes", [("", ""), ("datasets/owner/", "competitions/")], ids=["old", "new"])
def test_the_submission_kernel_answers_every_id_on_both_mount_layouts(tmp_path, prefixes):
    dataset, mount = prefixes
    sample = competition(tmp_path / "input" / mount / COMPETITION)
    shutil.copytree(ROOT / "rsnape_kit", tmp_path / "input" / dataset / "rsnape-kit" / "rsnape_kit")
    (tmp_path / "working").mkdir()
    result = run_kernel(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(tmp_path)), "the kernel imported another rsnape_kit than the attached"
    submission = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist()
    values = submission.set_index("id").label
    assert values["c1_negative_exam_for_pe"] == .5 and values["c2_central_pe"] == 0
    assert values["d1"] == .5  # one positive study, half of whose images are positive


def test_a_missing_dataset_is_named_with_what_is_attached(tmp_path):
    competition(tmp_path / "input" / COMPETITION)
    assert f"attached are: ['{COMPETITION}']" in run_kernel(tmp_path).stderr


def run_kernel(kaggle):
    "The kernel's cells as one script, /kaggle moved to a folder; prints which rsnape_kit it imported."
    notebook = json.loads((ROOT / "nbs/kernels/submit.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    code += "\nimport rsnape_kit; print(rsnape_kit.__file__)"
    return subprocess.run([sys.executable, "-c", code.replace("/kaggle/", f"{kaggle}/")], cwd=kaggle,
                          env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)


def test_the_kernel_that_push_sends_is_there():
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert json.loads((ROOT / metadata["code_file"]).read_text())["metadata"]["kernelspec"]["language"] == "python"
    assert metadata["enable_internet"] is False  # the client's default is true
    assert metadata["id"].split("/")[1] == metadata["title"].lower().replace(" ", "-")
