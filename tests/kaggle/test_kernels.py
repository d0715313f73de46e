"The kernels, run on a folder laid out as Kaggle mounts it."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import warm
from conftest import KERNEL_ENV, ROOT

from rsnape_kit.cli import main, parser
from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import AUX_LABELS, EXAM_LABELS, IMAGE_LABEL, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior
from rsnape_kit.competition.tables import sample_submission, slice_index
from rsnape_kit.ensemble.ensemble import Ensemble, fit_ensemble
from rsnape_kit.kaggle.kernels import KERNELS, copies, export_templates, pushed
from rsnape_kit.kaggle.plan import Plan
from rsnape_kit.kaggle.preflight import check_kernel
from rsnape_kit.kaggle.runtime import HEADER, PYTHON
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.runs.config import RunConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.testing import simulate_model, simulate_truth
from rsnape_kit.utils.manifest import write_manifest

COMPETITION = "rsna-str-pulmonary-embolism-detection"


def competition(folder):
    "Two training studies, two to predict, as csv files."
    folder.mkdir(parents=True)
    train = pd.DataFrame({STUDY: ["a1", "a1", "a2"], SLICE: ["b1", "b2", "b3"], IMAGE_LABEL: [0, 1, 0]})
    train[list(EXAM_LABELS + AUX_LABELS)] = 0
    train["negative_exam_for_pe"] = (train[STUDY] == "a2").astype(int)
    test = pd.DataFrame({STUDY: ["c1", "c2", "c1"], SLICE: ["d1", "d2", "d3"]})
    empty = sample_submission(slice_index(test)).sample(frac=1, random_state=0)
    for name, table in (("train", train), ("test", test), ("sample_submission", empty)):
        table.to_csv(folder / f"{name}.csv", index=False)
    return empty


