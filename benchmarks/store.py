"""Speed of building a slice store and of reading from it, compared with the usual preparation.

"pydicom + JPEG" is the usual preparation for this competition: dcmread, modality LUT, three windows at 256 pixels, one
JPEG of quality 95. It loses 13-33 HU rms; the store loses nothing. The variants alternate within one process; figures
are medians over rounds, of processor time. Memory is the growth of a build's peak over that of a small one.
"""
import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import _synthetic as synthetic
import blosc2
import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut

from rsnape_kit.dicom.slices import scan
from rsnape_kit.store.build import build_store
from rsnape_kit.store.codec import compress
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.lungs import lung_box, sampled
from rsnape_kit.store.slice_store import SliceStore

WINDOWS = ((-600, 1500), (100, 700), (40, 400))
BLOSC2 = {"typesize": 2, "codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE],
          "filters_meta": [0], "splitmode": blosc2.SplitMode.NEVER_SPLIT, "nthreads": 1}


def box(store, rows):
    "The lung box of a study, from the slices that it needs."
    some = rows[sampled(len(rows))]
    return lung_box(store[some], 1.25, 1.4, 1.4)


def usual(path, file):
    "pydicom to a JPEG of three windows."
    ds = pydicom.dcmread(path)
    hu = apply_modality_lut(ds.pixel_array, ds)
    hu = hu.reshape(256, 2, 256, 2).mean((1, 3), dtype=np.float32)
    image = np.stack([np.clip((hu - level) / width + .5, 0, 1) * 255 for level, width in WINDOWS], -1).astype(np.uint8)
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, "JPEG", quality=95)
    file.write(packed.getvalue())


def build(table, folder):
    "Build a store in this process."
    shutil.rmtree(folder, ignore_errors=True)
    return build_store(table, folder)


def pack_blosc2(slices):
    "A general codec: LZ4 on shuffled bytes, one block per slice."
    return [blosc2.compress2(values, blocksize=values.nbytes, **BLOSC2) for values in slices]


def unpack_blosc2(chunks, out):
    def run():
        for chunk in chunks:
            blosc2.decompress2(chunk, dst=out, nthreads=1)
    return run


def by_pydicom(paths):
    "The usual way to HU with pydicom."
    def run():
        for path in paths:
            ds = pydicom.dcmread(path)
            apply_modality_lut(ds.pixel_array, ds)
    return run


def read_compressed(store, rows):
    "read() of the compressed bytes of these slices, the lower bound of any reader."
    files = [os.open(path, os.O_RDONLY) for path in store._shards]

    def run():
        for i in rows:
            os.pread(files[store._shard[i]], store._bytes[i], store._start[i])
    return run


def read_files(paths):
    "read() of the whole files."
    def run():
        for path in paths:
            with open(path, "rb") as file:
                file.read()
    return run


def usual_build(paths, path):
    with open(path, "wb") as file:
        for name in paths:
            usual(name, file)


def read_rows(store, batches, out=None):
    def run():
        for rows in batches:
            store.read(rows, out)
    return run


def peak(table, folder):
    "Peak memory in MB of a build in a separate process."
    code = ("import pandas as pd, resource, sys; from rsnape_kit.store.build import build_store\n"
            "build_store(pd.read_pickle(sys.argv[1]), sys.argv[2])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    table.to_pickle(folder / "table.pkl")
    done = subprocess.run([sys.executable, "-c", code, folder / "table.pkl", folder / "peak"], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    shutil.rmtree(folder / "peak")
    return float(done.stdout)


def measure(root, folder, rounds):
    table = scan(root)
    few, paths = table.iloc[:400], table.path[:60].tolist()
    os.environ["TQDM_DISABLE"] = "1"
    seconds = synthetic.alternate({
        "build_store": lambda: build(few, folder / "store"),
        "pydicom + JPEG": lambda: usual_build(paths, folder / "usual"),
        "read() of the files": read_files(few.path),
    }, rounds)
    counts = dict.fromkeys(seconds, len(few)) | {"pydicom + JPEG": len(paths)}
    synthetic.table("Building a store, one core", seconds, counts, ["pydicom + JPEG", "read() of the files"])

    store, rng = SliceStore(build_store(table, folder / "all")), np.random.default_rng(0)
    rows, out = rng.integers(0, len(store), (16, 64)), np.empty((64, 256, 256), np.int16)
    slices = store[rows.ravel()]
    tiles, chunks = [compress(values) for values in slices], pack_blosc2(slices)
    means = [np.mean([len(chunk) for chunk in packed]) / 1024 for packed in (tiles, chunks)]
    print(f"\n{store}: {means[0]:.0f} KB a slice, {means[1]:.0f} with blosc2")
    studies = [store.study(s) for s in store.table.StudyInstanceUID.unique()]
    source, block = DicomSource(table), np.empty_like(out)
    seconds = synthetic.alternate({
        "random slices, each into one buffer": read_rows(store, rows.reshape(-1, 1), out[:1]),
        "random slices, into the memory of a batch": read_rows(store, rows, out),
        "random slices, into new memory": read_rows(store, rows),
        "slices in memory, blosc2": unpack_blosc2(chunks, out[0]),
        "whole studies": read_rows(store, studies),
        "copying decoded slices": lambda: [np.copyto(out, block) for _ in range(16)],
        "read() of the compressed bytes": read_compressed(store, rows.ravel()),
        "random slices, from DICOM": read_rows(source, rows[:4], out),
        "pydicom + apply_modality_lut": by_pydicom(table.path.iloc[rows[0]]),
    }, rounds)
    counts = dict.fromkeys(seconds, rows.size) | {"whole studies": len(store), "random slices, from DICOM": 256,
                                                  "pydicom + apply_modality_lut": 64}
    synthetic.table("Reading", seconds, counts, ["pydicom + apply_modality_lut", "random slices, from DICOM",
                                               "copying decoded slices", "read() of the compressed bytes"])

    boxes = synthetic.alternate({"lung boxes": lambda: [box(store, study) for study in studies],
                                 "whole studies": read_rows(store, studies)}, rounds)
    synthetic.table("Lung boxes, with the slices they read", boxes, dict.fromkeys(boxes, len(store)), ["whole studies"])
    print(f"{1000 * np.median(boxes['lung boxes']) / len(studies):.0f} ms a study")

    small, large = (peak(table.iloc[:n], folder) for n in (50, len(table)))
    print(f"\nPeak memory of a build: {small:.0f} MB for 50 slices, {large:.0f} MB for {len(table)}")
    print(f"This process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a folder of DICOM, instead of synthetic slices of 512x512")
    parser.add_argument("--studies", type=int, default=4, help="synthetic studies")
    parser.add_argument("--slices", type=int, default=200, help="slices in each")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not args.folder:
            synthetic.write(folder / "train", args.studies, args.slices)
        measure(args.folder or folder / "train", folder, args.rounds)


if __name__ == "__main__":
    main()
