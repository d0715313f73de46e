"Legal but unusual files: the scan and the reader give the HU that were written, or both refuse the file by name."
import gzip
import struct
from functools import partial

import ct_files
import numpy as np
import pydicom
import pytest
from ct_files import ENCODERS, ct_file, stored_values
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from rsnape_kit.dicom.decode import DicomError
from rsnape_kit.dicom.hounsfield import read_hu
from rsnape_kit.dicom.series import odd_values
from rsnape_kit.dicom.slices import scan

VALUES = stored_values((64, 48), bits=12)
HU = VALUES.astype(np.int16) - 1024


@pytest.fixture(autouse=True)
def quiet():
    ct_files.quiet()


def written(path, **how) -> bytes:
    "The bytes of a slice whose HU are HU."
    return ct_file(path, VALUES, **{"bits": 12, **how}).read_bytes()


def item(data: bytes, tag=0xE000) -> bytes:
    return struct.pack("<HHI", 0xFFFE, tag, len(data)) + data


def dataset_only(path, first="08000500", **how):
    raw = written(path, **how)
    path.write_bytes(raw[raw.index(bytes.fromhex(first)):])  # from SpecificCharacterSet on


def without_syntax(path, syntax):
    raw = written(path, syntax=syntax)
    at = raw.index(b"\x02\x00\x10\x00UI")
    path.write_bytes(raw[:at] + raw[at + 8 + struct.unpack_from("<H", raw, at + 6)[0]:])


def changed(path, change, **how):
    path.write_bytes(change(written(path, **how)))


def as_kind(path, kind, *tags):
    raw = written(path)
    for tag in map(bytes.fromhex, tags):
        assert tag + b"DS" in raw
        raw = raw.replace(tag + b"DS", tag + kind)
    path.write_bytes(raw)


def with_elements(path, **elements):
    "Write with some elements of another VR and value: keyword=(VR, value)."
    ds = pydicom.dcmread(ct_file(path, VALUES, bits=12))
    for keyword, (vr, value) in elements.items():
        ds[keyword] = pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), vr, value)
    ds.save_as(path)


def left_aligned(path, syntax=ExplicitVRLittleEndian, signed=False):
    values = VALUES - np.uint16(2048) if signed else VALUES
    values = (values << 4).view(np.int16 if signed else np.uint16)
    if syntax in ENCODERS:
        ct_file(path, values, syntax, bits=16)
        ds = pydicom.dcmread(path)
        ds.BitsStored = 12
        ds.save_as(path)
    else:
        ct_file(path, values, syntax, bits=12, intercept="1024" if signed else "-1024", HighBit=15)


def with_stream(path, change=lambda stream: [stream], table=b"", end=True, syntax=JPEGLosslessSV1):
    "Write with these fragments, offset table and end."
    stream = bytes(ENCODERS[syntax](VALUES, 12))
    stream += bytes(len(stream) % 2)
    ds = pydicom.dcmread(ct_file(path, VALUES, syntax, bits=12))
    parts = change(stream)
    ds.PixelData = item(table) + b"".join(map(item, parts)) + (item(b"", 0xE0DD) if end else b"")
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)


def halves(stream):
    half = len(stream) // 4 * 2
    return [stream[:half], stream[half:]]


def filled(stream, marker, count=1):
    at = stream.index(marker)
    new = stream[:at] + b"\xff" * count + stream[at:]
    return [new + bytes(len(new) % 2)]


