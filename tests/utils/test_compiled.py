"Without numba everything comes out the same: files, numbers, stores and pixels; one warning says that it is slow."
import os
import subprocess
import sys

import ct_files
import numpy as np
import pytest
from ct_files import ct_file, stored_values
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1

WORK = """
import hashlib, sys, warnings
from pathlib import Path
if sys.argv[1] == "blocked":
    sys.modules["numba"] = None
import ct_files
import numpy as np
import rsnape_kit.phantom.generate
from rsnape_kit.dicom import header
from rsnape_kit.store import codec as tiles
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.dicom.header import parse_decimal
from rsnape_kit.dicom.hounsfield import read_hu
from rsnape_kit.dicom.slices import scan
from rsnape_kit.transforms.render import fused
from rsnape_kit.transforms.render import InputConfig, make_render_params, render
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.store.build import build_store

rng, folder, out = np.random.default_rng(0), Path(sys.argv[2]), Path(sys.argv[3])

def say(name, *values):
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes())
    print(name, digest.hexdigest(), flush=True)

table = scan(folder)
say("scan", table.to_csv().encode())
say("HU", *(read_hu(path, lowest) for path in table.path for lowest in (-1024, -32768)))
for size in (32, 64):
    say(f"quarter {size}", DicomSource(folder, size)[:])
for codec in ("tiles", "blosc2"):
    built = build_store(folder, out / codec, size=32, codec=codec)
    say(codec, *(path.read_bytes() for path in sorted(built.glob("*.slices"))))
    store = SliceStore(built)
    assert store.verify() == []
    say("slices", store[:])
for mode in ("nearest", "bilinear"):
    for scale in ("image", "fixed"):
        pixels = Pixels(size=32, mode=mode, scale=scale)
        maps = np.stack([AffineRange().sample(rng) for _ in store.table.index])
        jobs = make_jobs(maps, rng.random((len(store), 2)) < .5, [-4096] * len(store), 32, 32)
        images, same = np.zeros((2, len(store), 32 * 32 * 3), np.uint8)
        for i, job in enumerate(jobs):
            render(store[i], job, pixels, images[i])
            fused(store[i], job, pixels.ends, scale == "image", mode == "nearest", 32, same[i], 0, 3)
        say(f"pixels {mode} {scale}", images)
        np.testing.assert_array_equal(same, images)

raw = Path(table.path[0]).read_bytes()
damaged = [data for _, (_, data) in zip(range(300), ct_files.mutations(raw, 1200, rng))]
bufs = np.stack([np.frombuffer(data[:2048].ljust(2048, b"\\0"), np.uint8) for data in damaged])
at, length = np.zeros((2, len(bufs), len(header.FIELDS)), np.int64)
numbers, status = np.zeros((len(bufs), header.NUMBERS)), np.zeros(len(bufs), np.uint8)
header.walk_many(bufs, rng.integers(140, 2049, len(bufs)), at, length, numbers, status)
assert set(status) == {0, 1, 2}
say("damaged headers", at, length, np.nan_to_num(numbers), status)

tokens = [b"1", b"9", b"12345678", b"0", b".", b"-", b"e", b"E+", b" "]
texts = [b"".join(rng.choice(tokens, rng.integers(1, 6))) for _ in range(2000)]
texts += [repr(number).encode() for number in rng.normal(0, 10. ** rng.integers(-9, 9, 300)).tolist()] + [b"9" * 40]
read = [decimal(np.frombuffer(text, np.uint8), 0, len(text)) for text in texts]
assert 600 < np.isfinite(read).sum() < len(read) - 600
say("decimals", np.nan_to_num(read))

for width in range(17):
    values = rng.integers(-2**15, -2**15 + 2**width, (40, 48)).astype(np.int16)
    chunk, again = tiles.compress(values), np.empty_like(values)
    tiles.decompress(chunk, again)
    np.testing.assert_array_equal(again, values)
    say(f"tiles of {width} bits", chunk)
damaged = bytearray(chunk)
damaged[40] ^= 1
try:
    tiles.decompress(damaged, again)
except ValueError as error:
    print(error)
try:
    rsnape_kit.phantom.paint.texture(np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32), 1., 2., 3)
    print("painted")
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "What both ways print, and what they warn of."
    folder = tmp_path_factory.mktemp("ct")
    files = (  # bits, signed, slope, intercept
        (ImplicitVRLittleEndian, 16, False, "1", "-1024"), (ExplicitVRLittleEndian, 16, True, "1", "-1024"),
        (ExplicitVRLittleEndian, 12, False, "1", "-1024"), (ImplicitVRLittleEndian, 12, True, "1", "0"),
        (JPEGLosslessSV1, 13, False, "1", "-1024"), (ExplicitVRLittleEndian, 16, False, "1.25", "-1000.5"))
    for k, (syntax, bits, signed, slope, intercept) in enumerate(files):
        values = stored_values((64, 64), signed, bits, seed=k) // (16 if bits == 16 else 1)  # a CT's range
        ct_file(folder / f"{k}.dcm", values, syntax, bits, slope, intercept, SOPInstanceUID=f"1.2.3.{k}",
                StudyInstanceUID=f"1.2.{k // 3}", SeriesInstanceUID=f"1.2.{k // 3}.1",
                InstanceNumber=k, ImagePositionPatient=[-160, -160, 5 * k])

    def run(way):
        path = os.pathsep.join([os.path.dirname(ct_files.__file__), *sys.path])
        done = subprocess.run([sys.executable, "-W", "always", "-c", WORK, way, folder, folder.parent / way],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if "Warning: " in line]

    return run("compiled"), run("blocked")


def test_the_same_without_numba(runs):
    (compiled, _), (plain, _) = runs
    assert plain[:-1] == compiled[:-1]
    assert len(set(compiled)) == len(compiled) - 1  # two codecs, the same slices: all else differs from all else
    assert sum(line.startswith("slices ") for line in compiled) == 2
    assert compiled[-2].endswith("checksum disagree")


def test_one_warning_and_none_of_numbers(runs):
    (_, compiled), (_, plain) = runs
    assert not [line for line in compiled if "numba" in line]
    assert len([line for line in plain if "numba" in line]) == 1
    assert not [line for line in plain if "RuntimeWarning" in line]


def test_the_phantom_says_what_it_needs(runs):
    (compiled, _), (plain, _) = runs
    assert compiled[-1] == "painted"
    assert plain[-1] == "rsnape_kit.phantom.paint.texture needs numba: pip install numba"


def test_nowhere_to_keep_a_cache():
    "A function without a file, as in an archive that Python imports from, is compiled nevertheless."
    from rsnape_kit.utils.native import compiled, numba

    space = {}
    exec("def double(x): return 2 * x", space)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(space["double"])
    double = compiled(space["double"])
    assert double(np.int64(21)) == 42 and double.signatures
