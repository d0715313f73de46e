"""A rerun in small: thousands of slices from DICOM to submission.csv, and whether memory and time behave.

A test set of made-up studies, twice as large each time, goes through the whole path of prediction: scan, read, keep,
four small untrained models in two frameworks, blend, consistency, submission. Time must grow like the slices, memory
must not grow. The files of a few studies stand for all of them, under names of their own, so that 20,000 slices need no
10 GB; they are in the page cache, so a slow disk is not measured.

    python benchmarks/rerun.py                  # up to 20,000 slices
    python benchmarks/rerun.py --slices 100000
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rsnape_kit.labels import SERIES, SLICE, STUDY
from rsnape_kit.phantom import make_competition
from rsnape_kit.recipes import RECIPES
from rsnape_kit.settings import change
from rsnape_kit.tables import sample_submission, slice_index

SMALL = {"efficientnet": ["pixels.size=32", "network.width=.25"], "resnet3d": ["pixels.size=32", "network.width=.125"],
         "efficientnet3d": ["pixels.size=32", "network.width=.25"], "petaformer": ["size=32", "net.width=.125"]}


def make_run(folder: Path, model: str):
    "A run folder with untrained weights; in this process."
    from rsnape_kit.runs import open_run

    config = change(replace(RECIPES["quick"][model], seed=0), SMALL[model])
    run = open_run(folder / config.name, config)
    if model == "petaformer":
        import torch

        from rsnape_kit.simulate import simulate_truth
        from rsnape_kit.train_torch import new_model
        torch.save(new_model(config, simulate_truth(50, (3, 6, 9))).state_dict(), run / "weights.pt")
    else:
        from rsnape_kit.config import build_model
        from rsnape_kit.models.backend import save_weights
        save_weights(build_model(config), run / "best.npz")


def make_test_set(folder: Path, made: Path, slices: int, per_study: int):
    "A competition folder whose test set has so many slices; files are links to a few."
    series = [sorted(path.rglob("*.dcm")) for path in sorted((made / "test").iterdir())]
    rows = []
    for i in range(-(-slices // per_study)):
        study, files = f"{i:012x}", series[i % len(series)]
        rows += [(study, f"5e{i:010x}", f"{i:06x}{k:06x}", str(path)) for k, path in enumerate(files)]
    table = pd.DataFrame(rows, columns=[STUDY, SERIES, SLICE, "path"])
    table.drop(columns="path").to_csv(folder / "test.csv", index=False)
    sample_submission(slice_index(table)).to_csv(folder / "sample_submission.csv", index=False)
    table.to_parquet(folder / "files.parquet")


def rerun(folder: Path, made: Path, runs: list, out: Path):
    "Submit one test set; in this process and its children."
    from rsnape_kit.dicom import scan
    from rsnape_kit.submit import submit

    began, cpu = time.perf_counter(), os.times()
    files = pd.read_parquet(folder / "files.parquet")
    known = scan(made / "test").assign(path=lambda t: t["path"].map(lambda p: str(Path(made / "test", p))))
    table = files.merge(known.drop(columns=[STUDY, SERIES, SLICE]), on="path")
    table = table.sort_values([STUDY, "order"], ignore_index=True)
    draft = submit(runs, None, table, float("inf"), competition=folder, out=out / "submission.csv", work=out,
                   progress=False)
    done = os.times()
    spent = sum(done[:4]) - sum(cpu[:4])
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {"slices": len(table), "studies": table[STUDY].nunique(), "wall, s": time.perf_counter() - began,
              "CPU, s": spent, "own peak, MB": peaks[0], "largest child, MB": peaks[1],
              "answered": draft.studies["by every model"]}
    print(json.dumps(result))


def child(*words) -> str:
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=20_000, help="of the largest test set")
    parser.add_argument("--per-study", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=list(SMALL), choices=list(SMALL))
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rerun", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_run(Path(args.make[0]), args.make[1])
    if args.rerun:
        folder, made, out, *runs = args.rerun
        return rerun(Path(folder), Path(made), runs, Path(out))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        made = make_competition(Path(scratch, "made"), 1, 4, args.per_study, difficulty="demo", clean=True)
        for model in args.models:
            child("--make", Path(scratch, "runs"), model)
        runs = sorted(Path(scratch, "runs").iterdir())
        for slices in (args.slices // 4, args.slices // 2, args.slices):
            folder = Path(scratch, str(slices))
            folder.mkdir()
            make_test_set(folder, made, slices, args.per_study)
            rows.append(json.loads(child("--rerun", folder, made, folder / "out", *runs).splitlines()[-1]))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    more = table.diff() / table["slices"].diff().to_numpy()[:, None]
    table["CPU ms a further slice"], table["wall ms a further slice"] = more["CPU, s"] * 1000, more["wall, s"] * 1000
    first, last = table["CPU ms a further slice"].iloc[[1, -1]]
    print(table.round(2).to_string(index=False))
    grown = table["largest child, MB"].iloc[-1] / table["largest child, MB"].iloc[0]
    print(f"\nfour times the slices: the largest process is {grown:.2f} times as large, "
          f"a further slice costs {last / first:.2f} times the CPU")


if __name__ == "__main__":
    main()
