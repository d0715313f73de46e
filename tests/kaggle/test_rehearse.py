"The committed submission kernel in a copy of Kaggle: its folders, its Python, no network, nothing but the bundle."
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from numba.core.caching import UserProvidedCacheLocator
from test_kernels import competition

from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.submission import check_submission
from rsnape_kit.competition.tables import read_csv
from rsnape_kit.ensemble.ensemble import Ensemble
from rsnape_kit.kaggle.bundle import make_bundle
from rsnape_kit.kaggle.chain import describe_chain, rehearse_chain
from rsnape_kit.kaggle.chain_kernels import SMALL, chain_kits, own_kit
from rsnape_kit.kaggle.dataset import BUNDLES, check_dataset
from rsnape_kit.kaggle.preflight import KERNEL, check_kernel
from rsnape_kit.kaggle.rehearsal import LAYOUTS, make_environment, rehearse, unshare, why_not
from rsnape_kit.kaggle.runtime import HEADER, PYTHON
from rsnape_kit.kaggle.static_check import imports, parse, reached, read_code
from rsnape_kit.kaggle.wheels import IMAGES, NEVER, image
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.utils.files import read_json, write_json

NEEDED_BY_WHEELS = ("numpy", "six")  # which both images have


@pytest.fixture(scope="module")
def shelf():
    "A folder for bundles and an environment (half a gigabyte), deleted afterwards."
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def bundles(shelf):
    "A bundle for each image, from the package index."
    try:
        return {target: make_bundle(shelf / target, target=target, owner="me", wheels=shelf / "wheels")
                for target in IMAGES}
    except RuntimeError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"no wheels for Kaggle's Python: {error}")


@pytest.fixture(scope="module")
def python(shelf):
    "Kaggle's Python with what the kernel imports, without this library."
    if reason := why_not():
        pytest.skip(reason)
    try:
        imported = imports(parse(read_code(ROOT / "kernels" / "submit" / "submit.ipynb")))
        modules = reached(dict.fromkeys(imported, "submit"), ROOT / "rsnape_kit")
        return make_environment(shelf / "python", packages=(*sorted(modules), *NEEDED_BY_WHEELS))[0]
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def contest(tmp_path):
    competition(tmp_path / "competition")
    return tmp_path / "competition"


def code(folder, text):
    "A kernel of one script."
    folder.mkdir()
    (folder / "kernel.py").write_text(HEADER + text)
    (folder / KERNEL).write_text(json.dumps({"code_file": "kernel.py"}))
    return folder


@pytest.mark.parametrize("target", IMAGES)
def test_a_bundle_is_whole_and_for_kaggles_python(bundles, target):
    bundle = bundles[target]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert check_dataset(bundle) == []
    brought = {wheel["name"] for wheel in manifest["wheels"]}
    assert "imagecodecs" in brought and not brought & (NEVER | set(image(target).packages))
    compiled = [path.name for path in bundle.rglob("*.so")]
    assert compiled and all("cpython-312" in name or ".abi3." in name or ".cpython" not in name for name in compiled)
    assert not [name for name in compiled if any(f"cpython-3{other}" in name for other in (9, 10, 11, 13, 14))]
    here = {path.name for path in (ROOT / "rsnape_kit").rglob("*.py")}
    assert {Path(name).name for name in manifest["files"] if name.startswith("rsnape_kit/")} >= here


def test_the_committed_kernel_passes_the_preflight_with_the_bundle(bundles, tmp_path):
    folder = shutil.copytree(ROOT / "kernels" / "submit", tmp_path / "submit")
    meta = (folder / KERNEL).read_text()
    owner = json.loads(meta)["id"].partition("/")[0]
    (folder / KERNEL).write_text(meta.replace(f"{owner}/", "me/"))
    assert check_kernel(folder, bundles["gpu"]) == []


