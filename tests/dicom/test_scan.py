"Scanning a folder: every slice, in anatomical order, however the files are named and numbered."
import errno
import itertools
import os
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import ct_files
import numpy as np
import pandas as pd
import pydicom
import pytest
from ct_files import NATIVE, ct_file, stored_values
from pydicom.uid import JPEGLosslessSV1

from rsnape_kit.dicom.decode import DicomError
from rsnape_kit.dicom.hounsfield import read_hu
from rsnape_kit.dicom.selection import dicom_input
from rsnape_kit.dicom.series import read_series
from rsnape_kit.dicom.slices import _rows, scan
from rsnape_kit.dicom.volumes import select_study
from rsnape_kit.store import SliceStore, build_store
from rsnape_kit.store.build import open_source

SUPINE, PRONE, CORONAL = [1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, 0, -1]


@pytest.fixture(autouse=True)
def quiet():
    ct_files.quiet()


def series(folder, z, orientation=SUPINE, names=None, numbers=None, uid="1.5", shape=(8, 8), syntax=NATIVE[1], **tags):
    "Write slices at heights `z`; slice i has the value 100 + i, except for a bright mark at the front right."
    folder.mkdir(parents=True, exist_ok=True)
    for i, height in enumerate(z):
        values = np.full(shape, 100 + i, np.uint16)
        values[0, 0] = 2000
        at = None if height is None else [-100, -90, height]
        ct_file(folder / f"{names[i] if names else i}.dcm", values, syntax, **{
            "SeriesInstanceUID": uid, "SOPInstanceUID": f"{uid}.{i}", "ImagePositionPatient": at,
            "ImageOrientationPatient": orientation, "InstanceNumber": i if numbers is None else numbers[i]} | tags)
    return folder


def marks(table):
    "The i of each slice, in the table's order."
    return [int(uid.split(".")[-1]) for uid in table.SOPInstanceUID]


def test_order_of_reversed_shuffled_and_gapped_series(tmp_path):
    rng = np.random.default_rng(0)
    z = -300 + 1.25 * np.arange(30)
    orders = {"rising": np.arange(30), "falling": np.arange(30)[::-1], "shuffled": rng.permutation(30)}
    for name, order in orders.items():
        order = order[order != 11]
        table = scan(series(tmp_path / name, z[order], names=rng.permutation(len(order)).tolist()))
        np.testing.assert_array_equal(table.position, np.delete(z, 11))
        assert [order[i] for i in marks(table)] == sorted(order)
        assert table.order.tolist() == list(range(29))
        assert table.index[table.problem != ""].tolist() == [11] and table.problem[11] == "gap before"


def test_position_along_a_tilted_normal(tmp_path):
    tilt = np.deg2rad(20)
    row, column = np.array([1, 0, 0]), np.array([0, np.cos(tilt), np.sin(tilt)])
    normal = np.cross(row, column)
    folder = tmp_path / "tilted"
    folder.mkdir()
    for i in range(5):  # each corner also slides within the plane, which must not matter
        corner = 2.5 * i * normal + 7 * i * column - 3 * i * row
        ct_file(folder / f"{9 - i}.dcm", stored_values((4, 4)), SOPInstanceUID=f"1.{i}",
                ImagePositionPatient=[f"{v:.6f}" for v in corner],
                ImageOrientationPatient=[f"{v:.9f}" for v in (*row, *column)])
    table = scan(folder)
    assert marks(table) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(np.diff(table.position), 2.5, atol=1e-4)
    assert not table.problem.any()


@pytest.mark.parametrize("orientation, rows, columns", [
    (SUPINE, False, False), (PRONE, True, True), ([-1, 0, 0, 0, 1, 0], False, True),
    ([1, 0, 0, 0, -1, 0], True, False)])
def test_flips_bring_right_front_to_the_first_pixel(tmp_path, orientation, rows, columns):
    "The mark is written where the patient's right front is, and must be read at [0, 0]."
    folder = tmp_path / "s"
    folder.mkdir()
    for i in range(3):
        values = np.full((6, 8), 100, np.uint16)
        values[-1 if rows else 0, -1 if columns else 0] = 2000
        ct_file(folder / f"{i}.dcm", values, SOPInstanceUID=f"1.{i}", ImageOrientationPatient=orientation,
                ImagePositionPatient=[0, 0, i], PatientPosition="HFP")  # not used
    table = scan(folder)
    assert table.flip_rows.tolist() == [rows] * 3 and table.flip_columns.tolist() == [columns] * 3
    assert marks(table) == [0, 1, 2]
    stack = read_series(table)
    assert (stack[:, 0, 0] == 2000 - 1024).all() and (stack == 2000 - 1024).sum() == 3


