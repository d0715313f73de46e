"States, logs and output files of kernels through the real client, from a server on loopback."
import json

import pytest

from rsnape_kit.kaggle.client import KaggleError
from rsnape_kit.kaggle.downloads import UNFINISHED
from rsnape_kit.kaggle.outputs import fetch_output, kernel_log, kernel_states
from rsnape_kit.runs.folder import find_runs

pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
from kaggle_files import connected  # noqa: E402

TRAIN = "me/train"
RUN = "runs/efficientnet-fold0-seed42"


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    "A stub with the output of a training kernel: a run, whose config.json is listed first, and a log."
    with connected(monkeypatch, tmp_path / "home") as stub:
        content = {f"{RUN}/config.json": b'{"settings": {"model": "efficientnet"}}',
                   f"{RUN}/history.csv": b"epoch,loss\n",
                   f"{RUN}/last.keras": bytes(range(256)) * 12_000, "figures/a b+c.png": b"picture",
                   "train.ipynb": b"{}"}
        stub.outputs[TRAIN] = list(content)
        stub.files = {f"{TRAIN}/{name}": each for name, each in content.items()}
        stub.logs[TRAIN] = json.dumps([{"stream_name": "stdout", "time": 1., "data": f"epoch {n}\n"} for n in range(9)])
        yield stub


def arrived(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_pages_arrive_and_nothing_is_fetched_twice(kaggle, tmp_path):
    paths = fetch_output(TRAIN, tmp_path / "out")
    assert arrived(tmp_path / "out") == {name: kaggle.files[f"{TRAIN}/{name}"] for name in kaggle.outputs[TRAIN]}
    assert len(kaggle.sent("ListKernelSessionOutput")) == 3
    assert paths[-1].name == "config.json" and find_runs(None, tmp_path / "out") == [tmp_path / "out" / RUN]
    times = {path: path.stat().st_mtime_ns for path in paths}
    fetch_output(TRAIN, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in paths} == times


def test_the_output_of_a_later_run_replaces_the_earlier(kaggle, tmp_path):
    fetch_output(TRAIN, tmp_path / "out")
    name = f"{TRAIN}/{RUN}/history.csv"
    kaggle.files[name], kaggle.times[name] = b"epoch,acc.\n", 1.5e9  # of the same length
    fetch_output(TRAIN, tmp_path / "out")
    assert arrived(tmp_path / "out")[f"{RUN}/history.csv"] == b"epoch,acc.\n"


def test_a_pattern_chooses_files(kaggle, tmp_path):
    names = {path.name for path in fetch_output(TRAIN, tmp_path / "out", "runs/*")}
    assert names == {"config.json", "history.csv", "last.keras"}
    with pytest.raises(KaggleError, match="5 output files and none like '.*.dcm': runs/efficientnet-fold0-seed42/"):
        fetch_output(TRAIN, tmp_path / "out", "*.dcm")


def test_a_large_file_goes_on_where_the_connection_broke(kaggle, tmp_path):
    name = f"{TRAIN}/{RUN}/last.keras"
    kaggle.breaks[name] = 2_500_000
    kaggle.first = [(502, {}), None]
    fetch_output(TRAIN, tmp_path / "out")
    assert arrived(tmp_path / "out")[f"{RUN}/last.keras"] == kaggle.files[name]
    assert [start > 1_000_000 for address, start in kaggle.gets if address == name] == [False, True]


def test_an_interrupted_download_is_no_run_and_goes_on(kaggle, tmp_path, monkeypatch):
    name = f"{TRAIN}/{RUN}/last.keras"
    kaggle.breaks[name] = 2_500_000

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", interrupt)  # in the pause after the broken connection
        with pytest.raises(KeyboardInterrupt):
            fetch_output(TRAIN, tmp_path / "out")
    assert find_runs(None, tmp_path / "out") == [] and (tmp_path / "out" / UNFINISHED).exists()
    fetch_output(TRAIN, tmp_path / "out")
    assert arrived(tmp_path / "out") == {each: kaggle.files[f"{TRAIN}/{each}"] for each in kaggle.outputs[TRAIN]}
    assert [start > 1_000_000 for address, start in kaggle.gets if address == name] == [False, False, True]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "link/outside", "runs/../../outside"])
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_fetched(kaggle, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    kaggle.outputs[TRAIN].append(name)
    kaggle.files[f"{TRAIN}/{name}"] = b"x"
    with pytest.raises(KaggleError, match="would not be below"):
        fetch_output(TRAIN, tmp_path / "out")
    assert not kaggle.gets and not (tmp_path / "outside").exists()


def test_a_file_that_kaggle_does_not_have_is_an_error_not_a_file(kaggle, tmp_path):
    del kaggle.files[f"{TRAIN}/train.ipynb"]
    with pytest.raises(KaggleError, match="fetching train.ipynb failed: 404"):
        fetch_output(TRAIN, tmp_path / "out")
    assert not (tmp_path / "out" / "train.ipynb").exists()


def test_states_of_several_kernels_survive_one_that_is_missing(kaggle):
    kaggle.kernel_states = ["RUNNING", "ERROR"]
    kaggle.first = [(500, {}), None]
    running, failed = kernel_states([TRAIN, "me/blend"])
    assert (running.name, running.state) == (TRAIN, "running")
    assert (failed.state, failed.message) == ("error", "Out of memory")
    kaggle.faults["GetKernelSessionStatus"] = (403, {"code": 403, "message": "denied"})
    missing, = kernel_states(["me/nothing"])
    assert missing.state == "unknown" and missing.message.startswith("not pushed yet, or not yours?")


def test_a_log_is_text_and_a_missing_one_says_why(kaggle):
    assert kernel_log(TRAIN) == [f"epoch {n}" for n in range(9)]
    kaggle.logs[TRAIN] = ""
    kaggle.kernel_states = ["RUNNING"]
    with pytest.raises(KaggleError, match="me/train has no log: it is running, and logs are kept when a run has ended"):
        kernel_log(TRAIN)
    with pytest.raises(KaggleError, match="Cannot access kernel"):
        kernel_log("me/nothing")
