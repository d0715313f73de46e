"""Better slices: what each change of an image model's input brings, at equal steps, on a synthetic competition.

Every variant is the demo's EfficientNet with one change. It is trained on one fold and scored on the held-out studies:

- image loss beside both priors, as predicted and after Platt scaling (nested: five parts of the studies), since one
  short training is badly calibrated
- gain after scaling over the model without a change (paired bootstrap over studies, one-sided 90 % bound)
- CPU-seconds of training
- sensitivity at 90 % specificity by area of the embolus on the slice

    python benchmarks/better_slices.py                                  # all variants, the demo's size
    python benchmarks/better_slices.py --seed 1 --variants neighbours "lung box"
    python benchmarks/better_slices.py --difficulty real --slices 96    # thinner slices, smaller emboli
    python benchmarks/better_slices.py --small                          # seconds; learns nothing

Everything is kept in --data, which may be the folder of a demo of the same seed: run the same command again to go on.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from rsnape_kit.competition.labels import IMAGE_LABEL, STUDY
from rsnape_kit.competition.metric import loss_table
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior, position_prior
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.demo import DemoSettings, prepare
from rsnape_kit.ensemble.calibration import cross_calibrate
from rsnape_kit.inference.predict_runs import predict
from rsnape_kit.report.scores import gain_over
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore

NEIGHBOURS, BASE = "pixels.neighbours=(-1, 0, 1)", "as in the demo"
PE_WINDOW = "pixels.windows=({'level': 100, 'width': 700},)"
VARIANTS = {BASE: [], "another seed": ["seed=100"], "neighbours": [NEIGHBOURS],
            "neighbours, PE window": [PE_WINDOW, NEIGHBOURS], "PE window": [PE_WINDOW],
            "lung box": ["pixels.crop=lungs"], "flips": ["affine.flip=0.5"],
            "contrast and shift": ["augment={'contrast': .2, 'shift': 20.}"],
            "cutouts": ["augment={'cutouts': 2}"], "without exam labels": ["exam_labels=0."]}
AREAS = 0, 40, 80, 150, np.inf  # mm2 of embolus on the slice


def data(args) -> tuple:
    "Make the competition; return the stores of train and test, the truths and the slices tables."
    folder = Path(args.data)
    small = dict(studies=16, test_studies=8, slices=8, size=64) if args.small else {}
    given = {name: value for name in ("studies", "test_studies", "slices") if (value := getattr(args, name))}
    train, test, store = prepare(folder, DemoSettings(**small | given, seed=args.seed, difficulty=args.difficulty))
    build_store(test, folder / "test_store")
    truths = [Predictions.from_train_csv(folder / "competition" / path) for path in ("train.csv", "truth/test.csv")]
    return store, SliceStore(folder / "test_store"), truths, (train, test)


def trained(args, name: str) -> tuple:  # folder of the run, CPU-seconds
    "Train a variant in a process of its own, if it was not trained before."
    out = Path(args.data) / "variants" / f"{name.replace(' ', '_')}-{args.steps}"
    changes = [change for change in VARIANTS[name] if not change.startswith("seed=")]
    seed = next((change[5:] for change in VARIANTS[name] if change.startswith("seed=")), args.seed)
    run = out / f"efficientnet-fold{args.fold}-seed{seed}"
    if not (run / "oof").exists():
        settings = [f"steps={max(1, args.steps // 12)}", *changes]
        settings += ["batch=4", "pixels.size=32"] if args.small else []
        command = [sys.executable, "-m", "rsnape_kit.cli", "train", "efficientnet", "--recipe", "demo",
                   "--store", Path(args.data) / "store", "--train-csv", Path(args.data) / "competition" / "train.csv",
                   "--fold", args.fold, "--folds", 2, "--seed", seed, "--out", out]
        command += [word for each in settings for word in ("--set", each)]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log", "w") as log:
            pid = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
            _, status, usage = os.wait4(pid.pid, 0)
        if status:
            raise RuntimeError(f"{command} failed: see {log.name}")
        (out / "cpu").write_text(str(usage.ru_utime + usage.ru_stime))
    return run, float((out / "cpu").read_text())


def clot_areas(args, table: pd.DataFrame) -> np.ndarray:  # float [n], mm2 of embolus on each slice of the table
    "Measure the emboli on the voxels that the phantom kept."
    areas = np.zeros(len(table))
    for study, rows in table.groupby(STUDY, sort=False).indices.items():
        path = Path(args.data) / "competition" / "truth" / "clots" / f"{study}.npz"
        if path.exists():
            count = np.bincount(np.load(path)["voxels"][:, 0].astype(int), minlength=len(rows))
            areas[rows] = count * (table["spacing_y"] * table["spacing_x"]).to_numpy()[rows]
    return areas


def sensitivities(p: np.ndarray, positive: np.ndarray, areas: np.ndarray) -> list:
    "Return the share of positive slices above the 90th percentile of negative ones, by area."
    above, groups = p > np.quantile(p[~positive], .9), np.digitize(areas, AREAS[1:])
    found = [above[positive & (groups == k)] for k in range(len(AREAS) - 1)]
    return [each.mean() if len(each) else np.nan for each in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder for all files; default: build/better_slices and the settings")
    parser.add_argument("--seed", type=int, default=0, help="of the competition and of the training")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1320)
    parser.add_argument("--difficulty", default="demo", choices=["demo", "real"])
    for name in ("studies", "test-studies", "slices"):
        parser.add_argument(f"--{name}", type=int, help="default: the demo's")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    size = "-".join(str(value) for value in (args.studies, args.test_studies, args.slices) if value)
    words = filter(None, ["build/better_slices", args.difficulty, str(args.seed), size, "small" * args.small])
    args.data = args.data or "-".join(words)
    args.steps = 12 if args.small else args.steps
    _, test, (truth, held_out), tables = data(args)
    areas = clot_areas(args, test.table)
    priors = {"constant prior": constant_prior(truth, tables[1]), "position prior": position_prior(truth, *tables)}
    rows = {name: {"images": loss_table(held_out, pred).loss[IMAGE_LABEL]} for name, pred in priors.items()}
    preds = {}
    names = [f"{low:g} to {high:g} mm2" for low, high in zip(AREAS, AREAS[1:])]
    at = slice_index(test.table)
    positive = held_out.images[at].to_numpy() == 1
    for name in dict.fromkeys([BASE, *args.variants]):
        run, cpu = trained(args, name)
        pred = next(iter(predict([run], test, tta=0, out=run.parent / "test").values()))
        preds[name] = cross_calibrate(pred, held_out)
        over = gain_over(held_out, preds[name], {BASE: preds[BASE]}, [IMAGE_LABEL])
        found = sensitivities(pred.images[at].to_numpy(), positive, areas)
        rows[name] = {"images": loss_table(held_out, pred).loss[IMAGE_LABEL], "scaled": over["loss"]}
        rows[name] |= {"gain": over["gain"], "at least": over["at_least"], "CPU-s": round(cpu)}
        rows[name] |= dict(zip(names, found))
        print(pd.DataFrame.from_dict(rows, orient="index").round(3).to_string(na_rep="-"), flush=True)


if __name__ == "__main__":
    main()
