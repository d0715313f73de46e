"The commands for Kaggle from end to end: what they print, and the command that they name as the next one."
import json
import re

import pytest

from rsnape_kit.cli import main, parser

pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
import kaggle_stub  # noqa: E402
from kaggle_files import connected  # noqa: E402
from kaggle_sessions import Kaggle  # noqa: E402

IDS = [f"{number:012d}" for number in range(4)]  # all digits, as ids can be
TRAIN = "StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID,negative_exam_for_pe,indeterminate\n"


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path / "home") as stub:
        rows = "".join(f"{study},{'e' * 12},{'a' * 12},{number % 2},0\n" for number, study in enumerate(IDS))
        sample = "id,label\n" + "".join(f"{study}_central_pe,0.5\n" for study in IDS)
        stub.files = {f"competition/{name}": text.encode() for name, text in
                      (("train.csv", TRAIN + rows), ("test.csv", TRAIN + rows), ("sample_submission.csv", sample))}
        stub.files |= {f"competition/train/{study}/{'e' * 12}/{'a' * 12}.dcm": b"slice" for study in IDS}
        monkeypatch.chdir(tmp_path)
        yield stub


@pytest.fixture
def run(capsys):
    "Run a command; gives its output and the next command that it names."
    def run(text: str) -> tuple:
        capsys.readouterr()
        main(text.split())
        printed = capsys.readouterr()
        *_, last = printed.err.strip().splitlines()
        assert last.startswith("next: rsnape ")
        words = last.removeprefix("next: rsnape ").partition(", with")[0].split()
        parser().parse_args(words)  # it can be typed as it is
        return printed.out, " ".join(words)
    return run


def test_download_takes_a_number_or_ids(kaggle, run, tmp_path):
    assert run("download")[1] == "download --studies 4 --out competition"
    out, following = run("download --studies 2")
    assert "2 studies in competition/train, 0 studies in competition/test" in out
    assert following == "store competition/train store"
    assert {path.name for path in (tmp_path / "competition" / "train").iterdir()} == set(IDS[:2])
    assert "3 studies in competition/train" in run(f"download --studies {IDS[3]}")[0]


def test_download_of_an_unknown_study_says_where_to_look(kaggle):
    with pytest.raises(SystemExit, match="train.csv has no study 5, 6: write a StudyInstanceUID of it, or --split"):
        main(["download", "--studies", "5", "6"])
    with pytest.raises(SystemExit, match="9 studies were asked for, train.csv has 4"):
        main(["download", "--studies", "9"])


@pytest.mark.parametrize("content, problem", [("", "is empty"), ("<html>\n", "has no column StudyInstanceUID")])
def test_a_damaged_table_is_named(kaggle, run, tmp_path, content, problem):
    run("download")
    (tmp_path / "competition" / "whole" / "train.csv").write_text(content)
    with pytest.raises(SystemExit, match=f"whole/train.csv {problem}.*: delete it and run the command again"):
        main(["download", "--studies", "2"])


def test_states_logs_and_output_of_a_kernel(kaggle, run):
    for state, printed, following in (("RUNNING", "running", "status"), ("ERROR", "error  Out of memory", "logs"),
                                      ("COMPLETE", "complete", "output")):
        kaggle.kernel_states = [state]
        assert run("status me/train") == (f"me/train  {printed}\n", f"{following} me/train")
    kaggle.outputs["me/train"] = ["runs/a/config.json"]
    kaggle.files["me/train/runs/a/config.json"] = json.dumps({"settings": {"model": "efficientnet"}}).encode()
    kaggle.logs["me/train"] = json.dumps([{"data": f"epoch {n}\n"} for n in range(50)])
    assert run("logs me/train --lines 2") == ("epoch 48\nepoch 49\n", "output me/train")
    assert run("logs me/train --all")[0].startswith("epoch 0\n")
    assert json.loads(run("status me/train --json")[0]) == [{"name": "me/train", "state": "complete", "message": ""}]
    out, following = run("output me/train --out here")
    assert out == "1 files in here\n1 runs: here/runs/a\n"
    assert following == "blend here/runs/a --train-csv competition/train.csv"


def test_submit_waits_for_the_run_and_the_score(kaggle, run, tmp_path, monkeypatch):
    (tmp_path / "kernel-metadata.json").write_text(json.dumps({"id": "me/submit"}))
    monkeypatch.setattr("rsnape_kit.kaggle.scores.watch.__defaults__", watch_defaults(kaggle))
    kaggle.submissions = [{"ref": 1, "description": "five folds", "status": "COMPLETE", "publicScore": "0.3"}]
    out, following = run("submit --version 3 --wait --message folds")
    assert [line for line in out.splitlines() if line] == [
        "the kernel me/submit is queued, 0 min so far", "the kernel me/submit is running, 0 min so far",
        "version 3 of me/submit: Successfully submitted to rsna-str-pulmonary-embolism-detection",
        "the submission is pending, 0 min so far", "2026-11-30 10:00  complete  public 0.2  five folds"]
    assert following == "scores"
    assert run("scores")[1] == "submit . --wait"
    newest, *_ = json.loads(run("scores --json")[0])
    assert (newest["ref"], newest["state"], newest["public"], newest["message"]) == (2, "complete", "0.2", "five folds")


def watch_defaults(kaggle) -> tuple:
    "Defaults of `watch` with a pause in which the score arrives once a submission was entered."
    from rsnape_kit.kaggle.scores import watch

    def sleep(seconds):
        if kaggle.sent("CreateCodeSubmission"):
            kaggle.submissions.append({"ref": 2, "description": "five folds", "status": "COMPLETE",
                                       "publicScore": "0.2", "date": "2026-11-30T10:00:00.000Z"})

    *rest, _, clock = watch.__defaults__
    return (*rest, sleep, clock)


def test_after_the_bundle_comes_the_submission_kernel_where_it_was_written(monkeypatch, run, tmp_path):
    "The commands of the README in an installed package's folder: each names one that works there."
    monkeypatch.chdir(tmp_path)
    run("kernels --owner me --models efficientnet --folds 0 --parts 1")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "x.py").write_text("x = 1")
    meta = {"id": "me/rsnape-kit", "title": "rsnape_kit", "licenses": [{"name": "apache-2.0"}]}
    (tmp_path / "bundle" / "dataset-metadata.json").write_text(json.dumps(meta))
    with kaggle_stub.connected(Kaggle(), monkeypatch, tmp_path / "home") as stub:
        stub.pending = 0
        following = run("push bundle")[1]
        assert following == "push kernels/submit"
        following = run(following)[1]
        assert following == "submit kernels/submit"
        assert run("scores")[1] == f"{following} --wait"


def test_notes_are_refused_where_they_would_be_lost(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(tmp_path), "--notes", "x"])
    assert re.search("--notes are for datasets, and .* has no dataset-metadata.json", capsys.readouterr().err)


def test_kernels_attach_models(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("kernels")[1] == "kernels --owner NAME"
    assert run("kernels --owner me --model-sources me/weights/keras/b1/1")[1] == "bundle --owner me"
    attached = {path.parent.name: json.loads(path.read_text())["model_sources"]
                for path in tmp_path.glob("kernels/*/kernel-metadata.json")}
    with_models = {name for name, sources in attached.items() if sources == ["me/weights/keras/b1/1"]}
    assert with_models == {name for name in attached if name.startswith(("train", "submit"))}
    assert not any(sources for name, sources in attached.items() if name not in with_models)
