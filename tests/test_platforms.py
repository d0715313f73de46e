"""Reading, training's input and the submission without what macOS or Windows lack: the same results.

A process hides the modules and functions of Linux before it imports anything, and runs what another runs with them.
"""
import json
import subprocess
import sys

import pytest

from rsnape_kit.phantom.generate import make_competition

HIDE = '''
import os, signal, sys, warnings
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty"): sys.modules[name] = None
for name in ("pread", "preadv", "sched_getaffinity", "fork", "forkpty", "sysconf", "statvfs", "killpg", "setsid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGSTOP", "SIGALRM", "setitimer"): delattr(signal, name)
def no_proc(event, args):
    if event == "open" and str(args[0]).startswith(("/proc", "/sys")): raise FileNotFoundError(2, "hidden", args[0])
sys.addaudithook(no_proc)
warnings.filterwarnings("error", category=EncodingWarning, module=r"rsnape_kit")  # text in the encoding of the system
'''
WORK = '''
import hashlib, json, sys
from pathlib import Path

def digest(*parts): return hashlib.sha256(b"".join(parts)).hexdigest()

import rsnape_kit as rk
from rsnape_kit.data.slice_loader import SliceLoader
from rsnape_kit.inference import supervisor, worker
from rsnape_kit.kaggle.runtime import session
from rsnape_kit.runs import folder
from rsnape_kit.utils import native
from rsnape_kit.utils.processes import exclusive

made, out = map(Path, sys.argv[1:])
slices = rk.scan(made / "train")
truth = rk.Predictions.from_train_csv(made / "train.csv")
with exclusive(out / "locked"):
    store = rk.SliceStore(rk.build_store(slices, out / "store", size=32))
pixels = rk.InputConfig(size=32)
x, y = rk.ImageBatches(store, truth, batch=4, pixels=pixels, mask=rk.SideMask(), affine=rk.AffineRange())[0]
prior = rk.make_consistent(rk.position_prior(truth, slices, rk.scan(made / "test")))
rk.write_submission(prior, made / "sample_submission.csv", out / "submission.csv")
assert not rk.check_submission(out / "submission.csv", made / "sample_submission.csv")
hu = [rk.read_hu(made / "train" / path) for path in slices.path]
results = {
    "table": digest(slices.to_csv().encode()), "hu": digest(*hu),
    "windows": digest(rk.apply_windows(hu[0], rk.PE_WINDOWS)),
    "shards": [digest(path.read_bytes()) for path in sorted(out.glob("store/*.slices"))],
    "slices": digest(*(store[i] for i in range(len(store.table)))), "batch": digest(x, y),
    "loss": rk.competition_loss(truth, rk.constant_prior(truth)),
    "folds": repr(rk.make_folds(truth.exams.index, None, 2)),
    "submission": digest((out / "submission.csv").read_bytes())}
here = session()
assert here.cores >= 1 and here.memory > 0 and here.left() == float("inf")
print(json.dumps({"results": results, "compiled": native._calls}))
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_competition(tmp_path_factory.mktemp("made") / "competition", 4, 2, slices=6, size=64, difficulty="demo")


def run(made, out, code: str) -> dict:
    out.mkdir()
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code, str(made), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_calls_of_linux_the_results_are_the_same(made, tmp_path):
    usual, bare = run(made, tmp_path / "usual", WORK), run(made, tmp_path / "bare", HIDE + WORK)
    assert usual["results"] == bare["results"]
    assert usual["results"]["shards"] and usual["results"]["loss"] > .1
    assert usual["compiled"] and not bare["compiled"]


@pytest.mark.parametrize("code", ["import fcntl", "os.preadv", "signal.SIGKILL", "open('/proc/uptime')"])
def test_they_are_hidden(code):
    done = subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True)
    assert done.returncode
    assert done.stderr.splitlines()[-1].startswith(("ModuleNotFoundError", "AttributeError", "FileNotFoundError"))
