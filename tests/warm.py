"""Processes that begin with Keras imported: each runs some code in a fork of one that did nothing but import.

An import of TensorFlow takes four CPU-seconds, which tests that kill and restart a training would pay many times."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT

SERVER = '''
import json, os, sys, traceback
import numpy, pandas, keras, efficientnet.model
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 1
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(os.path.join(job["folder"], name), os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(job["env"])
        sys.argv = job["argv"]
        sys.path[:0] = [each for each in job["env"].get("PYTHONPATH", "").split(os.pathsep) if each]
        try:
            exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''
servers = {}


def run(code: str, *argv, backend: str, **env) -> subprocess.CompletedProcess:
    "Run Python code as `python -c` would, with Keras on a backend already imported."
    if backend not in servers:
        environ = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        servers[backend] = subprocess.Popen([sys.executable, "-c", SERVER], env=environ, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        job = {"code": code, "argv": ["-c", *map(str, argv)], "env": env, "folder": folder}
        servers[backend].stdin.write(json.dumps(job) + "\n")
        servers[backend].stdin.flush()
        status = int(servers[backend].stdout.readline())
        said = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(job["argv"], status, *said)


def close():
    "End the processes, so that their time is counted with that of the tests."
    while servers:
        _, server = servers.popitem()
        server.stdin.close()
        server.wait()
