"Results without numba equal the compiled ones (headers, HU, stores, rendered slices), with one warning."
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
from rsnape_kit.transforms.input_config import InputConfig, make_render_params
from rsnape_kit.transforms.render import render_kernel, render_slice
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.store.build import build_store

rng, folder, out = np.random.default_rng(0), Path(sys.argv[2]), Path(sys.argv[3])

def report(name, *values):
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes())
    print(name, digest.hexdigest(), flush=True)

table = scan(folder)
report("scan", table.to_csv().encode())
report("HU", *(read_hu(path, lowest) for path in table.path for lowest in (-1024, -32768)))
for size in (32, 64):
    report(f"fixed point {size}", DicomSource(folder, size)[:])
built = build_store(folder, out / "store", size=32)
report("shards", *(path.read_bytes() for path in sorted(built.glob("*.slices"))))
store = SliceStore(built)
assert store.verify() == []
report("slices", store[:])
for mode in ("nearest", "bilinear"):
    for scale in ("image", "fixed"):
        config = InputConfig(size=32, mode=mode, scale=scale)
        matrices = np.stack([AffineRange().sample(rng) for _ in store.table.index])
        table_params = make_render_params(matrices, rng.random((len(store), 2)) < .5, [-4096] * len(store), 32, 32)
        images, same = np.zeros((2, len(store), 32, 32, 3), np.uint8)
        for i, params in enumerate(table_params):
            render_slice(store[i], params, config, images[i])
            how = scale == "image", mode == "nearest", 32
            render_kernel(store[i], params, config.ends, *how, same[i].reshape(-1), 3, 0)
        report(f"rendered {mode} {scale}", images)
        np.testing.assert_array_equal(same, images)

raw = Path(table.path[0]).read_bytes()
damaged = [data for _, (_, data) in zip(range(300), ct_files.mutations(raw, 1200, rng))]
bufs = np.stack([np.frombuffer(data[:2048].ljust(2048, b"\\0"), np.uint8) for data in damaged])
at, length = np.zeros((2, len(bufs), len(header.FIELDS)), np.int64)
numbers, status = np.zeros((len(bufs), header.NUMBERS)), np.zeros(len(bufs), np.uint8)
header.walk_many(bufs, rng.integers(140, 2049, len(bufs)), at, length, numbers, status)
assert set(status) == {0, 1, 2}
report("damaged headers", at, length, np.nan_to_num(numbers), status)

tokens = [b"1", b"9", b"12345678", b"0", b".", b"-", b"e", b"E+", b" "]
texts = [b"".join(rng.choice(tokens, rng.integers(1, 6))) for _ in range(2000)]
texts += [repr(number).encode() for number in rng.normal(0, 10. ** rng.integers(-9, 9, 300)).tolist()] + [b"9" * 40]
read = [parse_decimal(np.frombuffer(text, np.uint8), 0, len(text)) for text in texts]
assert 600 < np.isfinite(read).sum() < len(read) - 600
report("decimals", np.nan_to_num(read))

for width in range(17):
    values = rng.integers(-2**15, -2**15 + 2**width, (40, 48)).astype(np.int16)
    chunk, again = tiles.compress(values), np.empty_like(values)
    tiles.decompress(chunk, again)
    np.testing.assert_array_equal(again, values)
    report(f"tiles of {width} bits", chunk)
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
    "Output and warnings of a run with numba and of one without."
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
    assert len(set(compiled)) == len(compiled)
    assert compiled[-2].endswith("bytes is wrong")


def test_one_warning_and_none_about_overflow(runs):
    (_, compiled), (_, plain) = runs
    assert not [line for line in compiled if "numba" in line]
    assert len([line for line in plain if "numba" in line]) == 1
    assert not [line for line in plain if "RuntimeWarning" in line]


def test_the_phantom_names_the_missing_package(runs):
    (compiled, _), (plain, _) = runs
    assert compiled[-1] == "painted"
    assert plain[-1] == "rsnape_kit.phantom.paint.texture needs numba: pip install 'rsnape_kit[dicom]'"


def test_compiles_without_a_place_for_a_cache():
    "A function without a file, as in a zip archive, is compiled too."
    from rsnape_kit.utils.native import compiled, numba

    space = {}
    exec("def double(x): return 2 * x", space)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(space["double"])
    double = compiled(space["double"])
    assert double(np.int64(21)) == 42 and double.signatures
