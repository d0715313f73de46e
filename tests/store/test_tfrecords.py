"A store of TFRecords: equal to that of the same study's DICOM, labels kept, one record in memory at a time."
import contextlib
import io
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.cli import main
from rsnape_kit.competition.tables import read_train
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store, open_source
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.store.tfrecords import LABELS, read_tfrecords, write_tfrecords
from rsnape_kit.testing import ArraySource


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A phantom competition and the same slices, shuffled, as TFRecords in two folders."
    root = tmp_path_factory.mktemp("tfrecords")
    competition = make_competition(root / "competition", 3, 1, slices=6, difficulty="demo")
    slices = DicomSource(competition / "train").table
    labels = read_train(competition / "train.csv")[["SOPInstanceUID", *LABELS]]
    mixed = slices.merge(labels, on="SOPInstanceUID").sample(frac=1, random_state=0)
    (root / "records").mkdir()
    for part in range(2):
        write_tfrecords(mixed.iloc[part * 9:part * 9 + 9], root / "records" / str(part), per_file=5)
    return root


def command(*words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["store", *map(str, words)])
    return printed.getvalue()


def test_a_study_through_tfrecords_is_the_study_through_dicom(made, tmp_path):
    command(made / "competition" / "train", tmp_path / "dicom")
    printed = command(made / "records", tmp_path / "records")
    dicom, records = SliceStore(tmp_path / "dicom"), SliceStore(tmp_path / "records")
    assert printed.startswith("SliceStore(18 slices of 3 studies")
    np.testing.assert_array_equal(records[:], dicom[:])
    of_the_file = ["path", "transfer_syntax", "file_bytes"]
    assert set(dicom.table) - set(records.table) == {"file_bytes"}
    same = dicom.table.columns.drop(of_the_file)
    pd.testing.assert_frame_equal(records.table[same], dicom.table[same], check_dtype=False)
    truth = read_train(made / "competition" / "train.csv").set_index("SOPInstanceUID").loc[dicom.table.SOPInstanceUID]
    np.testing.assert_array_equal(records.table[list(LABELS)], truth[list(LABELS)])


def test_files_in_parts_and_resumed(made, tmp_path):
    whole = SliceStore(build_store(made / "records", tmp_path / "whole"))
    files = sorted((made / "records").rglob("*.tfrec"))
    assert len(files) == 4
    for part in range(2):
        command(*files, tmp_path / f"part{part}", "--part", f"{part}/2")
    parts = SliceStore(tmp_path / "part0", tmp_path / "part1")
    np.testing.assert_array_equal(parts[:], whole[:])
    shard = next((tmp_path / "whole").glob("*.slices"))
    raw, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    command(made / "records", tmp_path / "whole")
    assert shard.stat().st_mtime_ns == stamp
    shard.unlink()
    command(made / "records", tmp_path / "whole")
    assert shard.read_bytes() == raw


def test_what_is_no_source_is_named(made, tmp_path):
    with pytest.raises(ValueError, match="both kinds of file: 4 of TFRecords, such as .*tfrec, and DICOM, .*dcm"):
        open_source(made)
    (tmp_path / "folder").mkdir()
    for name in ("a.png", "b.png", "notes"):
        (tmp_path / "folder" / name).write_text("neither")
    with pytest.raises(FileNotFoundError, match="neither DICOM nor TFRecords .* among 2 .png, 1 without extension"):
        build_store(tmp_path / "folder", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nosuch"):
        open_source(tmp_path / "nosuch.tfrec")
    files = sorted((made / "records").rglob("*.tfrec"))
    with pytest.raises(SystemExit, match=f"rsnape: {files[-1]} is a file; the last path is the folder"):
        command(*files)  # without the store
    assert not (tmp_path / "out").exists()


def test_any_source_with_a_table_makes_a_store(tmp_path):
    pixels = np.random.default_rng(0).integers(-4096, 4000, (8, 32, 32)).astype(np.int16)
    table = pd.DataFrame({"StudyInstanceUID": list("aaabbbbb"), "SOPInstanceUID": list("ihgfedcb"),
                          "order": [0, 1, 2, 0, 1, 2, 3, 4]})
    store = SliceStore(build_store(ArraySource(pixels, table), tmp_path / "store", size=32))
    np.testing.assert_array_equal(store[:], pixels)
    assert store.table.SOPInstanceUID.tolist() == table.SOPInstanceUID.tolist()
    parts = [build_store(store, tmp_path / f"part{i}", size=32, part=(i, 2)) for i in range(2)]
    np.testing.assert_array_equal(SliceStore(*parts)[:], pixels)


def test_records_are_read_one_at_a_time(made, tmp_path):
    "54 records of half a megabyte: indexing and building hold a few of them."
    table = pd.concat([DicomSource(made / "competition" / "train").table] * 3, ignore_index=True)
    write_tfrecords(table, tmp_path / "many", per_file=54)
    size = (tmp_path / "many" / "00000.tfrec").stat().st_size
    read_tfrecords(made / "records")  # imports
    tracemalloc.start()
    source = read_tfrecords(tmp_path / "many")
    assert len(source.read(range(54)[::18])) == 3
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 25e6 and peak < size / 6
