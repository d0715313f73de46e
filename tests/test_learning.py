"Models of the demo's settings, made smaller, see in a minute or two what no prior can know."
import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
pytest.importorskip("keras")

from rsnape_kit.breakdown import gain_over  # noqa: E402
from rsnape_kit.dicom import scan  # noqa: E402
from rsnape_kit.folds import folds  # noqa: E402
from rsnape_kit.labels import IMAGE_LABEL, STUDY  # noqa: E402
from rsnape_kit.phantom import make_competition  # noqa: E402
from rsnape_kit.predictions import Predictions  # noqa: E402
from rsnape_kit.prior import position_prior, prior  # noqa: E402
from rsnape_kit.recipes import DEMO  # noqa: E402
from rsnape_kit.settings import change  # noqa: E402
from rsnape_kit.store import SliceStore, build_store  # noqa: E402

SMALLER = {"efficientnet": ["pixels.size=64", "steps=25"],
           "petaformer": ["groups=20", "first.steps=250", "first.batch=48", "epochs=3"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Stores, slices tables and truths of 120 studies to learn from and 60 to be tried on."
    folder = tmp_path_factory.mktemp("learning")
    made = make_competition(folder / "made", 120, 60, slices=20, size=256, seed=5, difficulty="demo", clean=True)
    tables = {part: scan(made / part) for part in ("train", "test")}
    stores = {part: SliceStore(build_store(table, folder / part)) for part, table in tables.items()}
    return folder, stores, tables, {"train": Predictions.from_train_csv(made / "train.csv"),
                                    "test": Predictions.from_train_csv(made / "truth" / "test.csv")}


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALLER)
def test_it_beats_both_priors_on_held_out_images(world, model):
    if model == "petaformer":
        pytest.importorskip("fastai")
        from rsnape_kit.infer_torch import infer
        from rsnape_kit.train_torch import train
    else:
        from rsnape_kit.infer import infer
        from rsnape_kit.train import train
    folder, stores, tables, truths = world
    split = folds(tables["train"][STUDY].unique(), truths["train"], 6)
    run = train(model, stores["train"], 0, change(DEMO[model], SMALLER[model]), truth=truths["train"], folds=split,
                out=folder / "runs", earlier=(), progress=False)
    rivals = {"constant": prior(truths["train"], tables["test"]),
              "position": position_prior(truths["train"], tables["train"], tables["test"])}
    gain = gain_over(truths["test"], infer(run, stores["test"], tta=1), rivals, [IMAGE_LABEL])
    print(model, gain)
    assert gain["at_least"] > 0
