"Reading one slice: for any file, the array that pydicom gives or a DicomError."
import errno
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ct_files
import numpy as np
import pydicom
import pytest
from ct_files import ENCODERS, NATIVE, SYNTAXES, ct_file, reference, stored_values
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from rsnape_kit.dicom.decode import DECODERS, DicomError
from rsnape_kit.dicom.hounsfield import read_hu
from rsnape_kit.dicom.slices import scan
from rsnape_kit.store.dicom_source import DicomSource

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.fixture(autouse=True)
def quiet():
    ct_files.quiet()


@pytest.mark.parametrize("bits, signed", [(16, True), (16, False), (12, True), (12, False), (13, False)])
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name.split(",")[0].replace(" ", "_"))
def test_every_syntax(tmp_path, syntax, bits, signed):
    values = stored_values(bits=bits, signed=signed)
    path = ct_file(tmp_path / "slice.dcm", values, syntax, bits=bits)
    plain = ct_file(tmp_path / "plain.dcm", values, bits=bits)
    np.testing.assert_array_equal(read_hu(path), reference(plain))
    if syntax not in ENCODERS:
        np.testing.assert_array_equal(read_hu(path), reference(path))
    raw = path.read_bytes()
    path.write_bytes(raw[:-len(raw) // 3])
    with pytest.raises(DicomError, match="slice.dcm"):
        read_hu(path)


@pytest.mark.parametrize("shape", [(512, 512), (512, 510), (1, 1), (3, 5), (768, 768), (700, 600)])
@pytest.mark.parametrize("slope, intercept", [
    ("1", "-1024"), ("1", "0"), ("1", "-8192"), ("2", "-1024"), ("0.5", "3.25"), ("1.0", "1e3"), ("-1", "0"),
    ("1", "40000"), (None, None)])
@pytest.mark.parametrize("syntax", NATIVE[:2], ids=["implicit", "explicit"])
def test_rescale_and_size(tmp_path, syntax, slope, intercept, shape):
    for signed in (True, False):
        values = stored_values(shape, signed, 12)
        path = ct_file(tmp_path / "slice.dcm", values, syntax, slope=slope, intercept=intercept)
        np.testing.assert_array_equal(read_hu(path), reference(path))
        np.testing.assert_array_equal(read_hu(path, lowest=-32768), reference(path, lowest=-32768))


@pytest.mark.parametrize("tags", [
    {"PixelPaddingValue": 63536}, {"WindowCenter": None}, {"NumberOfFrames": 1}, {"NumberOfFrames": 0},
    {"PhotometricInterpretation": "MONOCHROME1"}, {"SpecificCharacterSet": None},
    {"SpecificCharacterSet": "ISO_IR 192"}, {"SpecificCharacterSet": ["ISO_IR 13", "ISO 2022 IR 87"]},
    {"ImagePositionPatient": None}, {"InstanceNumber": None},
    {"StudyInstanceUID": None}, {"HighBit": None}, {"RescaleSlope": "1.00000000000001"},
    {"ImageComments": "x" * 30000}, {"ReferencedImageSequence": [pydicom.Dataset()]},
], ids=lambda tags: "-".join(tags))
@pytest.mark.parametrize("syntax", NATIVE[:2], ids=["implicit", "explicit"])
def test_odd_headers(tmp_path, syntax, tags):
    path = ct_file(tmp_path / "slice.dcm", stored_values((512, 512), bits=12), syntax, **tags)
    np.testing.assert_array_equal(read_hu(path), reference(path))


@pytest.mark.parametrize("tags, cause", [
    ({"slope": None}, "only one of RescaleSlope and RescaleIntercept"),
    ({"intercept": None}, "only one of RescaleSlope and RescaleIntercept"),
    ({"slope": "nan"}, "RescaleSlope"), ({"BitsStored": None}, "Bits Stored"), ({"Rows": None}, "Rows"),
    ({"PhotometricInterpretation": "GREY"}, "Photometric"), ({"SamplesPerPixel": 3}, "Planar"),
    ({"Rows": 4}, "expected one grayscale frame"), ({"PixelRepresentation": 2}, "Pixel Representation"),
])
def test_refused(tmp_path, tags, cause):
    path = ct_file(tmp_path / "slice.dcm", stored_values((8, 8)), **tags)
    with pytest.raises(DicomError, match=cause) as error:
        read_hu(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda uid: uid.name.split("(")[-1].strip(")").replace(" ", "_"))
def test_several_frames_are_an_error(tmp_path, syntax, table):
    values = stored_values((8, 8), bits=12)
    path = ct_file(tmp_path / "many.dcm", values, syntax, bits=12)
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames = 3
    ds.PixelData = encapsulate([bytes(ENCODERS[syntax](values // k, 12)) for k in (1, 2, 3)], has_bot=table)
    ds.save_as(path)
    with pytest.raises(DicomError, match="expected one grayscale frame, found 3 frames"):
        read_hu(path)
    assert scan(tmp_path).problem.tolist() == ["not one grayscale frame"]


def test_a_scan_notes_several_plain_frames_and_colours(tmp_path):
    ct_file(tmp_path / "frames.dcm", stored_values((8, 8)), NumberOfFrames=2, Rows=4)
    ct_file(tmp_path / "colour.dcm", stored_values((8, 9)), SamplesPerPixel=3, Columns=3, PlanarConfiguration=0)
    assert scan(tmp_path).problem.str.count("not one grayscale frame").tolist() == [1, 1]


@pytest.mark.parametrize("extended", [True, False], ids=["sign_extended", "masked"])
@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_twelve_signed_bits_in_a_stream_of_sixteen(tmp_path, syntax, extended):
    values = stored_values((16, 16), signed=True, bits=12)
    path, plain = (ct_file(tmp_path / name, values, bits=12) for name in ("packed.dcm", "plain.dcm"))
    words = values.view(np.uint16) if extended else values.view(np.uint16) & np.uint16(0xFFF)
    ds = pydicom.dcmread(path)
    ds.PixelData = encapsulate([bytes(ENCODERS[syntax](words, 16))])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    np.testing.assert_array_equal(read_hu(path, -32768), reference(plain, -32768))


def test_missing_and_folder(tmp_path):
    with pytest.raises(DicomError, match="No such file"):
        read_hu(tmp_path / "none.dcm")
    with pytest.raises(DicomError, match="directory"):
        read_hu(tmp_path)
    (tmp_path / "empty.dcm").touch()
    with pytest.raises(DicomError, match="empty.dcm"):
        read_hu(tmp_path / "empty.dcm")


def bundled():
    return sorted(p for p in BUNDLED.rglob("*") if p.is_file())


@pytest.mark.parametrize("path", bundled(), ids=lambda p: p.name)
def test_bundled(path):
    try:
        expected = reference(path)
    except Exception:
        expected = None
    try:
        hu = read_hu(path)
    except DicomError:
        assert expected is None
        return
    if expected is None:  # then pydicom only lacks a decoder
        ds = pydicom.dcmread(path)
        assert ds.file_meta.TransferSyntaxUID in DECODERS and hu.shape == (ds.Rows, ds.Columns) and hu.dtype == np.int16
    else:
        np.testing.assert_array_equal(hu, expected)


def test_one_image_in_many_syntaxes():
    plain = read_hu(BUNDLED / "MR_small.dcm")
    for name in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"):
        np.testing.assert_array_equal(read_hu(BUNDLED / f"MR_small_{name}.dcm"), plain)


@pytest.mark.parametrize("fault", [OSError(errno.EMFILE, "Too many files"), OSError(errno.ENOMEM, ""), MemoryError()])
def test_faults_of_the_machine_are_raised_unchanged(tmp_path, monkeypatch, fault):
    plain = ct_file(tmp_path / "plain.dcm", stored_values((512, 512), bits=12))
    packed = ct_file(tmp_path / "packed.dcm", stored_values((8, 8), bits=12), JPEGLosslessSV1, bits=12)
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"pip install 'rsnape_kit\[dicom\]'"):
        patch.setitem(sys.modules, "imagecodecs", None)
        read_hu(packed)

    def fails(*_, **__):
        raise fault
    for path in (plain, packed):
        with monkeypatch.context() as patch, pytest.raises(type(fault)) as error:
            patch.setattr("rsnape_kit.dicom.hounsfield.open_plain", lambda *_: -1)  # as if no file could be opened
            patch.setattr("pydicom.filereader.read_partial", fails)
            read_hu(path)
        assert error.value is fault
    with monkeypatch.context() as patch, pytest.raises(type(fault)):
        patch.setattr("rsnape_kit.dicom.slices.read_beginnings", lambda names, edges, bufs, got, size: got.fill(0))
        patch.setattr("pydicom.filereader.read_partial", fails)
        scan(tmp_path)


@contextmanager
def no_more_files():
    "Set the limit of open files so that no file can be opened."
    os.close(free := os.dup(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_raised_unchanged(tmp_path):
    plain = ct_file(tmp_path / "plain.dcm", stored_values((64, 64)))
    packed = ct_file(tmp_path / "packed.dcm", stored_values((64, 64), bits=12), JPEGLosslessSV1, bits=12)
    source, once = DicomSource(tmp_path, size=32), [read_hu(path) for path in (plain, packed)]
    for read in (lambda: read_hu(plain), lambda: read_hu(packed), lambda: source[0], lambda: source[1]):
        with no_more_files(), pytest.raises(OSError) as error:
            read()
        assert error.value.errno == errno.EMFILE
    np.testing.assert_array_equal([read_hu(path) for path in (plain, packed)], once)
    assert source[:].any() and not source.table.problem.str.contains("filled").any()


def test_a_header_that_declares_gigabytes_allocates_none(tmp_path):
    path = ct_file(tmp_path / "vast.dcm", stored_values((8, 8)), RLELossless)
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = 65535
    ds.save_as(path)
    with pytest.raises(DicomError, match="65535x65535 pixels, more than any CT slice has"):
        read_hu(path)


def test_slices_share_no_memory(tmp_path):
    paths = [ct_file(tmp_path / f"{i}.dcm", stored_values((512, 512), bits=12, seed=i)) for i in range(4)]
    expected = [reference(p) for p in paths]
    kept = [read_hu(p) for p in paths]
    for hu, want in zip(kept, expected):
        np.testing.assert_array_equal(hu, want)
    with ThreadPoolExecutor(4) as pool:
        for i, hu in enumerate(pool.map(read_hu, paths * 25)):
            np.testing.assert_array_equal(hu, expected[i % 4])


def test_plain_files_need_no_pydicom(tmp_path, monkeypatch):
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        path = ct_file(tmp_path / "slice.dcm", stored_values((512, 512), bits=12), syntax)
        expected = reference(path)
        with monkeypatch.context() as patch:
            patch.setattr("pydicom.filereader.read_partial", lambda *a, **k: pytest.fail("pydicom was called"))
            np.testing.assert_array_equal(read_hu(path), expected)


def test_no_files_left_open(tmp_path):
    path = ct_file(tmp_path / "slice.dcm", stored_values((8, 8)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_hu(path)
        with pytest.raises(DicomError):
            read_hu(tmp_path / "none.dcm")
    assert len(os.listdir("/proc/self/fd")) == before


def test_real_ct(real_ct):
    paths = sorted(real_ct.rglob("*.dcm"))
    assert len(paths) > 100
    for path in paths:
        np.testing.assert_array_equal(read_hu(path), reference(path), err_msg=str(path))
        np.testing.assert_array_equal(read_hu(path, lowest=-32768), reference(path, -32768))