@pytest.mark.parametrize("layout", ["old", "new"])  # a chain has the mixture
def test_the_whole_rerun_offline_from_the_bundle_alone(bundles, python, contest, tmp_path, layout):
    went = rehearse(bundles["gpu"], contest, ROOT / "kernels" / "submit", python, out=tmp_path / "out", layout=layout)
    assert went.ok, went.problem + went.log
    assert went.log.startswith("rerun on ")  # three slices are not the public test set
    assert went.submission.read_text().splitlines()[0] == "id,label"


def test_a_file_that_the_upload_lost_is_named(bundles, python, contest, tmp_path):
    bundle = shutil.copytree(bundles["gpu"], tmp_path / "bundle")
    (bundle / "rsnape_kit" / "competition" / "priors.py").unlink()
    went = rehearse(bundle, contest, ROOT / "kernels" / "submit", python)
    assert not went.ok and "rsnape_kit/competition/priors.py" in went.problem


def test_a_module_that_was_never_bundled_is_named(bundles, python, contest, tmp_path):
    bundle = shutil.copytree(bundles["gpu"], tmp_path / "bundle")
    shutil.rmtree(bundle / "site" / "imagecodecs")
    manifest = read_json(bundle / "manifest.json")
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "site/imagecodecs/" not in name}
    write_json(bundle / "manifest.json", manifest)
    went = rehearse(bundle, contest, code(tmp_path / "kernel", "import imagecodecs"), python)
    assert not went.ok and "No module named 'imagecodecs'" in went.problem


BOTH = """
import numpy, imagecodecs, efficientnet.model, rsnape_kit
picture = numpy.arange(64 * 64, dtype="u2").reshape(64, 64)
assert (imagecodecs.ljpeg_decode(imagecodecs.ljpeg_encode(picture)) == picture).all()
assert rsnape_kit.__file__.startswith("/kaggle/input/"), rsnape_kit.__file__
assert imagecodecs.__file__.startswith("/kaggle/input/"), imagecodecs.__file__
"""
TPU = """
import numba, pydicom, subprocess, sys
from rsnape_kit.store.codec import compress, decompress
stored, back = picture.view("i2"), numpy.empty_like(picture.view("i2"))
decompress(compress(stored), back)
assert (stored == back).all()
@numba.njit(nogil=True, cache=False)
def total(values): return values.sum()
assert total(picture) == picture.sum()
for module in (numba, pydicom): assert module.__file__.startswith("/kaggle/input/"), module
subprocess.run([sys.executable, "-c", "import numba, rsnape_kit"], check=True)
"""
PRINT = """
import pandas
from rsnape_kit.kaggle.runtime import competition_dir
table = pandas.read_csv(competition_dir() / "sample_submission.csv")
table["label"] = table["id"].str.endswith("_negative_exam_for_pe") * .8 + .1
table.to_csv("submission.csv", index=False)
"""
COPY = """
import shutil
from rsnape_kit.kaggle.runtime import competition_dir
shutil.copy(competition_dir() / "sample_submission.csv", "submission.csv")
"""


def test_a_submission_that_contradicts_itself_is_caught(bundles, python, contest, tmp_path):
    went = rehearse(bundles["gpu"], contest, code(tmp_path / "kernel", COPY), python)
    assert not went.ok and "exactly one of negative and indeterminate" in went.problem


@pytest.mark.parametrize("target", IMAGES)
def test_what_the_bundle_brings_works_on_kaggles_python(bundles, python, contest, tmp_path, target):
    text = BOTH + (TPU if target == "tpu" else "") + PRINT
    went = rehearse(bundles[target], contest, code(tmp_path / "kernel", text), python)
    assert went.ok, went.problem + went.log