@pytest.mark.parametrize("prefixes", [("", ""), ("datasets/owner/", "competitions/")], ids=["old", "new"])
def test_the_submission_kernel_predicts_every_id_on_both_mount_layouts(tmp_path, prefixes):
    dataset, mount = prefixes
    sample = competition(tmp_path / "input" / mount / COMPETITION)
    shutil.copytree(ROOT / "rsnape_kit", tmp_path / "input" / dataset / "rsnape-kit" / "rsnape_kit")
    (tmp_path / "working").mkdir()
    result = run_kernel(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(str(tmp_path)), "not the attached rsnape_kit"
    assert result_of(tmp_path / "working")["finished"]
    submission = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist()
    values = submission.set_index("id").label
    assert values["c1_negative_exam_for_pe"] == pytest.approx(.5, abs=2e-6)  # the mean, moved just above 0.5 (yes)
    assert values["c2_central_pe"] == 0 and values["d1"] == .5  # half of the positive study's images are positive


def test_the_blend_kernel_fits_on_all_runs_among_the_inputs(tmp_path):
    """Two models of two folds, one a kernel's output and one a dataset; a good one and one that predicts constants.

    Then one of them lacks a fold: that is refused by name, or the blend is fitted on what both have and says so."""
    truth = simulate_truth(80, (4, 8, 12), seed=1)
    competition(tmp_path / "input" / COMPETITION)
    train = truth.images.rename(IMAGE_LABEL).reset_index().merge(truth.exams, left_on=STUDY, right_index=True)
    train.assign(**dict.fromkeys(AUX_LABELS, 0)).to_csv(tmp_path / "input" / COMPETITION / "train.csv", index=False)
    split = make_folds(truth.exams.index, truth, 2)
    oofs = {"efficientnet": constant_prior(truth), "resnet3d": simulate_model(truth)[0]}
    for name, mount in (("efficientnet", "a-kernel/runs"), ("resnet3d", "datasets/owner/runs")):
        for fold in range(2):
            config = RunConfig(model=name, fold=fold, split=split.fingerprint)
            run = open_run(tmp_path / "input" / mount / config.name, config)
            oofs[name].select(split.valid(fold)).save(run / "oof")
    shutil.copytree(ROOT / "rsnape_kit", tmp_path / "input" / "rsnape-kit" / "rsnape_kit")
    (tmp_path / "working").mkdir()
    result = run_kernel(tmp_path, "blend")
    assert result.returncode == 0, result.stderr
    ensemble = Ensemble.load(tmp_path / "working" / "ensemble.json")
    assert set(ensemble.models) == set(oofs)
    assert ensemble.blend_weights.table().loc[IMAGE_LABEL, "resnet3d"] > .8
    expected = fit_ensemble(oofs, truth, split)  # the same from memory, with the folds as they were made
    pd.testing.assert_frame_equal(ensemble.blend_weights.table()[list(oofs)], expected.blend_weights.table(), atol=1e-6)
    said = result_of(tmp_path / "working")
    assert said == {"finished": True, "reason": "blended efficientnet, resnet3d", "progress": 1}

    shutil.rmtree(next(tmp_path.glob("input/datasets/owner/runs/resnet3d-fold1-*")))
    (tmp_path / "working" / "ensemble.json").unlink()
    result = run_kernel(tmp_path, "blend", values={"MODELS": ["efficientnet", "resnet3d"], "HELD_OUT": [0, 1]})
    assert "resnet3d has no run of fold 1" in result.stderr and "ALLOW_PARTIAL = True" in result.stderr
    assert result.returncode and not (tmp_path / "working" / "ensemble.json").exists()
    result = run_kernel(tmp_path, "blend", values={"ALLOW_PARTIAL": True})
    assert result.returncode == 0, result.stderr
    assert "BLENDED WITHOUT ALL FOLDS: resnet3d has no run of fold 1" in result.stdout
    assert "resnet3d has no run of fold 1" in result_of(tmp_path / "working")["reason"]
    ensemble = Ensemble.load(tmp_path / "working" / "ensemble.json")
    half = {name: oof.select(split.valid(0)) for name, oof in oofs.items()}
    expected = fit_ensemble(half, truth, split)
    pd.testing.assert_frame_equal(ensemble.blend_weights.table()[list(oofs)], expected.blend_weights.table(), atol=1e-6)


def result_of(folder):
    "What a kernel says of its run."
    found = json.loads((folder / "result.json").read_text())
    assert set(found) == {"finished", "reason", "progress"}
    return found


def source(name, **values):
    "A kernel's cells as one script, as `rsnape kernels` writes them, with other parameters."
    cells = pushed(json.loads((ROOT / f"nbs/kernels/{name}.ipynb").read_text()), values)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_copy_of_a_kernel_has_its_own_parameters():
    plan = Plan(n_folds=2, recipe="demo", seed=7, settings={"petaformer": ("batch=2",)})
    every = [(name, values) for name in KERNELS for values in copies(name, plan).values() if values]
    assert len(every) == 8 + 2 * len(plan.models) + 1 + 1
    assert every[-3][1] == {"MODEL": plan.models[-1], "FOLD": 1, "FOLDS": 2, "RECIPE": "demo", "SEED": 7,
                            "SETTINGS": [], "ALLOW_PARTIAL": False}
    assert every[-2][1] == {"MODELS": list(plan.models), "HELD_OUT": [0, 1], "ALLOW_PARTIAL": False}
    assert every[-1][1] == {"FULL_COMMIT": False}
    assert [values["SETTINGS"] for _, values in every if values.get("MODEL") == "petaformer"] == [["batch=2"]] * 2
    for name, values in every:
        code = source(name, **values)
        compile(code, name, "exec")
        for parameter, value in values.items():
            assert f"\n{parameter} = {value!r}" in code, (name, parameter)


def test_parts_are_prepared_and_trained_on_as_one(tmp_path):
    "Two kernels prepare the store, one of them in two sessions; another trains on both parts, and on no less."
    made = make_competition(tmp_path / "made", 6, 1, slices=6, size=64, difficulty="demo")
    kit, mounts = tmp_path / "input", tmp_path / "input" / "notebooks" / "me"
    mounts.mkdir(parents=True)
    shutil.copytree(ROOT / "rsnape_kit", kit / "rsnape-kit" / "rsnape_kit")
    shutil.move(made, kit / COMPETITION)
    train = pd.read_csv(kit / COMPETITION / "train.csv")
    train[IMAGE_LABEL] = train[STUDY].rank(method="dense").astype(int) % 2  # six slices show too little to balance
    train.to_csv(kit / COMPETITION / "train.csv", index=False)
    sessions = (("0", 0, 0, False), ("0", None, 0, True), ("0", None, 1, True), ("1", None, 0, True))
    small = {"FOLDS": 2, "RECIPE": "quick", "SETTINGS": ["pixels.size=32", "network.width=.25", "steps=2"]}
    for part, hours, begun, finished in sessions:
        change = ("hours=hours", f"hours={hours}")
        result = run_kernel(tmp_path, "prepare", values=copies("prepare")[part] | {"PARTS": 2}, change=change)
        assert result.returncode == 0, result.stderr
        done = int(re.search(r"(\d+)/\d+", result.stderr)[1])  # where the bar begins
        assert bool(done) == begun, result.stderr
        said = result_of(tmp_path / "working")
        assert said["finished"] == finished and bool(said["progress"]) == finished
        shutil.rmtree(mounts / part, ignore_errors=True)
        shutil.move(tmp_path / "working", mounts / part)
        if (part, begun) == ("0", 1):
            result = run_kernel(tmp_path, "train", values=small)
            lost = set(train[STUDY]) - set(pd.read_parquet(next(mounts.rglob("index.parquet")))[STUDY])
            assert result.returncode and f"{len(lost)} of 6 studies are in no part of the store" in result.stderr
            assert all(text in result.stderr for text in [*lost, "push prepare-1", "ALLOW_PARTIAL = True"])
            assert not (tmp_path / "working" / "runs").exists()
    result = run_kernel(tmp_path, "train", values=small)
    assert result.returncode == 0, result.stderr
    assert "36 slices of 6 studies" in result.stdout
    run = tmp_path / "working" / "runs" / "efficientnet-fold0-seed42"
    assert len(Predictions.load(run / "oof").exams) == 3
    epochs = len(pd.read_csv(run / "history.csv"))
    assert result_of(tmp_path / "working")["progress"] == epochs + 1 and result_of(tmp_path / "working")["finished"]


def test_a_missing_competition_is_named_with_the_inputs_found(tmp_path):
    shutil.copytree(ROOT / "rsnape_kit", tmp_path / "input" / "rsnape-kit" / "rsnape_kit")
    error = run_kernel(tmp_path).stderr
    assert "holds sample_submission.csv" in error and "attached: rsnape-kit" in error


def test_child_processes_can_import_from_the_bundle(tmp_path):
    "Unpacked wheels of a bundle are on the path of this process and of those that it starts."
    competition(tmp_path / "input" / COMPETITION)
    kit = tmp_path / "input" / "datasets" / "owner" / "rsnape-kit"
    shutil.copytree(ROOT / "rsnape_kit", kit / "rsnape_kit")
    (kit / "site").mkdir()
    (kit / "site" / "only_in_the_bundle.py").write_text("value = 42")
    (tmp_path / "working").mkdir()
    child = "import only_in_the_bundle as m, rsnape_kit; print(m.value, rsnape_kit.__file__)"
    start_child = f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    result = run_kernel(tmp_path, then=start_child)
    assert result.returncode == 0, result.stderr
    assert f"42 {kit}/rsnape_kit/__init__.py" in result.stdout.splitlines()


def bundled(folder, target):
    "The package with a manifest that lists one file; a bundle's lists all."
    shutil.copytree(ROOT / "rsnape_kit", folder / "rsnape_kit")
    write_manifest(folder, "bundle", ["rsnape_kit/__init__.py"], python=PYTHON, target=target)
    return folder


def test_the_bundle_that_is_imported_is_the_one_that_is_checked_and_passed_on(tmp_path):
    competition(tmp_path / "input" / COMPETITION)
    (tmp_path / "working").mkdir()
    kits = [bundled(tmp_path / "input" / name, "gpu") for name in ("a-kit", "b-kit", "c-kit")]
    show = "import os, rsnape_kit; print(rsnape_kit.__file__); print(os.environ['PYTHONPATH'].split(':')[0])"
    result = run_kernel(tmp_path, then=show)
    assert result.returncode == 0, result.stderr
    imported, passed_on = map(Path, result.stdout.splitlines()[-2:])
    assert imported.parents[1] == passed_on in kits
    for kit in kits:
        if kit != passed_on:
            (kit / "rsnape_kit" / "__init__.py").write_text("raise ImportError('another')")
    assert run_kernel(tmp_path).returncode == 0
    write_manifest(passed_on, "bundle", ["rsnape_kit/competition/priors.py"], python=PYTHON, target="gpu")
    (passed_on / "rsnape_kit" / "competition" / "priors.py").unlink()
    assert "rsnape_kit/competition/priors.py" in run_kernel(tmp_path).stderr


def test_a_bundle_for_the_other_image_is_refused_on_a_tpu(tmp_path):
    competition(tmp_path / "input" / COMPETITION)
    (tmp_path / "working").mkdir()
    bundled(tmp_path / "input" / "rsnape-kit", "gpu")
    tpu = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "ISTPUVM": "1"}
    assert "this session has a TPU: attach the one made with --target tpu" in run_kernel(tmp_path, environ=tpu).stderr


