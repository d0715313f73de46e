"Published weights: downloads from a server on this machine, and the files that are refused."
import hashlib
import io
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rsnape_kit.cli import main
from rsnape_kit.models import published
from rsnape_kit.models.published import PUBLISHED, PublishedWeights, fetch_weights, verify_weights

CONTENT = np.random.default_rng(0).bytes(1_000_000)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "An entry of the table whose file the server has: an npz file by its first bytes."
    file = io.BytesIO()
    np.savez(file, a=np.frombuffer(CONTENT, "u1"))
    digest = hashlib.md5(file.getvalue()).hexdigest()
    entry = PublishedWeights("small", "small.npz", "", None, digest, (), "", "a test", "CC0")
    monkeypatch.setitem(PUBLISHED, "small", entry)
    monkeypatch.setattr(published.time, "sleep", lambda seconds: None)
    return file.getvalue()


@contextmanager
def server(content, ranges=True, breaks_after=(), status=200):
    "Serve one content; the first answers break off after some bytes. Yields the address and the requested ranges."
    asked, breaks = [], list(breaks_after)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(found[1]) if found and ranges else 0
            if found and ranges and start >= len(content):
                return self.send_error(416)
            if status != 200:
                return self.send_error(status)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:start + breaks.pop(0)] if breaks else content[start:])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/files", asked
        finally:
            running.shutdown()


def test_a_download_continues_where_it_broke_off(tmp_path, small, capfd):
    with server(small, breaks_after=(300_000, 1)) as (mirror, asked):
        path, = fetch_weights(["small"], tmp_path / "weights", mirror)
        assert path.read_bytes() == small and path.name == "small.npz"
        assert asked == [None, "bytes=300000-", "bytes=300001-"]
        assert fetch_weights(["small"], tmp_path / "weights", mirror) == [path] and len(asked) == 3  # nothing to do
        path.rename(tmp_path / "weights" / "small.npz.part")  # killed before the file got its name
        assert fetch_weights(["small"], tmp_path / "weights", mirror)[0].read_bytes() == small
        main(["weights", "small", "--out", str(tmp_path / "cli"), "--mirror", mirror])
    assert [file.name for file in (tmp_path / "weights").iterdir()] == ["small.npz"]
    assert (tmp_path / "cli" / "small.npz").read_bytes() == small
    assert str(tmp_path / "cli" / "small.npz") in capfd.readouterr().out


def test_an_interrupted_call_is_continued_by_the_next_also_without_ranges(tmp_path, small):
    with server(small, breaks_after=[1000] * published.TRIES, ranges=False) as (mirror, asked):
        with pytest.raises(OSError, match="small.npz: the connection was closed after 1000 bytes, 5 times; call again"):
            fetch_weights(["small"], tmp_path, mirror)
        assert (tmp_path / "small.npz.part").stat().st_size == 1000
        assert fetch_weights(["small"], tmp_path, mirror)[0].read_bytes() == small


@pytest.mark.parametrize("content, problem", [
    (b"<!DOCTYPE html><title>log in</title>", "small.npz.part is an HTML page, expected small"),
    (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer instead of the file, expected small"),
    (b"PK\x03\x04" + CONTENT, "is a truncated zip archive, expected small")])
def test_a_wrong_file_is_refused_and_removed(tmp_path, content, problem):
    with server(content) as (mirror, _), pytest.raises(ValueError, match="not what was published.*removed") as error:
        fetch_weights(["small"], tmp_path, mirror)
    assert problem in str(error.value) and mirror in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_digest_is_refused_with_the_expected_one(tmp_path, small):
    other = bytes([*small[:5000], small[5000] ^ 1, *small[5001:]])  # one bit of the array
    expected = f"expected small .*md5 {PUBLISHED['small'].digest}"
    with server(other) as (mirror, _), pytest.raises(ValueError, match=expected):
        fetch_weights(["small"], tmp_path, mirror)
    assert not list(tmp_path.iterdir())
    (tmp_path / "small.npz").write_bytes(other)  # laid there by hand
    with pytest.raises(ValueError, match="small.npz is a NumPy file of .* fetch it with `rsnape weights small`"):
        fetch_weights(["small"], tmp_path)
    assert verify_weights(tmp_path / "small.npz") is None
    (tmp_path / "small.npz").write_bytes(small)
    with pytest.raises(ValueError, match="small.npz is small, expected resnet34"):
        verify_weights(tmp_path / "small.npz", "resnet34")


def test_an_address_that_is_gone_is_named(tmp_path):
    gone = "/files/small.npz: HTTP status 404.*as small.npz"
    with server(b"", status=404) as (mirror, _), pytest.raises(OSError, match=gone):
        fetch_weights(["small"], tmp_path, mirror)
    with pytest.raises(FileNotFoundError, match="efficientnet-b1-imagenet .*address is dead"):
        fetch_weights(["efficientnet-b1-imagenet"], tmp_path)


def test_the_list_names_every_entry_and_fetches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["weights", "--list"])
    printed = capsys.readouterr().out
    assert all(entry.name in printed and entry.licence in printed for entry in PUBLISHED.values())
    assert not list(tmp_path.iterdir())
