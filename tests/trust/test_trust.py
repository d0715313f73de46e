"""The matrix of faults: cases are in cases_*.py, their format is in matrix.py.

    python -m pytest tests/trust -k 'config.json'     # cases whose kind or fault has a text
    make trust                                        # the full matrix, with more examples

Some cases read weights of torch and keras.
"""
import warnings
from collections import Counter
from pathlib import Path

import pytest
from matrix import FULL, Case, check, either, error, fallback, load_cases, refused, survives, unchanged

CASES = load_cases()
LEFT_OUT = "only in the full matrix: make trust"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=pytest.mark.skipif(
    case.full and not FULL, reason=LEFT_OUT)) for case in CASES])
def test_case(case, tmp_path):
    check(case, tmp_path)


def test_no_case_is_given_twice():
    assert not [name for name, count in Counter(case.name for case in CASES).items() if count > 1]


def fails(exception=ValueError, text="a.json: model is 3"):
    def act(folder):
        raise exception(text)
    return act


def warns(folder):
    warnings.warn("a.json: model is 3, the prior is used", stacklevel=1)
    return 1, 1


WRONG = {
    "no error": (lambda folder: None, error(ValueError)),
    "an error of another type": (fails(KeyError), error(ValueError)),
    "an error that does not name the file": (fails(text="model is 3"), error(ValueError, "a.json")),
    "an error of two lines": (fails(text="a.json\nmodel"), error(ValueError, "a.json")),
    "a traceback of a command": (fails(), refused("a.json")),
    "a command that ends well": (fails(SystemExit, None), refused()),
    "a command with another message": (fails(SystemExit, "rsnape: b.json"), refused("a.json")),
    "an error where a fallback is expected": (fails(), fallback("a.json")),
    "a silent fallback": (lambda folder: (1, 1), fallback("a.json")),
    "a fallback to another result": (lambda folder: (warns(folder)[0], 2), fallback("a.json")),
    "an unexpected warning": (warns, unchanged()),
    "another result": (lambda folder: (1, 2), unchanged()),
    "a damaged file that is believed": (lambda folder: survives(_text(folder), Path.read_bytes), either()),
}


def _text(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text('{"model": 3}')
    return path


@pytest.mark.parametrize("name", WRONG)
def test_the_check_itself_finds(name, tmp_path):
    "What `check` is for, broken in each way."
    act, expected = WRONG[name]
    with pytest.raises(AssertionError):
        check(Case("check", name, act, expected), tmp_path)


def test_the_check_accepts_what_is_right(tmp_path):
    for act, expected in ((fails(), error(ValueError, "a.json", "model")), (warns, fallback("a.json")),
                          (fails(SystemExit, "rsnape: a.json"), refused("a.json")),
                          (lambda folder: ([1], [1]), unchanged())):
        check(Case("check", "none", act, expected), tmp_path)