READ = {
    "gzip": lambda p: changed(p, gzip.compress),
    "gzip of jpeg": lambda p: changed(p, gzip.compress, syntax=JPEGLosslessSV1),
    "no prefix, implicit": partial(dataset_only, syntax=ImplicitVRLittleEndian),
    "no prefix, explicit": dataset_only,
    "no prefix, big endian": partial(dataset_only, first="00080005", syntax=ExplicitVRBigEndian),
    "no preamble": lambda p: changed(p, lambda raw: raw[128:]),
    "no preamble, no DICM": lambda p: changed(p, lambda raw: raw[132:]),
    **{f"no syntax, {uid.name}": partial(without_syntax, syntax=uid)
       for uid in (ImplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)},
    "rescale as LO": lambda p: as_kind(p, b"LO", "28005210", "28005310"),
    "rescale as ST": lambda p: as_kind(p, b"ST", "28005210", "28005310"),
    "rescale as FD": lambda p: with_elements(p, RescaleSlope=("FD", 1.), RescaleIntercept=("FD", -1024.)),
    "slope twice": lambda p: changed(p, lambda raw: raw.replace(b"\x53\x10DS\x02\x001 ", b"\x53\x10DS\x04\x001\\1 ")),
    "decimal comma": lambda p: changed(p, lambda raw: raw.replace(b"DS\x06\x00-1024 ", b"DS\x06\x00-1024,")),
    "position as ST": lambda p: as_kind(p, b"ST", "20003200", "20003700"),
    "size as IS": lambda p: with_elements(p, Rows=("IS", 64), Columns=("UL", 48), BitsStored=("SS", 12)),
    "left-aligned": left_aligned,
    "left-aligned, signed": partial(left_aligned, signed=True),
    "left-aligned, big endian": partial(left_aligned, syntax=ExplicitVRBigEndian),
    "left-aligned, jpeg": partial(left_aligned, syntax=JPEGLosslessSV1),
    "left-aligned, jpeg 2000": partial(left_aligned, syntax=JPEG2000Lossless),
    "HighBit wrong": lambda p: written(p, HighBit=15),
    "HighBit missing": lambda p: written(p, HighBit=None),
    "zeros behind": lambda p: changed(p, lambda raw: raw + bytes(700)),
    "text behind": lambda p: changed(p, lambda raw: raw + b"checked by the archive"),
    "slice behind": lambda p: changed(p, lambda raw: raw + raw),
    "fill byte before SOF": partial(with_stream, change=lambda s: filled(s, b"\xff\xc3")),
    "fill bytes after SOI": partial(with_stream, change=lambda s: [b"\xff\xd8\xff\xff\xff" + s[2:] + bytes(1)]),
    "fill byte before DHT": partial(with_stream, change=lambda s: filled(s, b"\xff\xc4")),
    "bytes after EOI": partial(with_stream, change=lambda s: [s + b"\xffabcde"]),
    "two fragments": partial(with_stream, change=halves),
    "table of fragments": lambda p: with_stream(p, halves, struct.pack("<II", 0, len(VALUES) * 4)),
    "table too long": lambda p: with_stream(p, halves, struct.pack("<III", 0, 8, 1 << 30)),
    "table wrong": lambda p: with_stream(p, halves, struct.pack("<I", 8)),
}


@pytest.mark.parametrize("name", READ)
def test_read_as_written(tmp_path, name):
    path = tmp_path / "a.dcm"
    READ[name](path)
    np.testing.assert_array_equal(read_hu(path), HU)
    (row,) = scan(tmp_path).itertuples()
    assert row.problem == "" and (row.rows, row.columns, row.position) == (64, 48, 31.25)
    assert row.SOPInstanceUID == "1.2.3" and row.transfer_syntax


def rescale(path, slope: bytes, intercept=b"-1024 "):
    raw = written(path)
    for tag, old, new in ((b"\x53\x10DS", b"1 ", slope), (b"\x52\x10DS", b"-1024 ", intercept)):
        raw = raw.replace(tag + struct.pack("<H", len(old)) + old, tag + struct.pack("<H", len(new)) + new)
    path.write_bytes(raw)


