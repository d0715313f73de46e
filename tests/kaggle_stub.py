"A server on loopback that imitates Kaggle's API, records the requests, and fails on demand."
import io
import json
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

DROP, LOSE = "drop", "lose"  # the connection breaks before the request is handled, or before its response


class Stub:
    "Kaggle's side: datasets, kernels and submissions in memory."

    def __init__(self):
        self.calls, self.blobs, self.datasets, self.faults = [], {}, {}, {}
        self.pending = 2  # status requests until a new version is ready
        self.lags = False  # whether the old version is called ready meanwhile
        self.kernel_states = ["QUEUED", "RUNNING", "COMPLETE"]
        self.complete = set()  # names of kernels whose last run is complete, whatever `kernel_states` says
        self.hiccups = {}  # (method, number of its call from 1) -> (status, body), or DROP or LOSE

    def sent(self, method: str) -> list:
        "Bodies of the calls of one method."
        return [body for name, body in self.calls if name == method]

    def respond(self, method: str, body: dict) -> tuple | str:
        self.calls.append((method, body))
        hiccup = self.hiccups.get((method, len(self.sent(method))))
        if hiccup == LOSE:
            getattr(self, method)(body)
        if hiccup or method in self.faults:
            return hiccup or self.faults[method]
        return getattr(self, method)(body)

    def download(self, path: str) -> tuple:
        "Status and content of a file that is fetched by its address."
        return 404, b"not found"

    def add_dataset(self, name: str):
        "A dataset whose version 1 is ready."
        self.datasets[name] = {"version": 1, "next": 1, "pending": 0, "files": {}}

    def StartBlobUpload(self, body):
        token = f"token{len(self.blobs)}"
        self.blobs[token] = {"name": body["name"], "content": None}
        return 200, {"token": token, "createUrl": f"http://blobs.localhost/{token}"}

    def put(self, token: str, content: bytes) -> int:
        fault = self.faults.get("PUT " + self.blobs[token]["name"])
        if fault:
            return fault
        self.blobs[token]["content"] = content
        return 200

    def CreateDataset(self, body):
        return self._version(body["ownerSlug"], body["slug"], body["files"])

    def CreateDatasetVersion(self, body):
        return self._version(body["ownerSlug"], body["datasetSlug"], body["body"]["files"])

    def _version(self, owner, slug, files):
        dataset = self.datasets.setdefault(f"{owner}/{slug}", {"version": 0})
        dataset.update(pending=self.pending, next=dataset["version"] + 1, files=self._unpacked(files))
        url = f"https://www.kaggle.com/datasets/{owner}/{slug}"
        return 200, {"ref": f"/{owner}/{slug}", "url": url, "status": "Ok"}

    def _unpacked(self, files) -> dict:
        "Files of a dataset: archives are unpacked into a folder of their name."
        made = {}
        for blob in (self.blobs[file["token"]] for file in files):
            if not blob["name"].endswith(".zip"):
                made[blob["name"]] = blob["content"]
                continue
            with zipfile.ZipFile(io.BytesIO(blob["content"])) as archive:
                made |= {f"{blob['name'][:-4]}/{name}": archive.read(name) for name in archive.namelist()
                         if not name.endswith("/")}
        return made

    def GetDatasetStatus(self, body):
        dataset = self.datasets.get(f"{body['ownerSlug']}/{body['datasetSlug']}")
        if dataset is None:
            return 404, {"code": 404, "message": "Not found"}
        dataset["pending"] -= 1
        if dataset["pending"] >= 0:
            return 200, {"status": "READY" if self.lags else "BLOBS_RECEIVED"}
        dataset["version"] = dataset["next"]
        return 200, {"status": "READY"}

    def GetDataset(self, body):
        dataset = self.datasets[f"{body['ownerSlug']}/{body['datasetSlug']}"]
        return 200, {"ref": body["datasetSlug"], "currentVersionNumber": dataset["version"]}

    def SaveKernel(self, body):
        name = body.get("slug") or f"known-by-number/{body['id']}"
        url = f"https://www.kaggle.com/code/{name}"
        return 200, {"ref": f"/{name}", "url": url, "versionNumber": len(self.sent("SaveKernel"))}

    def GetKernel(self, body):
        newest = len(self.sent("SaveKernel"))
        return 200, {"metadata": {"slug": body["kernelSlug"], "currentVersionNumber": newest}, "blob": {}}

    def GetKernelSessionStatus(self, body):
        if f"{body['userName']}/{body['kernelSlug']}" in self.complete:
            return 200, {"status": "COMPLETE"}
        return 200, {"status": self.kernel_states.pop(0) if len(self.kernel_states) > 1 else self.kernel_states[0],
                     "failureMessage": "Out of memory" if self.kernel_states[0] == "ERROR" else ""}

    def CreateCodeSubmission(self, body):
        return 200, {"message": f"Successfully submitted to {body['competitionName']}", "ref": 1}


@contextmanager
def proxy(handler):
    "An HTTP proxy on loopback that answers by a handler; gives its address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def serving(stub: Stub):
    "The stub behind an HTTP proxy; gives the proxy's address."

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, status, value):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            kind = "octet-stream" if isinstance(value, bytes) else "json"
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            body = json.loads(self._body() or b"{}")
            response = stub.respond(urlsplit(self.path).path.rpartition("/")[2], body)
            if response in (DROP, LOSE):
                self.close_connection = True
            else:
                self._reply(*response)

        def do_GET(self):
            self._reply(*stub.download(urlsplit(self.path).path))

        def do_PUT(self):
            content = self._body()
            self._reply(stub.put(urlsplit(self.path).path.rpartition("/")[2], content), {})

        def log_message(self, *_):
            pass

    return proxy(Handler)


@contextmanager
def connected(stub: Stub, monkeypatch, home, serving=serving):
    "The real client connected to a stub, with a separate home folder for its records."
    extended = pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
    with serving(stub) as proxy:
        for name in ("NO_PROXY", "no_proxy", "KAGGLE_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy)
        home.mkdir()
        for name, value in (("KAGGLE_USERNAME", "test"), ("KAGGLE_KEY", "test"),
                            ("HOME", str(home)), ("TMPDIR", str(home))):
            monkeypatch.setenv(name, value)
        # what KAGGLE_API_ENVIRONMENT=LOCALHOST does where it is set before the import
        monkeypatch.setattr(extended.KaggleApi, "args", ["--local"])
        monkeypatch.setattr("tempfile.tempdir", None)  # the client keeps unfinished uploads there
        yield stub
