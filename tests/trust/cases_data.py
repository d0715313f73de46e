"Tables, slices, stores and test sets as strangers have them: what is wrong with each, and what the kit does."

import io
import os
import random
import zipfile
from functools import partial
from pathlib import Path

from matrix import FULL, Case, either, error, fallback, flips, sound, survives, unchanged

LABELS = (
    "negative_exam_for_pe",
    "qa_motion",
    "qa_contrast",
    "flow_artifact",
    "rv_lv_ratio_gte_1",
    "rv_lv_ratio_lt_1",
    "leftsided_pe",
    "chronic_pe",
    "true_filling_defect_not_pe",
    "rightsided_pe",
    "acute_and_chronic_pe",
    "central_pe",
    "indeterminate",
)
HEADER = ",".join(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "pe_present_on_image", *LABELS))
NEGATIVE, POSITIVE = "1" + ",0" * 12, "0,0,0,0,0,1,1,0,0,0,0,0,0"
ROWS = [f"001200000012,5e01,00000000000{k},0,{NEGATIVE}" for k in range(3)] + [
    f"1e2400000000,5e02,10000000000{k},{k % 2},{POSITIVE}" for k in range(3)
]
TRAIN = "\n".join([HEADER, *ROWS]) + "\n"


def truth(folder: Path, content: bytes | str, name: str = "train.csv"):
    "The labels of a train.csv with this content."
    from rsnape_kit.competition.predictions import Predictions

    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Predictions.from_train_csv(folder / name)


def as_dict(pred) -> dict:
    return pred.to_submission().set_index("id")["label"].to_dict()


def same_truth(folder: Path, content: bytes | str):
    return as_dict(truth(folder, content)), as_dict(truth(folder, TRAIN, "plain.csv"))


def with_value(column: str, value: str, row: int = 3) -> str:
    "train.csv with another value in a row, counted from 0."
    lines, at = TRAIN.splitlines(), HEADER.split(",").index(column)
    cells = lines[row + 1].split(",")
    cells[at] = value
    return "\n".join([*lines[: row + 1], ",".join(cells), *lines[row + 2 :]]) + "\n"


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("train.csv", text)
    return buffer.getvalue()


def without(column: str) -> str:
    at = HEADER.split(",").index(column)
    return "\n".join(",".join(cell for k, cell in enumerate(line.split(",")) if k != at) for line in TRAIN.splitlines())


FILES = {  # what the file is -> (content, words of the error)
    "a zip archive": (zipped(TRAIN), ("zip archive", "unpack it")),
    "a gzip archive": (b"\x1f\x8b\x08" + bytes(99), ("gzip archive",)),
    "a web page": ("<!DOCTYPE html>\n<html>Sign in</html>", ("web page", "download")),
    "a web page behind a blank line": ("\n <html>", ("web page",)),
    "empty": ("", ("is empty",)),
    "blanks": (" \n\n", ("is empty",)),
    "in UTF-16": (TRAIN.encode("utf-16"), ("UTF-16", "UTF-8")),
    "JSON": ('{"id": 1}', ("JSON",)),
    "a parquet file": (b"PAR1" + bytes(99), ("parquet",)),
    "a pointer of Git LFS": ("version https://git-lfs.github.com/spec/v1\noid 1\n", ("Git LFS",)),
    "an old spreadsheet": (b"\xd0\xcf\x11\xe0" + bytes(99), ("spreadsheet",)),
    "zeros": (bytes(999), ("binary",)),
    "in Latin-1": (TRAIN.replace("5e02", "s\u00e9rie").encode("latin-1"), ("UTF8",)),
    "separated by semicolons": (TRAIN.replace(",", ";"), ("StudyInstanceUID", "';'", "commas")),
    "separated by tabs": (TRAIN.replace(",", "\t"), ("StudyInstanceUID", "'\\t'", "commas")),
    "cut in a row": (TRAIN[:-20], ("17",)),
    "a row with one cell more": (TRAIN + ROWS[0] + ",1\n", ("17", "18")),
    "the header alone": (HEADER + "\n", ("no rows",)),
    "without a header": ("\n".join(ROWS), ("no column 'StudyInstanceUID'",)),
    "without StudyInstanceUID": (without("StudyInstanceUID"), ("no column 'StudyInstanceUID'",)),
    "without SOPInstanceUID": (without("SOPInstanceUID"), ("no column 'SOPInstanceUID'",)),
    "without pe_present_on_image": (without("pe_present_on_image"), ("no column 'pe_present_on_image'",)),
    "without qa_motion": (without("qa_motion"), ("no column 'qa_motion'",)),
    "a column in capitals": (
        TRAIN.replace("qa_motion", "QA_Motion", 1),
        ("no column 'qa_motion'", "rename 'QA_Motion'"),
    ),
    "a column with a space": (TRAIN.replace("qa_motion", " qa_motion", 1), ("rename ' qa_motion'",)),
    "a column twice": (
        "\n".join(line + (",0" if k else ",qa_motion") for k, line in enumerate(TRAIN.splitlines())),
        ("'qa_motion' twice",),
    ),
    "a row twice": (TRAIN + ROWS[5] + "\n", ("slice '100000000002'", "twice")),
    "a slice in two studies": (
        TRAIN + ROWS[5].replace("1e2400000000", "001200000012").replace(POSITIVE, NEGATIVE) + "\n",
        ("slice '100000000002'", "1e2400000000, 001200000012"),
    ),
    "labels that differ in a study": (with_value("central_pe", "1"), ("study '1e2400000000'", "different exam labels")),
}
VALUES = [
    (column, value, expected)
    for column, expected in (("pe_present_on_image", "0 or 1"), ("indeterminate", "0 or 1"))
    for value in ("", "0.5", "yes", "2", "-1", "inf", "nan")
]
VALUES += [
    (column, value, "text that is not empty")
    for column in ("StudyInstanceUID", "SOPInstanceUID")
    for value in ("", " ", "1.2E+11")
]
VARIANTS = {
    "a byte order mark": "\ufeff" + TRAIN,
    "Windows line ends": TRAIN.replace("\n", "\r\n"),
    "no last line end": TRAIN.rstrip("\n"),
    "blank lines": TRAIN.replace("\n", "\n\n"),
    "quoted ids": TRAIN.replace("001200000012", '"001200000012"'),
    "labels as decimals": TRAIN.replace(",1,0,", ",1.0,0.0,"),
    "a further column": TRAIN.replace("\n", ",x\n"),
    "columns in another order": "\n".join(",".join(line.split(",")[::-1]) for line in TRAIN.splitlines()),
}

