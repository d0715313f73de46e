"A model trained for a minute sees what no prior can know."
import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
pytest.importorskip("keras")

from rsnape_kit.breakdown import gain_over  # noqa: E402
from rsnape_kit.dicom import scan  # noqa: E402
from rsnape_kit.folds import folds  # noqa: E402
from rsnape_kit.infer import infer  # noqa: E402
from rsnape_kit.labels import IMAGE_LABEL, STUDY  # noqa: E402
from rsnape_kit.phantom import make_competition  # noqa: E402
from rsnape_kit.predictions import Predictions  # noqa: E402
from rsnape_kit.prior import position_prior, prior  # noqa: E402
from rsnape_kit.recipes import DEMO  # noqa: E402
from rsnape_kit.settings import change  # noqa: E402
from rsnape_kit.store import SliceStore, build_store  # noqa: E402
from rsnape_kit.train import train  # noqa: E402

STUDIES, TEST_STUDIES, SLICES = 120, 60, 16
SMALLER = ["pixels.size=64", "steps=25"]


@pytest.mark.slow
def test_the_image_model_beats_both_priors_on_held_out_studies(tmp_path):
    made = make_competition(tmp_path / "made", STUDIES, TEST_STUDIES, SLICES, size=256, seed=3, difficulty="demo")
    tables = {part: scan(made / part) for part in ("train", "test")}
    for part, table in tables.items():
        build_store(table, tmp_path / part)
    known, truth = (Predictions.from_train_csv(made / path) for path in ("train.csv", "truth/test.csv"))
    split = folds(tables["train"][STUDY].unique(), known, 6)
    run = train("efficientnet", SliceStore(tmp_path / "train"), 0, change(DEMO["efficientnet"], SMALLER), truth=known,
                folds=split, out=tmp_path / "runs", earlier=(), progress=False)
    rivals = {"prior": prior(known, tables["test"]),
              "position": position_prior(known, tables["train"], tables["test"])}
    gain = gain_over(truth, infer(run, SliceStore(tmp_path / "test")), rivals, [IMAGE_LABEL])
    print(gain)
    assert gain["at_least"] > 0
