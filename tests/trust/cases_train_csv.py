"train.csv, and the same as a table: what is wrong with each, and what the kit does."

import io
import random
import zipfile
from functools import partial
from pathlib import Path

from matrix import FULL, Case, either, error, unchanged

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