CASES = [
    Case(
        "train.csv",
        f"is {what}" if what[:2] != "a " else what,
        partial(truth, content=content),
        error(ValueError, "train.csv", *words),
    )
    for what, (content, words) in FILES.items()
]
CASES += [
    Case(
        "train.csv",
        f"{column} is {value!r}",
        partial(truth, content=with_value(column, value)),
        error(ValueError, "train.csv", "row 4", column, expected),
    )
    for column, value, expected in VALUES
]
CASES += [
    Case("train.csv", f"{what}: read all the same", partial(same_truth, content=content), unchanged())
    for what, content in VARIANTS.items()
]


def truth_of_folder(folder: Path):
    from rsnape_kit.competition.predictions import Predictions

    return Predictions.from_train_csv(folder)


def truth_of_nothing(folder: Path):
    from rsnape_kit.competition.predictions import Predictions

    return Predictions.from_train_csv(folder / "train.csv")


def text_after_a_megabyte(folder: Path):
    "The first block of the file has integers only."
    lines = [
        HEADER,
        *(f"001200000012,5e01,{k:012x},0,{NEGATIVE}" for k in range(30_000)),
        f"001200000012,5e01,a,no,{NEGATIVE}",
    ]
    return truth(folder, "\n".join(lines))


CASES += [
    Case("train.csv", "is a folder", truth_of_folder, error(FileNotFoundError, "is a folder")),
    Case("train.csv", "does not exist", truth_of_nothing, error(FileNotFoundError, "train.csv", "does not exist")),
    Case(
        "train.csv",
        "a label is text after a megabyte of numbers",
        text_after_a_megabyte,
        error(ValueError, "train.csv", "row 30001", "pe_present_on_image", "'no'"),
    ),
]


def scrambled(raw: bytes, few: int = 60, many: int = 2000, seed: int = 0):
    "Copies of some text with bits flipped, parts deleted, and separators, quotes and control characters put in."
    rng = random.Random(seed)
    for _ in range(many if FULL else few):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3, 20))):
            at, kind = rng.randrange(len(damaged)), rng.randrange(4)
            if kind == 0:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del damaged[at : at + rng.randrange(1, 30)]
            else:
                damaged[at : at + kind - 2] = bytes(rng.choices(b',;"\n\r\t\0 \xff\xef019eE+-.', k=rng.randrange(1, 5)))
        yield bytes(damaged)


def scrambled_train(folder: Path):
    "Ids may become others, but labels stay 0 or 1, and an error is one line with the file's name."
    wrong = []
    for number, content in enumerate(scrambled(TRAIN.encode())):
        try:
            found = truth(folder, content)
            if not found.images.isin((0, 1)).all() or not found.exams.isin((0, 1)).all(axis=None):
                wrong.append(f"version {number} gives other labels")
        except ValueError as error:
            if "train.csv" not in str(error) or not str(error).isprintable():
                wrong.append(f"version {number}: {error}")
    return wrong, []