def test_fallback_to_instance_number_then_name(tmp_path):
    with pytest.warns(UserWarning, match="series 1.5: 4 of 4 slices .* ordered by InstanceNumber"):
        table = scan(series(tmp_path / "number", [None] * 4, numbers=[4, 2, 9, 1]))
    assert marks(table) == [3, 1, 0, 2] and table.position.isna().all()
    assert set(table.problem) == {"position unknown"}
    with pytest.warns(UserWarning, match="series 1.5: .* ordered by file name"):
        table = scan(series(tmp_path / "name", [None] * 4, numbers=[None] * 4, names=["s10", "s9", "s1", "s2"]))
    assert marks(table) == [2, 3, 1, 0]


def test_one_position_missing_is_filled_in(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = scan(series(tmp_path / "s", [50, 45, None, 35, 30]))
    assert marks(table) == [4, 3, 2, 1, 0]
    np.testing.assert_allclose(table.position, [30, 35, 40, 45, 50])
    assert table.problem.tolist() == ["", "", "position from InstanceNumber", "", ""]


def test_a_series_without_orientation_is_taken_as_axial(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = scan(series(tmp_path / "s", [50, 45, 40, 35], orientation=None))
    assert marks(table) == [3, 2, 1, 0] and table.position.tolist() == [35, 40, 45, 50]
    assert set(table.problem) == {"orientation unknown, taken as axial"}
    assert not table.flip_rows.any() and not table.flip_columns.any()


@pytest.mark.parametrize("orientation", [[0] * 6, [1, 0, 0, 1, 0, 0]], ids=["none", "parallel"])
def test_an_invalid_orientation_is_unknown(tmp_path, orientation):
    table = scan(series(tmp_path, [2, 1, 0], orientation=orientation))
    assert marks(table) == [2, 1, 0] and set(table.problem) == {"orientation unknown, taken as axial"}


@pytest.mark.parametrize("other", [PRONE, [-1, 0, 0, 0, 1, 0], [1, 0, 0, 0, -1, 0]])
def test_mixed_orientation_is_noted(tmp_path, other):
    series(tmp_path, range(3), uid="1.1")
    series(tmp_path, range(3, 5), orientation=other, names=["a", "b"], uid="1.1")
    problems = scan(tmp_path).problem
    assert problems.str.contains("mixed orientation").tolist() == [False] * 3 + [True] * 2


def test_flags(tmp_path):
    series(tmp_path / "a", [0, 1, 2, 2, 3], uid="1.1")
    series(tmp_path / "b", range(5), uid="1.2", orientation=CORONAL)
    series(tmp_path / "c", range(5), uid="1.3")
    series(tmp_path / "c", [5], uid="1.3", shape=(4, 4), names=["x"], SOPInstanceUID="1.3.9")
    series(tmp_path / "d", range(5), uid="1.4")
    ct_file(tmp_path / "d/x.dcm", stored_values((8, 8)), SeriesInstanceUID="1.4", SOPInstanceUID="1.4.9",
            ImagePositionPatient=[0, 0, 9], ImageOrientationPatient=CORONAL)
    problems = {uid: part.problem.tolist() for uid, part in scan(tmp_path).groupby("SeriesInstanceUID")}
    assert problems["1.1"] == ["", "", "duplicate position", "duplicate position", ""]
    noise = series(tmp_path / "noise", range(4), orientation=["1", "0", "0", "0", "0.0001", "-1"], uid="1.6")
    series(noise, range(4), orientation=["1", "0", "0", "0", "-0.0001", "-1"], uid="1.6", names="abcd")
    assert not scan(noise).problem.str.contains("mixed orientation").any()
    assert set(problems["1.2"]) == {"duplicate position; not axial"}  # z does not separate coronal slices
    assert problems["1.3"] == [""] * 5 + ["mixed size"]
    assert sorted(problems["1.4"])[-1].startswith(("gap before; mixed orientation", "mixed orientation"))


def test_rotated_in_plane_is_noted(tmp_path):
    table = scan(series(tmp_path / "s", range(3), orientation=[0, 1, 0, 1, 0, 0]))
    assert set(table.problem) == {"rotated in plane"}
    assert marks(table) == [0, 1, 2]


def test_broken_files_keep_a_row(tmp_path):
    folder = series(tmp_path / "study" / "series", [0, 1, 2, 3, 4], uid="1.7", shape=(64, 64))
    (folder / "2.dcm").write_bytes((folder / "2.dcm").read_bytes()[:3000])
    (folder / "aa.dcm").write_bytes(b"")
    (folder / "bb.dcm").write_bytes(b"no DICOM at all" * 100)
    (folder / "notes.txt").write_text("stray files are not slices")
    shutil.copy(pydicom.data.get_testdata_file("rtplan.dcm"), folder / "plan.dcm")
    table = scan(tmp_path)
    mine = table[table.SeriesInstanceUID == "1.7"].reset_index(drop=True)
    assert len(table) == 8 and table.path.str.endswith(".dcm").all()
    assert mine.SOPInstanceUID.tolist() == ["1.7.0", "1.7.1", "1.7.2", "1.7.3", "1.7.4", "aa", "bb"]
    assert mine.problem.map(bool).tolist() == [False, False, True, False, False, True, True]
    assert "shorter" in mine.problem[2] and mine["rows"].tolist() == [64] * 5 + [0, 0]
    with pytest.raises(DicomError, match="2.dcm"):
        read_series(mine)
    stack = read_series(mine, on_error="fill")
    assert stack[:, 1, 1].tolist() == [100 - 1024 + i for i in (0, 1, 1, 3, 4, 4, 4)]
    assert "filled from 1.7.1" in mine.problem[2] and "filled from 1.7.4" in mine.problem[6]


def test_damaged_files_without_extension_keep_a_row(tmp_path):
    folder = series(tmp_path / "study" / "series", range(4), uid="1.7")
    for i in range(4):
        (folder / f"{i}.dcm").rename(folder / f"1.7.{i}")
    (folder / "1.7.1").write_bytes(b"")
    (folder / "1.7.2").write_bytes(b"no DICOM at all" * 100)
    (folder / "notes.txt").write_text("stray files are not slices")
    (tmp_path / "README").write_text("nor is this, where there are no others of its kind")
    table = scan(tmp_path)
    assert table["rows"].tolist() == [8, 8, 0, 0] and table.problem.map(bool).tolist() == [False, False, True, True]
    assert [path[-5:] for path in table.path] == ["1.7.0", "1.7.3", "1.7.1", "1.7.2"]


def test_pipes_and_circles(tmp_path):
    series(tmp_path / "a", range(3))
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "again").symlink_to("a")
    os.mkfifo(tmp_path / "a/pipe.dcm")
    (tmp_path / "a/lost.dcm").symlink_to("nowhere/at/all")
    table = scan(tmp_path)
    assert table.SOPInstanceUID.tolist() == ["1.5.0", "1.5.1", "1.5.2", "lost"]
    assert table.problem.tolist() == ["", "", "", "No such file or directory"]


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "train.csv").write_text("StudyInstanceUID,label")
    with pytest.raises(FileNotFoundError, match="1 files below .*, none of them DICOM"):
        scan(tmp_path)
    for name, cause in (("train.csv", "is no folder"), ("none", "does not exist")):
        with pytest.raises(OSError, match=f"{name} {cause}; give a folder"):
            scan(tmp_path / name)


