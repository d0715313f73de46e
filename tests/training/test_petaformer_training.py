"PetaFormer runs, in processes of their own: killed ones, and several at once; none of them loads TensorFlow."
import json
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import warm
from conftest import KERNEL_ENV, ROOT

from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.kaggle.kernels import with_values
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.store.build import build_store

torch = pytest.importorskip("torch")
pytest.importorskip("fastai")

SESSION = ROOT / "tests" / "petaformer_session.py"


def session(out, *args, **env):
    "A session in a process that has PyTorch and fastai imported, and nothing else."
    return warm.run(SESSION.read_text(), out, *args, backend="torch", OMP_NUM_THREADS="1", **env)


def finished(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return Path(result.stdout.strip().splitlines()[-1])


def history(run):
    return pd.read_csv(run / "history.csv", float_precision="round_trip").drop(columns=["seconds", "cpu_seconds"])


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
    calm = ["network.dropout=0", "network.attention_dropout=0", "network.frozen_norm=True", "network.attention=full"]
    one = finished(session(tmp_path / "one", *calm, "batch=4"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ThreadPoolExecutor(2) as pool:  # as torch.distributed.run starts them, which the kernel below does
        ranks = [pool.submit(session, tmp_path / "two", *calm, "batch=2", RANK=str(i), LOCAL_RANK=str(i), **both)
                 for i in range(2)]
    assert ranks[1].result().returncode == 0, ranks[1].result().stderr[-3000:]
    two = finished(ranks[0].result())
    pd.testing.assert_frame_equal(history(one), history(two), rtol=1e-4)
    a, b = (Predictions.load(run / "oof") for run in (one, two))
    pd.testing.assert_series_equal(a.images, b.align(a).images, rtol=1e-3)
    pd.testing.assert_frame_equal(a.exams, b.align(a).exams, rtol=1e-3)


@pytest.mark.slow
def test_the_training_kernel_goes_on_in_a_second_session(tmp_path):
    "A phantom competition and its store, laid out as Kaggle mounts them; the first session has time for one epoch."
    kaggle, name = tmp_path, "rsna-str-pulmonary-embolism-detection"
    competition = make_competition(kaggle / "input" / "competitions" / name, 9, 1, slices=8, size=64, difficulty="demo",
                                   clean=True)
    build_store(competition / "train", kaggle / "input" / "datasets" / "me" / "store" / "part0", size=64,
                executor=ThreadPoolExecutor(1))
    shutil.copytree(ROOT / "rsnape_kit", kaggle / "input" / "datasets" / "me" / "kit" / "rsnape_kit")
    small = ["pixels.size=32", "groups=4", "batch=2", "slices=3", "network.width=.125", "network.depth=.1",
             "network.layers=1", "phases.0.epochs=2"]
    first = run_kernel(kaggle, small, short=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "stopping after 1 of 2 epochs" in first.stdout
    said = json.loads((kaggle / "working" / "result.json").read_text())
    assert (said["finished"], said["progress"]) == (False, 1) and "1 of 2 epochs" in said["reason"]
    shutil.move(kaggle / "working", kaggle / "input" / "notebooks" / "me" / "train-petaformer")
    second = run_kernel(kaggle, small)
    assert second.returncode == 0, second.stderr[-3000:]
    run = kaggle / "working" / "runs" / "petaformer-fold0-seed42"
    assert history(run).epoch.tolist() == [0, 1]
    assert len(Predictions.load(run / "oof").exams) == 3
    said = json.loads((kaggle / "working" / "result.json").read_text())
    assert (said["finished"], said["progress"]) == (True, 3)


SHORT = """
import sys
from rsnape_kit import cli
from rsnape_kit.training.torch_checkpoint import Checkpoint
save = Checkpoint.save

def save_in_the_last_second(self, best):
    save(self, best)
    self.deadline = 0.

Checkpoint.save = save_in_the_last_second
sys.exit(cli.main())
"""  # a session whose time is up after an epoch


def run_kernel(kaggle, settings, short=False):
    "The kernel's cells as one script, /kaggle moved to a folder, with settings for a small network."
    notebook = json.loads((ROOT / "nbs" / "kernels" / "train.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = with_values(code, {"MODEL": "petaformer", "FOLDS": 3, "SETTINGS": ["tta=1", *settings]})
    changes = {"/kaggle/": f"{kaggle}/"}
    if short:
        (kaggle / "short.py").write_text(SHORT)
        changes['"-m", "rsnape_kit.cli"'] = repr(str(kaggle / "short.py"))
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    (kaggle / "working").mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", code], cwd=kaggle, capture_output=True, text=True,
                          env=KERNEL_ENV | {"RSNAPE_KAGGLE": str(kaggle)})