def test_every_kernel_begins_with_the_header():
    for path in (ROOT / "nbs" / "kernels").glob("*.ipynb"):
        first = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        assert "".join(first["source"]).removeprefix("#| eval: false\n").strip() == HEADER.strip(), path


FRESH = """import os, sys
os.chdir({kaggle!r})
for name in [name for name in sys.modules if name.partition(".")[0] == "rsnape_kit"]:
    del sys.modules[name]
"""  # before a kernel: it must import the attached package, not the one that this process has imported


def run_kernel(kaggle, name="submit", then="import rsnape_kit; print(rsnape_kit.__file__)", values=(),
               environ=(), change=("", "")):
    """A kernel's cells as one script, /kaggle moved to a folder, then a line of the test.

    The process is a fork of this one, which has pandas and numba imported; those that the kernel starts are not."""
    code = source(name, **dict(values)).replace("/kaggle/", f"{kaggle}/")
    assert change[0] in code
    code = code.replace(*change) if change[0] else code
    code = "\n".join((FRESH.format(kaggle=str(kaggle)), code, then))
    env = KERNEL_ENV | {"RSNAPE_KAGGLE": str(kaggle), **dict(environ)}
    return warm.run_command([sys.executable, "-c", code], env=env, start=warm._in_a_fork)


