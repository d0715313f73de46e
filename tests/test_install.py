"""The package as pip installs it: sdist, wheel, what imports without the extras, and commands in a folder of one's own.

In the gate the wheel lies in an empty folder beside the locked packages, and what it does not require is hidden.
The full set (`make trust`) installs it from the package index into fresh environments of each Python that is there.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from rsnape_kit.kaggle.rehearsal import find_python
from rsnape_kit.utils import EXTRAS

BLOCK = '''
"Hide the packages that the wheel does not require: read by every Python that starts."
import importlib.metadata as metadata, re, sys
from importlib.machinery import PathFinder

def normal(name): return re.sub(r"[-_.]+", "-", name).lower()

def required(name, found):
    for text in metadata.requires(name) or ():
        other = normal(re.match(r"[\\w.-]+", text)[0])
        if "extra ==" not in text and other not in found:
            found.add(other)
            try: required(other, found)
            except metadata.PackageNotFoundError: pass
    return found

CORE = required("rsnape_kit", {"rsnape-kit", "pip"})
HIDDEN = {module for module, names in metadata.packages_distributions().items() if not CORE & set(map(normal, names))}

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
'''
SOURCES = "rsnape_kit", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.txt"
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
LOCAL = "--no-deps", "--no-index", "--no-build-isolation"
PROVIDED = {  # imported modules of packages that a requirement or extra requires -> that one
    "PIL": "matplotlib", "h5py": "keras", "requests": "kaggle", "cloudpickle": "dask: workers do without it"}
OWN = {"tensorflow", "jax"}  # the user's own, in no extra


def sh(*command, **options) -> str:
    "Run a command and return its output."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel that pip builds from the sdist alone."
    top = tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, top / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, top / "src")
    sh(sys.executable, "setup.py", "-q", "sdist", "-d", top, cwd=top / "src")
    shutil.rmtree(top / "src")
    sh(*PIP, "wheel", *LOCAL, "-w", top, next(top.glob("*.tar.gz")))
    return next(top.glob("*.whl"))


class Installed:
    "The wheel in a folder, for Python processes that see nothing else of the kit and none of its extras."

    def __init__(self, wheel: Path, top: Path):
        self.lib, self.here = top / "lib", top / "here"
        self.here.mkdir()
        sh(*PIP, "install", *LOCAL, "--no-compile", "--target", self.lib, wheel)
        (top / "hide").mkdir()
        (top / "hide" / "sitecustomize.py").write_text(BLOCK)
        self.environ = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(top), "MPLCONFIGDIR": str(top),
                        "PYTHONPATH": os.pathsep.join([str(top / "hide"), str(self.lib)])}

    def python(self, *words, cwd=None) -> str:
        return sh(sys.executable, *words, cwd=cwd or self.here, env=self.environ)

    def rsnape(self, *words) -> str:
        return sh(sys.executable, self.lib / "bin" / "rsnape", *words, cwd=self.here, env=self.environ)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_every_file_of_the_package_and_the_locked_versions(wheel):
    names = sh("git", "ls-files", "rsnape_kit", cwd=ROOT).split()
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("rsnape_kit/kaggle/requirements.txt") == (ROOT / "requirements.txt").read_bytes()
    assert found == {*names, "rsnape_kit/kaggle/requirements.txt"}
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        assert {"settings.ini", "requirements.txt"} < {Path(name).name for name in archive.getnames()}


CORE = """
import importlib, json, pkgutil, sys
from pathlib import Path
import numpy as np
import rsnape_kit as rk

assert len(dir(rk)) > 50 and not {"pandas", "scipy"} & set(sys.modules)
refused = {}
modules = [each.name for each in pkgutil.walk_packages(rk.__path__, "rsnape_kit.")]
for name in sorted({*modules} - {"rsnape_kit._modidx"}):
    try: importlib.import_module(name)
    except ImportError as error: refused[name] = str(error)
for name in dir(rk):
    try: getattr(rk, name)
    except ImportError as error: refused[name] = str(error)
