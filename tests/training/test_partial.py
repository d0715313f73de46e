"What is trained on if the store lacks studies of train.csv, and with which settings."
from dataclasses import replace

import pandas as pd
import pytest

import rsnape_kit as rk
from rsnape_kit.cli import main
from rsnape_kit.competition.labels import STUDY
from rsnape_kit.runs.folder import open_run
from rsnape_kit.runs.recipes import find_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A competition, and one of two parts of its store."
    folder = tmp_path_factory.mktemp("partial")
    competition = rk.make_competition(folder / "made", 8, 1, slices=2, size=64, difficulty="demo")
    rk.build_store(competition / "train", folder / "store-0", size=64, part=(0, 2))
    return competition / "train.csv", folder / "store-0"


def test_training_without_all_studies_is_refused_by_name(made, monkeypatch):
    train_csv, store = made
    calls = []
    monkeypatch.setattr("rsnape_kit.train", lambda *settings, **more: calls.append(more["folds"]) or store)
    studies, there = pd.read_csv(train_csv)[STUDY].unique(), rk.SliceStore(store).table[STUDY].unique()
    lost = sorted(set(studies) - set(there))
    assert 2 <= len(there) < len(studies) == 8
    words = f"train efficientnet --recipe quick --folds 2 --store {store} --train-csv {train_csv}".split()
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert all(text in str(refused.value) for text in [*lost[:5], f"part 1 ({len(lost)} studies)", "--allow-partial"])
    assert not calls
    with pytest.warns(UserWarning, match="GOING ON WITHOUT A PART OF THE STUDIES"):
        main([*words, "--allow-partial"])
    assert set(calls[0].of.index) == set(there)


def test_the_settings_of_a_run_train_another(made, monkeypatch, tmp_path):
    train_csv, store = made
    calls = []
    monkeypatch.setattr("rsnape_kit.train", lambda *settings, **more: calls.append(settings) or store)
    filled = dict(store="a", split="b", pretrained="c")  # by `train`
    config = replace(find_recipe("quick", "efficientnet"), fold=1, seed=4, tta=2, batch=3, **filled)
    run = open_run(tmp_path / "run", config)
    words = f"train --config {run}/config.json --store {store} --train-csv {train_csv} --allow-partial --folds 2"
    with pytest.warns(UserWarning, match="GOING ON"):
        main(words.split())
    (model, _, fold, given), = calls
    assert (model, fold) == ("efficientnet", 1)
    assert given == replace(config, **dict.fromkeys(filled, ""))
