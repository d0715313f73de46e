"The documentation: the site builds and loads nothing from the network, links lead somewhere, examples run as written."
import ast
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

import rsnape_kit as rk
from rsnape_kit.cli import parser
from rsnape_kit.kaggle.runtime import HEADER
from rsnape_kit.runs.config import check_config
from rsnape_kit.runs.recipes import FULL, RECIPES, override_settings

FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_CARD.md", "CHANGELOG.md")]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
LOADS = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio"), "src") | {"object": "data"}
NOT_RUN = "<!-- not run:"


class Links(HTMLParser):
    "Links, anchors and loaded resources of a page."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors, self.loads = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if tag in LOADS and attrs.get(LOADS[tag]):
            self.loads.append(attrs[LOADS[tag]])
        if tag == "link" and attrs.get("rel") != "canonical":
            self.loads.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built in strict mode: a broken link or a missing page fails the build."
    if not all(map(find_spec, ("mkdocs", "mkdocstrings", "latex2mathml", "material"))):
        pytest.skip("the site needs mkdocs-material, mkdocstrings and latex2mathml: pip install -r requirements.txt")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pages(site):
    return {name: Links(path.read_text(encoding="utf-8")) for name, path in site.items() if name.endswith(".html")}


def test_every_notebook_and_every_public_name_has_its_place(site, pages):
    assert sum(name.startswith("library/") for name in pages) == len(list((ROOT / "nbs").rglob("[0-9]*.ipynb"))) + len(
        list((ROOT / "nbs/kernels").glob("*.ipynb")))
    reference = "".join(path.read_text() for name, path in site.items() if name.startswith("api/"))
    places = r'id="rsnape_kit\.[\w.]*\.{0}"|<code>{0}</code>'
    assert not [name for name in dir(rk) if not re.search(places.format(name), reference)]


def test_no_page_loads_anything_from_the_network(site, pages):
    assert len(pages) > 100
    for name, page in pages.items():
        assert not [link for link in page.loads if re.match(r"(https?:)?//", link)], name
    for name, path in site.items():
        if name.endswith(".css"):
            assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), name


def test_links_of_the_site_lead_to_a_page_and_an_anchor(site, pages):
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            path = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            path = "index.html" if path == "." else path
            path = path if path in site else f"{path}/index.html"
            fragment = unquote(parts.fragment)
            if path not in site or fragment and path in pages and fragment not in pages[path].anchors | {"__toc"}:
                broken.append(f"{name}: {link}")
    assert not broken


def slugs(path: Path) -> set:
    "The anchors that GitHub gives the headings of a Markdown file."
    text = re.sub(r"^(```+).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*FRONT, *DOCS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_the_repository_lead_somewhere(path):
    text = re.sub(r"^(```+).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        found = path.parent / target if target else path
        assert found.exists(), link
        assert not anchor or anchor in slugs(found), link


def blocks(path: Path, language: str) -> list:
    "Code blocks of a page, each with the line above it."
    return re.findall(rf"^([^\n]*)\n+```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> list:
    "The arguments of every rsnape command in a text."
    found = re.findall(r"\b(?:rsnape|rsnape_kit\.cli) ([^#&;`\n]+)", text.replace("\\\n", " "))
    return [re.sub(r"\$\w+", "0", line).split() for line in found]


@pytest.mark.parametrize("path", [*FRONT, *DOCS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_are_ones_that_the_command_line_takes(path):
    "Commands of shell blocks are parsed; of commands in a sentence the options are checked."
    for arguments in commands("".join(code for _, code in blocks(path, "sh"))):
        try:
            parser().parse_args(arguments)
        except SystemExit as error:
            if error.code:  # --help and --version end well
                raise AssertionError(f"rsnape {' '.join(arguments)}") from error
    parsers = next(action.choices for action in parser()._actions if action.choices)
    for name, *rest in commands("\n".join(re.findall(r"`(rsnape [^`]+)`", path.read_text(encoding="utf-8")))):
        assert name in parsers, f"rsnape {name}"
        options = {word for word in rest if word.startswith("--")}
        assert options <= set(parsers[name]._option_string_actions), (name, rest)


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    "A small synthetic competition."
    folder = tmp_path_factory.mktemp("docs") / "competition"
    return rk.make_competition(folder, 8, 1, slices=8, size=64, difficulty="demo")


WITH_CODE = [path for path in [ROOT / "README.md", *DOCS] if blocks(path, "python")]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_run_as_written(path, competition, tmp_path, monkeypatch):
    "The blocks of a page run one after another; calls in those that cannot run here fit the functions' signatures."
    for name in ("train", "train.csv", "test", "test.csv", "sample_submission.csv"):
        (tmp_path / name).symlink_to(competition / name)
    (tmp_path / "one-patient").symlink_to(next(iter(sorted((competition / "train").iterdir()))))
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for above, code in blocks(path, "python"):
        if not above.startswith(NOT_RUN):
            exec(compile(code, str(path), "exec"), space)
        for call in [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]:
            function = ast.unparse(call.func)
            if re.fullmatch(r"rk\.\w+", function) and not any(isinstance(arg, ast.Starred) for arg in call.args):
                inspect.signature(getattr(rk, function[3:])).bind(*call.args, **{key.arg: key for key in call.keywords})


def test_the_architecture_page_lists_the_packages():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^(\d\d_\w+) {2,}\S", page, re.M)
    found = [path.stem for path in (ROOT / "nbs").glob("[0-9]*") if path.is_dir() or not path.stem.startswith("00_")]
    assert named == sorted(found)


def rows_of_the_original(model: str) -> dict:
    "The rows of a model's table on the page of the original, each with the settings that it names."
    page = (ROOT / "docs/original.md").read_text(encoding="utf-8")
    section = re.search(rf"^## .*\(`{model}`\)\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]
    return {row: re.findall(r"`([a-z_][\w.]*=[^`]+)`", row) for row in re.findall(r"^\|.*\|$", section, re.M)}


@pytest.mark.parametrize("model", RECIPES["original"])
def test_settings_on_the_page_of_the_original_exist_and_are_those_of_its_recipe(model):
    rows, original = rows_of_the_original(model), RECIPES["original"][model]
    assert sum(map(len, rows.values())) > 6
    for row, switches in rows.items():
        config = override_settings(FULL[model], switches)
        check_config(config)
        assert all(config.entry.accepts(name) for name in config.network), row
        if row.split("|")[-2].strip().startswith("different"):
            assert override_settings(original, switches) == original, row
    used = [each for switches in rows.values() for each in switches if override_settings(original, [each]) == original]
    assert override_settings(FULL[model], used) == original  # so `full` differs only where the page says it


def test_the_first_cell_of_a_kaggle_notebook_is_that_of_the_kernels():
    assert HEADER in (ROOT / "docs/howto/kaggle_notebook.md").read_text(encoding="utf-8")
