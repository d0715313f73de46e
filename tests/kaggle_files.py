"A stub of Kaggle that also serves files and parts of them, breaks connections and has hiccups."
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from json import dumps, loads
from urllib.parse import quote, unquote, urlsplit

import kaggle_stub

STORAGE = "http://storage.localhost/"


class FileStub(kaggle_stub.Stub):
    "A competition's files, kernels' outputs and logs, submissions."

    def __init__(self):
        super().__init__()
        self.files = {}  # address -> bytes
        self.times = {}  # address -> unix time, default 1e9
        self.gets = []  # address and first byte of every GET
        self.breaks = {}  # address -> bytes after which the connection breaks, once
        self.first = []  # responses that come before the right ones; None: the connection is closed
        self.outputs, self.logs = {}, {}  # owner/slug -> names, text
        self.page = 2  # names of a page
        self.submissions = []

    def respond(self, method, body):
        with suppress(IndexError):
            response = self.first.pop(0)
            self.calls.append((method, body))
            return response
        return super().respond(method, body)

    def DownloadDataFile(self, body):
        names = [f"competition/{body['fileName']}{end}" for end in ("", ".zip")]
        found = [name for name in names if name in self.files]
        return (302, f"{STORAGE}{quote(found[0])}?signed=1") if found else (404, {"code": 404, "message": "Not found"})

    def ListKernelSessionOutput(self, body):
        name = f"{body['userName']}/{body['kernelSlug']}"
        if name not in self.outputs:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        start = int(body.get("pageToken") or 0)
        end = start + self.page
        files = [{"fileName": each, "url": f"{STORAGE}{quote(f'{name}/{each}')}?signed=1"}
                 for each in self.outputs[name][start:end]]
        more = {"nextPageToken": str(end)} if end < len(self.outputs[name]) else {}
        return 200, {"files": files, "log": self.logs.get(name, ""), **more}

    def ListSubmissions(self, body):
        return 200, {"submissions": self.submissions}


def serving_files(stub: FileStub):
    "The stub behind an HTTP proxy; gives the proxy's address."

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self, status, content, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_POST(self):
            body = loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            response = stub.respond(urlsplit(self.path).path.rpartition("/")[2], body)
            if response is None:
                self.close_connection = True
                return
            status, value = response
            moved = status == 302
            content = b"" if moved else dumps(value).encode()
            self._send(status, content, **({"Location": value} if moved else {"Content_Type": "application/json"}))
            self.wfile.write(content)

        def do_GET(self):
            address = unquote(urlsplit(self.path).path.lstrip("/"))
            whole, start = stub.files.get(address), 0
            if whole is None:
                self._send(404, b"")
                return
            headers = {"ETag": f'"{hash(whole)}"', "Accept_Ranges": "bytes",
                       "Last_Modified": formatdate(stub.times.get(address, 1e9), usegmt=True)}
            if "Range" in self.headers and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                headers["Content_Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
            stub.gets.append((address, start))
            self._send(206 if start else 200, whole[start:], **headers)
            end = stub.breaks.pop(address, None)
            self.wfile.write(whole[start:end])
            self.close_connection = self.close_connection or end is not None

        def log_message(self, *_):
            pass

    return kaggle_stub.proxy(Handler)


@contextmanager
def connected(monkeypatch, home):
    "A stub and Kaggle's client connected to it, without pauses."
    with kaggle_stub.connected(FileStub(), monkeypatch, home, serving_files) as stub:
        monkeypatch.setattr(import_module("kaggle.api.kaggle_api_extended").time, "sleep", lambda seconds: None)
        monkeypatch.setattr("rsnape_kit.kaggle.retry.pause_after", lambda error, attempt: 0.)
        yield stub