def test_table_equals_pydicom(tmp_path):
    rng = np.random.default_rng(1)
    for i, syntax in enumerate([*NATIVE, JPEGLosslessSV1, *NATIVE]):
        ct_file(tmp_path / f"{i}.dcm", stored_values((8, 8 + i), signed=i % 2 == 0, bits=16), syntax,
                SeriesInstanceUID=f"1.{i}", SOPInstanceUID=f"1.{i}.1", slope=f"{rng.random():.9f}",
                intercept=f"{-1000 * rng.random():.7f}", SliceThickness=None if i == 3 else f"{rng.random():.5e}",
                ImageComments="long " * 1500 * (i % 3), PixelSpacing=[f"{v:.8f}" for v in rng.random(2)],
                ImagePositionPatient=[f"{v:.7f}" for v in rng.normal(0, 200, 3)])
    compare(scan(tmp_path))


def compare(table):
    "Compare every column with pydicom."
    for row in table.itertuples():
        ds = pydicom.dcmread(row.path)
        assert (row.StudyInstanceUID, row.SeriesInstanceUID, row.SOPInstanceUID, row.transfer_syntax) == (
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.file_meta.TransferSyntaxUID)
        assert (row.rows, row.columns, row.bits) == (ds.Rows, ds.Columns, ds.BitsStored)
        assert row.signed == (ds.PixelRepresentation == 1)
        assert (row.slope, row.intercept) == (ds.RescaleSlope, ds.RescaleIntercept)
        assert (row.spacing_y, row.spacing_x) == tuple(ds.PixelSpacing)
        thickness = ds.get("SliceThickness")
        assert row.thickness == thickness or (thickness is None and np.isnan(row.thickness))
        assert row.position == pytest.approx(ds.ImagePositionPatient[2], abs=1e-9)


