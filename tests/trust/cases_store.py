"Stores, and labels beside the pixels: what is wrong with each, and what the kit does."

from functools import partial
from pathlib import Path

from matrix import Case, either, error, flips, sound, survives, unchanged


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
CASES = [
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
