"""Two stages: how to train a network that reads a study's slice features, on synthetic competitions.

The first stage is the demo's EfficientNet, one run per fold. Three ways to train the second are compared:

    a  each fold's networks on the studies that its image run held out; inner folds for out-of-fold predictions
    b  networks on the held-out studies of all folds together, features scaled per fold; inner folds over all studies
    c  each fold's networks on the studies that its image run was trained on, with more dropout and weight decay

Each is scored on held-out studies, beside the first stage and both priors, with the CPU-seconds of its training.

    python benchmarks/two_stages.py                       # demo's size, 1,320 steps of the first stage
    python benchmarks/two_stages.py --seed 1 --ways a --set network.units=64 --first exam_labels=0
    python benchmarks/two_stages.py --ways a --twins      # the same patients without their clots
    python benchmarks/two_stages.py --ways a --shuffled   # second stage on labels of other studies
    python benchmarks/two_stages.py --slices 256 --studies 60 --test-studies 30 --steps 240   # studies of full length
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
from _synthetic import shuffle_labels

from rsnape_kit.competition.folds import Folds, make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, STUDY
from rsnape_kit.competition.metric import loss_table
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior, position_prior
from rsnape_kit.data.sequences import HeldFeatures
from rsnape_kit.demo import DemoSettings, prepare
from rsnape_kit.dicom.slices import scan
from rsnape_kit.inference.averaging import ProbabilityAverager
from rsnape_kit.inference.features import FeatureStore, compute_features, predict_sequences
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.runs.config import SequenceConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.runs.recipes import DEMO, override_settings
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore

FOLDS, WAYS = 2, ("a", "b", "c")


def settings_of(args) -> DemoSettings:
    "Return the size of the competition."
    small = dict(studies=24, test_studies=6, slices=8, size=64) if args.small else {}
    given = {name: value for name in ("studies", "test_studies", "slices") if (value := getattr(args, name))}
    return DemoSettings(**small | given, seed=args.seed, difficulty=args.difficulty)


def data(args) -> tuple:
    "Make the competition; return the stores and truths of train and test, and with --twins of the test studies' twins."
    folder, settings = Path(args.data), settings_of(args)
    train, test, store = prepare(folder, settings)
    build_store(test, folder / "test_store")
    stores = [store, SliceStore(folder / "test_store")]
    truths = [Predictions.from_train_csv(folder / "competition" / path) for path in ("train.csv", "truth/test.csv")]
    if args.twins:
        made = make_competition(folder / "twins", 1, settings.test_studies, settings.slices, settings.size,
                                settings.seed, settings.difficulty, twins=True)
        build_store(scan(made / "truth" / "twins"), folder / "twins_store")
        stores.append(SliceStore(folder / "twins_store"))
    return stores, truths, (train, test)


def image_run(args, fold: int) -> Path:
    "Train the first stage on a fold, in a process of its own."
    folder = Path(args.data)
    out = folder / f"runs-{'-'.join([str(args.steps), *args.first])}"
    run = out / f"efficientnet-fold{fold}-seed{args.seed}"
    if not (run / "oof").exists():
        epochs = DEMO["efficientnet"].all_epochs
        command = [sys.executable, "-m", "rsnape_kit.cli", "train", "efficientnet", "--store", folder / "store",
                   "--train-csv", folder / "competition" / "train.csv", "--fold", fold, "--folds", FOLDS, "--recipe",
                   "demo", "--seed", args.seed, "--out", out, "--set", f"steps={max(1, args.steps // epochs)}"]
        command += [word for pair in args.first for word in ("--set", pair)]
        command += ["--set", "batch=4", "--set", "pixels.size=32"] if args.small else []
        started = time.time()
        with open(folder / f"{run.name}-{out.name}.log", "w") as log:
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
            folder = run.parent.with_name(run.parent.name.replace("runs", "features"))
            kept = [compute_features(run, store, folder / f"{run.name}-{name}", views=2, progress=False)
                    for name, store in zip(("train", "test", "twins"), self.stores)]
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

    def material(self, way: str, which: int = 1) -> list:
        "Return per second stage: features and studies to learn from, other studies, and the features of test or twins."
        train, test = ([fold[each] for fold in self.features] for each in (0, which))
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

    def second(self, way: str) -> tuple:  # Predictions of test (and twins), out of fold, CPU-seconds
        "Train the second stage and predict the held-out studies, the mean of all its networks."
        from rsnape_kit.training.sequence_trainer import fit_sequences
        started, (own, *averagers) = time.process_time(), map(self._averager, range(len(self.stores)))
        config = self.config(way)
        for number, (features, truth, other, tests) in enumerate(self.material(way)):
            if self.args.no_features:
                features, *tests = self._without([features, *tests])
            inner = None if way == "c" else make_folds(truth.exams.index, truth, config.inner, config.seed).of
            run = open_run(Path(self.args.data) / "second" / f"{time.time_ns()}-{way}{number}", config)
            taught = shuffle_labels(truth.align(truth), 1) if self.args.shuffled else truth
            model = fit_sequences(run, config, features, taught, other, inner, lambda model: {"val_loss": 0.},
                                  progress=False)
            for which, averager in enumerate(averagers, 1):
                for each in tests if which == 1 else self.material(way, which)[number][3]:
                    predict_sequences(model, each, self._rows(which, each.studies), averager, config, views=2)
            unseen = other if way == "c" else truth
            predict_sequences(model, features, self._rows(0, unseen.exams.index), own, config, views=2, inner=inner)
        seconds = time.process_time() - started
        return [averager.predictions() for averager in averagers], own.predictions(), seconds

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


def print_twins(truth: Predictions, pred: Predictions, twin: Predictions):
    "Print how the predictions fall where the same patients have no clots."
    positive = truth.images[truth.images == 1].index
    fall = pred.images[positive].mean(), twin.images.reindex(positive).mean()
    exams = [1 - each.exams.negative_exam_for_pe[twin.exams.index] for each in (pred, twin)]
    fell = (exams[1] < exams[0]).mean()
    print(f"twins: positive slices {fall[0]:.2f}, the same without clots {fall[1]:.2f}; 1 - P(negative) "
          f"{exams[0].mean():.2f} and {exams[1].mean():.2f}, lower in {fell:.0%} of {len(exams[0])} studies")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="build/two_stages", help="folder for all files; the seed is added")
    parser.add_argument("--seed", type=int, default=0, help="of the competition and the first stage")
    parser.add_argument("--second-seed", type=int, default=0, help="of the second stage")
    for name in ("studies", "test-studies", "slices"):
        parser.add_argument(f"--{name}", type=int, help="default: the demo's")
    parser.add_argument("--twins", action="store_true", help="predict positive test studies without their clots too")
    parser.add_argument("--shuffled", action="store_true", help="teach the second stage labels of other studies")
    parser.add_argument("--first", action="append", default=[], metavar="NAME=VALUE", help="setting of the first stage")
    parser.add_argument("--difficulty", default="demo", choices=["demo", "real"])
    parser.add_argument("--steps", type=int, default=1320, help="of the first stage")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--no-features", action="store_true", help="second stage on logits and positions only")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the second stage")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    size = "-".join(str(value) for value in (args.studies, args.test_studies, args.slices) if value)
    args.data = "-".join(filter(None, [args.data, args.difficulty, str(args.seed), size, "small" * args.small]))
    args.steps = 12 if args.small else args.steps
    stages = Stages(args)
    rows = {"constant prior": losses(stages.test_truth, constant_prior(stages.truth, stages.tables[1])),
            "position prior": losses(stages.test_truth, position_prior(stages.truth, *stages.tables)),
            "first stage": losses(stages.test_truth, stages.first(1)) | {
                "oof images": losses(stages.truth, stages.first(0))["images"]}}
    for way in args.ways:
        (pred, *twins), own, seconds = stages.second(way)
        for twin in twins:
            print_twins(stages.test_truth, pred, twin)
        rows[f"way {way}"] = losses(stages.test_truth, pred) | {"CPU-s": seconds} | {
            f"oof {name}": value for name, value in losses(stages.truth, own).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").round(4)
    print(f"seed {args.seed}, first stage {args.steps} steps{', no features' * args.no_features} {' '.join(args.set)}")
    print(table.to_string(na_rep="-"))


if __name__ == "__main__":
    main()
