"""Processes that begin with their frameworks imported: each is a fork of one that did nothing but import.

An import of TensorFlow takes four CPU-seconds, one of PyTorch two; tests that start many processes would pay for each.
"""
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
# 'both': PyTorch and Keras on TensorFlow
IMPORTS = {"tensorflow": ("keras", "efficientnet.model"), "jax": ("keras", "tensorflow", "efficientnet.model"),
           "torch": ("torch._dynamo", "fastai.callback.all"),
           "both": ("torch._dynamo", "fastai.callback.all", "keras", "efficientnet.model")}


def trace_plainly():
    """Leave out TensorFlow's optimisation of graphs: a third of each traced step, which pays in long trainings only.

    Forks inherit this.
    """
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def _run(job: dict):
    "Run a job in this process, which was forked for it, and exit."
    status = 1
    os.chdir(job["cwd"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    if job["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[:0] = [each for each in job["env"].get("PYTHONPATH", "").split(os.pathsep) if each]
    if job["parent"]:  # which started this process, but is not the one that it was forked from
        forked_from, real = os.getppid(), os.getppid
        os.getppid = lambda: job["parent"] if real() == forked_from else 1
    try:
        if job["module"]:
            runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        else:
            exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as error:  # as Python ends: a text is printed
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(requests: int, replies: int, imports: tuple):
    "Fork a process for each job requested, until the requesting process ends."
    for name in imports:
        __import__(name)
    trace_plainly()
    gc.freeze()  # collections in the forks pass over what was imported
    running, lines = {}, os.fdopen(requests, "rb", buffering=0)
    while True:
        if select.select([lines], [], [], .01 if running else None)[0]:
            line = lines.readline()
            if not line:
                return
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _run(job)
            running[pid] = Path(job["status"])
            os.write(replies, f"{pid}\n".encode())
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                path = running.pop(pid)
                path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                path.with_suffix(".new").rename(path)


class Server:
    "A process with some frameworks imported that starts others: a fork of this one where it has them, else a new one."

    def __init__(self, kind: str):
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        self.kind, self.folder, self.count, self.lock = kind, tempfile.TemporaryDirectory(), 0, threading.Lock()
        keras = sys.modules.get("keras")
        on_tensorflow = keras and keras.backend.backend() == "tensorflow"
        if kind in ("both", "tensorflow") and "torch" in sys.modules and on_tensorflow:
            self.pid = os.fork()
            if self.pid == 0:
                status = 1
                try:
                    os.close(self.requests)
                    serve(requests, replies, IMPORTS[kind])
                    status = 0
                finally:
                    os._exit(status)
        else:
            backend = {"KERAS_BACKEND": "tensorflow" if kind in ("both", "torch") else kind}
            env = os.environ | backend | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
            self.pid = subprocess.Popen([sys.executable, __file__, str(requests), str(replies), kind], env=env,
                                        pass_fds=(requests, replies)).pid
        os.close(requests)
        os.close(replies)
        self.lines = os.fdopen(self.replies, "rb", buffering=0)

    def start(self, job: dict) -> "Process":
        with self.lock:
            self.count += 1
            status = Path(self.folder.name, str(self.count))
            os.write(self.requests, (json.dumps(job | {"status": str(status)}) + "\n").encode())
            return Process(job["argv"], int(self.lines.readline()), status)

    def close(self):
        os.close(self.requests)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.folder.cleanup()


class Process:
    "A started process, with those methods of subprocess.Popen that are needed here."

    def __init__(self, args: list, pid: int, status: Path | None = None):
        self.args, self.pid, self.status, self.returncode = args, pid, status, None

    def poll(self):
        if self.returncode is None and self.status is None:  # forked from this process
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        elif self.returncode is None and self.status.exists():
            self.returncode = int(self.status.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None):
        end = time.time() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.time() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(.01)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


servers = {}


def server(kind: str) -> Server:
    "Return the server of this kind, started if there is none."
    if kind not in servers:
        servers[kind] = Server(kind)
    return servers[kind]


def _job(command: list, env: dict, stdout: str, stderr: str, new_session: bool = False, parent: int = 0) -> dict:
    "Return the job that does what `python ...` would do."
    _, option, text, *argv = map(str, command)
    assert option in ("-c", "-m"), command
    return {"argv": [option, *argv], "code": text if option == "-c" else "", "module": text if option == "-m" else "",
            "env": dict(env), "cwd": os.getcwd(), "stdout": stdout, "stderr": stderr, "new_session": new_session,
            "parent": parent}


def _in_a_fork(job: dict) -> Process:
    "Start a job in a fork of this process."
    pid = os.fork()
    if pid == 0:
        _run(job | {"parent": 0})
    return Process(job["argv"], pid)


def popen(command: list, *, env=None, stdin=None, stdout=None, stderr=None, start_new_session=False,
          start=None) -> Process:
    "Start `python -m ...` or `python -c ...` as subprocess.Popen does, with PyTorch and Keras imported."
    names = [os.devnull if file in (None, subprocess.DEVNULL) else file.name for file in (stdout, stderr)]
    job = _job(command, os.environ if env is None else env, *names, start_new_session,
               0 if start_new_session else os.getpid())
    return (start or server("both").start)(job)


def run_command(command: list, *, env=None, timeout=None, capture_output=True, text=True, stdout=None, stderr=None,
                start=None):
    "Run a Python process as subprocess.run does, with PyTorch and Keras imported."
    if stdout:
        process = popen(command, env=env, stdout=stdout, stderr=stderr, start=start)
        return subprocess.CompletedProcess(command, process.wait(timeout))
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/stdout", "w") as stdout, open(f"{folder}/stderr", "w") as stderr:
            process = popen(command, env=env, stdout=stdout, stderr=stderr, start=start)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        printed = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(command, process.returncode, *printed)


class _Subprocess:
    "The module subprocess, for modules whose processes are to be forked."

    def __init__(self, start=None):
        self.start = start

    def Popen(self, *args, **options):
        return popen(*args, start=self.start, **options)

    def run(self, *args, **options):
        return run_command(*args, start=self.start, **options)

    def __getattr__(self, name):
        return getattr(subprocess, name)


@contextlib.contextmanager
def workers(start=None):
    "Make training, prediction and submission start their processes warm."
    from rsnape_kit.inference import supervisor
    from rsnape_kit.kaggle import submitter
    from rsnape_kit.training import cross_validation
    modules = supervisor, submitter, cross_validation
    for module in modules:
        module.subprocess = _Subprocess(start)
    try:
        yield
    finally:
        for module in modules:
            module.subprocess = subprocess


def workers_in_forks():
    "The same within a warm process: the workers are its child processes and end with its process group."
    return workers(_in_a_fork)


COMMAND = """
import runpy, sys
sys.path.insert(0, {tests!r})
import warm
warm.servers.clear()  # those of the process that this one was forked from
warm.server("both")  # before there are threads
try:
    with warm.workers():
        runpy.run_module("rsnape_kit.cli", run_name="__main__", alter_sys=True)
finally:
    warm.close()
"""


def command(*words) -> subprocess.CompletedProcess:
    "Run `rsnape ...` and all processes that it starts with PyTorch and Keras imported; stdout has all output."
    with tempfile.NamedTemporaryFile("r") as output:
        code = COMMAND.format(tests=str(Path(__file__).parent))
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        job = _job([sys.executable, "-c", code, *words], env, output.name, output.name)
        status = server("both").start(job).wait()
        return subprocess.CompletedProcess(job["argv"], status, output.read())


def run(code: str, *argv, backend: str, **env) -> subprocess.CompletedProcess:
    "Run code as `python -c` would, with a framework imported: Keras on 'tensorflow' or 'jax', or 'torch'."
    with tempfile.TemporaryDirectory() as folder:
        backends = {} if backend == "torch" else {"KERAS_BACKEND": backend}
        job = _job([sys.executable, "-c", code, *argv], os.environ | {"PYTHONPATH": str(ROOT)} | backends | env,
                   f"{folder}/stdout", f"{folder}/stderr")
        status = server(backend).start(job).wait()
        printed = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(job["argv"], status, *printed)


def close():
    "End the servers, so that their time is counted with that of the tests."
    while servers:
        servers.popitem()[1].close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), IMPORTS[sys.argv[3]])
