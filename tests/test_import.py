"The library imports where no framework is installed, and loads none where they are."
import pkgutil
import subprocess
import sys

import rsnape_kit

FRAMEWORKS = ("tensorflow", "keras", "torch", "torchvision", "fastai", "fastcore", "jax")
BLOCKED = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FRAMEWORKS}: raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


def run(code: str):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_every_module_imports_without_frameworks():
    names = [m.name for m in pkgutil.walk_packages(rsnape_kit.__path__, "rsnape_kit.") if "_modidx" not in m.name]
    assert "rsnape_kit.competition.metric" in names
    result = run(BLOCKED + f"for name in {names}: importlib.import_module(name)")
    assert result.returncode == 0, result.stderr


def test_the_block_would_be_felt():
    assert "torch is blocked" in run(BLOCKED + "import torch").stderr