CASES += [Case("train.csv", "bits, quotes and control characters at random places", scrambled_train, either())]


# ------------------------------------------------------------------ the same as a DataFrame
def table_of_train(**how):
    import pandas as pd

    return pd.read_csv(io.StringIO(TRAIN), **how)


def truth_of_table(folder: Path, change=None, **how):
    from rsnape_kit.competition.predictions import Predictions

    table = table_of_train(**how)
    return Predictions.from_train_csv(change(table) if change else table)


def table_as_text(folder: Path, change=lambda table: table):
    return as_dict(truth_of_table(folder, change, dtype=str)), as_dict(truth(folder, TRAIN))


CASES += [
    Case(
        "table of train.csv",
        "pandas read the ids as numbers",
        partial(truth_of_table, change=lambda t: t[t.pe_present_on_image == 0][:3]),
        error(ValueError, "the table", "StudyInstanceUID", "dtype=str"),
    ),
    Case(
        "table of train.csv",
        "ids are numbers in one column",
        partial(truth_of_table, dtype=str, change=lambda t: t.assign(SOPInstanceUID=range(6))),
        error(ValueError, "the table", "row 1", "SOPInstanceUID", "dtype=str"),
    ),
    Case(
        "table of train.csv",
        "an id is missing",
        partial(truth_of_table, dtype=str, change=lambda t: t.assign(StudyInstanceUID=[None, *t.StudyInstanceUID[1:]])),
        error(ValueError, "the table", "row 1", "StudyInstanceUID", "empty"),
    ),
    Case(
        "table of train.csv",
        "is a list",
        partial(truth_of_table, change=lambda t: t.to_dict("list")),
        error(ValueError, "dict"),
    ),
    Case("table of train.csv", "all is text: read all the same", table_as_text, unchanged()),
    Case(
        "table of train.csv",
        "ids are categories: read all the same",
        partial(table_as_text, change=lambda t: t.astype({"StudyInstanceUID": "category"})),
        unchanged(),
    ),
]


# ------------------------------------------------------------------ folds.json
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


