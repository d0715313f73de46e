"Predictions with many runs of two frameworks equal those of single runs, with damaged studies, deadlines and kills."
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from broken_studies import BROKEN, break_study
from small_runs import keras_run, torch_run

from rsnape_kit.competition.labels import EXAM_LABELS, STUDY
from rsnape_kit.dicom.slices import scan
from rsnape_kit.inference.keras_predictor import infer as infer_keras
from rsnape_kit.inference.keras_predictor import load_run, make_views, predict_batches
from rsnape_kit.inference.predict_runs import plan_predictions, predict, run_plan
from rsnape_kit.inference.results import load_result
from rsnape_kit.inference.torch_predictor import CLIP
from rsnape_kit.inference.torch_predictor import infer as infer_torch
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.training.torch_trainer import predict_held_out
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.utils.files import read_json, write_json
from rsnape_kit.utils.processes import worker_environ


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Five studies of nine slices, and runs: two folds of an image model, a volume model, a PetaFormer."
    warm.server("both")  # before this process uses a framework
    folder = tmp_path_factory.mktemp("world")
    made = make_competition(folder / "competition", 1, 5, slices=9, difficulty="demo")
    runs = {"efficientnet": [keras_run(folder / "runs", "efficientnet", fold) for fold in (0, 1)],
            "resnet3d": [keras_run(folder / "runs", "resnet3d")], "petaformer": [torch_run(folder / "runs")]}
    table = scan(made / "test")
    single = {run: (infer_torch if name == "petaformer" else infer_keras)(run, DicomSource(table))
             for name, folders in runs.items() for run in folders}
    return folder, table, runs, single


@pytest.fixture
def forked():
    "Workers start in forks of a process with all frameworks imported; the test of killed parents starts them anew."
    with warm.workers():
        yield


def odds_mean(*p):
    odds = np.prod([q / (1 - q) for q in p], axis=0) ** (1 / len(p))
    return odds / (1 + odds)


def agrees(pred, single):
    "Compare predictions with the mean of single runs; batches of another composition change the last digits."
    labels = [label for label in pred.exams if pred.exams[label].notna().any()]
    single = [part.align(pred) for part in single]
    np.testing.assert_allclose(pred.images, odds_mean(*(part.images for part in single)), rtol=1e-4, atol=1e-5)
    if labels:
        exams = odds_mean(*(part.exams[labels] for part in single))
        np.testing.assert_allclose(pred.exams[labels], exams, rtol=1e-4, atol=1e-5)
    return labels


def test_all_at_once_equals_infer_run_by_run_and_both_frameworks_read_a_study_once(world, forked, tmp_path):
    folder, table, runs, single = world
    every = [run for folders in runs.values() for run in folders]
    work = plan_predictions(every, table, tmp_path / "results")
    seconds = run_plan(work, scratch=tmp_path / "scratch", gpus=[], progress=False)
    assert list(seconds) == ["keras", "torch"]
    preds = work.gather()
    assert {name: len(agrees(pred, [single[run] for run in runs[name]])) for name, pred in preds.items()} == {
        "efficientnet": 0, "resnet3d": 9, "petaformer": 13}
    kept = [path for path in (tmp_path / "scratch").iterdir() if path.suffix != ".lock"]
    assert {path.name for path in kept} == set(work.index.keys.values())
    for path in table.path[1:]:  # removed: the studies can only come from the scratch folder now
        shutil.move(path, f"{path}.away")
    try:
        again = plan_predictions(runs["petaformer"], table, tmp_path / "others")
        run_plan(again, scratch=tmp_path / "scratch", gpus=[], progress=False)
    finally:
        for path in table.path[1:]:
            shutil.move(f"{path}.away", path)
    pd.testing.assert_series_equal(again.gather()["petaformer"].images, preds["petaformer"].images)


@pytest.mark.slow
def test_two_processes_give_the_same_predictions_and_share_the_decoded_studies(world, forked, tmp_path):
    "As with two GPUs; the names used here have no effect on the frameworks."
    folder, table, runs, single = world
    both = [runs["resnet3d"][0], runs["petaformer"][0]]
    work = plan_predictions(both, table, tmp_path / "results")
    seconds = run_plan(work, scratch=tmp_path / "scratch", gpus=["0", "1"], progress=False)
    assert list(seconds) == ["keras and torch"]
    for name, pred in work.gather().items():
        agrees(pred, [single[run] for run in runs[name]])
    work = plan_predictions(runs["petaformer"], table, tmp_path / "one framework")  # one framework takes both
    run_plan(work, gpus=["0", "1"], progress=False)
    agrees(work.gather()["petaformer"], [single[runs["petaformer"][0]]])
    assert {path.name for path in (tmp_path / "one framework").glob("*.log")} == {"torch-0.log", "torch-1.log"}


