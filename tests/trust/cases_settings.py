"Settings, ensembles, folds, weights and bundles: values out of range, unknown keys, names that leave their folder."

import json
import zipfile
from functools import partial
from pathlib import Path

from matrix import Case, cuts, either, error, flips, refused, rsnape, sound, survives

SET, CONFIG, ENSEMBLE, FOLDS = "--set", "config.json, edited by hand", "ensemble.json", "folds.json"
OPTION, ARRAYS, BUNDLE, NAME = (
    "command line",
    "best.npz",
    "folders that are copied or replaced",
    "names that become paths",
)


# --set and config.json share one schema: the same values are refused in both.
WRONG = """
epochs=3 fold=-1 seed=-1 seed=1.5 seed=4294967296 batch=0 batch=2.5 batch=many batch=None batch=True
accumulate=0 phases=() phases=3 phases.0.epochs=0 phases.0.epochs=-1 phases.0.lr=-1 phases.0.lr=0
phases.0.lr=1e999 phases.0.lr=fast phases.0.one_cycle=2 phases.0.speed=1 phases.9.lr=1e-3 loss=hinge clip=-1
clip=0 precision=float8 tta=-1 tta=1.5 tta=1000 frames=0 steps=0 steps=-5 validate=-1 emphasis=-1 smoothing=2
smoothing=-0.1 optimizer=sgdd ema=1 ema=-0.5 balanced=3 pixels.size=0 pixels.size=-256 pixels.crop=-1
pixels.windows=3 pixels.colour=red affine.rotate=7 network.width=-1 network.dropout=2 network=3 mask=3
""".split()


def set_value(folder: Path, pair: str):
    "Train with a setting from the command line; the store is looked for after the settings are read."
    rsnape("train", "efficientnet", "--store", folder, "--train-csv", folder / "train.csv", "--set", pair)


@sound
def run(folder: Path):
    from rsnape_kit.runs.config import KerasConfig
    from rsnape_kit.runs.folder import open_run

    open_run(folder, KerasConfig(model="efficientnet"))


def edited(folder: Path, change) -> Path:
    "Return a run whose config.json was changed by a function of its content, and lost its checksum."
    path = run(folder) / "config.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(change(content)))
    return path.parent


def read_config(folder: Path, change):
    from rsnape_kit.runs.folder import load_config

    load_config(edited(folder, change))


def with_setting(name: str, value):
    "Return a function that puts a value, at any depth, into the settings of a config.json."

    def change(content):
        *inner, last = name.split(".")
        holder = content["settings"]
        for key in inner:
            holder = holder[int(key) if isinstance(holder, list) else key]
        holder[last] = value
        return content

    return change


SETTINGS = [
    ("batch", 0),
    ("batch", "32"),
    ("batch", None),
    ("seed", True),
    ("fold", [0]),
    ("phases", []),
    ("phases", {"a": 1}),
    ("loss", "hinge"),
    ("clip", -1),
    ("clip", float("nan")),
    ("tta", -1),
    ("precision", 16),
    ("smoothing", 1.5),
    ("optimizer", None),
    ("speed", 3),
    ("pixels.size", -1),
    ("pixels.windows", "PE"),
    ("pixels.colour", "red"),
    ("model", "a/b"),
    ("model", ".hidden"),
    ("model", "m" * 101),
    ("model", "../../victim"),
    ("model", ""),
    ("model", None),
]


@sound
def ensemble(folder: Path):
    from rsnape_kit.ensemble.ensemble import default_ensemble

    folder.mkdir(exist_ok=True)
    default_ensemble(("efficientnet", "resnet3d")).save(folder / "ensemble.json")


def read_ensemble(folder: Path, change):
    from rsnape_kit.ensemble.ensemble import Ensemble

    path = ensemble(folder) / "ensemble.json"
    content = json.loads(path.read_text())
    content.pop("checksum")
    path.write_text(json.dumps(change(content)))
    Ensemble.load(path)