def pieces(raw, path):
    "A file's bytes, split before each element of its data set; the pixels are last."
    ds = pydicom.dcmread(path)
    long = 4 * (ds.file_meta.TransferSyntaxUID == NATIVE[1])
    starts = [ds[tag].file_tell - 8 - (long if tag == 0x7FE00010 else 0) for tag in ds.keys()]
    return [raw[a:b] for a, b in zip([0, *starts], [*starts, len(raw)])]


def misplaced(raw, path, rng):
    "Yield files in which one or two elements are moved or missing, or an element of a later group is inserted."
    implicit, whole = pydicom.dcmread(path).file_meta.TransferSyntaxUID == NATIVE[0], pieces(raw, path)
    late = bytes.fromhex("40008002") + (b"\x04\0\0\0" if implicit else b"ST\x04\0") + b"late"
    while True:
        new = whole[1:-1]
        for _ in range(rng.integers(1, 3)):
            kind, one = rng.integers(3), int(rng.integers(len(new)))
            piece = late if kind == 2 else new.pop(one)
            if kind:
                new.insert(int(rng.integers(len(new))), piece)
        yield b"".join([whole[0], *new, whole[-1]])


def same_as_pydicom(row):
    "Compare one row of a scan with pydicom's header; False if pydicom raises, perhaps for an unused element."
    try:
        ds = pydicom.dcmread(row.path, stop_before_pixels=True)
        ids = [ds.get(f"{name}InstanceUID") or "" for name in ("Study", "Series", "SOP")]
        ids = [uid if isinstance(uid, str) else "\\".join(uid) for uid in ids]
        ds.file_meta.get("TransferSyntaxUID")
    except Exception:
        return False

    def number(keyword, count=1, default=np.nan):
        try:
            values = np.ravel(np.asarray(ds.get(keyword, []), float))
        except Exception:
            try:  # a decimal comma is read, which pydicom does not do
                values = np.array([float(part.replace(",", ".")) for part in np.atleast_1d(ds.get_item(keyword).value)])
            except Exception:
                return [default] * count
        return np.where(np.isnan(values), default, values) if values.size == count else [default] * count

    assert [row.StudyInstanceUID, row.SeriesInstanceUID, row.SOPInstanceUID] == ids
    rows, columns = np.nan_to_num([*number("Rows"), *number("Columns")])
    assert (row.rows, row.columns) == ((rows, columns) if rows * columns else (0, 0))
    found = [row.slope, row.intercept, row.instance, row.thickness, row.spacing_y, row.spacing_x, row.bits,
             row.corner_x, row.corner_y, row.corner_z, row.row_x, row.row_y, row.row_z,
             row.column_x, row.column_y, row.column_z]
    np.testing.assert_array_equal(found, np.concatenate([
        number("RescaleSlope", default=1), number("RescaleIntercept", default=0), number("InstanceNumber"),
        number("SliceThickness"), number("PixelSpacing", 2), number("BitsStored", default=0),
        number("ImagePositionPatient", 3), number("ImageOrientationPatient", 6)]), err_msg=row.path)
    return True


