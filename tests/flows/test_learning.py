"Small models with the demo's settings beat both priors after a minute or two of training."
import os

import numpy as np
import pandas as pd
import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
pytest.importorskip("torch._dynamo")  # before TensorFlow: after it, the wheel for GPUs ends the process
pytest.importorskip("keras")

from rsnape_kit.competition.folds import make_folds  # noqa: E402
from rsnape_kit.competition.labels import IMAGE_LABEL, STUDY  # noqa: E402
from rsnape_kit.competition.predictions import Predictions  # noqa: E402
from rsnape_kit.competition.priors import constant_prior, position_prior  # noqa: E402
from rsnape_kit.dicom.slices import scan  # noqa: E402
from rsnape_kit.phantom.generate import make_competition  # noqa: E402
from rsnape_kit.report.scores import gain_over  # noqa: E402
from rsnape_kit.runs.recipes import DEMO, override_settings  # noqa: E402
from rsnape_kit.store.build import build_store  # noqa: E402
from rsnape_kit.store.slice_store import SliceStore  # noqa: E402
from rsnape_kit.training.trainer import train  # noqa: E402

SMALLER = {"efficientnet": ["pixels.size=64", "steps=10"],
           "petaformer": ["groups=20", "slice_warmup.steps=250", "slice_warmup.batch=48", "phases.0.epochs=6"]}
PLACES = {"train": "train", "test": "test", "twins": "truth/twins"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Stores, slices tables and truths of 120 training studies, 60 held-out ones, and their twins without clots."
    folder = tmp_path_factory.mktemp("learning")
    made = make_competition(folder / "made", 120, 60, slices=20, size=128, seed=5, difficulty="demo", clean=True,
                            twins=True)
    tables = {part: scan(made / place) for part, place in PLACES.items()}
    stores = {part: SliceStore(build_store(table, folder / part)) for part, table in tables.items()}
    return folder, stores, tables, {"train": Predictions.from_train_csv(made / "train.csv"),
                                    "test": Predictions.from_train_csv(made / "truth" / "test.csv")}


@pytest.fixture(scope="module")
def trained(world):
    "A function that trains a model once and returns its run and its predictor."
    folder, stores, tables, truths = world
    runs = {}

    def train_once(model: str, shuffled: bool = False):
        if model == "petaformer":
            pytest.importorskip("fastai")
            from rsnape_kit.inference.torch_predictor import infer
        else:
            from rsnape_kit.inference.keras_predictor import infer
        if (model, shuffled) not in runs:
            truth = exchanged(truths["train"]) if shuffled else truths["train"]
            split = make_folds(tables["train"][STUDY].unique(), truth, 6)
            config = override_settings(DEMO[model], SMALLER[model])
            runs[model, shuffled] = train(model, stores["train"], 0, config, truth=truth, folds=split,
                                          out=folder / f"runs{shuffled}", earlier=(), progress=False)
        return lambda part, tta=0: infer(runs[model, shuffled], stores[part], tta=tta)

    return train_once


def exchanged(truth: Predictions) -> Predictions:
    "The labels of the studies, exchanged among them; image labels are resampled to the number of slices."
    names = truth.exams.index
    other = pd.Series(np.random.default_rng(1).permutation(names), names)
    values, parts = {name: part.to_numpy() for name, part in truth.images.groupby(level=0)}, []
    for name, part in truth.images.groupby(level=0):
        given = values[other[name]]
        parts.append(pd.Series(given[np.arange(len(part)) * len(given) // len(part)], part.index))
    return Predictions(truth.exams.loc[other].set_axis(names), pd.concat(parts).rename(truth.images.name))


def gain(world, pred) -> dict:
    "The gain of the image predictions over the better prior, on the held-out studies."
    _, _, tables, truths = world
    rivals = {"constant": constant_prior(truths["train"], tables["test"]),
              "position": position_prior(truths["train"], tables["train"], tables["test"])}
    found = gain_over(truths["test"], pred, rivals, [IMAGE_LABEL])
    print(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALLER)
def test_it_beats_both_priors_on_held_out_images(world, trained, model):
    assert gain(world, trained(model)("test", tta=1))["at_least"] > 0


@pytest.mark.slow
def test_its_predictions_fall_where_the_clots_are_removed(world, trained):
    "Position, noise and patient stay the same, so the difference is due to the clots."
    truth, infer = world[3]["test"].images, trained("petaformer")
    positive = truth[truth == 1].index
    seen, without = (infer(part).images[positive].groupby(level=0).mean() for part in ("test", "twins"))
    print(f"{seen.mean():.3f} -> {without.mean():.3f}, in {(without < seen).mean():.0%} of {len(seen)} studies")
    assert without.mean() < seen.mean() - .1 and (without < seen).mean() > .7


@pytest.mark.slow
def test_labels_of_other_studies_teach_nothing(world, trained):
    assert gain(world, trained("efficientnet", shuffled=True)("test"))["at_least"] < 0
