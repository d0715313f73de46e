"""Whether the accelerator waits for its input: images per second of EfficientNet's training, by source of the images.

Three trainings of the same network alternate: on one batch repeated, which is the device's maximum; on a store with
rendering on the device; on a store with rendering on the CPU. An epoch ends when its last step is done, and the minimum
time over several rounds counts. Results so far are from CPUs only; on the one GPU tried, a run took over four minutes
without finishing.

    python benchmarks/feeding.py                                              # a small network, two minutes
    python benchmarks/feeding.py --full --backend jax --precision bfloat16 # EfficientNet-B1 at 256 px, on a GPU
"""
import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from _synthetic import write
from pipeline import Repeated, make_truth

from rsnape_kit.data.adapters import keras_dataset
from rsnape_kit.data.batches import ImageBatches
from rsnape_kit.models.efficientnet import efficientnet
from rsnape_kit.models.input_layer import with_pixels
from rsnape_kit.models.keras_backend import import_keras, jit
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.utils import cores


class Same:
    "One batch, repeated."

    varies = False

    def __init__(self, batch, times: int):
        self.batch, self.times, self.epoch = batch, times, 0

    def __len__(self):
        return self.times

    def __getitem__(self, i):
        return self.batch


def synthetic_store(folder: Path, studies: int) -> SliceStore:
    write(folder / "dicom", studies, 234)
    with ThreadPoolExecutor(cores()) as pool:
        return SliceStore(build_store(DicomSource(folder / "dicom"), folder / "store", executor=pool))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--full", action="store_true", help="EfficientNet-B1 at 256 px; needs a GPU")
    parser.add_argument("--batch", type=int, help="default 16, or 256 with --full")
    parser.add_argument("--steps", type=int, help="of an epoch; default 12, or 60 with --full")
    parser.add_argument("--studies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import_keras(args.backend)
    batch, steps = args.batch or (256 if args.full else 16), args.steps or (60 if args.full else 12)
    size, small = (256, {}) if args.full else (64, {"width": .25})
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder), args.studies)
        how = dict(batch=batch, mask=SideMask(), affine=AffineRange(), shuffle=True, pixels=InputConfig(size=size))
        host, device = (ImageBatches(store, make_truth(store.table), device=device, **how) for device in (False, True))
        on_cpu = efficientnet("b1", size, precision=args.precision, **small)
        on_device = with_pixels(efficientnet("b1", size, precision=args.precision, **small), device)
        for model in (on_cpu, on_device):
            model.compile("sgd", "binary_crossentropy", jit_compile=jit())
        ways = {"one batch repeated": (on_device, Same(device[0], steps)),
                "store, rendered on the device": (on_device, Repeated(device, -(-steps // len(device)))),
                "store, rendered on the CPU": (on_cpu, Repeated(host, -(-steps // len(host))))}
        run(args, batch, ways)


def run(args, batch: int, ways: dict):
    "Run the trainings alternately; print images per second and the share of the maximum."
    spent = {name: [] for name in ways}
    for i in range(args.rounds + 1):
        for name, (model, batches) in ways.items():
            data, start = keras_dataset(batches, workers=2), time.perf_counter()
            model.fit(data, shuffle=False, verbose=0)
            if i:  # the first round compiles
                spent[name].append((time.perf_counter() - start) / len(batches) / batch)
    best = {name: 1 / np.min(seconds) for name, seconds in spent.items()}
    most = next(iter(best.values()))
    print(f"{cores()} cores, {args.backend}, {args.precision}, batches of {batch}")
    print(f"{'':<34}{'images / s':>12}{'of the maximum':>16}")
    for name, rate in best.items():
        print(f"{name:<34}{rate:>12,.0f}{rate / most:>16.0%}", flush=True)


if __name__ == "__main__":
    main()
