"test.csv and sample_submission.csv: what is wrong with each, and what the kit does."

from functools import partial
from pathlib import Path

from matrix import Case, error, fallback, unchanged

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
CASES = [
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
