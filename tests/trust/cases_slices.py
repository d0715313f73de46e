"Slices tables and unreadable slices: what is wrong with each, and what the kit does."

import os
from functools import partial
from pathlib import Path

from matrix import Case, either, error, fallback, flips, rsnape, sound, survives, unchanged


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
CASES = [
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


def flipped_pages(folder: Path):
    "The table as `rsnape scan` writes it; bits of its values flip, not those of the names at the end of the file."
    from rsnape_kit.competition.tables import read_parquet
    from rsnape_kit.store.dicom_source import DicomSource

    where = series(folder)
    rsnape("scan", where, "--out", folder / "slices.parquet")
    raw = (folder / "slices.parquet").read_bytes()
    pages = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")

    def read(path: Path):
        return DicomSource(read_parquet(path), 32).table

    return survives(
        folder / "slices.parquet", read, lambda raw: (each + raw[pages:] for each in flips(raw[:pages], few=100))
    )


CASES += [
    Case("slices table", "one flipped bit in the values of its parquet file", flipped_pages, either()),
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
