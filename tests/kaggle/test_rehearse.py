"The committed submission kernel in a copy of Kaggle: its folders, its Python, no network, nothing but the bundle."
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import keras_run
from test_kernels import competition

from rsnape_kit.kaggle.bundle import make_bundle
from rsnape_kit.kaggle.dataset import check_dataset
from rsnape_kit.kaggle.preflight import KERNEL, check_kernel
from rsnape_kit.kaggle.rehearsal import LAYOUTS, make_environment, rehearse, why_not
from rsnape_kit.kaggle.runtime import HEADER
from rsnape_kit.kaggle.static_check import imports, parse, reached, read_code
from rsnape_kit.kaggle.wheels import IMAGES, NEVER, image
from rsnape_kit.phantom.generate import make_competition
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


@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.slow
def test_a_trained_model_predicts_in_the_rehearsal(shelf, python, tmp_path):
    """Keras on JAX, from DICOM to submission.csv; PyTorch and TensorFlow are too large for this test.

    It is the last one, since it adds packages to the environment that the others use."""
    run = keras_run(tmp_path / "runs", "efficientnet3d")
    try:
        bundle = make_bundle(tmp_path / "kit", owner="me", wheels=shelf / "wheels", runs=[run])
        more = "pydicom", "numba", "scikit-image", "keras", "jax"
        python, skipped = make_environment(shelf / "python", packages=more)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert not skipped
    made = make_competition(tmp_path / "made", 2, 2, slices=6, size=64, difficulty="demo")
    shutil.rmtree(made / "truth")
    went = rehearse(bundle, made, ROOT / "kernels" / "submit", python, out=tmp_path / "out")
    assert went.ok, went.problem + went.log
    assert "2 studies, 2 predicted by every model" in went.log, went.log
