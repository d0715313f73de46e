"""Count what a notebook runs of its exported cells as lines of the module that they are exported to.

The text is the same, but Coverage knows it by another name. `make coverage` uses this.
"""
import ast
import json
import re
from pathlib import Path

from execnb.shell import CaptureShell

LIB = Path(__file__).parents[1] / "rsnape_kit"


def module_of(cells: list) -> Path | None:
    "Return the file that cells are exported to."
    found = re.search(r"^#\| default_exp (\S+)", "\n".join(cells), re.M)
    return LIB / f"{found[1].replace('.', '/')}.py" if found else None


def exported_lines(notebook: Path) -> dict:  # source of a cell -> its file, and what to add to a line's number
    "Return where the exported cells of a notebook stand in its module; without cells of compiled functions."
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]}
    module = module_of(list(cells.values()))
    if module is None or not module.exists():
        return {}
    marks = {line.rpartition("#")[2]: number for number, line in enumerate(module.read_text().splitlines(), 1)
             if line.startswith("# %% ")}
    found = {}
    for name, source in cells.items():
        directives = re.match(r"(#\|.*\n)*", source)[0]
        if re.search(r"^#\| *export\b", directives, re.M) and "@compiled" not in source and name in marks:
            found[source[len(directives):].strip()] = module, marks[name]
    return found


class CoveredShell(CaptureShell):
    "A shell that compiles exported cells under the name and the line numbers of their module."

    def __init__(self, path: Path):
        super().__init__(path)
        self._places, self._shift, plain = exported_lines(Path(path)), 0, self.compile.get_code_name

        def name_of(raw: str, code: str, number: int) -> str:
            module, self._shift = self._places.get(raw.strip(), (None, 0))  # nbdev has taken the directives away
            return str(module) if module else plain(raw, code, number)

        self.compile.get_code_name = name_of
        self.ast_transformers.append(self)

    def visit(self, tree: ast.AST) -> ast.AST:
        "Move a cell's lines to those of the module."
        return ast.increment_lineno(tree, self._shift) if self._shift else tree
