"The worked example of CONTRIBUTING, taken from the page and trained."
import re

import numpy as np
import pytest
from conftest import ROOT

from rsnape_kit.config import MODELS, TrainConfig
from rsnape_kit.dicom import scan
from rsnape_kit.folds import folds
from rsnape_kit.phantom import make_competition
from rsnape_kit.pixels import Pixels
from rsnape_kit.predictions import Predictions
from rsnape_kit.store import SliceStore, build_store
from rsnape_kit.train import Phase, train
from rsnape_kit.windows import PE


@pytest.fixture
def example():
    "What the page shows, as names."
    page = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    code = next(block for block in blocks if "default_exp models.plain" in block)
    names = {}
    exec(code, names)
    assert len(code.splitlines()) < 40
    return names


def test_a_model_of_one_function_trains_like_the_others(example, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "plain", example["plain"])
    made = make_competition(tmp_path / "competition", 6, 1, slices=8, size=64, difficulty="demo")
    source = SliceStore(build_store(scan(made / "train"), tmp_path / "store"))
    truth = Predictions.from_train_csv(made / "train.csv")
    split = folds(truth.exams.index, truth, 2)
    config = TrainConfig(model="plain", pixels=Pixels((PE,), "fixed", 32), network={"width": .5}, batch=4, steps=2,
                         phases=(Phase(1, 1e-3),), loss="bce")
    run = train("plain", source, 0, config, truth=truth, folds=split, out=tmp_path / "runs", earlier=(), progress=False)
    oof = Predictions.load(run / "oof")
    assert set(oof.exams.index) == set(split.valid(0))
    assert np.isfinite(oof.images).all() and oof.images.between(0, 1).all()
