"The kernels, run on a folder laid out as Kaggle mounts it."
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from rsnape_kit.kaggle import HEADER
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
    assert result.stdout.splitlines()[-1].startswith(str(tmp_path)), "not the attached rsnape_kit"
    submission = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist()
    values = submission.set_index("id").label
    assert values["c1_negative_exam_for_pe"] == .5 and values["c2_central_pe"] == 0
    assert values["d1"] == .5  # one positive study, half of whose images are positive


def test_a_missing_competition_is_named_with_what_is_attached(tmp_path):
    shutil.copytree(ROOT / "rsnape_kit", tmp_path / "input" / "rsnape-kit" / "rsnape_kit")
    error = run_kernel(tmp_path).stderr
    assert "holds sample_submission.csv" in error and "attached: rsnape-kit" in error


def test_child_processes_see_what_the_header_attached(tmp_path):
    "As wheels are unpacked in a bundle: on the path of this process and of those that it starts."
    competition(tmp_path / "input" / COMPETITION)
    kit = tmp_path / "input" / "datasets" / "owner" / "rsnape-kit"
    shutil.copytree(ROOT / "rsnape_kit", kit / "rsnape_kit")
    (kit / "site").mkdir()
    (kit / "site" / "only_in_the_bundle.py").write_text("answer = 42")
    (tmp_path / "working").mkdir()
    child = "import only_in_the_bundle as m, rsnape_kit; print(m.answer, rsnape_kit.__file__)"
    start_child = f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    result = run_kernel(tmp_path, then=start_child)
    assert result.returncode == 0, result.stderr
    assert f"42 {kit}/rsnape_kit/__init__.py" in result.stdout.splitlines()


def test_every_kernel_begins_with_the_header():
    for path in (ROOT / "nbs" / "kernels").glob("*.ipynb"):
        first = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        assert "".join(first["source"]).removeprefix("#| eval: false\n").strip() == HEADER.strip(), path


def run_kernel(kaggle, name="submit", then="import rsnape_kit; print(rsnape_kit.__file__)"):
    "A kernel's cells as one script, /kaggle moved to a folder, then a line of ours."
    notebook = json.loads((ROOT / f"nbs/kernels/{name}.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return subprocess.run([sys.executable, "-c", code.replace("/kaggle/", f"{kaggle}/") + "\n" + then], cwd=kaggle,
                          env={"PATH": "/usr/bin:/bin", "RSNAPE_KAGGLE": str(kaggle)}, capture_output=True, text=True)


def test_the_kernel_that_push_sends_is_there():
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert json.loads((ROOT / metadata["code_file"]).read_text())["metadata"]["kernelspec"]["language"] == "python"
    assert metadata["enable_internet"] is False  # the client's default is true
    assert metadata["id"].split("/")[1] == metadata["title"].lower().replace(" ", "-")
