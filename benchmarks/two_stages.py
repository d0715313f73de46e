"""Two stages: how to train a network that reads a study's slice features, on synthetic competitions.

The first stage is the demo's EfficientNet, one run per fold. Three ways to train the second are compared:

    a  each fold's networks on the studies that its image run held out; inner folds for out-of-fold predictions
    b  networks on the held-out studies of all folds together, features scaled per fold; inner folds over all studies
    c  each fold's networks on the studies that its image run was trained on, with more dropout and weight decay

Each is scored on held-out studies, beside the first stage and both priors, with the CPU-seconds of its training.

    python benchmarks/two_stages.py                       # demo's size, 1,320 steps of the first stage
    python benchmarks/two_stages.py --seed 1 --ways a --set units=32 --set kind=lstm
    python benchmarks/two_stages.py --small               # seconds; learns nothing

Everything is kept in --data: run the same command again to go on.
"""
import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from rsnape_kit.competition.folds import Folds, make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, STUDY
from rsnape_kit.competition.metric import loss_table
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior, position_prior
from rsnape_kit.data.sequences import HeldFeatures
from rsnape_kit.demo import DemoSettings, prepare
from rsnape_kit.inference.averaging import ProbabilityAverager
from rsnape_kit.inference.features import FeatureStore, compute_features, predict_sequences
from rsnape_kit.runs.config import SequenceConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.runs.recipes import DEMO, override_settings
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore

FOLDS, WAYS = 2, ("a", "b", "c")


def settings_of(args) -> DemoSettings:
    "Return the size of the competition."
    small = dict(studies=24, test_studies=6, slices=8, size=64) if args.small else {}
    return DemoSettings(**small, seed=args.seed, difficulty=args.difficulty)


def data(args) -> tuple:
    "Make the competition; return the stores and truths of train and test."
    folder = Path(args.data)
    train, test, store = prepare(folder, settings_of(args))
    build_store(test, folder / "test_store")
    truths = [Predictions.from_train_csv(folder / "competition" / path) for path in ("train.csv", "truth/test.csv")]
    return (store, SliceStore(folder / "test_store")), truths, (train, test)


def image_run(args, fold: int) -> Path:
    "Train the first stage on a fold, in a process of its own."
    folder = Path(args.data)
    out = folder / f"runs-{args.steps}"
    run = out / f"efficientnet-fold{fold}-seed{args.seed}"
    if not (run / "oof").exists():
        epochs = DEMO["efficientnet"].all_epochs
        command = [sys.executable, "-m", "rsnape_kit.cli", "train", "efficientnet", "--store", folder / "store",
                   "--train-csv", folder / "competition" / "train.csv", "--fold", fold, "--folds", FOLDS, "--recipe",
                   "demo", "--seed", args.seed, "--out", out, "--set", f"steps={max(1, args.steps // epochs)}"]
        command += ["--set", "batch=4", "--set", "pixels.size=32"] if args.small else []
        started = time.time()
        with open(folder / f"{run.name}-{args.steps}.log", "w") as log:
            pid = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
            _, status, usage = os.wait4(pid.pid, 0)
        if status:
            raise RuntimeError(f"{command} failed: see {log.name}")
        seconds, cpu = time.time() - started, usage.ru_utime + usage.ru_stime
        print(f"first stage, fold {fold}: {cpu:.0f} CPU-s, {seconds:.0f} s", flush=True)
    return run


def scaled(studies: list) -> list:
    "Return features with mean 0 and deviation 1 over these studies, for networks that read several image runs."
    everything = np.concatenate([study.features[0] for study in studies]).astype(np.float32)
    mean, deviation = everything.mean(0), everything.std(0) + 1e-3
    return [replace(study, features=((study.features - mean) / deviation).astype(np.float16)) for study in studies]


