"For the benchmarks: synthetic CT in the competition's layout and size, a chest with lungs and noise; shuffled labels."
import itertools
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from rsnape_kit.competition.predictions import Predictions


def image(rng, size=512):
    "int16 HU with the noise of a thin slice."
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    hu = np.full((size, size), -1000.0)
    hu[x**2 / .7 + y**2 / .4 < 1] = 50
    hu[((np.abs(x) - .38) / .27) ** 2 + (y / .42) ** 2 < 1] = -850
    hu[(x - .05) ** 2 + (y + .05) ** 2 < .02] = 350
    hu += rng.normal(0, 25, hu.shape) * (x**2 + y**2 < 1)
    hu[x**2 + y**2 >= 1] = -2000
    return hu.astype(np.int16)


def dataset(study, series, name, i, implicit):
    "A header with the competition's tags."
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = name
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    ds.SpecificCharacterSet, ds.ImageType, ds.Modality = "ISO_IR 100", ["ORIGINAL", "PRIMARY", "AXIAL"], "CT"
    ds.SliceThickness, ds.KVP, ds.GantryDetectorTilt, ds.TableHeight = "1.25", "120", "0", "155.5"
    ds.RotationDirection, ds.XRayTubeCurrent, ds.Exposure, ds.ConvolutionKernel = "CW", 400, 10, "STANDARD"
    ds.PatientPosition, ds.StudyInstanceUID, ds.SeriesInstanceUID = "FFS", study, series
    ds.SeriesNumber, ds.InstanceNumber, ds.FrameOfReferenceUID = 2, 400 - i, "1.2.3"
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-179.5, -165.25, -300.125 + 1.25 * i], [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelSpacing = 1, "MONOCHROME2", [0.703125, 0.703125]
    ds.WindowCenter, ds.WindowWidth, ds.RescaleIntercept, ds.RescaleSlope = "100", "700", "-1024", "1"
    return ds


def alternate(variants, rounds=5):
    "CPU-seconds of each variant, {name: [seconds per round]}; variants alternate, so that noise affects all alike."
    seconds = {name: [] for name in variants}
    for variant in variants.values():  # compile, import and warm up
        variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            seconds[name].append(time.process_time() - start)
    return seconds


def table(title, seconds, counts, against):
    "Print slices per CPU-second, and ratios to the ways named in `against`: medians of the rounds."
    print(f"\n{title:<44}{'slices / CPU-s':>16}" + "".join(f"{'x ' + name:>32}" for name in against))
    per = {name: [s / counts[name] for s in rounds] for name, rounds in seconds.items()}
    for name, own in per.items():
        ratios = [statistics.median(b / a for a, b in zip(own, per[other])) for other in against]
        print(f"  {name:<42}{1 / statistics.median(own):>16,.0f}" + "".join(f"{r:>32.2f}" for r in ratios))


def write(root, studies=3, slices=200, seed=0, size=512):
    "Write a competition folder; return the number of slices. Twelve images are reused, rolled."
    rng = np.random.default_rng(seed)
    images = [image(rng, size) for _ in range(12)]
    for s, i in itertools.product(range(studies), range(slices)):
        study, series, name = f"{s:012x}", f"{s:06x}aaaaaa", f"{s:06x}{i:06x}"
        path = Path(root) / study / series / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        ds = dataset(study, series, name, i, implicit=s % 4 != 3)
        pixels = np.roll(images[i % 12], rng.integers(0, size, 2), (0, 1)) + 1024
        ds.set_pixel_data(pixels.astype(np.int16), "MONOCHROME2", 16, generate_instance_uid=False)
        ds.save_as(path, enforce_file_format=True)
    return studies * slices


def write_headers(root, studies=20, slices=250, size=512):
    "Write many files whose pixels are sparse zeros, which take no disk space: enough for a scan."
    for s in range(studies):
        study, series = f"{s:012x}", f"{s:06x}aaaaaa"
        folder = Path(root) / study / series
        folder.mkdir(parents=True)
        ds = dataset(study, series, "f" * 12, 0, implicit=s % 4 != 3)
        ds.ImagePositionPatient, ds.InstanceNumber = [-179.5, -165.25, 1000.125], 7777
        ds.set_pixel_data(np.zeros((size, size), np.int16), "MONOCHROME2", 16, generate_instance_uid=False)
        ds.save_as(folder / "one", enforce_file_format=True)
        raw = (folder / "one").read_bytes()[:-2 * size * size]
        (folder / "one").unlink()
        for i in range(slices):
            name, z = f"{s:06x}{i:06x}", f"{1000.125 + i:.3f}"
            new = raw.replace(b"f" * 12, name.encode()).replace(b"1000.125", z.encode())
            new = new.replace(b"7777", f"{7777 - i}".encode())
            (folder / f"{name}.dcm").write_bytes(new)
            os.truncate(folder / f"{name}.dcm", len(raw) + 2 * size * size)
    return studies * slices


def shuffle_labels(truth: Predictions, seed: int) -> Predictions:
    "Give each study the labels of another, its image labels stretched to fit."
    rng, names = np.random.default_rng(seed), truth.exams.index
    other = pd.Series(rng.permutation(names), names)
    exams = truth.exams.loc[other].set_axis(names)
    by_study = {name: part.to_numpy() for name, part in truth.images.groupby(level=0)}
    parts = []
    for name, part in truth.images.groupby(level=0):
        values = by_study[other[name]]
        parts.append(pd.Series(values[np.arange(len(part)) * len(values) // len(part)], part.index))
    return Predictions(exams, pd.concat(parts).rename(truth.images.name))
