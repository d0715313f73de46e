"The layout that CONTRIBUTING promises: numbers are layers, names are modules, pictures are small."
import ast
import json
from pathlib import Path

from conftest import ROOT

NOTEBOOKS = {path.stem.split("_", 1)[1]: int(path.stem.split("_")[0]) for path in (ROOT / "nbs").glob("*.ipynb")}


def imported(module: str) -> set:
    "Modules of this library that a module imports, inside functions too."
    path = ROOT / "rsnape_kit" / f"{module.replace('.', '/')}.py"
    home = module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("rsnape_kit.")):
            above = home[:len(home) - node.level + 1] if node.level else []
            inside = [*above, *node.module.removeprefix("rsnape_kit.").split(".")] if node.module else above
            found |= {".".join(inside)} if node.module else {".".join([*inside, name.name]) for name in node.names}
    return found & set(NOTEBOOKS)


def test_every_number_is_one_notebook_and_every_notebook_a_module():
    assert len(set(NOTEBOOKS.values())) == len(NOTEBOOKS) > 90
    for name in NOTEBOOKS:
        assert (ROOT / "rsnape_kit" / f"{name.replace('.', '/')}.py").exists(), name


def test_imports_run_downwards_only():
    upwards = [(name, other) for name in NOTEBOOKS for other in imported(name) if NOTEBOOKS[other] >= NOTEBOOKS[name]]
    assert imported("metric") == {"labels", "predictions"}  # the walk sees what it should
    assert not upwards


def test_modules_stay_short():
    long = {path.name: lines for path in Path(ROOT, "rsnape_kit").rglob("*.py") if path.name != "_modidx.py"
            and (lines := len(path.read_text().splitlines())) > 300}
    assert not long


def test_pictures_are_small_and_no_cell_shows_a_failure():
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error", path.name
                for kind, picture in output.get("data", {}).items():
                    size = len("".join(picture)) * 3 / 4
                    assert size < 80_000 or not kind.startswith("image/"), f"{path.name}: {size / 1000:.0f} KB"