CASES += [
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


# ------------------------------------------------------------------ slices tables and unreadable slices
@sound
def series(folder: Path):
    "Two studies of six slices of 32 x 32 pixels."
    from ct_files import ct_file, quiet, stored_values

    quiet()
    for study in range(2):
        (folder / f"s{study}").mkdir(parents=True)
        for k in range(6):
            ct_file(
                folder / f"s{study}/{k}.dcm",
                stored_values((32, 32), bits=12, seed=k),
                bits=12,
                StudyInstanceUID=f"1.{study}",
                SeriesInstanceUID=f"2.{study}",
                SOPInstanceUID=f"3.{study}.{k}",
                ImagePositionPatient=[0, 0, float(k)],
            )


def source_of(folder: Path, change, **how):
    "Read all of a slices table after a change."
    from rsnape_kit.dicom.slices import scan
    from rsnape_kit.store.dicom_source import DicomSource

    return DicomSource(change(scan(series(folder))), 32, **how)[:]


SLICES = {
    "ids are numbers": (lambda t: t.assign(SOPInstanceUID=range(12)), ("row 1", "SOPInstanceUID")),
    "a study's id is missing": (
        lambda t: t.assign(StudyInstanceUID=[None, *t.StudyInstanceUID[1:]]),
        ("row 1", "StudyInstanceUID", "empty"),
    ),
    "paths are missing": (lambda t: t.assign(path=[*t.path[:-1], float("nan")]), ("row 12", "path", "empty")),
    "a height is negative": (lambda t: t.assign(rows=-1), ("row 1", "rows", "-1")),
    "a height is text": (lambda t: t.assign(rows="big"), ("row 1", "rows", "'big'")),
    "the order is a fraction": (lambda t: t.assign(order=0.5), ("row 1", "order", "0.5")),
    "a flip is 3": (lambda t: t.assign(flip_rows=3), ("row 1", "flip_rows", "True or False")),
}
CASES += [
    Case("slices table", what, partial(source_of, change=change), error(ValueError, "slices table", *words))
    for what, (change, words) in SLICES.items()
]
CASES += [
    Case(
        "slices table",
        f"has no column {name}",
        partial(source_of, change=lambda t, name=name: t.drop(columns=name)),
        error(ValueError, "slices table", name),
    )
    for name in ("path", "order", "problem", "SeriesInstanceUID", "flip_rows")
]
CASES += [Case("slices table", "is a dict", partial(source_of, change=dict), error(ValueError, "dict"))]


def source_from_elsewhere(folder: Path, save):
    "Scan by a relative path, save the table, read it in another working directory."
    from rsnape_kit.dicom.slices import scan
    from rsnape_kit.store.dicom_source import DicomSource

    where = series(folder)
    expected = DicomSource(where, 32)[:]
    here = os.getcwd()
    os.chdir(where.parent)
    try:
        table = save(scan(where.name), folder)
        (folder / "elsewhere").mkdir()
        os.chdir(folder / "elsewhere")
        return DicomSource(table, 32)[:].tolist(), expected.tolist()
    finally:
        os.chdir(here)


def through_parquet(table, folder):
    from rsnape_kit.competition.tables import read_parquet

    table.to_parquet(folder / "slices.parquet")
    return read_parquet(folder / "slices.parquet")


def through_text(table, folder):
    import pandas as pd

    table.to_csv(folder / "slices.csv", index=False)
    return pd.read_csv(folder / "slices.csv", dtype=str, keep_default_na=False)


def moved(folder: Path):
    "The folder is renamed after the scan."

    def move(table):
        (folder / "series").rename(folder / "moved")
        return table

    return source_of(folder, move)


def store_of_moved(folder: Path):
    from rsnape_kit.dicom.slices import scan
    from rsnape_kit.store.build import build_store

    where = series(folder)
    table = scan(where)
    where.rename(folder / "moved")
    return build_store(table, folder / "store", 32)


CASES += [
    Case(
        "slices table",
        "is used in another working directory: read all the same",
        partial(source_from_elsewhere, save=lambda table, folder: table),
        unchanged(),
    ),
    Case(
        "slices table",
        "was saved as parquet: read all the same",
        partial(source_from_elsewhere, save=through_parquet),
        unchanged(),
    ),
    Case(
        "slices table",
        "was saved as CSV, all read as text: read all the same",
        partial(source_from_elsewhere, save=through_text),
        unchanged(),
    ),
    Case("slices table", "the folder has moved", moved, error(FileNotFoundError, "series", "gone", "scan")),
    Case(
        "slices table",
        "a store is built after the folder has moved",
        store_of_moved,
        error(FileNotFoundError, "series", "gone"),
    ),
]


def cut(folder: Path, names, study: str = "s0"):
    for name in names:
        path = folder / study / f"{name}.dcm"
        os.truncate(path, path.stat().st_size - 1000)


def read_cut(folder: Path, count: int, **how):
    from rsnape_kit.store.dicom_source import DicomSource

    where = series(folder)
    cut(where, range(count))
    return DicomSource(where, 32, **how)[:]


def build_cut(folder: Path, count: int, **how):
    from rsnape_kit.store.build import build_store

    where = series(folder)
    cut(where, range(count))
    return build_store(where, folder / "store", 32, **how)


def filled(folder: Path):
    "Half of a study is unreadable: its slices are those of the nearest readable one."
    source = read_cut(folder, 3)
    return source[:3].tolist(), [source[3].tolist()] * 3


def allowed_air(folder: Path):
    import numpy as np

    return read_cut(folder, 6, max_unreadable=1)[:6].tolist(), np.full((6, 32, 32), -4096).tolist()


def store_of_air(folder: Path):
    from rsnape_kit.store.slice_store import SliceStore

    store = SliceStore(build_cut(folder, 6, max_unreadable=1))
    return (store[:6].max(), store.table.problem.str.contains("filled with air").sum()), (-4096, 6)


CASES += [
    Case(
        "unreadable slices",
        "4 of 6 of a study",
        partial(read_cut, count=4),
        error(ValueError, "'1.0'", "0.dcm", "more than 50%", "max_unreadable"),
    ),
    Case(
        "unreadable slices",
        "all of a study",
        partial(read_cut, count=6),
        error(ValueError, "'1.0'", "none of its 6 slices", "0.dcm"),
    ),
    Case(
        "unreadable slices",
        "a store of a study without one",
        partial(build_cut, count=6),
        error(ValueError, "s0", "max_unreadable"),
    ),
    Case(
        "unreadable slices",
        "1 of 6 where none is allowed",
        partial(read_cut, count=1, max_unreadable=0),
        error(ValueError, "s0", "more than 0%"),
    ),
    Case(
        "unreadable slices",
        "a share of 2 is allowed",
        partial(read_cut, count=0, max_unreadable=2),
        error(ValueError, "max_unreadable", "from 0 to 1"),
    ),
    Case("unreadable slices", "3 of 6 of a study: filled from the nearest", filled, unchanged()),
    Case(
        "unreadable slices",
        "a study of air is allowed by name",
        allowed_air,
        fallback("study '1.0'", "none of the 6 slices", "air"),
    ),
    Case(
        "unreadable slices",
        "a store of air is allowed by name",
        store_of_air,
        fallback("6 of 12 slices", "problems.csv"),
    ),
]


# ------------------------------------------------------------------ stores
@sound
def store(folder: Path):
    import numpy as np
    import pandas as pd

    from rsnape_kit.store import build
    from rsnape_kit.testing import ArraySource

    pixels = np.random.default_rng(0).integers(-4096, 4000, (12, 16, 16)).astype(np.int16)
    table = pd.DataFrame(
        {
            "StudyInstanceUID": np.repeat(["s0", "s1", "s2"], 4),
            "SOPInstanceUID": [f"{k:012x}" for k in range(12)],
            "order": np.tile(range(4), 3),
            "position": np.arange(12) * 1.25,
            "flip_rows": False,
            "pe_present_on_image": 1.0,
        }
    )
    build.build_store(ArraySource(pixels, table), folder, 16)


def open_changed(folder: Path, change):
    "Open a store after a change of its folder."
    from rsnape_kit.store.slice_store import SliceStore

    path = store(folder)
    change(path)
    return SliceStore(path)


def shard_of(path: Path) -> Path:
    return next(path.glob("*.slices"))


def rewrite(change, *names):
    "A change of the bytes of the first file that matches a pattern."

    def apply(path: Path):
        for name in names:
            file = next(path.glob(name))
            file.write_bytes(change(file.read_bytes()))

    return apply


def forge(change):
    "A change of the index by somebody who makes a sound manifest for it."

    def apply(path: Path):
        import pandas as pd

        from rsnape_kit.utils.manifest import read_manifest, write_manifest

        shards = read_manifest(path)["shards"]
        index = pd.read_parquet(path / "index.parquet")
        changed = change(index)
        changed.attrs = getattr(changed, "attrs", {}) or index.attrs
        changed.to_parquet(path / "index.parquet", index=False)
        write_manifest(path, "store", ["index.parquet"], shards=shards)

    return apply


STORES = {
    "index.parquet is empty": (rewrite(lambda raw: b"", "index.parquet"), ("index.parquet", "build the store again")),
    "index.parquet is cut": (
        rewrite(lambda raw: raw[:-9], "index.parquet"),
        ("index.parquet", "build the store again"),
    ),
    "index.parquet has one byte more": (
        rewrite(lambda raw: raw + b"0", "index.parquet"),
        ("index.parquet", "build the store again"),
    ),
    "index.parquet has other text": (
        rewrite(lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], "index.parquet"),
        ("index.parquet",),
    ),
    "manifest.json is empty": (rewrite(lambda raw: b"", "manifest.json"), ("manifest.json",)),
    "manifest.json is cut": (rewrite(lambda raw: raw[:-9], "manifest.json"), ("manifest.json",)),
    "manifest.json is of a run": (
        rewrite(lambda raw: raw.replace(b'"store"', b'"runs!"'), "manifest.json"),
        ("manifest.json",),
    ),
    "a shard is cut in its table": (rewrite(lambda raw: raw[:-30], "*.slices"), (".slices",)),
    "a shard's table has other text": (
        rewrite(lambda raw: raw[:-200] + bytes([raw[-200] ^ 1]) + raw[-199:], "*.slices"),
        (".slices",),
    ),
    "a shard begins otherwise": (rewrite(lambda raw: b"X" + raw[1:], "*.slices"), (".slices", "another version")),
    "a shard is a page": (
        rewrite(lambda raw: b"<html>" * (len(raw) // 6 + 1), "*.slices"),
        (".slices", "another version"),
    ),
}
FORGED = {
    "names a shard outside the folder": (
        lambda t: t.assign(shard="../../etc/passwd"),
        ("index.parquet", "shard", "'../../etc/passwd'"),
    ),
    "names an absolute path": (lambda t: t.assign(shard="/etc/passwd"), ("index.parquet", "shard", "'/etc/passwd'")),
    "names a hidden file": (lambda t: t.assign(shard=".slices"), ("index.parquet", "shard", "'.slices'")),
    "has no names of shards": (lambda t: t.drop(columns="shard"), ("index.parquet", "no shard")),
    "has no checksums": (lambda t: t.drop(columns="crc32"), ("index.parquet", "no crc32")),
}
CASES += [
    Case("store", what, partial(open_changed, change=change), error(ValueError, *words))
    for what, (change, words) in STORES.items()
]
CASES += [
    Case(
        "store",
        f"an index with a sound manifest {what}",
        partial(open_changed, change=forge(change)),
        error(ValueError, *words),
    )
    for what, (change, words) in FORGED.items()
]
CASES += [
    Case(
        "store",
        "index.parquet is missing",
        partial(open_changed, change=lambda path: (path / "index.parquet").unlink()),
        error(FileNotFoundError, "no finished store", "build it again"),
    ),
    Case(
        "store",
        "manifest.json is missing",
        partial(open_changed, change=lambda path: (path / "manifest.json").unlink()),
        error(FileNotFoundError, "no finished store", "build it again"),
    ),
    Case(
        "store",
        "a shard is missing",
        partial(open_changed, change=lambda path: shard_of(path).unlink()),
        error(FileNotFoundError, ".slices", "copy it again"),
    ),
    Case(
        "store",
        "a shard is empty",
        partial(open_changed, change=rewrite(lambda raw: b"", "*.slices")),
        error(FileNotFoundError, ".slices", "copy it again"),
    ),
]


def build_again(folder: Path, change):
    "The files of a store after a change and a second build, and those of the first."
    from rsnape_kit.store.build import build_store
    from rsnape_kit.store.slice_store import SliceStore
    from rsnape_kit.testing import ArraySource

    path = store(folder)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    source = SliceStore(path)
    pixels, table = source[:], source.table
    change(path)
    columns = ["StudyInstanceUID", "SOPInstanceUID", "order", "position", "flip_rows", "pe_present_on_image"]
    build_store(ArraySource(pixels, table[columns]), path, 16)
    return {file.name: file.read_bytes() for file in path.iterdir()}, before


CASES += [
    Case("store", f"{what}, and it is built again: the same bytes", partial(build_again, change=change), unchanged())
    for what, change in {
        "index.parquet is missing": lambda path: (path / "index.parquet").unlink(),
        "index.parquet is damaged": rewrite(lambda raw: raw[:60] + b"?" + raw[61:], "index.parquet"),
        "index.parquet is text": rewrite(lambda raw: b"hello", "index.parquet"),
        "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
        "manifest.json is damaged": rewrite(lambda raw: raw[:9] + b"?" + raw[10:], "manifest.json"),
        "a shard is missing": lambda path: shard_of(path).unlink(),
        "a shard is cut": rewrite(lambda raw: raw[:-1], "*.slices"),
    }.items()
]


def read_store(path: Path):
    "All that a store holds: pixels, ids, positions; raises for each damaged slice."
    from rsnape_kit.store.slice_store import SliceStore

    opened = SliceStore(path)
    bad = opened.verify()
    if bad:
        raise ValueError(f"{shard_of(path).name}: slices {bad} are damaged")
    return opened[:].tolist(), opened.table.astype(str).values.tolist()


def flipped_store(folder: Path, pattern: str):
    import warnings

    path = next(store(folder).glob(pattern))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verify's, which names the shard
        return survives(path, lambda path: read_store(path.parent), partial(flips, few=60, many=600))


CASES += [
    Case("store", f"one flipped bit in {name}", partial(flipped_store, pattern=name), either())
    for name in ("index.parquet", "manifest.json", "*.slices")
]


# ------------------------------------------------------------------ labels beside the pixels
def build_labelled(folder: Path, change):
    import numpy as np
    import pandas as pd

    from rsnape_kit.store.build import build_store
    from rsnape_kit.testing import ArraySource

    table = pd.DataFrame({"StudyInstanceUID": "s0", "SOPInstanceUID": ["0a", "0b"], "order": [0, 1]})
    labels = change(table.drop(columns="order").assign(pe_present_on_image=[0, 1]))
    return build_store(ArraySource(np.zeros((2, 16, 16), np.int16), table), folder / "labelled", 16, labels=labels)


CASES += [
    Case("labels of build_store", what, partial(build_labelled, change=change), error(ValueError, "the labels", *words))
    for what, change, words in (
        ("ids are numbers", lambda t: t.assign(SOPInstanceUID=[10, 11]), ("row 1", "SOPInstanceUID", "dtype=str")),
        ("have no column StudyInstanceUID", lambda t: t.drop(columns="StudyInstanceUID"), ("StudyInstanceUID",)),
        ("a label is .5", lambda t: t.assign(pe_present_on_image=0.5), ("row 1", "pe_present_on_image", "0.5")),
        ("a slice is there twice", lambda t: t.iloc[[0, 1, 1]], ("'0b'", "twice")),
    )
]


# ------------------------------------------------------------------ test set and sample
SLICES_OF = {"s1": ["a", "b"], "s2": ["c", "d"]}


def write_test_set(folder: Path, test=lambda t: t, sample=lambda t: t):
    "Write test.csv and sample_submission.csv after changes: table -> table, text, or None for no file."
    import pandas as pd

    from rsnape_kit.competition.tables import sample_submission, slice_index

    table = pd.DataFrame(
        [(study, name) for study, names in SLICES_OF.items() for name in names],
        columns=["StudyInstanceUID", "SOPInstanceUID"],
    )
    for name, made in (
        ("test.csv", test(table)),
        ("sample_submission.csv", sample(sample_submission(slice_index(table)))),
    ):
        if isinstance(made, str):
            (folder / name).write_text(made)
        elif made is not None:
            made.to_csv(folder / name, index=False)
    return sample_submission(slice_index(table))["id"].tolist()


def submitted(folder: Path, expected=None, **changes):
    "The ids of submission.csv, once it is found valid, and those that Kaggle wants."
    import pandas as pd

    from rsnape_kit.kaggle.submitter import submit

    ids = write_test_set(folder, **changes)
    state = submit([], competition=folder, out=folder / "out" / "submission.csv", work=folder / "work")
    for name, why in state.problems.items():
        print(f"{name}: {why}")
    written = pd.read_csv(state.out, dtype={"id": str}, keep_default_na=False)
    assert list(written) == ["id", "label"] and written["label"].between(0, 1).all() and written["id"].is_unique
    return sorted(written["id"]), sorted(expected(ids) if expected else ids)


def add(*ids):
    import pandas as pd

    return pd.DataFrame({"id": list(ids), "label": 0.5})


def concat(*parts):
    import pandas as pd

    return pd.concat(parts)


TESTS = {
    "test.csv has a row twice": ({"test": lambda t: t.iloc[[0, 1, 2, 3, 3]]}, None, ("test.csv", "repeat")),
    "test.csv has a slice in two studies": (
        {"test": lambda t: t.assign(SOPInstanceUID=["a", "b", "c", "a"])},
        None,
        ("test.csv", "'a'", "s1, s2"),
    ),
    "test.csv has a row without a study": (
        {"test": lambda t: t.assign(StudyInstanceUID=["s1", "s1", "s2", None])},
        None,
        ("test.csv", "row 4"),
    ),
    "test.csv has no column SOPInstanceUID": (
        {"test": lambda t: t[["StudyInstanceUID"]]},
        None,
        ("test.csv", "SOPInstanceUID"),
    ),
    "test.csv has no column StudyInstanceUID": (
        {"test": lambda t: t[["SOPInstanceUID"]]},
        None,
        ("test.csv", "StudyInstanceUID"),
    ),
    "test.csv is missing": ({"test": lambda t: None}, None, ("test.csv", "does not exist")),
    "test.csv is empty": ({"test": lambda t: ""}, None, ("test.csv", "is empty")),
    "test.csv is a page": ({"test": lambda t: "<html>"}, None, ("test.csv", "web page")),
    "test.csv has no rows": ({"test": lambda t: t[:0]}, None, ("test.csv", "no row")),
    "test.csv has rows of other lengths": (
        {"test": lambda t: "StudyInstanceUID,SOPInstanceUID\ns1,a\ns2\n"},
        None,
        ("test.csv", "Expected 2 columns"),
    ),
    "test.csv has a study more than the sample": (
        {"sample": lambda s: s[~s.id.str.startswith("s2") & ~s.id.isin(["c", "d"])]},
        lambda ids: [i for i in ids if not i.startswith("s2") and i not in "cd"],
        ("sample_submission.csv",),
    ),
    "test.csv lacks a study of the sample": ({"test": lambda t: t[:2]}, None, ("sample_submission.csv", "prior")),
    "test.csv is that of another set": ({"test": lambda t: t + "0"}, None, ("sample_submission.csv", "prior")),
    "the sample has an id twice": (
        {"sample": lambda s: s.iloc[[*range(len(s)), 0]]},
        None,
        ("sample_submission.csv", "repeat"),
    ),
    "the sample has an unknown id": (
        {"sample": lambda s: concat(s, add("zz"))},
        lambda ids: [*ids, "zz"],
        ("sample_submission.csv", "'zz'"),
    ),
    "the sample has an id of unknown form": (
        {"sample": lambda s: concat(s, add("s1_other_pe"))},
        lambda ids: [*ids, "s1_other_pe"],
        ("sample_submission.csv", "'s1_other_pe'"),
    ),
    "the sample has an empty id": (
        {"sample": lambda s: concat(s, add(""))},
        None,
        ("sample_submission.csv", "no valid id"),
    ),
    "the sample has no column id": (
        {"sample": lambda s: s.rename(columns={"id": "key"})},
        None,
        ("sample_submission.csv", "no column 'id'"),
    ),
    "the sample is missing": ({"sample": lambda s: None}, None, ("sample_submission.csv", "ids are those of test.csv")),
    "the sample is a page": ({"sample": lambda s: "<html>"}, None, ("sample_submission.csv", "web page")),
    "the sample is cut": ({"sample": lambda s: s.to_csv(index=False)[:-5]}, None, ("sample_submission.csv",)),
    "the labels of the sample are text": ({"sample": lambda s: s.assign(label="?")}, None, ()),
}
CASES += [
    Case("test set", what, partial(submitted, expected=expected, **changes), fallback(*words) if words else unchanged())
    for what, (changes, expected, words) in TESTS.items()
]
CASES += [
    Case(
        "test set",
        "neither file can be used",
        partial(submitted, test=lambda t: None, sample=lambda s: ""),
        error(ValueError, "test.csv", "sample_submission.csv"),
    )
]


# ------------------------------------------------------------------ TFRecords
def record(data: bytes) -> bytes:
    from rsnape_kit.store.tfrecords import masked

    head = len(data).to_bytes(8, "little")
    return head + masked(head).to_bytes(4, "little") + data + masked(data).to_bytes(4, "little")


def example(**features) -> bytes:
    "A record of one tf.train.Example."
    import tensorflow as tf

    kinds = {
        bytes: lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])),
        int: lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=[v])),
        float: lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=[v])),
    }
    made = {name: kinds[type(value)](value) for name, value in features.items() if value is not None}
    return record(tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString(deterministic=True))