def compiled(folder: Path) -> Path:
    "Functions that were compiled here, where numba looks for them in a sandbox; it would compile them there."
    for layout, own in itertools.product(LAYOUTS.values(), (ROOT / "rsnape_kit").rglob("*.nb[ic]")):
        for slug in BUNDLES.values():
            package = Path("/kaggle/input", layout["dataset"].format(owner="me", slug=slug), "rsnape_kit")
            source = package / own.parents[1].relative_to(ROOT / "rsnape_kit") / "module.py"
            place = folder / "numba" / UserProvidedCacheLocator.get_suitable_cache_subpath(str(source))
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(own, place)
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.slow
def test_a_chain_from_dicom_to_a_submission_of_a_model_that_it_trained(tmp_path):
    "PetaFormer with this project's Python: it starts fastest."
    if not unshare():
        pytest.skip(why_not())
    kit, lines = own_kit(tmp_path / "own"), []
    chain = rehearse_chain(tmp_path / "chain", kit, models=["petaformer"], show=lines.append,
                           temp=compiled(tmp_path / "temp"))
    logs = {path.stem: path.read_text() for path in (tmp_path / "chain" / "logs").glob("*")}
    assert chain.ok, (describe_chain(chain), logs)
    kernels = ["prepare", "train petaformer", "blend", "submit"]
    assert [(step.kernel, step.layout) for step in chain.steps] == list(zip(kernels, [*LAYOUTS, "old"]))
    assert all(log.startswith("rerun on cpu") for log in logs.values()) and len(lines) == len(logs) == 4
    outputs = tmp_path / "chain" / "outputs"
    assert len(SliceStore(outputs / "prepare" / "store-0")) == 16 * 8
    run = outputs / "train-petaformer" / "runs" / "petaformer-fold0-seed42"
    held_out, truth = Predictions.load(run / "oof"), Predictions.from_train_csv(chain.competition / "train.csv")
    assert len(held_out.exams) == 8 and set(held_out.exams.index) < set(truth.exams.index)
    assert Ensemble.load(outputs / "blend" / "ensemble.json").models == ("petaformer",)
    assert json.loads((outputs / "submit" / "submit.json").read_text())["models"]["petaformer"]["studies"] == 2
    sample, test = (chain.competition / name for name in ("sample_submission.csv", "test.csv"))
    assert check_submission(outputs / "submit" / "submission.csv", sample, read_csv(test)) == []


def test_what_a_failed_kernel_feeds_is_skipped(contest, tmp_path, monkeypatch):
    if not unshare():
        pytest.skip(why_not())
    monkeypatch.setattr("rsnape_kit.kaggle.chain.make_competition", lambda *_, **__: contest)
    kit = own_kit(tmp_path / "own")
    (kit.bundle / "rsnape_kit" / "store" / "build.py").unlink()
    chain = rehearse_chain(tmp_path / "chain", kit, models=["efficientnet", "sequence"])
    assert not chain.ok and [bool(step.problem) for step in chain.steps] == [True, False, False, False, False]
    assert "store/build.py" in chain.steps[0].problem and "prepare, which it reads" in chain.steps[1].skipped
    assert "0 of 5 steps ran well" in describe_chain(chain) and "store/build.py" in chain.problems[0]


@pytest.mark.slow
@pytest.mark.skipif("RSNAPE_TRUST" not in os.environ, reason="trains every model: make trust")
def test_the_whole_chain_on_kaggles_python(bundles, shelf, tmp_path):
    "The last one, since it adds packages to the environment of the others; PetaFormer has this project's Python."
    if reason := why_not():
        pytest.skip(reason)
    chain = rehearse_chain(tmp_path, *chain_kits(shelf, bundles["gpu"], torch=False))
    assert chain.ok, describe_chain(chain)
    assert {step.kit for step in chain.steps} == {"Kaggle's Python 3.12", f"this project's Python {PYTHON}"}
    reports = [json.loads((tmp_path / "outputs" / name / "submit.json").read_text())
               for name in ("submit-without-petaformer", "submit")]
    assert [len(report["models"]) for report in reports] == [len(SMALL) - 1, len(SMALL)]
