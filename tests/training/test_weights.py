"What a run starts from: found, refused, kept when it is resumed, and a warning where it is noise."
import hashlib
import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import STUDY
from rsnape_kit.models.published import PUBLISHED
from rsnape_kit.runs.config import PetaFormerConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.runs.recipes import DEMO, FULL
from rsnape_kit.testing import ArraySource, simulate_truth
from rsnape_kit.training.trainer import choose_weights, describe_weights, train

NAMES = ("efficientnet-b1-noisy-student", "efficientnet-b0-noisy-student", "efficientnet-b1-keras")


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Files that stand for published ones, in a folder of their own; ./weights and the Kaggle inputs are empty."
    folder = tmp_path / "files"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        path = folder / PUBLISHED[name].file
        with h5py.File(path, "w") as file:
            file["number"] = number
        published_as(monkeypatch, name, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RSNAPE_KAGGLE", str(tmp_path / "kaggle"))
    return folder


def published_as(monkeypatch, name, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], digest=digest, size=path.stat().st_size))


def place(path, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder)
    return folder / path.name


def test_auto_takes_the_preferred_file_that_is_there_and_says_so(weights, tmp_path, capsys):
    config = FULL["efficientnet"]
    place(weights / "efficientnetb1_notop.h5", tmp_path / "kaggle" / "input" / "datasets" / "me" / "keras")
    assert choose_weights("auto", config, "runs", ()).name == "efficientnetb1_notop.h5"
    for folder in (tmp_path / "kaggle" / "input" / "bundle" / "weights", tmp_path / "weights"):
        file = place(weights / PUBLISHED[NAMES[0]].file, folder)
        assert choose_weights("auto", config, "runs", ()).absolute() == file
        assert f"{PUBLISHED[NAMES[0]].file} (efficientnet-b1-noisy-student)" in capsys.readouterr().out
    file = tmp_path / "weights" / PUBLISHED[NAMES[0]].file
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is an HTML page, expected efficientnet-b1-noisy-student"):
        choose_weights("auto", config, "runs", ())


@pytest.mark.parametrize("config", [FULL["efficientnet"], FULL["efficientnet3d"], PetaFormerConfig()],
                         ids=lambda config: config.model)
@pytest.mark.parametrize("asked", ["auto", None])
def test_a_full_size_model_warns_in_capitals_before_it_starts_from_noise(weights, config, asked):
    with pytest.warns(UserWarning, match=f"{config.model.upper()} AT FULL SIZE STARTS FROM NOISE.*`rsnape weights "):
        assert choose_weights(asked, config, "runs", ()) is None


@pytest.mark.filterwarnings("error")
def test_a_model_without_published_weights_says_so_without_a_warning(weights, capsys):
    for config in (FULL["resnet3d"], *DEMO.values()):
        assert choose_weights("auto", config, "runs", ()) is None
        assert f"{config.model} starts from random weights: none are published" in capsys.readouterr().out


def test_weights_of_another_variant_are_refused_by_name(weights):
    refusal = "is efficientnet-b0-noisy-student; efficientnet with these settings starts from efficientnet-b1-noisy"
    with pytest.raises(ValueError, match=refusal):
        choose_weights(weights / PUBLISHED[NAMES[1]].file, FULL["efficientnet"], "runs", ())
    cut = weights / "cut.h5"
    cut.write_bytes((weights / PUBLISHED[NAMES[0]].file).read_bytes()[:-50])
    with pytest.raises(ValueError, match="cut.h5 is a truncated or damaged HDF5 file"):
        choose_weights(cut, FULL["efficientnet"], "runs", ())


def finished(config, folder, epochs=1):
    "A run's folder with a checkpoint, weights and held-out predictions."
    run = open_run(folder / config.name, config)
    for name in ("checkpoint", "oof"):
        (run / name).mkdir(exist_ok=True)
    (run / "checkpoint" / "state.json").write_text(json.dumps({"epoch": epochs}))
    (run / "checkpoint" / "history.csv").write_text("epoch,loss\n0,.5\n")
    (run / "best.npz").write_bytes(str(config).encode())
    return run


