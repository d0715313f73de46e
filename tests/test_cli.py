"The command line as a user meets it: statuses, one line for a fault, options without effect, quiet and verbose."
import inspect
import json
import os
import subprocess
import sys

import pytest

import rsnape_kit as rk
from rsnape_kit.cli import COMMANDS, main
from rsnape_kit.kaggle.runtime import find_machine
from rsnape_kit.kaggle_commands import kernels


def ended(capsys, *words) -> tuple:
    "Run a command that ends by itself; return its status and what it printed on standard error."
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    printed = capsys.readouterr()
    assert not printed.out
    code = end.value.code
    return (1, code) if isinstance(code, str) else (code, printed.err.strip())  # Python prints the text and ends with 1


def test_statuses(capsys, monkeypatch, tmp_path):
    def interrupt(folder):
        raise KeyboardInterrupt

    status, told = ended(capsys, "scan", tmp_path / "nowhere")
    assert status == 1 and told.startswith("rsnape: ") and "nowhere does not exist" in told and "\n" not in told
    status, told = ended(capsys, "scan")
    assert status == 2 and told == "rsnape scan: the following arguments are required: folder; see rsnape scan --help"
    monkeypatch.setattr(rk, "scan", interrupt, raising=False)
    assert ended(capsys, "scan", tmp_path) == (130, "rsnape: interrupted; run the same command again to resume")
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"rsnape_kit {rk.__version__}\n")


@pytest.mark.parametrize("words", [
    "train --config c.json --recipe demo", "train efficientnet --tta 2 --set tta=1", "weights b1 --list",
    "weights --list --out x", "logs me/train --all --lines 3", "campaign --dry-run --retry",
    "campaign --dry-run --again all", "campaign --once --poll 5", "campaign --no-submit --message x",
    "rehearse --torch", "rehearse --models petaformer", "download --split test",
    "blend r --train-csv x --space logit --preset original", "blend r --train-csv x --store s",
    "blend r --preset original --allow-partial", "predict r --store s --ensemble e.json",
    "predict r --store s --submission x.csv", "predict r --dicom d --heat-method gradcam",
    "predict r --store s --json", "predict r --store s --dicom d"])
def test_an_option_without_effect_is_refused(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, told = ended(capsys, *words.split())
    assert status == 2 and "\n" not in told and told.endswith(f"see rsnape {words.split()[0]} --help")
    assert "no effect" in told or "no input or several" in told
    assert not list(tmp_path.iterdir())


def test_a_dataset_takes_no_options_of_kernels(capsys, tmp_path):
    (tmp_path / "dataset-metadata.json").touch()
    assert ended(capsys, "push", tmp_path, "--allow", "x")[0] == 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_rules_name_parameters(command):
    names = set(inspect.signature(command).parameters)
    assert names.isdisjoint({"run", "debug", "quiet", "verbose"})  # parsed beside them
    for _, others, options in vars(command).get("rules", ()):
        assert {*others, *options} <= names


def test_hints_are_of_the_command_line_and_quiet_leaves_them_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kernels(owner="me")
    assert not capsys.readouterr().err  # the library is silent
    main(["kernels", "--owner", "me"])
    assert capsys.readouterr().err == "next: rsnape bundle --owner me\n"
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that it is as before when the test is over
    main(["kernels", "--owner", "me", "-q"])
    assert not capsys.readouterr().err and os.environ["TQDM_DISABLE"] == "1"
    main(["-v", "kernels", "--owner", "me"])
    first, hint, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"rsnape_kit {rk.__version__}, Python ") and "'owner': 'me'" in first
    assert hint.startswith("next: ") and last.endswith(" s")


def test_a_recipe_as_json_is_its_table(capsys):
    main(["recipes", "--machine", "cpu", "--json"])
    rows, table = json.loads(capsys.readouterr().out), rk.recipe_table("full", find_machine("cpu"))
    assert [row["model"] for row in rows] == list(table.model)
    for name in ("input", "GiB", "batch x passes", "hours"):
        assert [row[name] for row in rows] == list(table[name])


COMPLETE = """
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    $(complete -p rsnape | sed 's/.*-F //; s/ .*//')
    echo "${COMPREPLY[*]}"
}
complete_words rsnape sc
complete_words rsnape train --reci
complete_words rsnape train efficientnet --recipe full-
complete_words rsnape predict runs/a --dicom one-
complete_words rsnape scan one-
"""


def test_bash_completes_commands_options_choices_and_files(capsys, tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "one-patient").mkdir()
    main(["completion", "bash"])
    script = capsys.readouterr().out + COMPLETE
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["scan scores", "--recipe", "full-384 full-512", "one-patient", "one-patient"]
    assert not done.stderr


def test_completion_names_what_it_lacks(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, told = ended(capsys, "completion", "zsh")
    assert status == 1 and "completion needs it: pip install" in told


def test_printed_settings_can_be_given_back(capsys, tmp_path):
    words = "train efficientnet --set clip=5 --set mask=None --tta 3 --fold 2 --machine t4x2 --print-config"
    main(words.split())
    printed = capsys.readouterr()
    settings = json.loads(printed.out)["settings"]
    assert [settings[name] for name in ("clip", "mask", "tta", "fold")] == [5., None, 3, 2]
    assert settings["precision"] == "float16" and "t4x2" in printed.err  # fitted to the machine
    (tmp_path / "mine.json").write_text(printed.out)
    again = ["train", "--config", str(tmp_path / "mine.json"), "--print-config"]
    main(again)
    assert capsys.readouterr().out == printed.out
    main([*again, "--set", "phases.0.lr=4e-3", "--seed", "7"])
    changed = json.loads(capsys.readouterr().out)["settings"]
    settings["phases"][0]["lr"], settings["seed"] = 4e-3, 7
    assert changed == settings


@pytest.mark.parametrize("words, status, fault", [
    ("train", 2, "no model"), ("train efficientnet", 2, "--store, --train-csv"),
    ("train resnet3d --config mine.json", 2, "mine.json has settings of rvlv, not of resnet3d"),
    ("train --config other.json", 1, "other.json"), ("train rvlv --set batch=many --print-config", 1, "an integer"),
    ("train --config mine.json --set seed=3 --print-config", 1, "seed")])
def test_settings_that_cannot_be(words, status, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"model": "rvlv"}')
    got, told = ended(capsys, *words.split())
    assert got == status and fault in told and "\n" not in told