@pytest.mark.parametrize("syntax", NATIVE[:2], ids=["implicit", "explicit"])
def test_damaged_and_disordered_headers_equal_pydicom(tmp_path, syntax):
    whole = ct_file(tmp_path / "whole.dcm", stored_values((16, 24), bits=12), syntax, bits=12)
    raw, rng = whole.read_bytes(), np.random.default_rng(4)
    damaged = [new for _, new in itertools.islice(ct_files.mutations(raw, len(raw) - 768, rng), 400)]
    for i, new in enumerate([*itertools.islice(misplaced(raw, whole, rng), 400), *damaged]):
        (tmp_path / f"{i:04d}.dcm").write_bytes(new)
    rows = _rows([str(path) for path in sorted(tmp_path.glob("0*.dcm"))])
    readable = [same_as_pydicom(row) for row in rows.itertuples()]
    assert all(readable[:400]) and sum(readable) > 500


def test_a_misplaced_element_loses_no_slice(tmp_path):
    "A comment of a later group before the study's id, Rows or the intercept: the slice is read like any other."
    path = ct_file(tmp_path / "0.dcm", stored_values((64, 64), bits=12), NATIVE[1], bits=12)
    raw, comment = path.read_bytes(), bytes.fromhex("40008002") + b"ST\x04\0late"
    for tag in ("20000d00", "28001000", "28005210"):
        place = raw.index(bytes.fromhex(tag))
        path.write_bytes(raw[:place] + comment + raw[place:])
        (row,) = scan(tmp_path).itertuples()
        assert (row.StudyInstanceUID, row.rows, row.intercept) == ("1.2.1", 64, -1024)
        assert (row.position, row.problem) == (31.25, "")


def test_executors_and_batches_give_the_same_table(tmp_path):
    for s in range(4):
        series(tmp_path / str(s), range(9), uid=f"1.{s}")
    expected = scan(tmp_path)
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        pd.testing.assert_frame_equal(scan(tmp_path, threads, batch_files=5), expected)
        pd.testing.assert_frame_equal(scan(tmp_path, processes, batch_files=7), expected)


def test_real_ct(real_ct):
    table = scan(real_ct / "lidc_small")
    assert table.SeriesInstanceUID.nunique() == 3 and len(table) == 39 and not table.problem.any()
    compare(table)
    for _, part in table.groupby("SeriesInstanceUID"):
        assert part.position.is_monotonic_increasing and part.order.tolist() == list(range(len(part)))
        np.testing.assert_allclose(np.diff(part.position).std(), 0, atol=1e-3)
        stack = read_series(part)
        assert stack.shape == (len(part), 512, 512) and stack.min() == -1024
        np.testing.assert_array_equal(stack[3], read_hu(part.path.iloc[3]))
    whole = scan(real_ct / "cip_ct64_series")
    assert len(whole) == 79 and whole.SeriesInstanceUID.nunique() == 1
    compare(whole)


@pytest.mark.parametrize("number, fix", [(errno.EACCES, "chmod -R"), (errno.EIO, "its disk")])
def test_a_folder_that_cannot_be_listed_ends_a_scan(tmp_path, monkeypatch, number, fix):
    "Its slices would be missing. The tests may run as root, who may read everything."
    for name in ("a", "b/c", "d"):
        series(tmp_path / name, [0, 1], uid=name)
    true, closed = os.scandir, str(tmp_path / "b" / "c")

    def scandir(path):
        if path == closed:
            raise OSError(number, os.strerror(number), path)
        return true(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for read in (scan, select_study, open_source):
        with pytest.raises(OSError, match=f"{closed} cannot be listed .{os.strerror(number)}.*{fix}"):
            read(tmp_path)
    assert len(scan(tmp_path / "d")) == 2


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, empty):
    series(tmp_path, [0, 1])
    monkeypatch.chdir(tmp_path)
    assert len(scan(".")) == len(open_source(".", size=8)) == 2
    for read in (scan, select_study, open_source, lambda path: dicom_input(path).__enter__(), SliceStore,
                 lambda out: build_store(".", out, 8)):
        with pytest.raises(ValueError, match=f"is {empty!r}, .* not set; the current folder is"):
            read(empty)
    assert {path.suffix for path in tmp_path.iterdir()} == {".dcm"}
