"The layout that CONTRIBUTING promises: packages follow the data, imports run downwards, modules are small."
import ast
import json
from pathlib import Path

from conftest import ROOT

LIB, NBS = ROOT / "rsnape_kit", ROOT / "nbs"
PACKAGES = [path.name.split("_", 1)[1] for path in sorted(NBS.glob("[0-9]*/"))]
NOTEBOOKS = sorted([*NBS.glob("[0-9]*/[0-9]*.ipynb"), *NBS.glob("[0-9]*.ipynb")])


def module_of(notebook: Path) -> str:
    "The module that a notebook exports, from its path: 02_dicom/05_slices.ipynb -> dicom.slices."
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
    assert modules - {"__init__", "_modidx"} == set(ORDER)


def test_imports_run_downwards_only():
    assert imported("competition.metric") == {"competition.labels", "competition.predictions"}  # the walk sees what it should
    chapters = {f"{package}.__init__" for package in PACKAGES}
    upwards = [(name, other) for name in set(ORDER) - chapters for other in imported(name) - {name}
               if ORDER[other] >= ORDER[name]]
    assert not upwards


def test_modules_stay_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in LIB.rglob("*.py") if path.name != "_modidx.py"}
    assert not {name: count for name, count in lines.items() if count > 300}


def test_pictures_are_small_and_no_cell_shows_a_failure():
    for path in NBS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error", path.name
                for kind, picture in output.get("data", {}).items():
                    size = len("".join(picture)) * 3 / 4
                    assert size < 80_000 or not kind.startswith("image/"), f"{path.name}: {size / 1000:.0f} KB"
