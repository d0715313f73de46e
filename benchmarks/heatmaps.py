"""Pointing game: does the peak of an occlusion map lie on a clot? On phantom slices with known clots, against chance.

    python benchmarks/heatmaps.py [STUDIES=100] [SLICES=24] [STEPS=1000]

A small network learns slices of positive studies against their twins without clots, in one thread. On slices of
other studies, whose clots are known to the pixel, a hit is a peak within 10 mm of a clot. Chance is the same for a
random point of the body, and for the map of the network before training, which depends on contrast but knows no clot.
"""
import sys
import time
from itertools import islice

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.stats import beta

import rsnape_kit as rk
from rsnape_kit.phantom.generate import Settings, make_study
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import image_labels, twin
from rsnape_kit.transforms.windows import HU_SCALE, PE, apply_windows

SIZE, CROP, PATCH, STRIDE, NEAR = 256, 64, 32, 16, 10.  # pixels; mm
CLOT = 40  # HU between a slice and its twin, from which a pixel is clot


def pairs(split: str, studies: int, per_study: int = 4):
    "Yield (slice, twin's slice, clot, mm per pixel): int16 HU [S, S], bool [S, S]."
    settings = Settings(slices=32, size=SIZE, difficulty="demo", clean=True)
    for number in range(studies):
        study, _ = make_study(settings, split, number)
        positive = np.flatnonzero(image_labels(study))
        scanners = (Scanner(study), Scanner(twin(study))) if len(positive) else ()
        for k in positive[np.unique(np.linspace(0, len(positive) - 1, per_study).astype(int))] if scanners else ():
            hu, without = (scanner.slice(int(k))[0] for scanner in scanners)
            clot = np.abs(hu.astype(int) - without) > CLOT
            if clot.sum() >= 4:
                yield hu, without, clot, study.scan.spacing


def network():
    "Four convolutions and a maximum: float [b, 1, S, S] -> log-odds [b]."
    from torch import nn

    layers, before = [], 1
    for filters in (16, 24, 32, 48):
        layers += [nn.Conv2d(before, filters, 3, 2, 1), nn.BatchNorm2d(filters), nn.ReLU()]
        before = filters
    return nn.Sequential(*layers, nn.Conv2d(before, 1, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(0))


def tensor(hu: np.ndarray):
    import torch

    return torch.as_tensor(apply_windows(hu, [PE], "fixed")[..., 0], dtype=torch.float32)[:, None] / 255 - .5


def predictor(model):
    "Return a function of int16 [b, 1, S, S] in HU x 4 -> probability [b], as `occlusion_map` wants it."
    import torch

    def predict(copies):
        with torch.inference_mode():
            return model(tensor(copies[:, 0] / np.float32(HU_SCALE))).sigmoid().numpy()
    return predict


def crops(slices: list, rng, count: int):
    "Return crops at clots, of the twins at the same places, and of slices anywhere: float [3 count, 1, C, C], 0 or 1."
    import torch

    parts, last = ([], [], []), SIZE - CROP
    for number in rng.integers(len(slices), size=count):
        hu, without, clot, _ = slices[number]
        rows, columns = np.nonzero(clot)
        pixel = rng.integers(len(rows))
        at = np.clip(np.array([rows[pixel], columns[pixel]]) - rng.integers(8, CROP - 8, 2), 0, last)
        for part, pixels, (row, column) in zip(parts, (hu, without, without), (at, at, rng.integers(0, last + 1, 2))):
            part.append(pixels[row:row + CROP, column:column + CROP])
    return tensor(np.stack(sum(parts, []))), torch.tensor([1.] * count + [0.] * 2 * count)


def train(model, slices: list, steps: int, pairs: int = 12):
    "Train with Adam; on crops a step costs a sixteenth of one on slices, and the network has no place to learn."
    import torch

    rng = np.random.default_rng(0)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    model.train()
    for _ in range(steps):
        x, y = crops(slices, rng, pairs)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


def play(model, slices: list) -> np.ndarray:  # bool [n]
    "Return whether the peak of each slice's map is near a clot."
    hits = []
    for hu, _, clot, mm in slices:
        stored = (HU_SCALE * hu[None].astype(np.int32)).clip(-4096, 2**15 - 1).astype(np.int16)
        heat = rk.occlusion_map(predictor(model), stored, PATCH, STRIDE)
        hits.append(near(clot, mm)[peak(heat)])
    return np.array(hits)


def peak(heat: np.ndarray) -> tuple:  # row, column
    "Return the middle of the cell of the highest value; a map is constant where the same patches cover it."
    top = np.argwhere(heat >= heat.max() - 1e-6)
    return tuple(np.rint(top[np.abs(top - top[0]).max(1) < STRIDE].mean(0)).astype(int))


def near(clot: np.ndarray, mm: float) -> np.ndarray:
    return distance_transform_edt(~clot) * mm <= NEAR


def told(name: str, hits) -> str:
    "Return a rate with its 95 % interval (Clopper-Pearson)."
    n, k = len(hits), int(np.sum(hits))
    low, high = beta.ppf(.025, k, n - k + 1) if k else 0., beta.ppf(.975, k + 1, n - k) if k < n else 1.
    return f"{name:<34}{k / n:8.1%}   ({low:.1%} to {high:.1%}), {k} of {n}"


def main(studies: str = "100", count: str = "24", steps: str = "1000"):
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    known, held = list(pairs("train", int(studies))), list(islice(pairs("test", int(studies), 2), int(count)))
    model, blank = network(), network().eval()
    drawn = time.process_time()
    train(model, known, int(steps))
    learnt = time.process_time()
    with torch.inference_mode():
        odds = [model(tensor(np.stack(part))).numpy() for part in list(zip(*held))[:2]]
    auc = roc_auc_score(np.repeat([1, 0], len(held)), np.concatenate(odds))
    hits, untrained = play(model, held), play(blank, held)
    body = [near(clot, mm)[hu > -500].mean() for hu, _, clot, mm in held]
    print(f"{len(known)} slices and their twins learnt; {len(held)} of other studies, AUC against twins {auc:.3f}")
    seconds = drawn - start, learnt - drawn, time.process_time() - learnt
    print("CPU-seconds: {:.0f} to draw slices, {:.0f} to learn, {:.0f} for the maps\n".format(*seconds))
    print(f"peak within {NEAR:.0f} mm of a clot")
    print(told("occlusion map", hits))
    print(told("the network before training", untrained))
    print(f"{'a random point of the body':<34}{np.mean(body):8.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