def test_augmented_views_do_not_depend_on_the_other_studies_and_are_kept_one_by_one(world, forked, tmp_path):
    folder, table, runs, _ = world
    studies = table[STUDY].unique()

    def predictions(**how):
        return predict(runs["petaformer"], table, progress=False, **how)["petaformer"]

    whole = predictions(tta=2, out=tmp_path / "a")
    one = predictions(tta=2, out=tmp_path / "b", studies=studies[3:4])
    pd.testing.assert_series_equal(one.images, whole.select(studies[3:4]).images, check_exact=True)
    results = {path: path.stat().st_mtime_ns for path in tmp_path.glob("a/petaformer*/*/*")}
    plain = predictions(out=tmp_path / "a")  # uses the plain views alone, which are there
    assert np.abs(plain.images - whole.images).max() > 1e-6 and len(results) == 15
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("a/petaformer*/*/*")} == results


def with_views(run: Path, folder: Path, tta: int) -> Path:
    "A copy of a run whose settings have another number of augmented views."
    copy = Path(shutil.copytree(run, folder / run.name, dirs_exist_ok=True))
    content = read_json(copy / "config.json")
    content["settings"]["tta"] = tta
    write_json(copy / "config.json", content)
    return copy


def test_predict_gives_the_mean_that_training_gives_for_the_held_out_studies(world, forked, tmp_path):
    "Training adds up all views, as these functions do; `predict` keeps each view and averages them later."
    folder, table, runs, _ = world
    source, studies = DicomSource(table), sorted(table[STUDY].unique())[1:]
    settings = dict(loss="metric", exam_labels=1., exam_maxima=True, affine=AffineRange(flip=.5))
    maxima = keras_run(tmp_path / "maxima", "efficientnet", 2, **settings)
    chosen = [runs["efficientnet"][0], maxima, *runs["resnet3d"], *runs["petaformer"]]
    names = ["efficientnet", "maxima", "resnet3d", "petaformer"]
    certain = torch.load(chosen[-1] / "weights.pt")  # PetaFormer's probabilities reach their limits
    certain = {name: value * (40 if "exam_head" in name else 1) for name, value in certain.items()}
    networks = [load_run(run) for run in chosen[:-1]]
    for tta in (2, 0):
        own = [with_views(run, tmp_path / "runs", tta) for run in chosen]
        torch.save(certain, own[-1] / "weights.pt")
        views = [make_views(config, source, studies, range(1 + tta)) for config, _ in networks]
        held_out = {name: predict_batches(network, own_views, exam_maxima=name == "maxima")
                    for name, (_, network), own_views in zip(names, networks, views)}
        held_out["petaformer"] = predict_held_out(own[-1], source, studies)
        by_name = {name: [run] for name, run in zip(names, own)}
        preds = predict(by_name, table, out=tmp_path / "results", studies=studies, progress=False)
        assert preds["maxima"].exams.notna().sum(axis=1).eq(8).all()
        for name, pred in preds.items():
            expected = held_out[name].align(pred)
            np.testing.assert_allclose(pred.images, expected.images, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(pred.exams, expected.exams[list(pred.exams)], rtol=1e-4, atol=1e-6)
        exams = preds["petaformer"].exams.to_numpy()
        assert exams.min() > CLIP - 1e-9 and exams.max() < 1 - CLIP + 1e-9 and np.abs(exams - .5).max() > .49


def test_a_store_a_folder_and_a_table_give_the_same(world, forked, tmp_path):
    folder, table, runs, _ = world
    build_store(table, tmp_path / "store")
    sources = {"table": table, "folder": folder / "competition" / "test", "store": SliceStore(tmp_path / "store")}
    preds = {name: predict(runs["petaformer"], source, out=tmp_path / name, progress=False)["petaformer"]
             for name, source in sources.items()}
    for name in ("folder", "store"):
        pd.testing.assert_series_equal(preds[name].images, preds["table"].images, check_exact=True)


def test_results_of_other_weights_settings_or_slices_are_never_used(world, forked, tmp_path):
    folder, table, runs, _ = world
    run = shutil.copytree(runs["petaformer"][0], tmp_path / "run")
    studies = table[STUDY].unique()
    first = plan_predictions([run], table, tmp_path / "results")
    run_plan(first, progress=False)
    assert plan_predictions([run], table, tmp_path / "results").done().all(axis=None)
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    assert plan_predictions([moved], table, tmp_path / "results").done().all(axis=None)  # the run elsewhere
    grown = table[~((table[STUDY] == studies[0]) & (table["order"] == 8))]  # a slice less in the first study
    assert plan_predictions([run], grown, tmp_path / "results").done().iloc[:, 0].tolist() == [False] + [True] * 4
    torch_weights = run / "weights.pt"
    other = shutil.copytree(torch_run(tmp_path / "fresh", fold=3), tmp_path / "other") / "weights.pt"
    shutil.copy(other, torch_weights)
    assert not plan_predictions([run], table, tmp_path / "results").done().any(axis=None)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    "A competition in which all studies but the last are damaged, each in another way."
    folder = tmp_path_factory.mktemp("broken")
    made = make_competition(folder / "competition", 1, len(BROKEN) + 1, slices=8, difficulty="demo")
    studies = sorted(path.name for path in (made / "test").iterdir())
    for study, kind in zip(studies, BROKEN):
        break_study(kind, sorted(map(str, (made / "test" / study).rglob("*.dcm"))))
    return made, dict(zip(BROKEN, studies)), studies[-1]


def test_every_broken_study_is_predicted_or_reported(world, forked, broken, tmp_path):
    _, _, runs, _ = world
    made, studies, whole = broken
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both = [*runs["resnet3d"], *runs["petaformer"]]
        preds = predict(both, made / "test", out=tmp_path / "results", progress=False)
    for pred in preds.values():
        predicted = pred.exams[list(EXAM_LABELS)].notna().all(axis=1)
        assert predicted[whole]
        assert {kind: predicted.get(study) for kind, study in studies.items()} == BROKEN
        assert (pred.images.notna().groupby(level=0).all()[list(predicted.index)] == predicted).all()
        assert len(pred.images[studies["twice"]]) == 8 and len(pred.images[studies["one slice"]]) == 1
    assert any("had problems" in str(warning.message) for warning in caught)


def test_a_deadline_is_kept_and_what_was_done_counts(world, forked, tmp_path):
    folder, table, runs, single = world
    late = predict(runs["resnet3d"], table, out=tmp_path / "results", time_budget=0, progress=False)["resnet3d"]
    assert late.exams.isna().all(axis=None) and len(late.exams) == 5
    work = plan_predictions(runs["resnet3d"], table, tmp_path / "results")
    name, rows = next(iter(work.index.keys.values())), next(iter(work.index.rows.values()))
    full = predict(runs["resnet3d"], table, out=tmp_path / "full", progress=False)
    source = next((tmp_path / "full").glob("resnet3d*/view0")) / name
    shutil.copy(source, work.folders[str(runs["resnet3d"][0]), 0])
    again = predict(runs["resnet3d"], table, out=tmp_path / "results", time_budget=0, progress=False)["resnet3d"]
    assert again.exams.notna().all(axis=1).sum() == 1
    agrees(full["resnet3d"], [single[runs["resnet3d"][0]]])
    assert load_result(work.folders[str(runs["resnet3d"][0]), 0], name, len(rows)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_process_whose_parent_is_killed_ends_by_itself(world, tmp_path, how):
    "At once, in the middle of a study."
    folder, table, runs, _ = world
    table.to_parquet(tmp_path / "slices.parquet")
    code = f"""
import pandas as pd, os, signal, threading, time
from rsnape_kit.inference.predict_runs import predict
def end():
    while not list(__import__('pathlib').Path({str(tmp_path)!r}).glob('results/*.now')): time.sleep(.01)
    os.kill(os.getpid(), signal.{how})
threading.Thread(target=end, daemon=True).start()
predict([{str(runs['petaformer'][0])!r}], pd.read_parquet({str(tmp_path / 'slices.parquet')!r}),
        out={str(tmp_path / 'results')!r}, tta=200, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], env=worker_environ(), timeout=120)
    assert done.returncode == -signal.Signals[how]
    job = str(tmp_path / "results" / "torch-0.job")
    time.sleep(2)
    assert not any(job in cmdline for cmdline in _commands())
    work = plan_predictions(runs["petaformer"], table, tmp_path / "results", tta=200)
    assert work.done().to_numpy().sum() < 5 * 201


def _commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
