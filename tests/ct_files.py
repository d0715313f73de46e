"Small CT files for the tests, written by pydicom, and what pydicom reads from any file."
import copy
import gzip
import itertools
import logging
import warnings

import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)


def jpeg_2000(values, bits):
    return imagecodecs.jpeg2k_encode(values, reversible=True, codecformat="j2k", level=0, bitspersample=bits)


NATIVE = ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian
ENCODERS = {
    JPEGLosslessSV1: lambda x, bits: imagecodecs.jpeg8_encode(x, lossless=True, bitspersample=bits, predictor=1),
    JPEGLossless: lambda x, bits: imagecodecs.jpeg8_encode(x, lossless=True, bitspersample=bits, predictor=6),
    JPEGLSLossless: lambda x, bits: imagecodecs.jpegls_encode(x),
    JPEG2000Lossless: jpeg_2000,
    JPEG2000: jpeg_2000,
}
SYNTAXES = (*NATIVE, RLELossless, *ENCODERS)


def stored_values(shape=(48, 40), signed=False, bits=16, seed=0):
    "Smooth and noisy stored values that fill their bits, padding in the corner."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:1:shape[0] * 1j, :1:shape[1] * 1j]
    values = (x + y) / 2 * (2 ** bits - 1) + rng.normal(0, 2 ** bits / 50, shape)
    values = np.clip(values, 0, 2 ** bits - 1).astype(np.int64)
    values[:4, :4] = 0
    return (values - 2 ** (bits - 1)).astype(np.int16) if signed else values.astype(np.uint16)


def ct_file(path, values, syntax=ExplicitVRLittleEndian, bits=16, slope="1", intercept="-1024", **tags):
    "Write one CT slice; None as slope, intercept or a tag leaves it out."
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SpecificCharacterSet, ds.ImageType, ds.Modality = "ISO_IR 100", ["ORIGINAL", "PRIMARY", "AXIAL"], "CT"
    ds.SliceThickness, ds.KVP, ds.PatientPosition = "1.25", "120", "FFS"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = "1.2.1", "1.2.2", "1.2.3"
    ds.InstanceNumber, ds.ImagePositionPatient = 7, [-165.5, -170, 31.25]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.WindowCenter, ds.WindowWidth = [0.703125, 0.703125], ["40", "100"], ["400", "700"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.PixelRepresentation = int(values.dtype == np.int16)
    ds.RescaleIntercept, ds.RescaleSlope = intercept, slope
    for name, value in tags.items():
        setattr(ds, name, value)
    for name in [e.keyword for e in ds if e.value is None]:
        delattr(ds, name)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    little = values.astype(values.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = values.astype(values.dtype.newbyteorder(">")).tobytes() if syntax == ExplicitVRBigEndian else little
    ds["PixelData"].VR = "OW"
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax in ENCODERS:
        words = values.view(np.uint16)  # JPEG has no sign: only the stored bits are encoded
        if syntax != JPEGLSLossless:  # whose encoder here always takes 16
            words = words & np.uint16(2 ** bits - 1)
        ds.PixelData = encapsulate([bytes(ENCODERS[syntax](words, bits))])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path, enforce_file_format=True)
    return path


def reference(path, lowest=-1024):
    "int16 HU of one grayscale frame, computed by pydicom; raises whatever it raises."
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        ds = pydicom.dcmread(file)
    hu = apply_modality_lut(ds.pixel_array, ds)
    if hu.ndim != 2 or not np.isfinite(hu).all():
        raise ValueError("not one grayscale frame")
    return np.clip(np.rint(hu), lowest, 32767).astype(np.int16)


def mutations(raw, header, rng):
    "Endless damage to a file's bytes, most of it in the first `header` of them."
    for kind in itertools.cycle(("flip", "flip", "digit", "cut", "drop", "insert", "zero", "swap")):
        new, at = bytearray(raw), int(rng.integers(128, header if rng.random() < .85 else len(raw)))
        if kind == "flip":
            for _ in range(rng.integers(1, 4)):
                new[int(rng.integers(128, header)) if rng.random() < .5 else at] ^= 1 << int(rng.integers(8))
        elif kind == "digit":
            new[at] = rng.choice(np.frombuffer(b"0123456789-+.eE\\ \0AZ\xff", np.uint8))
        elif kind == "cut":
            new = new[:int(rng.integers(0, len(raw)))]
        elif kind == "drop":
            del new[at:at + int(rng.integers(1, 24))]
        elif kind == "insert":
            new[at:at] = rng.bytes(int(rng.integers(1, 12)))
        elif kind == "zero":
            new[at:at + 8] = bytes(len(new[at:at + 8]))
        else:
            other = int(rng.integers(128, header))
            new[at:at + 4], new[other:other + 4] = new[other:other + 4], new[at:at + 4]
        yield kind, bytes(new)


def without_tags(path, out, rng):
    "Write a copy that lacks a few elements, as pydicom writes it."
    ds = copy.deepcopy(pydicom.dcmread(path))
    for element in rng.choice(len(ds), rng.integers(1, 4), replace=False):
        del ds[list(ds.keys())[min(element, len(ds) - 1)]]
    ds.save_as(out, enforce_file_format=False)


def quiet():
    "Suppress pydicom's warnings about damaged files."
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
