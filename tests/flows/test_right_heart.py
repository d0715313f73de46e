"The model of the right heart from training to the blend: it learns from studies with an embolus, and predicts all."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import warm

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, RV_LV, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions, positive_studies, ratio_only
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.ensemble import fit_ensemble
from rsnape_kit.inference.keras_predictor import infer
from rsnape_kit.inference.predict_runs import load_oofs, predict
from rsnape_kit.runs.config import Phase
from rsnape_kit.runs.recipes import DEMO
from rsnape_kit.testing import ArraySource, simulate_model
from rsnape_kit.training.trainer import train

STUDIES, SLICES, SIZE = 40, 6, 32
CONFIG = replace(DEMO["rvlv"], network=dict(width=.125, depth=.2, momentum=.7), frames=4, batch=10, steps=10, tta=0,
                 phases=(Phase(1, 1e-3), Phase(2, 1e-2, 1e-3, False)), validate=3,
                 pixels=replace(DEMO["rvlv"].pixels, size=SIZE))


def hearts(seed=0):
    "Pixels, table and truth: studies of two discs, one large if RV/LV is at least 1; two of three have an embolus."
    rng = np.random.default_rng(seed)
    wide, positive = rng.random(STUDIES) < .5, np.arange(STUDIES) % 3 > 0
    y, x = np.mgrid[:SIZE, :SIZE]
    disc = lambda column, radius: (y - 16)**2 + (x - column)**2 < radius**2  # noqa: E731
    names = np.repeat([f"s{i:02}" for i in range(STUDIES)], SLICES)
    table = pd.DataFrame({STUDY: names, SLICE: [f"{name}.{k % SLICES}" for k, name in enumerate(names)],
                          "order": np.tile(np.arange(SLICES), STUDIES)})
    pixels = rng.normal(0, 60, (STUDIES, SLICES, SIZE, SIZE))
    for i in range(STUDIES):
        pixels[i, :, disc(10, 6 if wide[i] else 3)] = pixels[i, :, disc(22, 5)] = 900
    exams = pd.DataFrame(0., pd.Index(sorted(set(names)), name=STUDY), EXAM_LABELS)
    exams["negative_exam_for_pe"], exams["rightsided_pe"] = ~positive * 1., positive * 1.
    exams[RV_LV[0]], exams[RV_LV[1]] = positive & wide, positive & ~wide
    images = pd.Series(np.repeat(positive, SLICES) * (np.tile(np.arange(SLICES), STUDIES) < 2) * 1., slice_index(table))
    return pixels.reshape(-1, SIZE, SIZE).astype(np.int16), table, Predictions(exams.astype(float), images)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Source, truth, folds, and the run of a fold."
    warm.server("both")  # before this process uses a framework
    pixels, table, truth = hearts()
    source, folds = ArraySource(pixels, table), make_folds(truth.exams.index, truth, 2)
    out = tmp_path_factory.mktemp("runs")
    run = train("rvlv", source, 0, CONFIG, truth=truth, folds=folds, out=out, progress=False)
    return source, truth, folds, run


def test_it_learns_the_ratio_and_predicts_every_study(world):
    source, truth, folds, run = world
    truth, oof = truth.select(folds.valid(0)), load_oofs([run])["rvlv"]
    assert set(oof.exams.index) == set(truth.exams.index) and ratio_only(oof)
    np.testing.assert_allclose(oof.exams[list(RV_LV)].sum(axis=1), 1)
    shown = positive_studies(truth).exams
    p, wide = oof.exams.loc[shown.index, RV_LV[0]], shown[RV_LV[0]] == 1
    assert np.mean(p[wide].to_numpy()[:, None] > p[~wide].to_numpy()) > .9  # the AUC
    history = pd.read_csv(run / "history.csv")
    loss = -np.log(np.where(wide, p, 1 - p)).mean()
    assert history.val_loss.min() == pytest.approx(loss, rel=.3)  # validated with one pass, predicted with two


def test_studies_without_an_embolus_change_nothing(world, tmp_path):
    "Other pixels and labels of theirs give the same weights, to the bit."
    source, truth, folds, run = world
    negative = truth.exams.index.difference(positive_studies(truth).exams.index)
    pixels, exams = source.slices.copy(), truth.exams.copy()
    pixels[source.table[STUDY].isin(negative)] = 400
    exams.loc[negative[::2], ["negative_exam_for_pe", "indeterminate"]] = 0., 1.
    other = train("rvlv", ArraySource(pixels, source.table), 0, CONFIG, truth=Predictions(exams, truth.images),
                  folds=folds, out=tmp_path / "runs", progress=False)
    one, two = (np.load(run / "best.npz") for run in (run, other))
    assert len(one.files) > 10 and all((one[name] == two[name]).all() for name in one.files)


def test_worker_processes_predict_as_this_one_and_the_blend_takes_the_product(world, tmp_path):
    source, truth, folds, run = world
    with warm.workers():
        pred = predict([run], source, out=tmp_path / "results", progress=False)["rvlv"]
    assert ratio_only(pred) and len(pred.images) == len(source.table)
    single = infer(run, source).align(pred)
    np.testing.assert_allclose(pred.exams[list(RV_LV)], single.exams[list(RV_LV)], rtol=1e-4, atol=1e-6)
    oof = load_oofs([run])["rvlv"]
    truth = truth.select(oof.exams.index)
    whole = simulate_model(truth, .5)[0]
    losses = [fit_ensemble(members, truth).blend_weights.losses["blend"]
              for members in ({"whole": whole, "rvlv": oof}, {"whole": whole})]
    assert all(losses[0][label] < losses[1][label] for label in RV_LV)
