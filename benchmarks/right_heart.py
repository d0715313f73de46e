"""The model of the right heart on a synthetic competition, whose RV/LV ratio is known as a number.

Its recipe `demo` is trained on the studies with an embolus, fold by fold, beside PetaFormer, a model of all labels.
Printed are, out of fold:

- on studies with an embolus: log loss and AUC of "RV/LV >= 1", and Spearman's correlation of the log-odds with the
  ratio; beside the best constant, and PetaFormer's two probabilities divided by their sum
- the same correlation on studies without an embolus, on which nothing was trained
- the nested losses of the blend with and without it

    nice python benchmarks/right_heart.py                       # demo's size, 280 studies
    nice python benchmarks/right_heart.py --studies 120 --models rvlv
    nice python benchmarks/right_heart.py --recipe quick --studies 24 --slices 12   # a minute or two; learns nothing

CPU-seconds are those of making the data, and of each model's training on all folds. Everything is kept in --data: run
the same command again to go on.
"""
import argparse
import resource
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from scipy.stats import spearmanr
from sklearn.metrics import log_loss, roc_auc_score

import rsnape_kit as rk
from rsnape_kit.competition.labels import EXAM_LABELS, RV_LV, STUDY
from rsnape_kit.competition.predictions import positive_studies
from rsnape_kit.demo import DemoSettings, demo_trainings, prepare
from rsnape_kit.inference.predict_runs import load_folds, load_oofs


def cpu_seconds() -> float:
    "Return the CPU time of this process and those that it has waited for."
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def score(given: pd.Series, wide: pd.Series, ratio: pd.Series) -> dict:
    "Return the scores of P(RV/LV >= 1 | embolus) on some studies; wide: the label, ratio: the number."
    found = {"studies": len(given), "log loss": log_loss(wide, given, labels=[0, 1])}
    if given.nunique() > 2:  # no constant
        found |= {"AUC": roc_auc_score(wide, given), "Spearman": correlation(given, ratio)}
    return found


def correlation(given: pd.Series, ratio: pd.Series) -> float:
    "Return Spearman's correlation of the log-odds with the ratio of the same studies."
    return spearmanr(logit(np.clip(given, 1e-6, 1 - 1e-6)), ratio[given.index]).statistic


def given_embolus(pred: rk.Predictions) -> pd.Series:
    "Return the share of RV/LV >= 1 in the probability of either ratio."
    return pred.exams[RV_LV[0]] / pred.exams[list(RV_LV)].sum(axis=1)


def on_positives(oofs: dict, truth: rk.Predictions, folds: pd.Series, ratio: pd.Series) -> pd.DataFrame:
    "Tabulate the scores on studies with an embolus; the constant of a fold is that of the other folds."
    shown = positive_studies(truth).exams
    wide, fold = shown[RV_LV[0]], folds[shown.index]
    table = {"constant": score(fold.map(lambda own: wide[fold != own].mean()), wide, ratio[shown.index])}
    for name, oof in oofs.items():
        table[name] = score(given_embolus(oof)[shown.index], wide, ratio[shown.index])
    return pd.DataFrame(table).T


def blends(oofs: dict, truth: rk.Predictions, folds: pd.Series) -> pd.DataFrame:
    "Tabulate the nested losses of the blend with and without the model of the right heart."
    rows = {}
    for title, names in (("without", [name for name in oofs if name != "rvlv"]), ("with", list(oofs))):
        ensemble = rk.fit_ensemble({name: oofs[name] for name in names}, truth, folds)
        losses, chosen = ensemble.blend_weights.losses["blend"], ensemble.losses["chosen"]
        exams = pd.Series(losses)[list(EXAM_LABELS)]
        weight = pd.Series(ensemble.blend_weights.losses["metric_weights"])[list(EXAM_LABELS)]
        rows[title] = {label: losses[label] for label in RV_LV} | {
            "exams": exams @ weight / weight.sum(), "all": ensemble.losses[chosen], "chosen": chosen,
            "weight": ", ".join(f"{ensemble.blend_weights.table().loc[label].get('rvlv', 0):.2f}" for label in RV_LV)}
    return pd.DataFrame(rows).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/right_heart"))
    parser.add_argument("--studies", type=int, default=280)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="demo", choices=["demo", "quick"])
    parser.add_argument("--models", nargs="+", default=["petaformer", "rvlv"])
    args = parser.parse_args()
    began = cpu_seconds()
    settings = DemoSettings(args.studies, 1, args.slices, seed=args.seed, recipe=args.recipe, models=tuple(args.models))
    prepare(args.data, settings)
    print(f"data: {cpu_seconds() - began:.0f} CPU-s", flush=True)
    runs = []
    for model in args.models:
        began = cpu_seconds()
        runs += rk.train_all(demo_trainings(args.data, DemoSettings(**vars(settings) | {"models": (model,)})), 1)
        print(f"{model}: {cpu_seconds() - began:.0f} CPU-s", flush=True)
    truth = rk.Predictions.from_train_csv(args.data / "competition" / "train.csv")
    facts = pd.read_csv(args.data / "competition" / "truth" / "studies.csv", dtype={STUDY: str})
    ratio = facts.set_index(STUDY)["rv_lv_ratio"]
    oofs = {name: oof.align(truth) for name, oof in load_oofs(runs).items()}
    folds = load_folds(runs)[args.models[-1]].reindex(truth.exams.index)
    print("\nstudies with an embolus, out of fold\n", on_positives(oofs, truth, folds, ratio).round(3).to_string())
    if "rvlv" in oofs:
        others = truth.exams.index.difference(positive_studies(truth).exams.index)
        found = correlation(given_embolus(oofs["rvlv"])[others], ratio)
        print(f"\nSpearman on the {len(others)} studies without an embolus: {found:.3f}")
    if len(oofs) > 1 and "rvlv" in oofs:
        print("\nthe blend, nested by fold\n", blends(oofs, truth, folds).to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
