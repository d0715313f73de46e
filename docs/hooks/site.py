"""MkDocs hook: add the notebooks, the front pages and one API page a package to the site.

A page's path in the site's table of files is its path in the repository, so one relative link works on GitHub and here.
"""
import ast
import base64
import json
import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from rsnape_kit.runs.hardware import MACHINES
from rsnape_kit.runs.machine import recipe_table
from rsnape_kit.utils import typed_imports

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "trust")]
from licences import licence_table  # noqa: E402  the line above adds its folder to the path
from matrix import load_cases  # noqa: E402

FRONT = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "MODEL_CARD.md": "model_card"}
KINDS = {"image/png": "png", "image/jpeg": "jpg"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def notebook_paths() -> list[Path]:
    "Return all notebooks: chapters and modules in reading order, tutorials, kernels."
    found = [path.relative_to(ROOT) for path in sorted((ROOT / "nbs").rglob("*.ipynb"))]
    return [path for path in found if not any(part.startswith((".", "_")) for part in path.parts)]


def module_file(path: Path, cells: list) -> str:
    "Return the module that a notebook exports as a path such as dicom/slices.py, or an empty text."
    text = "".join(line for cell in cells for line in cell["source"] if line.startswith("#| default_exp"))
    return text.removeprefix("#| default_exp").strip().replace(".", "/") + ".py" if text else ""


def fenced(text: str, kind: str) -> str:
    "Return a text as a fenced block whose fence is longer than any inside it."
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def as_markdown(path: Path) -> tuple[str, dict]:
    "Return a notebook as Markdown, and its pictures by file name."
    cells, parts, pictures = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"], [], {}
    module = module_file(path, cells)

    def picture(kind: str, data: str) -> str:
        pictures[f"{len(pictures) + 1}.{KINDS[kind]}"] = base64.b64decode(data)
        return f"{path.stem}/{list(pictures)[-1]}"

    for cell in cells:
        source = "".join(cell["source"]).strip()
        directives = re.findall(r"^#\| *(\S+)", source, re.M)
        if cell["cell_type"] == "markdown":
            for name, data in cell.get("attachments", {}).items():
                kind = next(kind for kind in data if kind in KINDS)
                source = source.replace(f"attachment:{name}", picture(kind, data[kind]))
            parts.append(source)
        if cell["cell_type"] != "code" or {"hide", "default_exp"} & set(directives):
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        title = f' title="{module}"' if "export" in directives else ""
        parts.append(fenced(code, "{ .python" + title + " }"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            kind = next((kind for kind in KINDS if kind in data), None)
            text = "".join(output.get("text", data.get("text/plain", [])))
            if kind:
                parts.append(f"![Picture made by the code above]({picture(kind, ''.join(data[kind]))})")
            elif "text/html" in data:
                html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.S)
                parts.append('<div class="output">' + re.sub(r"\n\s*", "\n", html) + "</div>")
            elif text.strip():
                parts.append(fenced(ANSI.sub("", text), "{ .text .output .no-copy }"))
    return "\n\n".join(part for part in parts if part), pictures


def site_path(path: Path) -> str:
    "Return a notebook's place in the site: library/dicom/slices/index.html, tutorials/method/index.html."
    plain = [re.sub(r"^\d+_", "", part) for part in path.with_suffix("").parts[1:]]
    if path.stem.startswith("00_"):
        plain = plain[:-1]
    return "/".join([*([] if path.parts[1] == "tutorials" else ["library"]), *plain, "index.html"])


def constant_rows(module: Path) -> dict[str, str]:
    "Return the constants of a module: name -> row of a table with its value and the comment beside it."
    text, rows = module.read_text(encoding="utf-8"), {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts) if both else [(target, value)]
        comment = re.search(r"  # (.*)", text.splitlines()[node.end_lineno - 1])
        for name, what in pairs:
            code = ast.unparse(what)
            shown = f"`{code}`" if len(code) < 80 else ""
            rows[ast.unparse(name)] = f"| `{ast.unparse(name)}` | {shown} | {comment[1] if comment else ''} |"
    return rows


def public_names(package: str) -> list[str]:
    "Return the full names that a package re-exports, in its order; of a module, those that the root re-exports."
    init = ROOT / "rsnape_kit" / package / "__init__.py"
    whole = (init if init.exists() else ROOT / "rsnape_kit/__init__.py").read_text(encoding="utf-8")
    found = [(source if not source.startswith(".") else f"rsnape_kit.{package}{source}", name)
             for source, name in typed_imports(whole).values()]
    return [f"{source}.{name}" for source, name in found if source.startswith(f"rsnape_kit.{package}")]


def api_page(package: str) -> str:
    "Return the reference page of a package: a table of its constants, then its functions and classes."
    table, parts = [], []
    for full in public_names(package):
        source, name = full.rsplit(".", 1)
        row = constant_rows(ROOT / f"{source.replace('.', '/')}.py").get(name)
        table += [row] if row else []
        parts += [] if row else [f"::: {full}"]
    if table:
        table = ["## Constants\n\n| name | value | |\n|---|---|---|\n" + "\n".join(table)]
    chapter = next(path for path in notebook_paths() if re.fullmatch(rf"(00|\d\d)_{package}", path.stem))
    intro = (f"[The notebooks](../../{chapter}) show the code, with examples. "
             "`import rsnape_kit as rk` makes most names available as `rk.NAME`.")
    return "\n\n".join([f"# {package}", intro, *table, *parts])


def api_packages() -> list[str]:
    "Return what has public names, in the order of the data."
    folders = [path.name.split("_", 1)[1] for path in sorted((ROOT / "nbs").glob("[0-9]*/"))]
    return [name for name in [*folders, "testing"] if public_names(name)]


def with_recipes(text: str) -> str:
    """Return a page with the tables of recipes, and where they differ from the original, in place of their comments.

    <!-- recipes: RECIPE MACHINE --> becomes a table, <!-- differs: RECIPE --> a list."""
    def table(match):
        rows = recipe_table(match[1], MACHINES[match[2]])
        why = [f"\n`{row.model}`: {row.differs}" for row in rows[rows["batch x passes"] == "-"].itertuples()]
        rows = rows.drop(columns=["recipe", "differs"])
        lines = [rows.columns, ["---"] * rows.shape[1], *rows.itertuples(index=False)]
        return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), *why])

    def differences(match):
        rows = recipe_table(match[1], MACHINES["t4x2"])
        return "\n".join(f"- `{row.model}`: {row.differs}" for row in rows.itertuples())

    text = re.sub(r"<!-- recipes: (\S+) (\S+) -->", table, text)
    return re.sub(r"<!-- differs: (\S+) -->", differences, text)