def test_the_kernel_that_push_sends_is_there():
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert json.loads((ROOT / metadata["code_file"]).read_text())["metadata"]["kernelspec"]["language"] == "python"
    assert metadata["enable_internet"] is False  # the client's default is true
    assert metadata["id"].split("/")[1] == metadata["title"].lower().replace(" ", "-")


def test_the_documented_commands_are_ones_that_the_library_takes(monkeypatch):
    "The commands from a clone to a submission, and those of training."
    page = (ROOT / "docs" / "howto" / "kaggle.md").read_text().partition("## Resume")[0]
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    commands = [line.split() for line in re.findall(r"\brsnape ([^#&;\n]+)", "".join(blocks))]
    assert len(commands) > 20
    for command in commands:
        parser().parse_args(command)
    made = []
    monkeypatch.setattr("rsnape_kit.make_bundle", lambda out, *settings: made.append(out))
    for command in commands:
        if command[0] == "bundle":
            main(command)
    assert list(dict.fromkeys(made)) == ["build/bundle", "build/bundle-tpu"]
    assert all(["push", out] in commands for out in made)


def test_templates_are_in_step_with_the_notebooks(tmp_path):
    "In the repository and in the package. Whoever pushes from the repository's top edits the owner there."
    shutil.copytree(ROOT / "nbs" / "kernels", tmp_path / "nbs" / "kernels")
    made = export_templates(tmp_path)
    assert len(made) == 3 * len(KERNELS) + 1
    owner = json.loads((ROOT / "kernel-metadata.json").read_text())["id"].partition("/")[0]
    for path in made:
        here = (ROOT / path.relative_to(tmp_path)).read_text().replace(f'"{owner}/', '"OWNER/')
        assert here == path.read_text(), f"call export_templates, {path} is newer"
    kept = {path for folder in ("kernels", "rsnape_kit/kaggle/notebooks") for path in (ROOT / folder).rglob("*.*")}
    assert kept == {ROOT / path.relative_to(tmp_path) for path in made[:-1]}


