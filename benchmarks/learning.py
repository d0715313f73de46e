"""What the models learn: on a synthetic competition, from scratch, on this machine.

Each model is trained on a few seeds and scored on held-out studies against the constant and the position prior, over
images and over exams, with the 90 % interval of the paired study bootstrap. Two checks show whether it detects emboli:
trained on labels shuffled among the studies it must not beat the priors; on the twin of a study, the same
patient without the clots, its probabilities must fall.

    python benchmarks/learning.py                     # all models, one seed
    python benchmarks/learning.py --seeds 0 1 2 --shuffled
    python benchmarks/learning.py --models resnet3d --set batch=8
    python benchmarks/learning.py --use 240 --folds 3 # 160 studies to learn from, 80 to choose the epoch by

EfficientNet3D starts from the backbone of the image model of the same seed, which must be trained first.
Each training runs in a process of its own and is kept: run the same command again to go on.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from _synthetic import shuffle_labels

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior, position_prior
from rsnape_kit.dicom.slices import scan
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.report.scores import gain_over
from rsnape_kit.runs.recipes import DEMO, ORIGINAL, override_settings
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.training.trainer import train

SPLITS = {"train": "train", "test": "test", "twins": "truth/twins"}


def prepare(args) -> Path:
    "Make the competition and the stores of train, test and twins."
    folder = Path(args.data)
    made = make_competition(folder / "competition", args.studies, args.test_studies, args.slices,
                            seed=args.phantom_seed, difficulty=args.difficulty, twins=True)
    for split, path in SPLITS.items():
        if not (folder / f"{split}.parquet").exists():
            table = scan(made / path)
            build_store(table, folder / split)
            table.to_parquet(folder / f"{split}.parquet")
    return folder


def backbone_of(learned: Path, args) -> Path:
    "Return the weights of the image model of the same seed, fold and labels, which the 3-D model starts from."
    run = args.run.replace("efficientnet3d", "efficientnet")
    path = learned / run / f"efficientnet-fold0-seed{args.seeds[0]}" / "best.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: train efficientnet first, with the same options")
    return path


def train_one(args):
    "Train one model on one seed and predict test and twins; in this process."
    folder, name = Path(args.data), args.models[0]
    out = folder / "learned" / args.run
    if (out / "seconds.json").exists():
        return
    truth = Predictions.from_train_csv(folder / "competition" / "train.csv")
    if args.shuffled:
        truth = shuffle_labels(truth.align(truth), 1)
    config = override_settings(DEMO[name], [f"seed={args.seeds[0]}", *args.set])
    if name == "petaformer":
        from rsnape_kit.inference.torch_predictor import infer
    else:
        from rsnape_kit.inference.keras_predictor import infer
    source, wall, cpu = SliceStore(folder / "train"), time.perf_counter(), time.process_time()
    names = source.table[STUDY].unique()[:args.use]
    split = make_folds(names, truth.select(names), args.folds)
    more = {"weights": backbone_of(folder / "learned", args)} if name == "efficientnet3d" else {}
    run = train(name, source, 0, config, truth=truth, folds=split, out=out, earlier=(), **more)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    for part in ("test", "twins"):
        infer(run, SliceStore(folder / part), tta=args.tta).save(out / part)
    (out / "seconds.json").write_text(json.dumps(spent))


def auc(y, p) -> float:
    from sklearn.metrics import roc_auc_score
    return roc_auc_score(y, p)


def score(folder: Path, out: Path) -> dict:
    "Score one training."
    train_truth = Predictions.from_train_csv(folder / "competition" / "train.csv")
    truth = Predictions.from_train_csv(folder / "competition" / "truth" / "test.csv")
    slices = {part: pd.read_parquet(folder / f"{part}.parquet") for part in SPLITS}
    rivals = {"constant": constant_prior(train_truth, slices["test"]),
              "position": position_prior(train_truth, slices["train"], slices["test"])}
    pred, twin = (Predictions.load(out / part) for part in ("test", "twins"))
    pred = pred.align(truth)
    row = {}
    heads = {"images": [IMAGE_LABEL]} | ({"exams": list(EXAM_LABELS)} if pred.exams.notna().any(axis=None) else {})
    for head, labels in heads.items():
        row |= {f"{head} {key}": value for key, value in gain_over(truth, pred, rivals, labels).items()}
    positive = truth.images[truth.images == 1].index
    inside = truth.images.groupby(level=0).transform("max") == 1
    row["images AUC in positives"] = auc(truth.images[inside], pred.images[inside])
    row["positive slices"], row["same in twins"] = pred.images[positive].mean(), twin.images.reindex(positive).mean()
    if "exams" in heads:
        row["exam AUC"] = auc(1 - truth.exams.negative_exam_for_pe, 1 - pred.exams.negative_exam_for_pe)
        for label in EXAM_LABELS:
            row[f"AUC {label}"] = auc(truth.exams[label], pred.exams[label])
    else:
        row["exam AUC"] = auc(truth.images.groupby(level=0).max(), pred.images.groupby(level=0).max())
    return row | json.loads((out / "seconds.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="build/learning", help="folder for the competition and the runs")
    parser.add_argument("--studies", type=int, default=480)
    parser.add_argument("--test-studies", type=int, default=160)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--phantom-seed", type=int, default=5)
    parser.add_argument("--difficulty", default="demo", choices=("demo", "real"))
    parser.add_argument("--models", nargs="+", default=list(ORIGINAL), choices=list(ORIGINAL))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--use", type=int, help="how many of the studies to train and validate on; default: all")
    parser.add_argument("--folds", type=int, default=6, help="one of them is held out to choose the best epoch")
    parser.add_argument("--tta", type=int, default=0)
    parser.add_argument("--shuffled", action="store_true", help="also train on labels shuffled among the studies")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return train_one(args)
    folder, rows = prepare(args), {}
    tag = "".join(f"_{text}" for text in args.set).replace("/", "-") + (f"_of{args.use}" if args.use else "")
    for name in args.models:
        for seed, shuffled in [(seed, False) for seed in args.seeds] + [(args.seeds[0], True)] * args.shuffled:
            run = f"{name}-{seed}{'-shuffled' * shuffled}{tag}"
            command = [sys.executable, __file__, "--data", str(folder), "--models", name, "--seeds", str(seed), "--run",
                       run, "--folds", str(args.folds), "--tta", str(args.tta)]
            command += ["--use", str(args.use)] * bool(args.use)
            command += ["--shuffled"] * shuffled + [word for text in args.set for word in ("--set", text)]
            subprocess.run(command, check=True, env=os.environ)
            rows[run] = score(folder, folder / "learned" / run)
            print(pd.Series(rows[run]).round(4).to_string(), "\n")
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.to_csv(folder / "learning.csv")
    print(f"{args.test_studies} held-out studies of difficulty {args.difficulty!r}, {args.studies} to learn from\n")
    print(table.round(3).T.to_string())


if __name__ == "__main__":
    main()