def test_efficientnet3d_starts_from_the_same_folds_image_run_or_from_published_weights(weights, tmp_path):
    place(weights / PUBLISHED[NAMES[1]].file, tmp_path / "weights")
    config = replace(FULL["efficientnet3d"], fold=1, split="s")
    image = replace(FULL["efficientnet"], fold=1, split="s")
    b0 = replace(image, network={"variant": "b0"})
    others = (replace(b0, seed=1, fold=0), replace(b0, seed=2, split="t"), replace(image, seed=3),
              replace(b0, seed=4, network={"variant": "b0", "width": .5}),
              replace(b0, seed=7, network={"variant": "b0", "scale": "unit"}))
    for other in others:
        finished(other, tmp_path / "runs")
    unfinished = finished(replace(b0, seed=5), tmp_path / "runs")
    (unfinished / "oof").rmdir()
    assert choose_weights("auto", config, tmp_path / "runs", ()).name == PUBLISHED[NAMES[1]].file
    attached = finished(replace(b0, seed=6), tmp_path / "inputs" / "kernel" / "runs")
    assert choose_weights("auto", config, tmp_path / "runs", [tmp_path / "inputs"]) == attached / "best.npz"
    beside = finished(b0, tmp_path / "runs")  # the same seed
    assert choose_weights("auto", config, tmp_path / "runs", [tmp_path / "inputs"]) == beside / "best.npz"


def test_a_resumed_run_keeps_its_file_or_names_what_is_missing(weights, tmp_path, capsys):
    file = place(weights / "efficientnetb1_notop.h5", tmp_path / "weights")
    started = replace(FULL["efficientnet"], pretrained=describe_weights(file))
    finished(started, tmp_path / "inputs" / "kernel" / "runs")
    place(weights / PUBLISHED[NAMES[0]].file, tmp_path / "weights")  # preferred, but it came later
    config, earlier = FULL["efficientnet"], [tmp_path / "inputs"]
    assert choose_weights("auto", config, "runs", earlier).absolute() == file
    with open(file, "ab") as changed:
        changed.write(b"x")
    missing = f"{config.name} started from efficientnetb1_notop.h5 [0-9a-f]{{12}} .*attach it"
    with pytest.raises(FileNotFoundError, match=missing):
        choose_weights("auto", config, "runs", earlier)
    finished(config, tmp_path / "runs")  # began with noise
    assert choose_weights("auto", config, "runs", earlier) is None
    assert "efficientnet starts from random weights, as before" in capsys.readouterr().out


def test_training_gets_what_was_found_and_records_it(weights, tmp_path, monkeypatch):
    path = place(weights / PUBLISHED[NAMES[0]].file, tmp_path / "weights")
    truth = simulate_truth(6, slices=(4, 5, 6))
    table = truth.images.index.to_frame(index=False)
    table = table.assign(order=table.groupby(STUDY).cumcount(), intercept=-1024.)
    source, folds = ArraySource(np.zeros((len(table), 32, 32), "int16"), table), make_folds(truth.exams.index, truth, 2)
    trained = []
    monkeypatch.setattr("rsnape_kit.training.keras_trainer.train_keras",
                        lambda run, config, *args, weights, **options: trained.append((config.pretrained, weights)))
    train("efficientnet", source, 0, FULL["efficientnet"], truth=truth, folds=folds, weights="auto")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert trained == [(f"{path.name} {digest[:12]}", path.relative_to(tmp_path))]
    with pytest.warns(UserWarning, match="EFFICIENTNET AT FULL SIZE STARTS FROM NOISE"):
        train("efficientnet", source, 0, FULL["efficientnet"], truth=truth, folds=folds)
    assert trained[1] == ("", None)
