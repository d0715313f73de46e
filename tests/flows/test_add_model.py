"The worked example of CONTRIBUTING, taken from the page, put among the models and trained by the command."
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.dicom.slices import scan
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store

REGISTERED = """
import sys
from rsnape_kit.runs import config
exec(open(sys.argv[1]).read())
config.MODELS["plain"] = plain
from rsnape_kit.cli import main
main(sys.argv[2:])
"""


@pytest.fixture
def example(tmp_path):
    "What the page shows, as a file."
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    code = next(block for block in blocks if "default_exp models.plain" in block)
    assert len(code.splitlines()) < 40
    (tmp_path / "plain.py").write_text(code)
    return tmp_path / "plain.py"


def test_a_model_of_one_function_trains_like_the_others(example, tmp_path):
    made = make_competition(tmp_path / "competition", 6, 1, slices=8, size=64, difficulty="demo")
    build_store(scan(made / "train"), tmp_path / "store")
    words = ["train", "plain", "--store", tmp_path / "store", "--train-csv", made / "train.csv", "--folds", 2,
             "--out", tmp_path / "runs"]
    for setting in ("pixels.size=32", "network.width=.5", "batch=4", "steps=2"):
        words += ["--set", setting]
    done = subprocess.run([sys.executable, "-c", REGISTERED, example, *map(str, words)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    oof = Predictions.load(tmp_path / "runs" / "plain-fold0-seed0" / "oof")
    truth = Predictions.from_train_csv(made / "train.csv")
    assert set(oof.exams.index) == set(make_folds(truth.exams.index, truth, 2).valid(0))
    assert np.isfinite(oof.images).all() and oof.images.between(0, 1).all()