def damaged_ensemble(folder: Path, damage):
    from rsnape_kit.ensemble.ensemble import Ensemble

    return survives(ensemble(folder) / "ensemble.json", Ensemble.load, damage)


CHANGES = [
    (
        "no blend weights",
        lambda content: {key: content[key] for key in content if key != "blend_weights"},
        "blend_weights",
    ),
    ("an unknown key", lambda content: content | {"colour": 1}, "colour"),
    ("q is text", lambda content: content | {"q": "high"}, "q"),
    ("q without its slope", lambda content: content | {"q": {"offset": 0.0, "power": 1.0}}, "slope"),
    ("q falls with the images", lambda content: content | {"q": {"offset": 0.0, "power": 1.0, "slope": -1.0}}, "slope"),
    ("q is NaN", lambda content: content | {"q": {"offset": float("nan"), "power": 1.0, "slope": 1.0}}, "offset"),
    ("negative views", lambda content: content | {"views": {"efficientnet": -1}}, "views"),
    ("views are text", lambda content: content | {"views": {"efficientnet": "four"}}, "views"),
    ("calibrations are a list", lambda content: content | {"calibrations": []}, "calibrations"),
    ("blend weights are a number", lambda content: content | {"blend_weights": 3}, "blend_weights"),
    ("it is a list", lambda content: [content], "expected a JSON object"),
]


@sound
def folds(folder: Path):
    import pandas as pd

    from rsnape_kit.competition.folds import Folds

    folder.mkdir(exist_ok=True)
    Folds(pd.Series([0, 1, 2, 0], [f"study{i}" for i in range(4)])).save(folder / "folds.json")


def read_folds(folder: Path, text: str):
    from rsnape_kit.competition.folds import Folds

    path = folds(folder) / "folds.json"
    path.write_text(text)
    Folds.load(path)


@sound
def weights(folder: Path):
    import numpy as np

    folder.mkdir(exist_ok=True)
    np.savez(folder / "best.npz", a=np.arange(64, dtype=np.float32), b=np.ones((3, 3)))


def damaged_weights(folder: Path, damage):
    from rsnape_kit.utils.archives import read_arrays

    def read(path):
        arrays = read_arrays(path)
        return {name: arrays[name] for name in sorted(arrays)}

    return survives(weights(folder) / "best.npz", read, damage)


def pickled_weights(folder: Path):
    import numpy as np

    from rsnape_kit.utils.archives import read_arrays

    path = folder / "best.npz"
    np.savez(path, a=np.array([{"os": "system"}], object))
    read_arrays(path)


def replace_foreign(folder: Path, content: str):
    "Save predictions into a folder with a file of the user's."
    from rsnape_kit.competition.predictions import Predictions
    from rsnape_kit.testing import simulate_truth

    mine = folder / "mine"
    mine.mkdir()
    (mine / content).write_text("years of work")
    try:
        Predictions.save(simulate_truth(3, slices=(2, 3, 4)), mine)
    finally:
        assert (mine / content).read_text() == "years of work"


def copy_link(folder: Path):
    from rsnape_kit.utils.manifest import refuse_links

    (folder / "secret").write_text("password")
    source = folder / "runs"
    source.mkdir()
    (source / "best.npz").symlink_to(folder / "secret")
    refuse_links(source)


def unpack_wheel(folder: Path, member: str):
    "Unpack a wheel with a member that leaves its folder."
    from types import SimpleNamespace

    from rsnape_kit.kaggle.wheels import unpack

    wheel = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "x")
    try:
        unpack([SimpleNamespace(path=wheel)], folder / "site")
    finally:
        assert not (folder / "outside.py").exists() and not Path("/tmp/outside.py").exists()


def name(folder: Path, text):
    from rsnape_kit.utils.files import validate_name

    validate_name(text, "index.parquet: shard")


