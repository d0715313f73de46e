"""Score against the cost of training: every model and useful blend of finished demos, as a table and a picture.

    rsnape demo --folder build/demo0 --seed 0        # and so on for more seeds
    python benchmarks/score_and_cost.py build/demo0 build/demo1 build/demo2
    python benchmarks/score_and_cost.py --small      # makes a quick demo in a scratch folder; learns nothing

The score is the competition's loss on the demo's held-out studies, of calibrated predictions blended with weights
fitted out of fold. A blend costs what its members cost together; a member that reads the run of another, or starts from
it, costs that run too. CPU minutes are the training processes' own, from history.csv: without their start, compilation
included. FLOPs are counted from the layers, three forward passes a sample. Both are sums over the folds.
"""
import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

import rsnape_kit as rk
from rsnape_kit.competition.labels import STUDY
from rsnape_kit.competition.tables import read_parquet
from rsnape_kit.demo import SIZES, demo, score
from rsnape_kit.inference.predict_runs import load_folds, load_oofs, load_views, plan_predictions
from rsnape_kit.runs.folder import load_config
from rsnape_kit.runs.machine import find_costs
from rsnape_kit.runs.recipes import BACKBONE_FROM, IMAGE_RUN_FROM

NEEDS = BACKBONE_FROM | IMAGE_RUN_FROM  # model -> model that is trained first


def run_flops(run: Path, image_run: Path, slices: int, studies: int) -> float:
    "Return the operations of a run's training; slices: held out, studies: of the training."
    config = load_config(run)
    if config.entry.kind == "sequence":  # features of the held-out slices; the networks add little
        return config.views * slices * find_costs(load_config(image_run)).flops
    epochs = len(pd.read_csv(run / "history.csv"))
    per_epoch = getattr(config, "steps", None) or studies // config.batch
    samples = config.batch * per_epoch * epochs
    warmup = config.slice_warmup
    frames = getattr(config, "frames", None) or getattr(config, "groups", 1)
    single = warmup.steps * warmup.batch * find_costs(config).flops / frames if warmup else 0
    return 3 * (samples * find_costs(config).flops + single)


def costs(folder: Path, models: list) -> pd.DataFrame:
    "Return CPU minutes and TFLOP of each model's own training, over all folds."
    held_out = read_parquet(folder / "train.parquet").groupby(STUDY).size()
    rows = {}
    for model in models:
        runs = sorted((folder / "runs").glob(f"{model}-fold*"))
        cpu = sum(pd.read_csv(run / "history.csv").cpu_seconds.sum() for run in runs)
        slices, studies = held_out.sum() // len(runs), len(held_out) * (len(runs) - 1) // len(runs)
        flops = sum(run_flops(run, run.with_name(run.name.replace(model, "efficientnet", 1)), slices, studies)
                    for run in runs)
        rows[model] = {"CPU minutes": cpu / 60, "TFLOP": flops / 1e12}
    return pd.DataFrame.from_dict(rows, orient="index")


def total(own: pd.DataFrame, members) -> pd.Series:
    "Return what members cost together, with the runs that they need."
    needed = set(members) | {NEEDS[model] for model in members if model in NEEDS}
    return own.loc[sorted(needed & set(own.index))].sum()


def score_blends(folder: Path) -> pd.DataFrame:
    "Return score, gain and costs of every model and every blend of a finished demo."
    runs = sorted(path for path in (folder / "runs").iterdir() if path.is_dir())
    train, test = (read_parquet(folder / f"{split}.parquet") for split in ("train", "test"))
    truth, held_out = (rk.Predictions.from_train_csv(folder / "competition" / path)
                       for path in ("train.csv", "truth/test.csv"))
    oofs, views, folds = load_oofs(runs), load_views(runs), load_folds(runs)
    preds = plan_predictions(runs, test, folder / "results", views).gather()
    priors = {"constant prior": rk.constant_prior(truth, test), "position prior": rk.position_prior(truth, train, test)}
    blends = {}
    for size in range(1, len(oofs) + 1):
        for members in combinations(oofs, size):
            some = [{name: each[name] for name in members} for each in (oofs, preds, views)]
            if not any(oof.exams.notna().all(axis=None) for oof in some[0].values()):
                continue  # predicts slices only
            blends[members] = rk.fit_ensemble(some[0], truth, folds, views=some[2]).blend(some[1], test)
    own = costs(folder, list(oofs))
    spent = pd.DataFrame({" + ".join(members): total(own, members) for members in blends}).T
    return score({" + ".join(members): pred for members, pred in blends.items()}, priors, held_out).join(spent)


def picture(table: pd.DataFrame, path: Path):
    "Draw score against cost, a dot for each blend; names of models, and of blends better than all that are cheaper."
    from matplotlib.figure import Figure

    figure, shown = Figure(figsize=(7, 4.4), dpi=110, layout="tight"), table.dropna(subset=["CPU minutes"])
    axes, best = figure.subplots(), np.inf
    axes.scatter(shown["CPU minutes"], shown["loss"], s=14, color="lightsteelblue")
    front = []
    shown = shown.assign(members=shown.index.str.count(r"\+"))
    for name, row in shown.sort_values(["CPU minutes", "members"]).iterrows():
        x, y = row["CPU minutes"], row["loss"]
        if y < best - .0005 or "+" not in name:
            right = x > shown["CPU minutes"].mean()
            axes.annotate(name, (x, y), fontsize=7, xytext=(-4 if right else 4, 5), textcoords="offset points",
                          ha="right" if right else "left")
        if y < best - .0005:
            best = y
            front.append((x, best))
    axes.step(*zip(*front), where="post", color="steelblue", lw=1)
    axes.axhline(table["loss"]["position prior"], color="gray", ls=":", lw=1)
    axes.annotate("position prior", (axes.get_xlim()[0], table["loss"]["position prior"]), fontsize=6, color="gray")
    axes.set(xlabel="CPU minutes of training", ylabel="competition loss, held-out studies")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="finished demos, one a seed")
    parser.add_argument("--out", type=Path, default=Path("build/score_and_cost.png"), help="picture to write")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.small:
            args.folders = [Path(scratch, "demo")]
            demo(args.folders[0], SIZES["quick"])
        tables = [score_blends(folder) for folder in args.folders]
    mean = sum(tables) / len(tables)
    mean["loss, each seed"] = [" ".join(f"{table['loss'][name]:.3f}" for table in tables) for name in mean.index]
    print(mean.sort_values("loss").round(3).to_string(na_rep="-"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture(mean, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
