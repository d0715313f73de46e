"Which slices of a study are used: archives' studies with one right answer, and every file accounted for."
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import ct_files
import numpy as np
import pandas as pd
import pydicom
import pytest
from ct_files import ct_file, stored_values

from rsnape_kit.dicom.selection import dicom_input, select_slices
from rsnape_kit.dicom.slices import scan

VALUES = stored_values((16, 16), bits=12)
CORONAL = [1, 0, 0, 0, 0, -1]


@pytest.fixture(autouse=True)
def quiet():
    ct_files.quiet()


def series(folder, name, n=12, start=0., step=2.5, values=VALUES, own_ids="", **tags):
    "Write n slices of one series, `step` mm apart; `own_ids`: kinds of UIDs that each file has for itself."
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        ids = {f"{kind}InstanceUID": f"1.2.{name}.{kind == 'Study':d}.{i + 1}" for kind in own_ids.split()}
        ct_file(folder / f"{name}-{i:03d}.dcm", values, bits=12, **{
            "SeriesInstanceUID": f"1.2.{name}", "SOPInstanceUID": f"1.2.{name}.{i}", "InstanceNumber": i + 1,
            "ImagePositionPatient": [-165.5, -170, start + i * step], "FrameOfReferenceUID": "1.9",
            "SliceThickness": 2.5, "ConvolutionKernel": "B30f", "ContrastBolusAgent": "Iomeprol"} | ids | tags)


def document(path, sop_class, modality, **tags):
    "Write an object without pixels."
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.Modality = sop_class, modality
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.1", f"1.3.{path.name}", f"1.3.{path.name}.1"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop_class, ds.SOPInstanceUID
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


def used(selection) -> set:
    "Names of the series of which files are used."
    return {Path(path).name.split("-")[0] for path in selection.table.path}