OPTIONS = [
    (("phantom", "out", "--studies", "-3"), "studies"),
    (("train", "efficientnet"), "--store"),
    (("fly",), "invalid choice"),
    (("train", "efficientnet", "--store", "x", "--train-csv", "y", "--recipe", "huge"), "--recipe"),
    (("train", "efficientnet", "--store", "x", "--train-csv", "y", "--folds", "0"), "--folds"),
    (("train", "efficientnet", "--store", "x", "--train-csv", "y", "--fold", "a"), "--fold"),
    (("train", "nothing", "--store", "x", "--train-csv", "y"), "nothing"),
    (("train", "efficientnet", "--store", "x", "--train-csv", "y", "--hours", "nan"), "--hours"),
    (("features", "nowhere", "--store", "x", "--views", "0"), "--views"),
    (("blend", "nowhere", "--train-csv", "y"), "y does not exist"),
]

CASES = [
    *(Case(SET, pair, partial(set_value, pair=pair), refused(pair.partition("=")[0].split(".")[-1])) for pair in WRONG),
    *(
        Case(
            CONFIG,
            f"{key} is {value!r:.40}",
            partial(read_config, change=with_setting(key, value)),
            error(ValueError, "config.json", *key.split(".")),
        )
        for key, value in SETTINGS
    ),
    Case(
        CONFIG,
        "no settings",
        partial(read_config, change=lambda content: {}),
        error(ValueError, "config.json", "settings"),
    ),
    Case(
        CONFIG,
        "settings are a list",
        partial(read_config, change=lambda content: {"settings": []}),
        error(ValueError, "config.json"),
    ),
    *(
        Case(ENSEMBLE, fault, partial(read_ensemble, change=change), error(ValueError, "ensemble.json", word))
        for fault, change, word in CHANGES
    ),
    Case(ENSEMBLE, "one flipped bit in 40 places", partial(damaged_ensemble, damage=flips), either()),
    Case(ENSEMBLE, "cut at 10 places", partial(damaged_ensemble, damage=cuts), either()),
    *(
        Case(FOLDS, fault, partial(read_folds, text=text), error(ValueError, "folds.json"))
        for fault, text in (
            ("empty", ""),
            ("no JSON", "{"),
            ("a list", "[]"),
            ("no folds", '{"fingerprint": "0"}'),
            ("a fold is text", '{"folds": {"a": "0"}, "fingerprint": "0"}'),
            ("a fold is negative", '{"folds": {"a": -1}, "fingerprint": "0"}'),
            ("another fingerprint", '{"folds": {"a": 0}, "fingerprint": "0"}'),
        )
    ),
    Case(ARRAYS, "one flipped bit in 40 places", partial(damaged_weights, damage=flips), either()),
    Case(ARRAYS, "cut at 10 places", partial(damaged_weights, damage=cuts), either()),
    Case(ARRAYS, "an array of Python objects", pickled_weights, error(ValueError, "best.npz")),
    *(
        Case(
            BUNDLE,
            f"predictions saved over a folder with {content}",
            partial(replace_foreign, content=content),
            error(FileExistsError, "mine", content, "nothing was deleted"),
        )
        for content in ("thesis.tex", "exams.csv", ".git")
    ),
    Case(BUNDLE, "a link in a run that is bundled", copy_link, error(ValueError, "best.npz", "link")),
    *(
        Case(
            BUNDLE,
            f"a wheel with the member {member}",
            partial(unpack_wheel, member=member),
            error(ValueError, "thing-1.0"),
        )
        for member in ("../outside.py", "/tmp/outside.py", "a/../../outside.py")
    ),
    *(
        Case(NAME, repr(text)[:40], partial(name, text=text), error(ValueError, "index.parquet: shard"))
        for text in (
            "",
            ".",
            "..",
            "../a",
            "a/b",
            "/etc/passwd",
            "a\\b",
            ".hidden",
            "a b",
            "a\n",
            "a\0b",
            "é",
            "a" * 101,
            None,
            3,
            ["a"],
        )
    ),
    *(
        Case(OPTION, " ".join(words), lambda folder, words=words: rsnape(*words), refused(word))
        for words, word in OPTIONS
    ),
]
