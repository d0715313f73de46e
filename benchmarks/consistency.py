"""Cost and run time of making predictions consistent, at the size of the whole test set.

Simulated calibrated models at the competition's prevalence. For each repair, the expected increase of the loss (by the
predictions and the true expected q) and the realised increase; then run times, interleaved, of the exact repair, of a
plain loop over the studies that tries all 44 label combinations and of the usual repair.

    python benchmarks/consistency.py                       # simulated models
    python benchmarks/consistency.py --demos demo demo-1   # trained ones: folders that `rsnape demo` has filled
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from rsnape_kit.competition.labels import (
    CHRONICITY,
    EXAM_LABELS,
    EXAM_WEIGHTS,
    IMAGE_WEIGHT,
    LOCATIONS,
    NOT_POSITIVE,
    RV_LV,
    STUDY,
    allowed_combinations,
)
from rsnape_kit.competition.metric import competition_loss
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.submission import violations
from rsnape_kit.ensemble.consistency import (
    MARGIN,
    expected_cost,
    expected_positive_share,
    fit_positive_share,
    make_consistent,
)
from rsnape_kit.ensemble.ensemble import Ensemble, nested_blend
from rsnape_kit.inference.predict_runs import load_folds, load_oofs, plan_predictions
from rsnape_kit.report.scores import resample, study_losses
from rsnape_kit.testing import simulate_model, simulate_truth

LO, HI = .5 - MARGIN, .5 + MARGIN
AT = {label: i for i, label in enumerate(EXAM_LABELS)}
PE = [AT[label] for label in EXAM_LABELS if label not in NOT_POSITIVE]


def clip_study(exam: np.ndarray, images: np.ndarray, positive: bool):
    "The usual repair of one study, in place: clip every label to the chosen side."
    def exactly_one(labels):
        columns = [AT[label] for label in labels]
        top = columns[int(exam[columns].argmax())]
        for i in columns:
            exam[i] = max(exam[i], HI) if i == top else min(exam[i], LO)

    if not positive:
        exactly_one(NOT_POSITIVE)
        exam[PE] = np.minimum(exam[PE], LO)
        images[images > .5] = LO
        return
    exactly_one(RV_LV)
    exam[[AT[label] for label in NOT_POSITIVE]] = np.minimum(exam[[AT[label] for label in NOT_POSITIVE]], LO)
    if not (exam[[AT[label] for label in LOCATIONS]] > .5).any():
        exactly_one(LOCATIONS)
    if (exam[[AT[label] for label in CHRONICITY]] > .5).all():
        exactly_one(CHRONICITY)
    if not (images > .5).any():
        images[images.argmax()] = HI


def clip(pred: Predictions, by_image: bool) -> Predictions:
    "The usual repair: the side by negative_exam_for_pe at most 0.5, or by any image above 0.5."
    exams, images = pred.exams.to_numpy().copy(), pred.images.to_numpy().copy()
    rows = pred.images.groupby(level=0, sort=False).indices
    for i, study in enumerate(pred.exams.index):
        own = images[rows[study]]
        clip_study(exams[i], own, (own > .5).any() if by_image else exams[i, 0] <= .5)
        images[rows[study]] = own
    return Predictions(pd.DataFrame(exams, pred.exams.index, EXAM_LABELS), pd.Series(images, pred.images.index))


def divergence(p: float, c: float) -> float:
    return sum(a * np.log(a / b) for a, b in ((p, c), (1 - p, 1 - c)) if a > 0)


def loop(pred: Predictions, q: pd.Series) -> Predictions:
    "The exact repair as a plain loop over every study and every allowed combination."
    exams, images = pred.exams.to_numpy().copy(), pred.images.to_numpy().copy()
    rows = pred.images.groupby(level=0, sort=False).indices
    weights = list(EXAM_WEIGHTS.values())
    for i, study in enumerate(pred.exams.index):
        own = images[rows[study]]
        for_no = sum(divergence(p, LO) for p in own if p > .5)
        for_yes = 0 if own.max() > .5 else divergence(own.max(), HI)
        best = None
        for yes, positive in zip(*allowed_combinations()):
            cost = IMAGE_WEIGHT * q[study] * (for_yes if positive else for_no)
            cost += sum(w * divergence(p, HI if y else LO) for w, p, y in zip(weights, exams[i], yes) if (p > .5) != y)
            if best is None or cost < best[0]:
                best = cost, yes, positive
        _, yes, positive = best
        crosses = yes != (exams[i] > .5)
        exams[i] = np.where(crosses, np.where(yes, HI, LO), exams[i])
        if not positive:
            own[own > .5] = LO
        elif not (own > .5).any():
            own[own.argmax()] = HI
        images[rows[study]] = own
    return Predictions(pd.DataFrame(exams, pred.exams.index, EXAM_LABELS), pd.Series(images, pred.images.index))


def repairs(pred: Predictions, q) -> dict:  # name -> Predictions
    "All repairs that need no knowledge of the truth."
    repaired = {"exact, q fitted on OOF": make_consistent(pred, q), "exact, q = mean of images": make_consistent(pred),
            "clip, side by negative_exam": clip(pred, False), "clip, side by image maximum": clip(pred, True)}
    assert all(violations(to).empty for to in repaired.values())
    return repaired


def costs(truth: Predictions, pred: Predictions, repaired: dict, q) -> pd.DataFrame:
    "Contradictory studies, expected and realised cost of each repair of one set of predictions."
    counts = pred.images.groupby(level=0, sort=False).size().reindex(truth.exams.index)
    weights = len(truth.exams) + IMAGE_WEIGHT * (counts * expected_positive_share(truth)).sum()
    before, contradictory = competition_loss(truth, pred), violations(pred)[STUDY].nunique()
    return pd.DataFrame({name: {
        "contradictory before": contradictory, "loss before": before,
        "expected cost": expected_cost(pred, to, q).sum() / weights,
        "realised cost": competition_loss(truth, to) - before} for name, to in repaired.items()}).T


def simulated(studies: int, slices: tuple, skill: float, seed: int) -> pd.DataFrame:
    "The costs for a simulated model."
    oof_truth, truth = simulate_truth(studies, slices, seed), simulate_truth(studies, slices, seed + 1000)
    oof, _ = simulate_model(oof_truth, skill, seed)
    pred, q = simulate_model(truth, skill, seed)
    share = fit_positive_share(oof, oof_truth)
    repaired = {"exact, true expected q": make_consistent(pred, q)} | repairs(pred, share)
    return costs(truth, pred, repaired, q)


def demo_blends(folder: Path) -> dict:  # what -> (truth, blend, q)
    "A demo's nested out-of-fold blend, and its blend of the held-out studies."
    if not (folder / "ensemble.json").exists():
        raise SystemExit(f"{folder} has no ensemble.json; give the folder of a finished `rsnape demo`")
    ensemble = Ensemble.load(folder / "ensemble.json")
    runs = sorted(path.parent for path in folder.glob("runs/*/config.json"))
    truth = Predictions.from_train_csv(folder / "competition" / "train.csv")
    test = pd.read_parquet(folder / "test.parquet")
    space, calibrated = ensemble.blend_weights.space, bool(ensemble.calibrations)
    _, oof = nested_blend(load_oofs(runs), truth, load_folds(runs), space, calibrated)
    plan = plan_predictions(runs, test, folder / "results", ensemble.views)
    if not plan.done().all(axis=None):
        raise SystemExit(f"{folder}/results lacks predictions of some test studies; run the demo again to complete it")
    pred = ensemble.blend(plan.gather(), test)
    held_out = Predictions.from_train_csv(folder / "competition" / "truth" / "test.csv").align(pred)
    return {"out of fold": (truth.align(oof), oof, ensemble.q), "held out": (held_out, pred, ensemble.q)}


def together(preds: list) -> Predictions:
    "Predictions of several competitions as one."
    return Predictions(pd.concat([pred.exams for pred in preds]), pd.concat([pred.images for pred in preds]))


def on_demos(folders: list):
    "The costs for trained models over all demos, with intervals of the difference to the exact repair."
    blends = [demo_blends(Path(folder)) for folder in folders]
    for what in blends[0]:
        truths, preds, fits = zip(*(blend[what] for blend in blends))
        repaired = [repairs(pred, q) for pred, q in zip(preds, fits)]
        repaired = {name: together([each[name] for each in repaired]) for name in repaired[0]}
        truth, pred, q = together(truths), together(preds), pd.concat([q(pred) for pred, q in zip(preds, fits)])
        table, draws = costs(truth, pred, repaired, q), resample(len(truth.exams))
        exact = study_losses(truth, repaired["exact, q fitted on OOF"]).total(draws)
        more = {name: study_losses(truth, to).total(draws) - exact for name, to in repaired.items()}
        table["more than exact"] = table["realised cost"] - table["realised cost"].iloc[0]
        table["at least"], table["at most"] = (pd.Series({name: np.quantile(d, level) for name, d in more.items()})
                                               for level in (.05, .95))
        print(f"\n{what}: {len(truth.exams)} studies of {len(folders)} demos, loss {table['loss before'].iloc[0]:.4f}, "
              f"{table['contradictory before'].iloc[0]:.0f} contradict themselves")
        print(table.drop(columns=["contradictory before", "loss before"]).round(5).to_string())
        print(summary(table))


def summary(table: pd.DataFrame) -> str:
    "State whether the exact repair costs at most as much as the usual ones."
    rivals = table[table.index.str.startswith("clip")]
    cheapest = rivals["realised cost"].idxmin()
    holds = bool((rivals["more than exact"] >= 0).all())
    sure = "; beyond chance" if holds and (rivals["at least"] > 0).all() else \
        "; within chance" if (rivals["at least"] <= 0).any() and (rivals["at most"] >= 0).all() else ""
    return (f"SUMMARY: the exact repair's realised cost, {table['realised cost'].iloc[0]:+.5f}, is "
            f"{'AT MOST' if holds else 'MORE THAN'} that of the heuristics (the cheapest: {cheapest}, "
            f"{rivals['realised cost'].min():+.5f}){sure}")


def in_turns(functions: dict, repeat: int) -> pd.DataFrame:
    "Minimum CPU and wall seconds of each function; calls are interleaved."
    times = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return pd.DataFrame({name: np.min(t, axis=0) for name, t in times.items()}, ["CPU s", "wall s"]).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2167)
    parser.add_argument("--median-slices", type=int, default=230)
    parser.add_argument("--seeds", type=int, default=4, help="test sets to average over")
    parser.add_argument("--skills", type=float, nargs="+", default=[.7, 1., 1.3])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--demos", nargs="+", help="folders of finished demos, instead of simulated models")
    args = parser.parse_args()
    if args.demos:
        return on_demos(args.demos)
    slices = (min(63, args.median_slices), args.median_slices, max(1083, args.median_slices))
    for skill in args.skills:
        tables = [simulated(args.studies, slices, skill, seed) for seed in range(1, args.seeds + 1)]
        mean = sum(tables) / len(tables)
        print(f"\nskill {skill}: loss {mean['loss before'].iloc[0]:.4f}, {mean['contradictory before'].iloc[0]:.0f} of "
              f"{args.studies} studies contradict themselves; mean of {args.seeds} test sets")
        mean["ratio to fitted q"] = mean["realised cost"] / mean["realised cost"]["exact, q fitted on OOF"]
        print(mean.drop(columns=["contradictory before", "loss before"]).round(5).to_string())

    truth = simulate_truth(args.studies, slices, 99)
    pred, q = simulate_model(truth)
    exact, slow = make_consistent(pred, q), loop(pred, q)
    assert np.array_equal(exact.exams, slow.exams) and np.array_equal(exact.images, slow.images)
    table = in_turns({"make_consistent": lambda: make_consistent(pred, q), "violations": lambda: violations(pred),
                      "clip, study by study": lambda: clip(pred, False),
                      "all combinations, study by study": lambda: loop(pred, q)}, args.repeat)
    table["ratio"] = table["wall s"] / table.loc["make_consistent", "wall s"]
    print(f"\n{len(pred.exams)} studies, {len(pred.images)} slices\n{table.round(3).to_string()}")


if __name__ == "__main__":
    main()