LOCALIZER, MIP = ["ORIGINAL", "PRIMARY", "LOCALIZER"], ["DERIVED", "SECONDARY", "AXIAL", "MIP"]
OBJECTS = {  # what an archive sends beside series 7: tags of series(), and the reason for which it is left out
    "localizer": (dict(n=2, ImageType=LOCALIZER, ImageOrientationPatient=CORONAL), "localizer"),
    "localizer of the same series": (dict(n=1, SeriesInstanceUID="1.2.7", ImageType=LOCALIZER), "localizer"),
    "topogram by name": (dict(n=1, SeriesDescription="Topogram 0.6"), "localizer, by its description"),
    "coronal": (dict(n=30, ImageOrientationPatient=CORONAL), "not axial (coronal)"),
    "sagittal": (dict(n=30, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "not axial (sagittal)"),
    "bolus tracking": (dict(n=20, step=0.), "at one position"),
    "MIP": (dict(n=30, ImageType=MIP), "derived image: MIP"),
    "screen shot": (dict(n=1, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "Secondary Capture Image Storage"),
    "MR": (dict(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), "modality MR, MR Image Storage"),
    "multi-frame": (dict(n=1, NumberOfFrames=2), "several frames or colours"),
    "dose report": (dict(modality="SR", sop_class="1.2.840.10008.5.1.4.1.1.88.67"), "X-Ray Radiation Dose SR"),
    "key object": (dict(modality="KO", sop_class="1.2.840.10008.5.1.4.1.1.88.59"), "modality KO"),
    "index": (dict(modality="", sop_class="1.2.840.10008.1.3.10"), "DICOMDIR"),
    "part": (dict(n=3), "covers 5 mm, another series 28 mm"),
    "sharp": (dict(ConvolutionKernel="B70f"), "sharp kernel B70f, the used series has a soft one B30f"),
    "sharp of the same series": (dict(SeriesInstanceUID="1.2.7", ConvolutionKernel="B70f"), "sharp kernel"),
    "no contrast": (dict(n=24, step=1.25, ContrastBolusAgent=None), "no contrast agent is named"),
    "thick": (dict(SliceThickness=5), "5 mm slices, the used series has 2.5 mm"),
    "derived": (dict(n=24, step=1.25, ImageType=MIP[:3]), "derived images"),
    "fewer": (dict(n=8), "8 slices, the used series has 12"),
    "other size": (dict(n=8, SeriesInstanceUID="1.2.7", values=VALUES[:8]), "8 slices, the used series has 12"),
}


def add(folder, name, tags):
    "Write one of OBJECTS under a name."
    if "sop_class" in tags:
        document(folder / name, **tags)
    else:
        series(folder, name, **tags)


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_left_out_of_a_study(tmp_path, name):
    tags, reason = OBJECTS[name]
    series(tmp_path, "7")
    alone = scan(tmp_path)
    add(tmp_path, "8", tags)
    selection = select_slices(tmp_path)
    pd.testing.assert_frame_equal(selection.table, alone)
    assert selection.series.slices.sum() == len(list(tmp_path.iterdir()))
    assert len(selection.left_out) == 1 and reason in selection.left_out.reason[0]
    assert reason in selection.describe() and selection.used.slices.tolist() == [12]


def test_a_whole_archive(tmp_path):
    "All of these in one study: the same slices as without them."
    series(tmp_path, "7")
    alone = scan(tmp_path)
    for number, (tags, _) in enumerate(OBJECTS.values()):
        add(tmp_path, f"{100 + number}", tags)
    selection = select_slices(tmp_path)
    pd.testing.assert_frame_equal(selection.table, alone)
    assert selection.series.slices.sum() == len(list(tmp_path.iterdir()))
    for name, (_, reason) in OBJECTS.items():
        assert name == "part" or reason in selection.describe()  # another series is the tallest here


@pytest.mark.parametrize("own_ids", ["Series", "Study Series"])
def test_every_file_its_own_series_is_one_body(tmp_path, own_ids):
    series(tmp_path, "7", own_ids=own_ids)
    table = select_slices(tmp_path).table
    assert table.SeriesInstanceUID.nunique() == table.StudyInstanceUID.nunique() == 1
    assert table.order.tolist() == list(range(12)) and not table.problem.any()
    np.testing.assert_allclose(table.position, 2.5 * np.arange(12))


def test_a_stack_in_two_series_is_one_body_and_two_scans_are_not(tmp_path):
    for name, start, slices in (("ends", 30., 24), ("between", 1.25, 12), ("gap", 60., 12)):
        series(tmp_path / name, "7")
        series(tmp_path / name, "8", start=start)
        assert len(select_slices(tmp_path / name).table) == slices, name


def test_a_series_that_is_asked_for(tmp_path):
    series(tmp_path, "7")
    series(tmp_path, "8", 20, ImageOrientationPatient=CORONAL)
    assert used(select_slices(tmp_path)) == {"7"}
    chosen = select_slices(tmp_path, series="1.2.8")
    assert used(chosen) == {"8"} and "series 1.2.8 was asked for" in chosen.describe()
    with pytest.raises(ValueError, match="no series '1.2.9' with images; there are 1.2.7, 1.2.8"):
        select_slices(tmp_path, series="1.2.9")
    for path in tmp_path.glob("7-*"):
        path.unlink()
    with pytest.raises(ValueError, match="no axial CT series to use; --series UID.*\n.*not axial"):
        select_slices(tmp_path)


def test_studies_are_chosen_one_by_one(tmp_path):
    for study in ("1.2.1", "1.2.4"):
        series(tmp_path / study, "7", StudyInstanceUID=study)
        series(tmp_path / study, "8", StudyInstanceUID=study, ConvolutionKernel="B70f")
    series(tmp_path / "other", "9", StudyInstanceUID="1.2.5", Modality="MR")
    selection = select_slices(tmp_path)
    assert selection.table.StudyInstanceUID.value_counts().to_dict() == {"1.2.1": 12, "1.2.4": 12}
    assert used(selection) == {"7"}
    assert selection.left_out.StudyInstanceUID.tolist() == ["1.2.1", "1.2.4", "1.2.5"]


def test_unreadable_slices_stay_in_their_series(tmp_path):
    series(tmp_path, "7")
    series(tmp_path, "8", 2, ImageType=LOCALIZER)
    for i in (3, 4):
        (tmp_path / f"7-{i:03d}.dcm").write_bytes(os.urandom(500))
    table = select_slices(tmp_path).table
    assert len(table) == 12 and table.problem.str.startswith("InvalidDicomError").sum() == 2


def test_the_competitions_layout_is_the_scan_and_costs_no_more_headers(tmp_path, monkeypatch):
    ids = iter(f"{i:012x}" for i in range(0xabc, 0xfff))
    for study in range(3):
        names = next(ids), next(ids)
        folder = tmp_path.joinpath(*names)
        folder.mkdir(parents=True)
        for i in range(4):
            image = next(ids)
            ct_file(folder / f"{image}.dcm", VALUES, bits=12, StudyInstanceUID=names[0], SeriesInstanceUID=names[1],
                    SOPInstanceUID=image, ImagePositionPatient=[0, 0, i], ImageType=LOCALIZER)
        if study == 2:
            (folder / f"{image}.dcm").write_bytes(b"damaged")
    monkeypatch.setattr("rsnape_kit.dicom.kinds.read_dataset", lambda *_, **__: pytest.fail("a header was read again"))
    selection = select_slices(tmp_path)
    pd.testing.assert_frame_equal(selection.table, scan(tmp_path))
    assert len(selection.used) == 3 and not len(selection.left_out) and selection.describe() == ""


def test_real_studies_are_used_as_they_are(real_ct):
    ct_files.quiet()
    for folder in (real_ct / "lidc_small", real_ct / "cip_ct64_series"):
        pd.testing.assert_frame_equal(select_slices(folder).table, scan(folder))


INPUTS = {
    "folder": lambda folder: folder,
    "DICOMDIR": lambda folder: document(folder / "DICOMDIR", "1.2.840.10008.1.3.10", "") or folder / "DICOMDIR",
    "damaged DICOMDIR": lambda folder: (folder / "DICOMDIR").write_bytes(b"damaged") and folder / "DICOMDIR",
    "zip": lambda folder: Path(shutil.make_archive(folder.with_name("study"), "zip", folder)),
    "zip without suffix": lambda folder: INPUTS["zip"](folder).rename(folder.with_name("study")),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(tmp_path, kind):
    series(tmp_path / "in", "7")
    with dicom_input(INPUTS[kind](tmp_path / "in")) as root:
        assert len(select_slices(root).table) == 12
    with dicom_input(tmp_path / "in" / "7-003.dcm") as root:
        assert select_slices(root).table.position.tolist() == [7.5]


def test_members_of_a_zip_stay_in_its_folder(tmp_path):
    series(tmp_path / "in", "7", 2)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, path in zip(("../../up", "/root/x\\..\\7"), sorted((tmp_path / "in").iterdir())):
            archive.write(path, name)
    with dicom_input(tmp_path / "a.zip") as root:
        inside = [Path(path) for path in scan(root).path]
        assert len(inside) == 2 and all(path.resolve().is_relative_to(Path(root).resolve()) for path in inside)
    assert not Path(root).exists()


def test_a_member_without_a_name_stays_in_the_folder_of_its_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("..", b"1")
        archive.writestr("x/../..", b"2")
        archive.writestr("./.", b"3")
    with dicom_input(tmp_path / "a.zip") as root:
        assert sorted(path.read_bytes() for path in Path(root).rglob("*") if path.is_file()) == [b"1", b"2", b"3"]
        assert list((tmp_path / "temporary").iterdir()) == [Path(root)]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("name, content, cause", [
    ("study.tar.gz", b"", "unpack it and give the folder"), ("study.7z", b"", "unpack it"),
    ("study.zip", b"PK no zip", "cannot be unpacked"), ("none.dcm", None, "does not exist"),
])
def test_other_inputs_are_refused_by_name(tmp_path, name, content, cause):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} .*{cause}"), dicom_input(tmp_path / name):
        pass


def test_errors_name_the_file_that_was_given(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no DICOM")
    for path in (tmp_path / "in" / "notes.txt", Path(shutil.make_archive(tmp_path / "study", "zip", tmp_path / "in"))):
        with pytest.raises(FileNotFoundError, match=f"{path.name}.*none of them DICOM"), dicom_input(path) as root:
            select_slices(root)


def test_a_damaged_member_of_a_zip_is_an_error(tmp_path):
    series(tmp_path / "in", "7")
    path = Path(shutil.make_archive(tmp_path / "study", "zip", tmp_path / "in"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="study.zip cannot be unpacked"), dicom_input(path):
        pass


def test_names_that_are_not_utf8(tmp_path, capsys):
    "A folder from a Latin-1 CD: files without ids take its name, a study is cached, and the table is saved."
    from rsnape_kit.commands import scan as scan_command
    from rsnape_kit.inference.results import fetch_study
    from rsnape_kit.store import DicomSource

    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/J\xfcrgen"))
    series(folder, "7", 3)
    (folder / "damaged.dcm").write_bytes(b"no slice")
    series(folder / "none", "8", 2, StudyInstanceUID=None, SeriesInstanceUID=None)
    table = scan(folder)
    assert r"J\udcfcrgen" in set(table.StudyInstanceUID) and os.path.exists(table.path.iloc[0])
    assert all(text.isascii() for text in table[["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]].stack())
    source, rows = DicomSource(table, size=8), np.arange(len(table))
    plain = fetch_study(source, rows).pixels
    for _ in range(2):  # written, and read again
        np.testing.assert_array_equal(fetch_study(source, rows, tmp_path / "cached").pixels, plain)
    assert (tmp_path / "cached").exists()
    scan_command(folder, out=tmp_path / "slices.parquet")
    assert len(pd.read_parquet(tmp_path / "slices.parquet")) == 6 and "6 slices" in capsys.readouterr().out
