"The layout that CONTRIBUTING promises: packages follow the data, imports run downwards, modules are small."
import ast
import importlib
import json
import statistics
from pathlib import Path

import pytest
from conftest import ROOT

LIB, NBS = ROOT / "rsnape_kit", ROOT / "nbs"
PACKAGES = [path.name.split("_", 1)[1] for path in sorted(NBS.glob("[0-9]*/"))]
NOTEBOOKS = sorted([*NBS.glob("[0-9]*/[0-9]*.ipynb"), *NBS.glob("[0-9]*.ipynb")])


def module_of(notebook: Path) -> str:
    "The module that a notebook exports, from its path: 02_dicom/06_slices.ipynb -> dicom.slices."
    number, name = notebook.stem.split("_", 1)
    package = notebook.parent.name.split("_", 1)[1] if notebook.parent != NBS else ""
    return ".".join(filter(None, [package, "__init__" if number == "00" else name]))


ORDER = {module_of(path): number for number, path in enumerate(NOTEBOOKS)}


def source(module: str) -> Path:
    return LIB / f"{module.replace('.', '/')}.py"


def imported(module: str) -> set:
    "Modules of this library that a module imports, inside functions too."
    home, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "rsnape_kit"):
            above = home[:len(home) - node.level + 1] if node.level else []
            inside = [*above, *[part for part in (node.module or "").split(".") if part not in ("", "rsnape_kit")]]
            found |= {".".join(inside), *(".".join([*inside, name.name]) for name in node.names)}
    return found & set(ORDER)


def test_every_notebook_exports_the_module_its_path_names():
    for path in NOTEBOOKS:
        text = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text())["cells"])
        assert f"#| default_exp {module_of(path)}\n" in text, path
    modules = {".".join(path.relative_to(LIB).with_suffix("").parts) for path in LIB.rglob("*.py")}
    assert modules - {"_modidx"} == set(ORDER)


def test_imports_run_downwards_only():
    assert imported("competition.metric") == {"competition.labels", "competition.predictions"}  # it sees some
    modules = {name for name in ORDER if not name.endswith("__init__")}
    upwards = [(name, other) for name in modules for other in imported(name) - {name} if ORDER[other] >= ORDER[name]]
    assert not upwards


def test_modules_are_few_and_short():
    lines = {name: len(source(name).read_text().splitlines()) for name in ORDER if not name.endswith("__init__")}
    assert len(lines) <= 150 and statistics.median(lines.values()) <= 180
    assert not {name: count for name, count in lines.items() if count > 300}


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_no_module_is_named_like_a_name_its_package_exports(package):
    home = importlib.import_module(f"rsnape_kit.{package}".rstrip("."))
    assert home.__doc__ and not {path.stem for path in Path(home.__file__).parent.iterdir()} & set(home.__all__)
    assert all(hasattr(home, name) for name in home.__all__)


def calls(tree: ast.Module):
    "Calls that run with the cell: those outside the bodies of functions."
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from (each for each in ast.walk(node) if isinstance(each, ast.Call))


def test_every_output_stands_below_a_cell_that_can_have_made_it():
    stray = []
    for path in NBS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            kinds = {output["output_type"] for output in cell.get("outputs", [])}
            if kinds:
                text = "".join(cell["source"])
                tree = ast.parse(text)
                valued = isinstance(tree.body[-1], ast.Expr) and not text.rstrip().endswith(";")
                if ("execute_result" in kinds and not valued) or not (valued or any(calls(tree))):
                    stray.append((path.relative_to(NBS), text[:60]))
    assert not stray


def test_pictures_are_small_and_no_cell_shows_a_failure():
    for path in NBS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error", path.name
                for kind, picture in output.get("data", {}).items():
                    size = len("".join(picture)) * 3 / 4
                    assert size < 80_000 or not kind.startswith("image/"), f"{path.name}: {size / 1000:.0f} KB"
