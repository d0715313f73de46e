"""Speed and memory of the phantom.

Per slice of 512x512: labels without rendering, rendering with the tissue map, and a whole study with DICOM writing in
each transfer syntax, in CPU-seconds of this process. For comparison, two plain ways to do a part of the work: computing
correlated noise for each slice, and writing with pydicom's `save_as`. Memory is the growth of the peak from a short
study to one four times longer. Stages are interleaved, so that variations of the machine's speed affect all of them.
"""
import argparse
import resource
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1
from scipy.ndimage import gaussian_filter

from rsnape_kit.phantom.dicom_writer import Style, encode, header, hex_id, write_series
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import DEMO, draw_study, exam_labels, image_labels


def peak() -> float:
    "Peak memory of this process, MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def labels(seed, n):
    "Draw a study and label it."
    s = draw_study((seed,), slices=n)
    return exam_labels(s), image_labels(s)


def series(study, syntax, folder):
    "Render, label and write a whole study."
    ids = hex_id(syntax), hex_id(syntax, 1), [hex_id(syntax, k) for k in range(len(study.scan.z))]
    return write_series(Path(folder) / ids[0], study, Style(syntax), ids)


def save_as(study, images, folder):
    "Write the same files with pydicom's dcmwrite, from rendered images."
    ds = header(study, Style(ExplicitVRLittleEndian), "1.2", "1.3")
    for k, hu in enumerate(images):
        ds.SOPInstanceUID = f"1.4.{k}"
        ds.PixelData = encode(hu, Style())
        ds["PixelData"].VR = "OW"
        pydicom.dcmwrite(Path(folder) / f"{k}.dcm", ds, enforce_file_format=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=60, help="of each study")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # pydicom on ids that are not UIDs
    study = next(s for s in (draw_study((k,), DEMO, args.slices) for k in range(50)) if s.plan and s.scan.motion == 0)
    study = replace(study, scan=replace(study.scan, pad=-1024))
    scanner, rng = Scanner(study), np.random.default_rng(0)
    images = [scanner.slice(k)[0] for k in range(args.slices)]
    with tempfile.TemporaryDirectory() as folder:
        stages = {
            "labels alone, no pixels": lambda r: labels(r, args.slices),
            "render with tissue map": lambda r: [scanner.slice(k) for k in range(args.slices)],
            "study, implicit": lambda r: series(study, ImplicitVRLittleEndian, folder),
            "study, explicit": lambda r: series(study, ExplicitVRLittleEndian, folder),
            "study, lossless JPEG": lambda r: series(study, JPEGLosslessSV1, folder),
            "only noise, per slice": lambda r: [gaussian_filter(rng.normal(size=(512, 512)), 1.) for _ in images],
            "only writing, by save_as": lambda r: save_as(study, images, folder),
        }
        cost = {k: [] for k in stages}
        for r in range(args.rounds + 1):
            for name, run in stages.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run(r)
                if r:  # the first round compiles
                    cost[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        before = peak()
        longer = draw_study((study.seed[0],), DEMO, 4 * args.slices)
        series(replace(longer, scan=replace(longer.scan, pad=-1024)), ImplicitVRLittleEndian, folder)
    print(f"{'':28}{'slices/CPU-s':>14}{'slices/s':>10}{'to 40':>8}")
    for name, times in cost.items():
        cpu, wall = np.median(times, 0)
        print(f"{name:28}{args.slices / cpu:14.0f}{args.slices / wall:10.0f}{args.slices / cpu / 40:7.1f}x")
    more = 3 * args.slices * 512 * 512 * 2 / 2**20
    print(f"\npeak memory {peak():.0f} MB; a study of {4 * args.slices} slices after one of {args.slices} added "
          f"{peak() - before:.0f} MB, with {more:.0f} MB more pixels")


if __name__ == "__main__":
    main()
