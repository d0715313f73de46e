"The worked example of CONTRIBUTING, taken from the page: it trains a model of the user's and predicts with it."
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
from rsnape_kit.inference.predict_runs import load_oofs
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store


@pytest.fixture
def example(tmp_path):
    "What the page shows, as a file."
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    code = next(block for block in blocks if "register_model(" in block)
    assert len(code.splitlines()) < 40
    (tmp_path / "my_model.py").write_text(code)
    return tmp_path / "my_model.py"


def test_a_model_of_one_function_trains_and_predicts_like_the_others(example, tmp_path):
    made = make_competition(tmp_path / "competition", 6, 1, slices=8, size=64, difficulty="demo")
    build_store(scan(made / "train"), tmp_path / "store")
    command = [sys.executable, example, tmp_path / "store", made / "train.csv"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Predictions(6 studies, 48 slices" in done.stdout and "had problems" not in done.stderr
    truth = Predictions.from_train_csv(made / "train.csv")
    oof = load_oofs([tmp_path / "runs" / "plain-fold0-seed0"])["plain"]
    assert set(oof.exams.index) == set(make_folds(truth.exams.index, truth, 2).valid(0))
    assert np.isfinite(oof.images).all() and oof.images.between(0, 1).all()
