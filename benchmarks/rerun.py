"""A rerun in small: thousands of slices from DICOM to submission.csv, and whether memory and time behave.

A test set of synthetic studies, twice as large each time, goes through the whole path of prediction: scan, read, keep,
four small untrained models in two frameworks, blend, consistency, submission. Time must grow like the slices, memory
must not grow. Every slice is a file of its own; four studies are made and the others are copies of them with ids of
their own, of 256 x 256 pixels, so that 20,000 slices take 3 GB. They are in the page cache, so a slow disk is not
measured.

    python benchmarks/rerun.py                  # up to 20,000 slices
    python benchmarks/rerun.py --slices 100000  # 13 GB
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from rsnape_kit.competition.labels import SERIES, SLICE, STUDY
from rsnape_kit.competition.tables import read_csv, sample_submission, slice_index
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.runs.recipes import RECIPES, override_settings

SMALL = {"efficientnet": ["pixels.size=32", "network.width=.25"], "resnet3d": ["pixels.size=32", "network.width=.125"],
         "efficientnet3d": ["pixels.size=32", "network.width=.25"],
         "petaformer": ["pixels.size=32", "network.width=.125"]}


def make_run(folder: Path, model: str):
    "A run folder with untrained weights; in this process."
    from rsnape_kit.models.registry import build_model
    from rsnape_kit.runs.folder import open_run

    config = override_settings(replace(RECIPES["quick"][model], seed=0), SMALL[model])
    run = open_run(folder / config.name, config)
    if model == "petaformer":
        import torch

        from rsnape_kit.testing import simulate_truth
        torch.save(build_model(config, simulate_truth(50, (3, 6, 9))).state_dict(), run / "weights.pt")
    else:
        from rsnape_kit.models.keras_backend import save_weights
        save_weights(build_model(config), run / "best.npz")


def make_test_set(folder: Path, made: Path, slices: int, per_study: int):
    "A competition folder whose test set has so many slices, each a copy with its own ids."
    series = [sorted(path.rglob("*.dcm")) for path in sorted((made / "test").iterdir())]
    rows = []
    for i in range(-(-slices // per_study)):
        study, name = f"{i:012x}", f"5e{i:010x}"
        (folder / "test" / study / name).mkdir(parents=True)
        for k, path in enumerate(series[i % len(series)]):
            new, raw = f"{i:06x}{k:06x}", path.read_bytes()
            for old, its in zip((*path.parts[-3:-1], path.stem), (study, name, new)):
                raw = raw.replace(old.encode(), its.encode())
            (folder / "test" / study / name / f"{new}.dcm").write_bytes(raw)
            rows.append((study, name, new))
    save_lists(folder, pd.DataFrame(rows, columns=[STUDY, SERIES, SLICE]))


def save_lists(folder: Path, table: pd.DataFrame):
    "test.csv and sample_submission.csv."
    table.to_csv(folder / "test.csv", index=False)
    sample_submission(slice_index(table)).to_csv(folder / "sample_submission.csv", index=False)


def make_part(folder: Path, whole: Path, slices: int):
    "The same with the first studies only; links, no copies."
    table = read_csv(whole / "test.csv")
    studies = table[STUDY].unique()[:round(table[STUDY].nunique() * slices / len(table))]
    for study in studies:
        shutil.copytree(whole / "test" / study, folder / "test" / study, copy_function=os.link)
    save_lists(folder, table[table[STUDY].isin(studies)])


def rerun(folder: Path, runs: list, out: Path):
    "Submit one test set; in this process and its workers."
    from rsnape_kit.kaggle.submitter import submit

    began, cpu, test = time.perf_counter(), os.times(), read_csv(folder / "test.csv")
    state = submit(runs, None, None, float("inf"), competition=folder, out=out / "submission.csv", work=out,
                   progress=False)
    done = os.times()
    spent = sum(done[:4]) - sum(cpu[:4])
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {"slices": len(test), "studies": test[STUDY].nunique(), "scan, s": state.seconds["scan"],
              "wall, s": time.perf_counter() - began,
              "CPU, s": spent, "own peak, MB": peaks[0], "largest worker, MB": peaks[1],
              "predicted": state.studies["by every model"]}
    print(json.dumps(result))


def in_new_process(*words) -> str:
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
        folder, out, *runs = args.rerun
        return rerun(Path(folder), runs, Path(out))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        made = make_competition(Path(scratch, "made"), 1, 4, args.per_study, 256, difficulty="demo", clean=True)
        for model in args.models:
            in_new_process("--make", Path(scratch, "runs"), model)
        runs = sorted(Path(scratch, "runs").iterdir())
        whole = Path(scratch, "whole")
        make_test_set(whole, made, args.slices, args.per_study)
        for slices in (args.slices // 4, args.slices // 2, args.slices):
            folder = Path(scratch, str(slices))
            make_part(folder, whole, slices)
            rows.append(json.loads(in_new_process("--rerun", folder, folder / "out", *runs).splitlines()[-1]))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    more = table.diff() / table["slices"].diff().to_numpy()[:, None]
    table["CPU ms a further slice"], table["wall ms a further slice"] = more["CPU, s"] * 1000, more["wall, s"] * 1000
    first, last = table["CPU ms a further slice"].iloc[[1, -1]]
    print(table.round(2).to_string(index=False))
    grown = table["largest worker, MB"].iloc[-1] / table["largest worker, MB"].iloc[0]
    print(f"\nfour times the slices: the largest process is {grown:.2f} times as large, "
          f"a further slice costs {last / first:.2f} times the CPU")


if __name__ == "__main__":
    main()
