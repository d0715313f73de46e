"The competition's data through the real client, from a server on loopback."
import io
import zipfile
from collections import Counter

import pandas as pd
import pytest

import rsnape_kit as rk
from rsnape_kit.kaggle.client import KaggleError
from rsnape_kit.kaggle.downloads import UNFINISHED, choose_studies, download_competition, read_whole

pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
from kaggle_files import connected  # noqa: E402


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    "A synthetic competition: path -> content."
    folder = rk.make_competition(tmp_path_factory.mktemp("made") / "competition", 5, 1, slices=4, difficulty="demo")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.suffix in (".csv", ".dcm") and "truth" not in path.name}


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def kaggle(monkeypatch, tmp_path, competition):
    "A stub that has the competition; its large tables come as archives, as on Kaggle."
    with connected(monkeypatch, tmp_path / "home") as stub:
        for name, content in competition.items():
            packed = name in ("train.csv", "sample_submission.csv")
            stub.files[f"competition/{name}{'.zip' * packed}"] = zipped(name, content) if packed else content
        yield stub


def arrived(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.dcm")}


def test_a_few_studies_become_a_small_competition(kaggle, competition, tmp_path, capsys):
    out = tmp_path / "few"
    done = download_competition(out, 3)
    assert "3 studies, 12 slices; 12 to fetch, about 0.01 GB" in capsys.readouterr().out
    assert arrived(out) == {name: content for name, content in competition.items()
                            if name.startswith(tuple(f"train/{study}/" for study in done["train"]))}
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        assert (out / "whole" / name).read_bytes() == competition[name]
    assert (out / "test.csv").read_bytes() == competition["test.csv"]  # no study of it was asked for
    assert not (out / UNFINISHED).exists()
    truth = rk.Predictions.from_train_csv(out / "train.csv")
    slices = rk.scan(out / "train")
    store = rk.SliceStore(rk.build_store(slices, tmp_path / "store"))
    assert set(truth.exams.index) == set(store.table.StudyInstanceUID) == set(done["train"])
    assert len(store.table) == len(truth.images) == 12


def test_test_studies_come_with_a_sample_to_submit(kaggle, tmp_path):
    out = tmp_path / "c"
    download_competition(out, 1)
    done = download_competition(out, 1, "test")
    assert {split: len(studies) for split, studies in done.items()} == {"train": 1, "test": 1}
    truth = rk.Predictions.from_train_csv(out / "train.csv")
    prior = rk.position_prior(truth, rk.scan(out / "train"), rk.scan(out / "test"))
    rk.write_submission(rk.make_consistent(prior), out / "sample_submission.csv", tmp_path / "submission.csv")
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 4 + 9


def test_broken_connections_and_hiccups_cost_no_file(kaggle, competition, tmp_path):
    names = [name for name in kaggle.files if name.startswith("competition/train/")]
    download_competition(tmp_path / "c")
    kaggle.breaks = dict.fromkeys(names, 100_000)
    kaggle.first = [(503, {"message": "restarting"}), None, (429, {"code": 429, "message": "Too many requests"})] * 3
    done = download_competition(tmp_path / "c", 5)
    assert len(done["train"]) == 5
    slices = {name: content for name, content in competition.items() if name.startswith("train/")}
    assert arrived(tmp_path / "c") == slices
    assert not kaggle.first and not kaggle.breaks
    assert Counter(name for name, _ in kaggle.gets if name in names) == dict.fromkeys(names, 2)


def test_an_interrupted_download_goes_on_where_it_was(kaggle, competition, tmp_path):
    out = tmp_path / "c"
    download_competition(out, 1)
    table = read_whole(out, "train")
    study = choose_studies(table, 2, "train.csv")[1]
    names = [name for name in kaggle.files if f"/{study}/" in name]
    kept, missing = dict(kaggle.files), names[2]
    del kaggle.files[missing]
    with pytest.raises(KaggleError, match=f"fetching {missing.removeprefix('competition/')} failed: Not found"):
        download_competition(out, 2)
    assert not (out / missing.removeprefix("competition/")).exists()
    assert study not in set(pd.read_csv(out / "train.csv", dtype=str).StudyInstanceUID)  # it is not complete
    kaggle.files = kept
    before, kaggle.gets = len(arrived(out)), []
    assert study in download_competition(out, 2)["train"]
    assert len(kaggle.gets) == 8 - before
    kaggle.gets, kaggle.calls = [], []
    download_competition(out, 2)
    assert not kaggle.gets and not kaggle.calls  # everything is there


def test_a_page_in_place_of_a_table_is_not_kept(kaggle, tmp_path):
    kaggle.files["competition/train.csv.zip"] = zipped("index.html", b"<html>")
    with pytest.raises(KaggleError, match="is an archive of .'index.html'., expected train.csv"):
        download_competition(tmp_path / "c")
    assert not (tmp_path / "c" / "whole" / "train.csv").exists()


def test_more_than_the_disk_has_is_refused_before_a_slice_is_fetched(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(ValueError, match="too little space for 20 slices"):
        download_competition(tmp_path / "c", 5)
    assert not arrived(tmp_path / "c")


@pytest.mark.parametrize("fault, words", [
    ((403, {"code": 403, "message": "You must accept this competition's rules"}), "rules accepted"),
    ((401, {"code": 401, "message": "Unauthenticated"}), "is the API token valid")])
def test_a_refusal_says_what_to_do(kaggle, tmp_path, fault, words):
    kaggle.faults["DownloadDataFile"] = fault
    with pytest.raises(KaggleError, match=words):
        download_competition(tmp_path / "c", 1)
    assert len(kaggle.calls) == 1  # not repeated