hu = np.arange(-1100, 900, 500).reshape(2, 2)
windows = rk.apply_windows(hu, (rk.PE,), "fixed")[..., 0].tolist()
print(json.dumps({"from": rk.__file__, "refused": refused, "windows": windows}))
"""


def test_the_light_core_imports_and_computes(installed):
    found = json.loads(installed.python("-c", CORE))
    assert Path(found["from"]).is_relative_to(installed.lib)
    writers = {f"rsnape_kit.{name}" for name in ("phantom.dicom_writer", "phantom.generate", "kaggle.chain")}
    assert set(found["refused"]) == {"make_competition", *writers}
    assert all(text.endswith("pip install 'rsnape_kit[dicom]'") for text in found["refused"].values())
    expected = np.clip((np.arange(-1100, 900, 500).reshape(2, 2) + 250) / 700, 0, 1) * 255
    assert np.abs(found["windows"] - expected).max() < 1


NEEDS = {  # what needs an extra -> (extra, code)
    "reading DICOM": ("dicom", "rk.read_hu('a.dcm')"), "listing DICOM": ("dicom", "rk.scan('.')"),
    "JPEG noise": ("dicom", "import rsnape_kit.transforms.windows as w; w.jpeg_noise(np.zeros((8, 8, 3)), 50)"),
    "TFRecords": ("dicom", "list(rk.read_tfrecords('a.tfrec'))"), "volumes": ("volumes", "rk.scan_volume('a.nii')"),
    "Keras": ("keras", "from rsnape_kit.models.keras_backend import import_keras; import_keras()"),
    "PyTorch": ("torch", "from rsnape_kit.models.petaformer import PetaFormer; PetaFormer()"),
    "reports": ("sr", "from rsnape_kit.report.structured_report import need_highdicom; need_highdicom()"),
    "Kaggle": ("kaggle", "from rsnape_kit.kaggle.api import client; client()"),
}


def test_what_is_missing_is_named_with_its_extra(installed):
    (installed.here / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(3000))
    for name in ("a.nii", "a.tfrec"):
        (installed.here / name).write_bytes(bytes(400))
    tries = "\n".join(f"try: exec({code!r})\nexcept (ImportError, RuntimeError) as error: said[{name!r}] = str(error)"
                      for name, (_, code) in NEEDS.items())
    code = f"import json, numpy as np, rsnape_kit as rk\nsaid = {{}}\n{tries}\nprint(json.dumps(said))"
    said = json.loads(installed.python("-c", code))
    extras = {name: re.findall(r"pip install 'rsnape_kit\[(\w+)\]'", text) for name, text in said.items()}
    assert extras == {name: [extra] for name, (extra, _) in NEEDS.items()}


def third_party() -> dict:
    "Return the modules that the package imports besides Python's and its own: module -> files."
    found = {}
    for path in (ROOT / "rsnape_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_module":
                names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"rsnape_kit"}:
                found.setdefault(top, []).append(path.name)
    return found


def test_every_import_is_required_or_in_an_extra():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    modules = {}  # distribution -> modules
    for module, names in metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(module)

    def of(key: str) -> set:
        names = re.findall(r"(?:^|\s)([\w-]+)", settings["DEFAULT"][key])
        return set().union(*(modules[name.lower()] for name in names))

    imported = third_party()
    extras = {module for names in EXTRAS.values() for module in names}
    assert set(imported) - of("requirements") - extras - OWN - set(PROVIDED) == set()
    for extra, names in EXTRAS.items():
        assert set(names) - {"kagglesdk"} <= of(f"{extra}_requirements"), extra
    assert not extras & of("requirements")


def test_commands_of_the_wheel_write_below_the_current_folder(installed):
    assert "rehearse" in installed.rsnape("--help")
    before = {path for path in installed.lib.rglob("*") if "__pycache__" not in path.parts}
    installed.rsnape("kernels", "--owner", "me", "--models", "efficientnet", "--folds", "0")
    written = {path.name for path in (installed.here / "kernels").iterdir()}
    assert written >= {"plan.json", "train-efficientnet-fold-0", "blend", "submit"}
    installed.rsnape("check", "kernels/submit")
    assert {path for path in installed.lib.rglob("*") if "__pycache__" not in path.parts} == before


BUNDLE = """
import sys
from rsnape_kit.kaggle import bundle, wheels
print(bundle.commit(), wheels.pins()["pydicom"])
bundle.resolve = lambda names, there, cache: []  # no package index
import rsnape_kit as rk
print(rk.make_bundle("build/bundle", owner="me"))
"""


def test_a_bundle_of_the_wheel_has_the_package_the_pins_and_no_commit_of_another_repository(installed):
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]
    sh(*git, "init", "-q", ".", cwd=installed.lib.parent)
    sh(*git, "commit", "-q", "--allow-empty", "-m", "another project", cwd=installed.lib.parent)
    commit, folder = installed.python("-c", BUNDLE).splitlines()
    pin = re.search(r"^pydicom==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert commit == f"None {pin}" and folder == "build/bundle"
    manifest = json.loads((installed.here / folder / "manifest.json").read_text())
    assert manifest["commit"] is None and "rsnape_kit/kaggle/sandbox.sh" in manifest["files"]


FRESH = ("3.11", "3.12", "3.13")


@pytest.mark.skipif("RSNAPE_TRUST" not in os.environ, reason="installs from the package index: make trust")
@pytest.mark.parametrize("version", FRESH)
@pytest.mark.parametrize("extras", ["", "[dicom,volumes,sr]"])
def test_a_fresh_environment(wheel, tmp_path, version, extras):
    "What pip installs of the wheel, with the newest versions that it finds."
    readme = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    base = find_python(version)
    if base is None:
        pytest.skip(f"no Python {version} here")
    sh(base, "-m", "venv", tmp_path / "env")
    python, here = tmp_path / "env" / "bin" / "python", tmp_path / "here"
    here.mkdir()
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    index = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sh(python, "-m", "pip", "install", "-q", "--no-compile", "--only-binary=:all:", f"{wheel}{extras}", env=index)
    sh(python, "-m", "pip", "check", env=index)
    print(sh(python, "-m", "pip", "freeze", env=index))
    assert "rehearse" in sh(tmp_path / "env" / "bin" / "rsnape", "--help", cwd=here, env=environ)
    sh(tmp_path / "env" / "bin" / "rsnape", "kernels", "--owner", "me", cwd=here, env=environ)
    found = json.loads(sh(python, "-c", CORE, cwd=here, env=environ))
    assert bool(found["refused"]) == (not extras)
    if extras:
        sh(python, "-c", readme, cwd=here, env=environ)
        assert (here / "submission.csv").exists()
    shutil.rmtree(tmp_path / "env")  # some 800 MB
