"""Pointing game: does the peak of a heat map lie on a clot? On phantom slices with known clots, against chance.

    python benchmarks/heatmaps.py [STUDIES=100] [SLICES=24] [STEPS=1000] [--method occlusion|gradcam]

A small network learns slices of positive studies against their twins without clots, in one thread. On slices of
other studies, whose clots are known to the pixel, a hit is a peak within 10 mm of a clot. Chance is the same for a
random point of the body, and for the map of the network before training, which depends on contrast but knows no clot.
For Grad-CAM the learnt weights are put into an equal network of Keras.
"""
import argparse
import time
from itertools import islice

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.stats import beta

import rsnape_kit as rk
from rsnape_kit.inference.heatmaps import METHODS
from rsnape_kit.inference.keras_predictor import grad_cam
from rsnape_kit.phantom.generate import Settings, make_study
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import image_labels, twin
from rsnape_kit.transforms.affine import fixed_point, unwarp
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


def in_keras(model):
    "Return the same network in Keras, of uint8 [b, S, S, 1] -> probability [b, 1]; its last map is of log-odds."
    from rsnape_kit.models.keras_backend import import_keras

    layers = import_keras().layers
    x = inputs = import_keras().Input((SIZE, SIZE, 1), dtype="uint8")
    x, made = layers.Rescaling(1 / 255, -.5)(x), []
    for own in model:
        if type(own).__name__ == "Conv2d":
            made.append((own, layers.Conv2D(own.out_channels, own.kernel_size, own.stride, name=f"conv{len(made)}")))
            x = made[-1][1](layers.ZeroPadding2D(own.padding)(x))
        elif type(own).__name__ == "BatchNorm2d":
            made.append((own, layers.BatchNormalization(epsilon=own.eps, name=f"norm{len(made)}")))
            x = made[-1][1](x)
        elif type(own).__name__ == "ReLU":
            x = layers.ReLU()(x)
    head = layers.Dense(1, "sigmoid", kernel_initializer="ones")
    whole = import_keras().Model(inputs, head(layers.GlobalMaxPooling2D()(x)))
    for own, layer in made:
        statistics = [own.running_mean, own.running_var] if hasattr(own, "running_var") else []
        arrays = [each.detach().numpy() for each in (own.weight, own.bias, *statistics)]
        layer.set_weights([each.transpose(2, 3, 1, 0) if each.ndim == 4 else each for each in arrays])
    return whole


def cams(model):
    "Return a function of int16 HU [S, S] -> Grad-CAM map [S, S]; it checks that both networks predict the same."
    import torch

    whole, whole_slice = in_keras(model), fixed_point(np.eye(3), SIZE)
    maps = grad_cam(whole)

    def draw(hu):
        x = apply_windows(hu[None], [PE], "fixed")
        with torch.inference_mode():
            expected = model(tensor(hu[None])).sigmoid().numpy()
        np.testing.assert_allclose(np.asarray(whole.predict_on_batch(x))[:, 0], expected, atol=1e-3)
        return unwarp(maps(x)[0], whole_slice, SIZE, SIZE)
    return draw


def occlusions(model):
    "Return a function of int16 HU [S, S] -> occlusion map [S, S]."
    def draw(hu):
        stored = (HU_SCALE * hu[None].astype(np.int32)).clip(-4096, 2**15 - 1).astype(np.int16)
        return rk.occlusion_map(predictor(model), stored, PATCH, STRIDE)
    return draw


def play(draw, slices: list) -> np.ndarray:  # function of a slice -> map; bool [n]
    "Return whether the peak of each slice's map is near a clot; a map of zeros has none."
    maps = [draw(hu) for hu, *_ in slices]
    return np.array([heat.any() and near(clot, mm)[peak(heat)] for heat, (*_, clot, mm) in zip(maps, slices)])


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


def main(studies: int, count: int, steps: int, method: str):
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    known, held = list(pairs("train", studies)), list(islice(pairs("test", studies, 2), count))
    model, blank = network(), network().eval()
    drawn = time.process_time()
    train(model, known, steps)
    learnt = time.process_time()
    with torch.inference_mode():
        odds = [model(tensor(np.stack(part))).numpy() for part in list(zip(*held))[:2]]
    auc = roc_auc_score(np.repeat([1, 0], len(held)), np.concatenate(odds))
    maps = cams if method == "gradcam" else occlusions
    hits, untrained = play(maps(model), held), play(maps(blank), held)
    body = [near(clot, mm)[hu > -500].mean() for hu, _, clot, mm in held]
    print(f"{len(known)} slices and their twins learnt; {len(held)} of other studies, AUC against twins {auc:.3f}")
    seconds = drawn - start, learnt - drawn, time.process_time() - learnt
    print("CPU-seconds: {:.0f} to draw slices, {:.0f} to learn, {:.0f} for the maps\n".format(*seconds))
    print(f"peak within {NEAR:.0f} mm of a clot")
    print(told({"gradcam": "Grad-CAM"}.get(method, "occlusion map"), hits))
    print(told("the network before training", untrained))
    print(f"{'a random point of the body':<34}{np.mean(body):8.1%}")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("studies", 100), ("count", 24), ("steps", 1000)):
        parse.add_argument(name, type=int, nargs="?", default=default)
    parse.add_argument("--method", choices=METHODS, default="occlusion")
    main(**vars(parse.parse_args()))