class Stages:
    "Features of all studies by the image run of each fold, and the second stage on top."

    def __init__(self, args):
        self.args = args
        self.stores, (self.truth, self.test_truth), self.tables = data(args)
        studies = self.stores[0].table[STUDY].unique()
        self.folds: Folds = make_folds(studies, self.truth, FOLDS)
        self.features = []
        for fold in range(FOLDS):
            run = image_run(args, fold)
            folder = Path(args.data) / f"features-{args.steps}"
            kept = [compute_features(run, store, folder / f"{run.name}-{name}", views=2, progress=False)
                    for name, store in zip(("train", "test"), self.stores)]
            self.features.append([self._held(each) for each in kept])

    @staticmethod
    def _held(store: FeatureStore) -> HeldFeatures:
        return HeldFeatures([store.study(study) for study in store.studies])

    def config(self, way: str) -> SequenceConfig:
        "Return the settings of the second stage."
        config = DEMO["sequence"]
        if way == "c":
            config = replace(config, inner=2, weight_decay=.2, network=config.network | {"dropout": .5})
        if self.args.small:
            short = (replace(config.phases[-1], epochs=1),)
            config = replace(config, phases=short, steps=1, inner=2, network={"units": 4})
        size = next(iter(self.features[0][0].studies.values())).features.shape[2] * (not self.args.no_features)
        return override_settings(replace(config, features=size, seed=self.args.second_seed), self.args.set)

    def material(self, way: str) -> list:
        "Return per second stage: features and studies to learn from, other studies, and the features of test."
        train, test = ([fold[which] for fold in self.features] for which in (0, 1))
        if way == "b":
            held_out = [[train[fold].study(study) for study in self.folds.valid(fold)] for fold in range(FOLDS)]
            scale = scaled if not self.args.no_features else list
            pooled = HeldFeatures(sum(map(scale, held_out), []))
            tests = [HeldFeatures(scale(list(fold.studies.values()))) for fold in test]
            return [(pooled, self.truth, self.truth, tests)]
        parts = []
        for fold in range(FOLDS):
            seen, unseen = (self.truth.select(part) for part in (self.folds.train(fold), self.folds.valid(fold)))
            mine, other = (unseen, seen) if way == "a" else (seen, unseen)
            parts.append((train[fold], mine, other, [test[fold]]))
        return parts

    def second(self, way: str) -> tuple:  # Predictions of test, out of fold (None for c), CPU-seconds
        "Train the second stage and predict the held-out studies, the mean of all its networks."
        from rsnape_kit.training.sequence_trainer import fit_sequences
        started, averager, own = time.process_time(), self._averager(1), self._averager(0)
        config = self.config(way)
        for number, (features, truth, other, tests) in enumerate(self.material(way)):
            if self.args.no_features:
                features, *tests = self._without([features, *tests])
            inner = None if way == "c" else make_folds(truth.exams.index, truth, config.inner, config.seed).of
            run = open_run(Path(self.args.data) / "second" / f"{time.time_ns()}-{way}{number}", config)
            model = fit_sequences(run, config, features, truth, other, inner, lambda model: {"val_loss": 0.},
                                  progress=False)
            for each in tests:
                predict_sequences(model, each, self._rows(1, each.studies), averager, config, views=2)
            unseen = other if way == "c" else truth
            predict_sequences(model, features, self._rows(0, unseen.exams.index), own, config, views=2, inner=inner)
        return averager.predictions(), own.predictions(), time.process_time() - started

    @staticmethod
    def _without(held: list) -> list:
        "Return features without vectors: logits and positions only."
        return [HeldFeatures([replace(study, features=study.features[..., :0]) for study in each.studies.values()])
                for each in held]

    def _averager(self, which: int) -> ProbabilityAverager:
        return ProbabilityAverager(self.stores[which].table, EXAM_LABELS)

    def _rows(self, which: int, studies) -> dict:
        rows = self.stores[which].table.groupby(STUDY, sort=False).indices
        return {study: rows[study] for study in studies}

    def first(self, which: int) -> Predictions:
        "Return the image predictions of the first stage: of test by all folds, of train out of fold."
        averager = self._averager(which)
        for fold in range(FOLDS):
            held = self.features[fold][which]
            for study, rows in self._rows(which, held.studies if which else self.folds.valid(fold)).items():
                for view in range(2):
                    averager.add(rows[None], 1 / (1 + np.exp(-held.study(study).logits[view][None])))
        return averager.predictions()


def losses(truth: Predictions, pred: Predictions) -> dict:
    "Return the metric in parts."
    table = loss_table(truth, pred)
    exams = table.loc[list(EXAM_LABELS)]
    return {"exams": exams.loss @ exams.weight / exams.weight.sum(), "images": table.loss[IMAGE_LABEL],
            "all": table.loss @ table.weight}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="build/two_stages", help="folder for all files; the seed is added")
    parser.add_argument("--seed", type=int, default=0, help="of the competition and the first stage")
    parser.add_argument("--second-seed", type=int, default=0, help="of the second stage")
    parser.add_argument("--difficulty", default="demo", choices=["demo", "real"])
    parser.add_argument("--steps", type=int, default=1320, help="of the first stage")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--no-features", action="store_true", help="second stage on logits and positions only")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the second stage")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.data = f"{args.data}-{args.difficulty}-{args.seed}{'-small' * args.small}"
    args.steps = 12 if args.small else args.steps
    stages = Stages(args)
    rows = {"constant prior": losses(stages.test_truth, constant_prior(stages.truth, stages.tables[1])),
            "position prior": losses(stages.test_truth, position_prior(stages.truth, *stages.tables)),
            "first stage": losses(stages.test_truth, stages.first(1)) | {
                "oof images": losses(stages.truth, stages.first(0))["images"]}}
    for way in args.ways:
        pred, own, seconds = stages.second(way)
        rows[f"way {way}"] = losses(stages.test_truth, pred) | {"CPU-s": seconds} | {
            f"oof {name}": value for name, value in losses(stages.truth, own).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").round(4)
    print(f"seed {args.seed}, first stage {args.steps} steps{', no features' * args.no_features} {' '.join(args.set)}")
    print(table.to_string(na_rep="-"))


if __name__ == "__main__":
    main()
