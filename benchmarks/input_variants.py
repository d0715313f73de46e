"""What variants of the network input cost: CPU time of a slice from a store, beside the usual three windows.

Batches of 64 slices in the order of a study (prediction) and in random order with random affine transforms and side
masks (training), on one thread; the variants alternate.

    python benchmarks/input_variants.py            # half a minute
    python benchmarks/input_variants.py --rounds 1
"""
import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _synthetic import alternate, table, write
from pipeline import make_truth

from rsnape_kit.data.batches import ImageBatches
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.augment import Augment
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.transforms.windows import PE

NEAR, USUAL, BATCH = (-1, 0, 1), "three windows", 64
INPUTS = {USUAL: {}, "three windows of three slices": {"neighbours": NEAR}, "PE window": {"windows": (PE,)},
          "PE window of three slices": {"windows": (PE,), "neighbours": NEAR}, "lung box": {"crop": "lungs"}}
AUGMENTED = {"flips": {"affine": AffineRange(flip=.5)}, "contrast and shift": {"augment": Augment(.2, 20)},
             "two cutouts": {"augment": Augment(cutouts=2)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        write(Path(folder) / "dicom", 2, 100)
        store = SliceStore(build_store(Path(folder) / "dicom", Path(folder) / "store", executor=pool))
        truth = make_truth(store.table)
        training = dict(affine=AffineRange(), mask=SideMask(), shuffle=True)
        ways = {name: {"pixels": InputConfig(**how)} for name, how in INPUTS.items()}
        plain = {name: ImageBatches(store, batch=BATCH, workers=1, **how) for name, how in ways.items()}
        random = {name: ImageBatches(store, truth, batch=BATCH, workers=1, **training | how)
                  for name, how in (ways | AUGMENTED).items()}
        for title, batches in (("prediction", plain), ("training", random)):
            seconds = alternate({name: lambda own=own: own[0] for name, own in batches.items()}, args.rounds)
            table(title, seconds, dict.fromkeys(batches, BATCH), [USUAL])


if __name__ == "__main__":
    main()
