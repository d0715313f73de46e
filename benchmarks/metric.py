"""Tables and metric at the size of the competition: 7,279 studies, 1.8 million slices.

Prints, side by side in one run: reading train.csv, the loss with and without a shared index, and the plain
per-study loop that each is held against; then what importing the library costs beside numpy and pandas alone.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from rsnape_kit.competition.labels import (
    AUX_LABELS,
    EXAM_LABELS,
    EXAM_WEIGHTS,
    IMAGE_LABEL,
    IMAGE_WEIGHT,
    SERIES,
    SLICE,
    STUDY,
)
from rsnape_kit.competition.metric import competition_loss, log_loss
from rsnape_kit.competition.predictions import Predictions


def make_train(studies: int, rng) -> pd.DataFrame:
    "A table as large and as shuffled as train.csv."
    sizes = np.clip(rng.lognormal(np.log(236), .35, studies).astype(int), 63, 1083)
    ids = rng.integers(16**11, 16**12, studies + sizes.sum())
    names = np.array([f"{i:012x}" for i in np.unique(ids)], object)
    rng.shuffle(names)
    study = np.repeat(np.arange(studies), sizes)
    positive = rng.random(studies) < .3
    exams = (rng.random((studies, 13)) < .2).astype(int)
    table = pd.DataFrame({STUDY: names[study], SERIES: names[study], SLICE: names[studies:][:len(study)],
                          IMAGE_LABEL: ((rng.random(len(study)) < .18) & positive[study]).astype(int)})
    table[list(EXAM_LABELS + AUX_LABELS)] = exams[study]
    return table.sample(frac=1, random_state=0)


def loop_loss(truth: Predictions, pred: Predictions) -> float:
    "The formula study by study, as most write it first."
    total = weights = 0.
    by_study = pred.images.groupby(level=0, sort=False)
    predicted = {study: values.to_numpy() for study, values in by_study}
    w = np.array(list(EXAM_WEIGHTS.values()))
    for study, y in truth.images.groupby(level=0, sort=False):
        exam_y, exam_p = (part.exams.loc[study, list(EXAM_LABELS)].to_numpy() for part in (truth, pred))
        share = y.mean()
        total += log_loss(exam_y, exam_p) @ w + IMAGE_WEIGHT * share * log_loss(y, predicted[study]).sum()
        weights += w.sum() + IMAGE_WEIGHT * share * len(y)
    return total / weights


def timed(function, repeat=3):
    "Result and the least wall seconds of a few calls."
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def import_seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
               for _ in range(3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=7279)
    studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        table = make_train(studies, rng)
        table.to_csv(path, index=False)
        rows = len(table)
        del table
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        truth, reading = timed(lambda: Predictions.from_train_csv(path), 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pairs = pd.read_csv(path, usecols=[STUDY, SLICE])
    _, tuples = timed(lambda: pd.MultiIndex.from_tuples(list(zip(pairs[STUDY], pairs[SLICE]))), 1)
    pred = Predictions(truth.exams[list(EXAM_LABELS)] * 0 + rng.uniform(.01, .99, (studies, 9)),
                       truth.images * 0 + rng.uniform(.01, .99, rows))
    shuffled = Predictions(pred.exams, pred.images.sample(frac=1, random_state=0))
    shared_loss, shared = timed(lambda: competition_loss(truth, pred))
    other_loss, other = timed(lambda: competition_loss(truth, shuffled))
    slow_loss, slow = timed(lambda: loop_loss(truth, pred), 1)
    assert np.allclose([shared_loss, other_loss], slow_loss, rtol=1e-10)

    print(f"{studies} studies, {rows} slices")
    print(f"{'read train.csv into Predictions':42}{reading:8.2f} s   (peak {peak:.2f} GiB, {before:.2f} before)")
    print(f"{'only the index, from tuples':42}{tuples:8.2f} s")
    print(f"{'competition_loss, shared index':42}{shared:8.3f} s   {slow / shared:6.0f}x the loop")
    print(f"{'competition_loss, another row order':42}{other:8.3f} s   {slow / other:6.0f}x the loop")
    print(f"{'per-study loop':42}{slow:8.2f} s")
    alone = import_seconds("import numpy, pandas, pyarrow.csv")
    print(f"{'import rsnape_kit.competition.priors':42}{import_seconds('import rsnape_kit.competition.priors'):8.2f} s")
    print(f"{'import numpy, pandas, pyarrow.csv':42}{alone:8.2f} s")


if __name__ == "__main__":
    main()