def kernels(capsys, *words):
    "Run `rsnape kernels` and return the lines that it prints."
    main(["kernels", *words])
    return capsys.readouterr().out.splitlines()


def written(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_kernels_keep_what_an_earlier_call_decided(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kernels(capsys, "--owner", "me", "--models", "efficientnet", "sequence", "--folds", "0", "2", "--resume")
    before = written(tmp_path / "kernels")
    kept = next(line for line in kernels(capsys, "--trained") if line.startswith("kept: "))
    assert all(text in kept for text in ("owner me", "models efficientnet sequence", "folds 0 2", "resume True"))
    after = written(tmp_path / "kernels")
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {"plan.json", "submit/kernel-metadata.json"}
    assert json.loads(after["submit/kernel-metadata.json"])["kernel_sources"] == [
        f"me/rsnape-kit-{name}" for name in ("blend", "train-efficientnet-fold-0", "train-efficientnet-fold-2",
                                             "train-sequence-fold-0", "train-sequence-fold-2")]
    kernels(capsys, "--no-trained")
    assert written(tmp_path / "kernels") == before
    kernels(capsys, "--no-resume", "--n-folds", "3", "--set", "efficientnet.batch=64", "--accelerator", "sequence=tpu")
    meta = json.loads((tmp_path / "kernels" / "train-sequence-fold-2" / "kernel-metadata.json").read_text())
    assert meta["enable_tpu"] and meta["id"] not in meta["kernel_sources"]
    text = written(tmp_path / "kernels")["train-efficientnet-fold-2/train.ipynb"]
    assert all(line in text for line in ("SETTINGS = ['batch=64']", "FOLDS = 3", "FOLD = 2"))
    shutil.copyfile("kernels/plan.json", "plan.json")
    kernels(capsys, "--plan", "plan.json", "--out", "other")
    assert written(tmp_path / "other") == written(tmp_path / "kernels")


@pytest.mark.parametrize("words, problem", [
    ("--folds 5", "fold 5 is none of 5 folds"), ("--models sequence", "sequence reads the runs of efficientnet"),
    ("--models vit", "unknown model 'vit'"), ("--accelerator petaformer=tpu", "petaformer cannot be trained on tpu"),
    ("--set resnet3d.batsh=2", "batsh"), ("--recipe fuller", "unknown recipe 'fuller'"),
    ("--owner NAME", "owner is 'NAME': expected a Kaggle user name"),
    ("--models efficientnet --set resnet3d.batsh=2", "batsh"), ("--model-sources me/weights", "expected owner/model/"),
    # the notebook would look for the run of its own fold and seed when all the training is done
    ("--set efficientnet.seed=5", "seed=5' cannot be set"), ("--set efficientnet.fold=3", "fold=3' cannot be set")])
def test_a_plan_that_cannot_run_is_refused_and_nothing_is_written(tmp_path, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=problem):
        main(["kernels", *words.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", ["NAME", "J Smith", "", "me/you"])
def test_a_bundle_of_nobody_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, owner):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"the dataset is '{owner}/rsnape-kit': "):
        main(["bundle", "--owner", owner])
    assert not list(tmp_path.rglob("*.whl")) and not (tmp_path / "build" / "bundle").exists()


def test_an_edited_notebook_is_named_when_it_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kernels(capsys, "--models", "efficientnet", "--folds", "0", "1", "--parts", "1")
    path = tmp_path / "kernels" / "train-efficientnet-fold-1" / "train.ipynb"
    path.write_text(path.read_text().replace('"ALLOW_PARTIAL = False', '"ALLOW_PARTIAL = True'))  # as the page says
    lines = kernels(capsys, "--resume")
    assert [line.split()[4] for line in lines if line.startswith("replaced")] == ["kernels/train-efficientnet-fold-1,"]
    assert '"ALLOW_PARTIAL = False' in path.read_text()
    assert not any(line.startswith("replaced") for line in kernels(capsys, "--allow-partial"))


def test_only_folders_of_the_former_plan_are_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kernels(capsys, "--models", "efficientnet", "--n-folds", "3", "--parts", "3")
    (tmp_path / "kernels" / "prepare-2" / "notes.txt").write_text("one's own")
    shutil.copytree(tmp_path / "kernels" / "submit", tmp_path / "kernels" / "my-submission")
    (tmp_path / "kernels" / "notes").mkdir()
    lines = kernels(capsys, "--n-folds", "2", "--parts", "2")
    folders = {path.name for path in (tmp_path / "kernels").iterdir() if path.is_dir()}
    assert folders == {"prepare-0", "prepare-1", "train-efficientnet-fold-0", "train-efficientnet-fold-1", "blend",
                       "submit", "prepare-2", "my-submission", "notes"}
    assert [line.split()[1] for line in lines if line.startswith("removed")] == ["kernels/train-efficientnet-fold-2,"]
    alone = [line for line in lines if line.startswith("left alone")]
    assert {line.split()[2] for line in alone} == {"kernels/prepare-2,", "kernels/my-submission,", "kernels/notes,"}
    assert [line.split()[2] for line in alone if "rsnape campaign" not in line] == ["kernels/notes,"]


def test_the_repository_is_never_written_to(tmp_path, monkeypatch, capsys):
    "From its top the kernels go to build/, which git ignores; its own kernels are refused as a target."
    for name in ("kernels", "nbs/kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "kernel-metadata.json", tmp_path)
    before = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    kernels(capsys, "--owner", "me", "--models", "efficientnet", "--folds", "0")
    after = written(tmp_path)
    assert {name.split("/")[:2] == ["build", "kernels"] for name in {*after} - {*before}} == {True}
    for out in ("kernels", "."):
        with pytest.raises(SystemExit, match="the repository's templates"):
            main(["kernels", "--out", out])
    assert written(tmp_path) == after and all(after[name] == text for name, text in before.items())


def test_an_installed_package_writes_kernels(tmp_path):
    "What setup.py installs, without the repository, in a folder of one's own."
    lib, here = tmp_path / "lib", tmp_path / "here"
    here.mkdir()
    for command, folder in ((["setup.py", "-q", "build_py", "--build-lib", str(lib)], ROOT),
                            (["-m", "rsnape_kit.cli", "kernels", "--owner", "me"], here)):
        done = subprocess.run([sys.executable, *command], cwd=folder, env=KERNEL_ENV | {"PYTHONPATH": str(lib)},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in KERNELS:
        folder = next((here / "kernels").glob(f"{name}*"))
        assert not [fault for fault in check_kernel(folder) if "rsnape_kit" not in fault]
