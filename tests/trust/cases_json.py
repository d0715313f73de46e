"JSON that the library wrote and reads again: damaged, or of another shape."
import json
from functools import partial
from pathlib import Path

from matrix import Case, cuts, either, error, sound, survives

RUN = "config.json of a run"


@sound
def run(folder: Path):
    "The settings of a run that has not begun."
    from rsnape_kit.runs.config import KerasConfig
    from rsnape_kit.runs.folder import open_run

    open_run(folder, KerasConfig(model="efficientnet"))


def read_changed(folder: Path, **settings):
    "Read the settings of a run after some were replaced."
    from rsnape_kit.runs.folder import run_settings

    path = run(folder) / "config.json"
    content = json.loads(path.read_text())
    del content["checksum"]  # as in a file that was edited by hand
    path.write_text(json.dumps(content | {"settings": content["settings"] | settings}))
    run_settings(path.parent)


def read_cut(folder: Path):
    from rsnape_kit.runs.folder import run_settings

    return survives(run(folder) / "config.json", lambda path: run_settings(path.parent), cuts)


CASES = [
    *(Case(RUN, f"{name} is {value!r}", partial(read_changed, **{name: value}), error(ValueError, "config.json", name))
      for name, value in (("model", "../victim"), ("model", 3), ("fold", -1), ("seed", "one"), ("tta", 1.5))),
    Case(RUN, "cut at 10 places", read_cut, either()),
]