def with_cases(text: str) -> str:
    "Return a page with the cases of tests/trust, and how many of each kind, in place of the comment <!-- cases -->."
    if "<!-- cases -->" not in text:
        return text
    kinds: dict = {}
    for case in load_cases():
        kinds.setdefault(case.kind, []).append(case)
    total = sum(map(len, kinds.values()))
    lines = [f"{total} faults of {len(kinds)} kinds:", "", "| input | faults |", "|---|---|"]
    lines += [f"| {kind} | {len(cases)} |" for kind, cases in sorted(kinds.items())]
    for kind, cases in sorted(kinds.items()):
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", "", "| fault | outcome |", "|---|---|"]
        lines += [f"| {_cell(case.fault)} | {_cell(case.expected)} |" for case in cases]
    return text.replace("<!-- cases -->", "\n".join(lines))


def _cell(what) -> str:
    "Return a text that does not end its cell of a table, and is no markup."
    return re.sub(r"[|<>]", lambda sign: f"&#{ord(sign[0])};", str(what))


class Page(File):
    "A page whose text is made here; notebooks are pages too."

    def is_documentation_page(self):
        return True


def page(config, uri: str, dest: str, content: str) -> File:
    made = Page(uri, None, config.site_dir, config.use_directory_urls, dest_uri=dest)
    made.generated_by, made._content, made.abs_src_path = "hooks", content, None
    if dest.startswith("library/") and Path(uri).stem.startswith("00_"):
        made.name = "index"  # the page of its section
    return made


def on_config(config):
    "Complete the navigation of mkdocs.yml with what is found."
    notebooks = notebook_paths()
    library = [{path.name: [str(nb) for nb in notebooks if nb.parent == path.relative_to(ROOT)]}
               for path in sorted((ROOT / "nbs").glob("[0-9]*/"))]
    library = [{re.sub(r"^\d+_", "", name): pages} for part in library for name, pages in part.items()]
    library = [str(nb) for nb in notebooks if nb.match("nbs/00_*")] + library
    library += [str(nb) for nb in notebooks if nb.parent == Path("nbs") and not nb.match("00_*")]
    library += [{"kernels": [str(nb) for nb in notebooks if nb.parent == Path("nbs/kernels")]}]
    api = [f"docs/api/{package}.md" for package in api_packages()]
    for section in config.nav:
        for title, pages in section.items():
            if title == "Library":
                pages += library
            if title == "API":
                pages += api
    return config


def completed(text: str) -> str:
    "Return a page of docs/ with its tables."
    text = with_cases(with_recipes(text))
    return text.replace("<!-- licences -->", licence_table()) if "<!-- licences -->" in text else text


@event_priority(100)
def on_files(files, config):
    "Name pages by their path in the repository, and add the pages that are not in docs/."
    found = []
    for file in files:
        if file.src_uri.endswith(".md"):
            uri = f"docs/{file.src_uri}"
            found.append(page(config, uri, file.dest_uri, completed(file.content_string)))
        else:
            found.append(file)
    for path in notebook_paths():
        text, pictures = as_markdown(path)
        dest = site_path(path)
        found.append(page(config, str(path), dest, text))
        for name, content in pictures.items():
            made = File.generated(config, f"{path.parent}/{path.stem}/{name}", content=content)
            made.dest_uri = dest.replace("index.html", name)
            found.append(made)
    for name, folder in FRONT.items():
        found.append(page(config, name, f"{folder}/index.html", (ROOT / name).read_text(encoding="utf-8")))
    for package in api_packages():
        found.append(page(config, f"docs/api/{package}.md", f"api/{package}/index.html", api_page(package)))
    for path in (ROOT / "pictures").iterdir():
        found.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return Files(found)


def on_page_content(html, page, config, files):
    "Turn formulas into MathML, which browsers draw without a script."
    def formula(match):
        text = unescape(match[1]).strip()
        return convert(text[2:-2], display="block" if text.startswith(r"\[") else "inline")

    return re.sub(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', formula, html, flags=re.S)