SLICE = {
    "StudyInstanceUID": b"s",
    "SeriesInstanceUID": b"e",
    "SOPInstanceUID": b"i",
    "Rows": b"2",
    "Columns": b"2",
    "image": b"\1\0\2\0\3\0\4\0",
    "RescaleSlope": b"1",
    "RescaleIntercept": b"0",
    "InstanceNumber": b"1",
    "ImagePositionPatient": b"[0, 0, 1]",
}


def records(folder: Path, content):
    "All slices of a file of records, and their problems."
    from rsnape_kit.store.tfrecords import read_tfrecords

    (folder / "a.tfrec").write_bytes(content())
    source = read_tfrecords(folder / "a.tfrec", 2)
    return source[:].tolist(), source.table.problem.tolist()


RECORDS = {
    "the file is empty": (lambda: b"", ("empty",)),
    "the file is text": (lambda: b"hello, world. hello", ("TFRecord",)),
    "the file is compressed": (lambda: b"\x1f\x8b" + bytes(50), ("compressed",)),
    "a record is cut": (lambda: example(**SLICE)[:-1], ("truncated",)),
    "a record is empty": (lambda: record(b""), ("StudyInstanceUID",)),
    "a record is no example": (lambda: record(b"\xff" * 9), ("Example",)),
    "the record is of another schema": (lambda: example(foo=b"x"), ("StudyInstanceUID", "foo")),
    "an id is a number": (lambda: example(**SLICE | {"StudyInstanceUID": 5}), ("StudyInstanceUID", "is 5")),
    "an id is empty": (lambda: example(**SLICE | {"SOPInstanceUID": b""}), ("SOPInstanceUID",)),
    "an id is not UTF-8": (lambda: example(**SLICE | {"SeriesInstanceUID": b"\xff"}), ("SeriesInstanceUID",)),
    "an id is missing": (lambda: example(**SLICE | {"SOPInstanceUID": None}), ("SOPInstanceUID",)),
    "the image is a number": (lambda: example(**SLICE | {"image": 7}), ("image", "is 7")),
    "a label is 2": (lambda: example(**SLICE | {"pe_present_on_image": 2}), ("pe_present_on_image", "is 2")),
    "a label is text": (lambda: example(**SLICE | {"pe_present_on_image": b"1"}), ("pe_present_on_image",)),
    **{
        f"{name} is {value!r}": (
            lambda name=name, value=value: example(**SLICE | {name: value}),
            ("none of its 1 slices",),
        )
        for name, value in (
            ("Rows", b"-2"),
            ("Rows", b"1e400"),
            ("Columns", b"2.5"),
            ("Rows", b""),
            ("image", b""),
            ("BitsStored", b"99"),
            ("BitsStored", b"0"),
            ("RescaleSlope", b"1e400"),
            ("RescaleSlope", b"slope"),
        )
    },
}
CASES += [
    Case("TFRecords", what, partial(records, content=content), error(ValueError, "a.tfrec", *words))
    for what, (content, words) in RECORDS.items()
]
CASES += [
    Case(
        "TFRecords",
        "Rows is a number: read all the same",
        lambda folder: (
            records(folder, lambda: example(**SLICE | {"Rows": 2, "Columns": 2.0}))[0],
            records(folder, lambda: example(**SLICE))[0],
        ),
        unchanged(),
    )
]


def flipped_records(folder: Path):
    from rsnape_kit.store.tfrecords import read_tfrecords

    path = folder / "a.tfrec"
    path.write_bytes(
        b"".join(
            example(**SLICE | {"SOPInstanceUID": f"i{k}".encode(), "ImagePositionPatient": f"[0, 0, {k}]".encode()})
            for k in range(2)
        )
    )
    return survives(path, lambda path: read_tfrecords(path, 2)[:].tolist(), flips)


CASES += [Case("TFRecords", "one flipped bit", flipped_records, either())]