REFUSED = {
    "two slopes": (lambda p: rescale(p, b"1\\2 "), "RescaleSlope"),
    "slope of text": (lambda p: rescale(p, b"one "), "RescaleSlope"),
    "slope of a message's words": (lambda p: rescale(p, b"only one"), "expected finite numbers, found RescaleSlope"),
    "slope empty": (lambda p: rescale(p, b""), "only one of RescaleSlope and RescaleIntercept"),
    "gzip cut": (lambda p: changed(p, lambda raw: gzip.compress(raw)[:-700]), "EOFError"),
    "gzip of text": (lambda p: p.write_bytes(gzip.compress(b"a letter" * 99)), "InvalidDicomError"),
    "text that begins like a data set": (lambda p: p.write_bytes(b"\x08\0" + b"a letter" * 99), "InvalidDicomError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(tmp_path, name):
    make, cause = REFUSED[name]
    make(tmp_path / "a.dcm")
    with pytest.raises(DicomError, match=cause):
        read_hu(tmp_path / "a.dcm")
    assert cause in scan(tmp_path).problem[0]


def test_no_rescale_and_an_empty_one_are_stored_values(tmp_path):
    rescale(tmp_path / "a.dcm", b"", b"")
    np.testing.assert_array_equal(read_hu(tmp_path / "a.dcm"), VALUES.astype(np.int16))
    assert scan(tmp_path)[["slope", "intercept", "problem"]].to_numpy().tolist() == [[1, 0, ""]]


def test_packed_files_beside_plain_ones(tmp_path):
    "A packed slice keeps its place; other packed files are no slices."
    for i in range(5):
        ct_file(tmp_path / f"{i}.dcm", VALUES, SOPInstanceUID=f"1.2.3.{i}", ImagePositionPatient=[0, 0, 2.5 * i])
    (tmp_path / "3.dcm.gz").write_bytes(gzip.compress((tmp_path / "3.dcm").read_bytes()))
    (tmp_path / "3.dcm").unlink()
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(b"a,b"))
    table = scan(tmp_path)
    assert table.position.tolist() == [0, 2.5, 5, 7.5, 10] and not table.problem.any()


@pytest.mark.parametrize("location, numbers, names, by", [
    ([4, 0, 3, 1, 2], [1] * 5, range(5), "SliceLocation"),
    ([4, 0, 3, 1, 2], [None] * 5, range(5), "SliceLocation"),
    ([4, 0, 3, 1, 2], [3, 1, 5, 2, 4], range(5), "InstanceNumber"),
    ([7] * 5, [1] * 5, [9, 10, 7, 11, 8], "file name"),
    ([4, 0, None, 1, 2], [1] * 5, [9, 10, 7, 11, 8], "file name"),
])
def test_order_without_positions(tmp_path, location, numbers, names, by):
    for i, (place, number, name) in enumerate(zip(location, numbers, names)):
        ct_file(tmp_path / f"{name}", VALUES, SOPInstanceUID=f"1.{i}", ImagePositionPatient=None, InstanceNumber=number,
                SliceLocation=place)
    with pytest.warns(UserWarning, match=f"ordered by {by}"):
        order = [int(uid[2:]) for uid in scan(tmp_path).SOPInstanceUID]
    key = {"SliceLocation": location, "InstanceNumber": numbers, "file name": list(names)}[by]
    assert order == np.argsort(key).tolist()


@pytest.mark.parametrize("change, note", [
    (lambda hu: hu, None),
    (lambda hu: hu * 0 - 1024, "all pixels are -1024 HU"),
    (lambda hu: hu.clip(None, -600), "nothing but air: -1024 to -600 HU"),
    (lambda hu: np.where(hu < 0, hu & 0xFFF, hu), "above 3071 HU"),
    (lambda hu: hu + 4096, "100% of the pixels are above 3071 HU"),
    (lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) % 20, hu, 3072), None),  # some metal
])
@pytest.mark.parametrize("scale", [1, 4])
def test_odd_values(change, note, scale):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    hu = np.where(x**2 + y**2 < .6, 40 - 900 * (np.abs(x) > .3), -1000)
    hu += np.random.default_rng(0).integers(-24, 24, hu.shape)
    found = odd_values((scale * np.array([hu, change(hu)])).astype(np.int16), scale)
    assert list(found) == [1] * bool(note) and (note is None or note in found[1])
