"PetaFormer runs, in processes of their own: killed ones, and several at once; none of them meets TensorFlow."
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")

from rsnape_kit.predictions import Predictions  # noqa: E402

SESSION = str(Path(__file__).with_name("petaformer_session.py"))
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
                    "OMP_NUM_THREADS": "1"}


def session(out, *args, launcher=()):
    command = [sys.executable, *launcher, SESSION, str(out), *args]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


def finished(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return Path(result.stdout.strip().splitlines()[-1])


def history(run):
    return pd.read_csv(run / "history.csv", float_precision="round_trip").drop(columns="seconds")


def test_killed_and_resumed_equals_unbroken(tmp_path):
    unbroken = finished(session(tmp_path / "unbroken"))
    for trouble in (["--kill", "1", "2"], ["--tear", "2"]):
        assert session(tmp_path / "broken", *trouble).returncode == -signal.SIGKILL
    broken = finished(session(tmp_path / "broken"))
    pd.testing.assert_frame_equal(history(unbroken), history(broken), check_exact=True)
    for file in ("weights.pt", "checkpoint/state.pt"):
        a, b = (torch.load(run / file, weights_only=True) for run in (unbroken, broken))
        a, b = (part.get("model", part) for part in (a, b))
        assert all(torch.equal(a[name], b[name]) for name in a | b)
    a, b = (Predictions.load(run / "oof") for run in (unbroken, broken))
    pd.testing.assert_frame_equal(a.exams, b.exams, check_exact=True)
    pd.testing.assert_series_equal(a.images, b.images, check_exact=True)
    assert history(unbroken).loss.is_monotonic_decreasing  # it does learn


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    calm = ["net.dropout=0", "net.attention_dropout=0", "net.frozen_norm=true", "net.attention=full"]
    one = finished(session(tmp_path / "one", *calm, "batch=4"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = finished(session(tmp_path / "two", *calm, "batch=2", launcher=[
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]))
    pd.testing.assert_frame_equal(history(one), history(two), rtol=1e-4)
    a, b = (Predictions.load(run / "oof") for run in (one, two))
    pd.testing.assert_series_equal(a.images, b.align(a).images, rtol=1e-3)
    pd.testing.assert_frame_equal(a.exams, b.align(a).exams, rtol=1e-3)
