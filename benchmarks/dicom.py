"""Speed of scanning a folder and of reading slices, compared with pydicom and with reading the bytes alone.

Files are in the operating system's cache, so these are costs of the processor, not of a disk. The variants alternate
within one process; figures are medians over rounds. "read()" is open(path, "rb").read(), the lower bound of any reader.
"""
import argparse
import tempfile
from pathlib import Path

import _synthetic as synthetic
import imagecodecs
import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut
from pydicom.uid import JPEGLosslessSV1

from rsnape_kit.dicom.hounsfield import read_hu
from rsnape_kit.dicom.slices import list_files, scan

FIELDS = ("StudyInstanceUID SeriesInstanceUID SOPInstanceUID Rows Columns PixelSpacing SliceThickness RescaleSlope "
          "RescaleIntercept PixelRepresentation ImagePositionPatient ImageOrientationPatient InstanceNumber").split()


def by_pydicom(path):
    "The usual way to HU with pydicom."
    ds = pydicom.dcmread(path)
    return apply_modality_lut(ds.pixel_array, ds)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def beginning(path):
    with open(path, "rb", buffering=0) as file:
        return file.read(4096)


def headers(paths, fields=()):
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        for field in fields:
            ds.get(field)


def each(function, paths):
    def run():
        for path in paths:
            function(path)
    return run


def as_jpeg(path, out):
    "Write the same slice as JPEG Lossless, the format of 8 % of the competition."
    ds = pydicom.dcmread(path)
    values = ds.pixel_array.astype(np.uint16)
    ds.PixelData = encapsulate([bytes(imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=16))])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.save_as(out)


def measure(root, many, rounds, n):
    paths = list_files(many)
    few = paths[:2 * n]
    seconds = synthetic.alternate({
        "scan(root)": lambda: scan(many),
        "pydicom stop_before_pixels": lambda: headers(few),
        "pydicom, with the table's fields": lambda: headers(few, FIELDS),
        "read() of 4 KB": each(beginning, paths),
    }, rounds)
    counts = dict.fromkeys(seconds, len(few)) | {"scan(root)": len(paths), "read() of 4 KB": len(paths)}
    synthetic.table("Listing a folder", seconds, counts, ["pydicom stop_before_pixels", "read() of 4 KB"])

    paths = list_files(root)
    few = paths[:n]
    seconds = synthetic.alternate({
        "read_hu(path)": each(read_hu, paths[:4 * n]),
        "pydicom + apply_modality_lut": each(by_pydicom, few),
        "read()": each(read, paths[:4 * n]),
    }, rounds)
    counts = dict.fromkeys(seconds, len(paths[:4 * n])) | {"pydicom + apply_modality_lut": len(few)}
    synthetic.table("DICOM to int16 HU", seconds, counts, ["pydicom + apply_modality_lut", "read()"])

    with tempfile.TemporaryDirectory() as folder:
        jpegs = [Path(folder) / f"{i}.dcm" for i in range(20)]
        for path, jpeg in zip(paths, jpegs):
            as_jpeg(path, jpeg)
        seconds = synthetic.alternate({"read_hu(path), JPEG Lossless SV1": each(read_hu, jpegs),
                                     "read_hu(path), uncompressed": each(read_hu, paths[:20])}, rounds)
        synthetic.table("Compressed", seconds, dict.fromkeys(seconds, 20), ["read_hu(path), uncompressed"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a folder of DICOM, instead of synthetic slices of 512x512")
    parser.add_argument("--studies", type=int, default=4, help="synthetic studies")
    parser.add_argument("--slices", type=int, default=200, help="slices in each")
    parser.add_argument("--headers", type=int, default=10_000, help="synthetic headers to scan")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        if not args.folder:
            synthetic.write(few, args.studies, args.slices)
            synthetic.write_headers(many, args.headers // 250)
        measure(args.folder or few, args.folder or many, args.rounds, 100)


if __name__ == "__main__":
    main()
