"folds.json, saved predictions and histories of trainings: what is wrong with each, and what the kit does."

from functools import partial
from pathlib import Path

from cases_train_csv import as_dict, table_of_train
from matrix import Case, cuts, either, error, flips, sound, survives

FOLDS = {
    "is empty": "",
    "is a list": "[]",
    "is null": "null",
    "has no folds": "{}",
    "has folds of text": '{"folds": {"a": "x"}, "fingerprint": "1"}',
    "has a fold below 0": '{"folds": {"a": -1, "b": 0}, "fingerprint": "1"}',
    "lacks fold 1": '{"folds": {"a": 0, "b": 2}, "fingerprint": "1"}',
    "has no study": '{"folds": {}, "fingerprint": "1"}',
    "has no fingerprint": '{"folds": {"a": 0, "b": 1}}',
    "was edited": '{"folds": {"a": 0, "b": 1}, "fingerprint": "1"}',
    "is cut": '{"folds": {"a"',
}


def folds(folder: Path, text: str):
    from rsnape_kit.competition.folds import Folds

    (folder / "folds.json").write_text(text)
    return Folds.load(folder / "folds.json")


@sound
def saved_folds(folder: Path):
    from rsnape_kit.competition.folds import make_folds

    folder.mkdir(parents=True, exist_ok=True)
    make_folds([f"{k:012x}" for k in range(6)], n=3).save(folder / "folds.json")


def flipped_folds(folder: Path):
    from rsnape_kit.competition.folds import Folds

    path = saved_folds(folder) / "folds.json"
    return survives(path, lambda path: Folds.load(path).of.to_dict(), flips)


CASES = [
    Case("folds.json", what, partial(folds, text=text), error(ValueError, "folds.json")) for what, text in FOLDS.items()
]
CASES += [Case("folds.json", "one flipped bit", flipped_folds, either())]


# ------------------------------------------------------------------ saved predictions
@sound
def predictions(folder: Path):
    from rsnape_kit.competition.predictions import Predictions

    Predictions.from_train_csv(table_of_train(dtype=str)).save(folder)


def load_changed(folder: Path, name: str, change):
    "Load predictions of which one table was changed by `change`: table -> table, or bytes."
    import pandas as pd

    from rsnape_kit.competition.predictions import Predictions

    path = predictions(folder) / name
    changed = change(pd.read_parquet(path))
    for manifest in path.parent.glob("manifest.json"):  # what is tried here is the schema
        manifest.unlink()
    path.write_bytes(changed) if isinstance(changed, bytes) else changed.to_parquet(path, index=False)
    return Predictions.load(path.parent)


CASES += [
    Case(
        "saved predictions",
        f"{name} {what}",
        partial(load_changed, name=name, change=change),
        error(ValueError, name, *words),
    )
    for name, what, change, words in (
        ("exams.parquet", "is no parquet file", lambda t: b"x" * 50, ("parquet",)),
        ("exams.parquet", "is empty", lambda t: b"", ("parquet",)),
        ("exams.parquet", "has no column for a label", lambda t: t.drop(columns="central_pe"), ("central_pe",)),
        (
            "exams.parquet",
            "has a probability above 1",
            lambda t: t.assign(central_pe=1.5),
            ("row 1", "central_pe", "1.5"),
        ),
        (
            "exams.parquet",
            "has text for a probability",
            lambda t: t.assign(central_pe="x"),
            ("row 1", "central_pe", "'x'"),
        ),
        (
            "exams.parquet",
            "has numbers for ids",
            lambda t: t.assign(StudyInstanceUID=[1, 2]),
            ("row 1", "StudyInstanceUID"),
        ),
        ("images.parquet", "has no slices' ids", lambda t: t.drop(columns="SOPInstanceUID"), ("SOPInstanceUID",)),
        (
            "images.parquet",
            "has an infinite probability",
            lambda t: t.assign(pe_present_on_image=float("inf")),
            ("row 1", "pe_present_on_image"),
        ),
    )
]
CASES += [
    Case(
        "saved predictions",
        f"tables {what}",
        partial(load_changed, name=name, change=change),
        error(ValueError, "predictions", *words),
    )
    for name, what, change, words in (
        ("images.parquet", "of other studies", lambda t: t.assign(StudyInstanceUID="x"), ("x",)),
        ("exams.parquet", "with a study twice", lambda t: t.iloc[[0, 0, 1]], ("twice",)),
        ("images.parquet", "with a slice twice", lambda t: t.iloc[[0, *range(len(t))]], ("twice",)),
    )
]


def flipped_predictions(folder: Path, name: str):
    from rsnape_kit.competition.predictions import Predictions

    return survives(predictions(folder) / name, lambda path: as_dict(Predictions.load(path.parent)), flips)


CASES += [
    Case("saved predictions", f"one flipped bit in {name}", partial(flipped_predictions, name=name), either())
    for name in ("exams.parquet", "images.parquet")
]


# ------------------------------------------------------------------ histories of trainings
@sound
def checkpoint(folder: Path):
    "A run after two epochs."
    from rsnape_kit.runs.folder import saving_checkpoint

    with saving_checkpoint(folder, {"epoch": 2}, [{"epoch": 0, "loss": 0.61}, {"epoch": 1, "loss": 0.1 + 0.2}]):
        pass


def history_with(folder: Path, text: str):
    "Load a checkpoint of an earlier version, without checksums, with another history."
    from rsnape_kit.runs.folder import load_checkpoint

    run = checkpoint(folder)
    (run / "checkpoint" / "manifest.json").unlink()
    (run / "checkpoint" / "history.csv").write_text(text)
    return load_checkpoint(run)


def damaged_history(folder: Path, damage):
    from rsnape_kit.runs.folder import load_checkpoint

    path = checkpoint(folder) / "checkpoint" / "history.csv"
    return survives(path, lambda path: load_checkpoint(path.parents[1])[1:], damage)


HISTORIES = {
    "a loss is text": ("epoch,loss\n0,low\n", ("row 1", "loss", "'low'")),
    "a loss is infinite": ("epoch,loss\n0,.5\n1,inf\n", ("row 2", "loss")),
    "has no epochs": ("loss\n.5\n", ("'epoch'",)),
    "lacks a row": ("epoch,loss\n0,.6\n2,.4\n", ("row 2", "epoch 2", "expected 1")),
    "an epoch is a fraction": ("epoch,loss\n0.5,.6\n", ("row 1", "epoch")),
    "a row has more cells": ("epoch,loss\n0,.6\n1,.5,.4\n", ("3",)),
    "is a page": ("<html>\nSign in\n", ("web page",)),
}
CASES += [
    Case("history of a training", what, partial(history_with, text=text), error(ValueError, "history.csv", *words))
    for what, (text, words) in HISTORIES.items()
]
CASES += [
    Case("history of a training", f"{what} with its checksum", partial(damaged_history, damage=damage), either())
    for what, damage in (("one flipped bit", flips), ("cut", cuts))
]
