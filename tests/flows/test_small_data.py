"A few studies, to try things on: the commands work, or say what is missing and which option gives it."
import numpy as np
import pandas as pd
import pytest

import rsnape_kit as rk
from rsnape_kit.cli import main
from rsnape_kit.competition.labels import STUDY

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Four studies of ten slices as a competition and as a store, and how many of them are positive."
    folder = tmp_path_factory.mktemp("small")
    competition = rk.make_competition(folder / "competition", 4, 2, 10, 64, seed=1, difficulty="demo")
    truth = rk.Predictions.from_train_csv(competition / "train.csv")
    assert (truth.images.groupby(level=0).max() > 0).sum() == 2
    rk.build_store(competition / "train", folder / "store")
    return folder, truth


def labels(folder, truth, studies):
    "A train.csv of some of the studies only."
    table = pd.read_csv(folder / "competition" / "train.csv")
    path = folder / f"{len(studies)}.csv"
    table[table[STUDY].isin(studies)].to_csv(path, index=False)
    return path


def store_of(folder, studies):
    source = rk.SliceStore(folder / "store")
    rows = np.concatenate([source.study(study) for study in studies])
    part = rk.ArraySource(source[rows], source.table.iloc[rows].reset_index(drop=True))
    return rk.build_store(part, folder / f"store{len(studies)}")


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as error:
        main(list(map(str, arguments)))
    return str(error.value)


def test_every_refusal_names_what_is_missing_and_the_option(made, tmp_path):
    folder, truth = made
    positive = list(truth.images[truth.images > 0].index.unique(0))
    negative = [study for study in truth.exams.index if study not in positive]

    def train(studies, *options):
        data = "--store", store_of(folder, studies), "--train-csv", labels(folder, truth, studies)
        return refused("train", "efficientnet", *data, "--recipe", "quick", "--out", tmp_path / "runs", *options)

    everything = [*positive, *negative]
    assert "5 folds of 4 studies" in (said := train(everything)) and "choose 2 to 4 folds (n, --folds)" in said
    assert "fold 2 of 2: expected 0 to 1 (fold, --fold)" in train(everything, "--folds", 2, "--fold", 2)
    with pytest.warns(UserWarning, match="positive: 2 of 4 studies, fewer than 3 folds"):
        said = train(everything, "--folds", 3, "--fold", 2)
    assert "fold 2 holds out no study" in said and "2 of 4 studies have one: hold out fold 0 or 1 (--fold)" in said
    with pytest.warns(UserWarning, match="1 of 3 studies, fewer than 2 folds"):
        said = train([positive[0], *negative], "--folds", 2)
    assert "none is left to learn from; 1 of 3 studies have one: two are needed" in said and "--studies 4" in said
    (weights := tmp_path / "run").mkdir()
    (weights / "best.npz").touch()
    assert f"is a folder: give the path of a file with weights, such as {weights / 'best.npz'}" in \
        train(everything, "--folds", 2, "--weights", weights)
    assert not (tmp_path / "runs").exists()


def dot(size: int, channels: int):
    "The smallest network of slices."
    import keras

    inputs = keras.Input((size, size, channels), dtype="uint8")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(1, "sigmoid", dtype="float32")(x))


def test_a_batch_and_a_step_larger_than_the_data_are_cut_with_a_note(made, tmp_path):
    folder, truth = made
    rk.register_model("dot", dot)
    source = rk.SliceStore(folder / "store")
    folds, notes = rk.make_folds(truth.exams.index, truth, 2), {}
    for fold, (batch, accumulate) in enumerate(((768, 1), (12, 64))):  # a step of 768, without and with --machine
        config = rk.KerasConfig(model="dot", pixels=rk.InputConfig(size=32), network={}, batch=batch,
                                accumulate=accumulate, phases=(rk.Phase(2, 1e-2),))
        with pytest.warns(UserWarning) as caught:
            run = rk.train("dot", source, fold, config, truth=truth, folds=folds, out=tmp_path, progress=False)
        notes[batch] = [str(note.message) for note in caught if "is cut to" in str(note.message)]
        assert sorted(rk.Predictions.load(run / "oof").exams.index) == sorted(folds.valid(fold))
        assert len(pd.read_csv(run / "history.csv")) == 2
    assert notes == {768: ["batch=768 is cut to 20: an epoch has no more slices"],
                     12: ["accumulate=64 is cut to 1: an epoch has no more batches of 12"]}
