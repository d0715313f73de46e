"""The matrix of faults as data: which input, what is wrong with it, and what the library must do.

A file cases_NAME.py beside this one has a list CASES of Case; test_trust.py runs them all, and the page docs/trust.md
lists them. Case files import the library within their functions, so that the page is made without loading it.
"""
import atexit
import contextlib
import importlib
import io
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

HERE = Path(__file__).parent
FULL = bool(os.environ.get("RSNAPE_TRUST"))  # `make trust` sets it: all cases, and more examples of each


@dataclass(frozen=True)
class Outcome:
    "What a case must end in."
    kind: str  # error, fallback, unchanged or either
    exception: type[BaseException] | None = None
    words: tuple[str, ...] = ()  # parts of the message

    def __str__(self):
        said = ", ".join(f"`{word}`" for word in self.words)
        return {"error": f"error that names {said}", "fallback": f"fallback; the message names {said}",
                "unchanged": "the sound result", "either": "error that names the file, or the sound result"}[self.kind]


def error(exception: type[BaseException], *words: str) -> Outcome:
    "An exception of this type, of one line, whose text has all the words: the file or option first."
    return Outcome("error", exception, words)


def refused(*words: str) -> Outcome:
    "A command that ends with one line that has all the words; no traceback. For cases that call `rsnape`."
    return Outcome("error", SystemExit, words)


def fallback(*words: str) -> Outcome:
    "A result in spite of the fault, and a warning or printed line of all words. The case returns (result, expected)."
    return Outcome("fallback", None, words)


def unchanged() -> Outcome:
    "The same result as without the fault, without a warning. The case returns (result, expected)."
    return Outcome("unchanged")


def either() -> Outcome:
    "For many damaged versions of a file: each is refused or reads as the sound one. The case returns `survives(...)`."
    return Outcome("either")


@dataclass(frozen=True)
class Case:
    "One fault of one kind of input."
    kind: str  # of input, e.g. 'config.json of a run'
    fault: str  # e.g. 'the model is a path'
    act: Callable[[Path], object]  # makes the input in an empty folder, the working directory, and uses it as users do
    expected: Outcome
    full: bool = False  # only in the full matrix: it takes more than a CPU-second or so

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.fault}"


def load_cases() -> list[Case]:
    "Return the cases of all files, in the order of their names."
    for folder in (HERE, HERE.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return [case for path in sorted(HERE.glob("cases_*.py")) for case in importlib.import_module(path.stem).CASES]


def check(case: Case, folder: Path):
    "Run a case in an empty folder; raise AssertionError if it does not end as expected."
    out, err, raised, result = io.StringIO(), io.StringIO(), None, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder), \
            warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = case.act(folder)
        except (Exception, SystemExit) as exception:
            raised = exception
    warned = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    if case.expected.kind == "error":
        _check_error(case.expected, raised, err.getvalue())
        return
    if raised is not None:
        raise AssertionError(f"expected {case.expected}, got {type(raised).__name__}: {raised}") from raised
    if case.expected.kind == "fallback":
        said = [*warned, *out.getvalue().splitlines()]
        assert any(all(word in line for word in case.expected.words) for line in said), (case.expected.words, said)
    else:
        assert not warned, f"expected no warning: {warned}"
    got, wanted = result
    assert_same(got, wanted)


def _check_error(expected: Outcome, raised: BaseException | None, printed: str):
    "Compare an exception, or the message of a command that ended, with the expected one."
    assert raised is not None, f"expected {expected.exception.__name__}, nothing was raised"
    if not isinstance(raised, expected.exception):
        wrong = f"expected {expected.exception.__name__}, got {type(raised).__name__}: {raised}"
        raise AssertionError(wrong) from raised
    text = str(raised)
    if isinstance(raised, SystemExit):
        assert raised.code not in (None, 0), "the command succeeded"
        if not isinstance(raised.code, str):  # argparse prints its message
            text = (printed.strip().splitlines() or [""])[-1]
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    missing = [word for word in expected.words if word not in text]
    assert not missing, f"{missing} not in {text!r}"


def assert_same(got, wanted):
    "Raise AssertionError unless two results are equal to the bit: tables, arrays, predictions, containers, or by ==."
    import numpy as np
    import pandas as pd

    if isinstance(wanted, pd.DataFrame):
        pd.testing.assert_frame_equal(got, wanted, check_exact=True)
    elif isinstance(wanted, pd.Series):
        pd.testing.assert_series_equal(got, wanted, check_exact=True)
    elif isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(got, wanted)
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        assert_same(list(got.values()), list(wanted.values()))
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), (got, wanted)
        for pair in zip(got, wanted):
            assert_same(*pair)
    elif hasattr(wanted, "exams"):
        assert_same((got.exams, got.images), (wanted.exams, wanted.images))
    else:
        assert got == wanted, (got, wanted)


def sound(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    "Decorate a function that fills a folder with a sound input: it runs once; each call returns a copy in some folder."
    kept = []

    @wraps(make)
    def copy(folder: Path) -> Path:
        if not kept:
            kept.append(Path(tempfile.mkdtemp(prefix="sound-")))
            atexit.register(shutil.rmtree, kept[0], ignore_errors=True)
            make(kept[0])
        return Path(shutil.copytree(kept[0], Path(folder) / make.__name__))

    return copy


def rsnape(*words: object):
    "Run a command of `rsnape` in this process."
    from rsnape_kit.cli import main

    main([str(word) for word in words])


def flips(raw: bytes, few: int = 40, many: int = 400, seed: int = 0) -> Iterator[bytes]:
    "Yield copies of some bytes with one bit flipped each; `few` in the gate, `many` in the full matrix."
    rng = random.Random(seed)
    for _ in range(many if FULL else few):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


def cuts(raw: bytes, few: int = 10, many: int = 100, seed: int = 0) -> Iterator[bytes]:
    "Yield the beginning of some bytes, of many lengths, the empty one first."
    rng = random.Random(seed)
    yield b""
    for _ in range((many if FULL else few) - 1):
        yield raw[:rng.randrange(1, len(raw))]


def survives(path: Path, read: Callable[[Path], object], damage: Callable[[bytes], Iterator[bytes]] = flips,
             errors: tuple = (ValueError, OSError)) -> tuple[list, list]:
    """Read damaged versions of a sound file; return (what was wrong, []).

    Each version must be refused by one line that names the file, or give the same as the sound file.
    """
    raw, wanted, wrong = path.read_bytes(), read(path), []
    for number, damaged in enumerate(damage(raw)):
        path.write_bytes(damaged)
        try:
            assert_same(read(path), wanted)
        except errors as error:
            if "\n" in str(error).strip() or path.name not in str(error):
                wrong.append(f"version {number}: {type(error).__name__}: {error}")
        except AssertionError:
            wrong.append(f"version {number} is read as if it were sound, and differs")
        except Exception as error:
            wrong.append(f"version {number}: {type(error).__name__}: {error}")
    path.write_bytes(raw)
    return wrong, []
