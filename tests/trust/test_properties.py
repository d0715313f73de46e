"""Files of arrays, results and settings with any damage that hypothesis finds: refused by name, or read as written.

Examples are few in the gate, with fixed seeds; the full set (`make trust`) tries more.
"""
import io
import json
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import FULL, assert_same

from rsnape_kit.competition.labels import AUX_LABELS, EXAM_LABELS, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.data.feature_store import INDEX, META, FeatureStore
from rsnape_kit.inference.results import load_result, save_result
from rsnape_kit.models.keras_backend import read_arrays
from rsnape_kit.models.weight_files import read_torch
from rsnape_kit.runs.config import KerasConfig, PetaFormerConfig, Phase, SequenceConfig
from rsnape_kit.runs.folder import load_config, open_run
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE_WINDOWS, Window

bounded = settings(max_examples=2000 if FULL else 100, deadline=None, derandomize=True, database=None)
fewer = settings(bounded, max_examples=500 if FULL else 25)
numbers = count()  # names of files


@st.composite
def damages(draw):
    "Return a function of the bytes of a file: some are changed, cut out, put in, or the file ends early."
    kind = draw(st.sampled_from(("change", "change", "cut", "insert", "end")))
    at, bits = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))
    piece = draw(st.binary(min_size=1, max_size=8))

    def damage(raw: bytes) -> bytes:
        i = int(at * len(raw))
        return {"change": raw[:i] + bytes([raw[i] ^ bits]) + raw[i + 1:], "cut": raw[:i] + raw[i + len(piece):],
                "insert": raw[:i] + piece + raw[i:], "end": raw[:i]}[kind]

    return damage


def reads(read, path: Path, wanted, damage):
    "Damage a file; it must be refused by one line that names it, or read as before."
    raw = path.read_bytes()
    path.write_bytes(damage(raw))
    try:
        assert_same(read(path), wanted)
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error), error
    finally:
        path.write_bytes(raw)


ARRAYS = {"00000": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "00001": np.array([1, -1], np.int8),
          "00002": np.float32(.5)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A file of each kind, sound."
    folder = tmp_path_factory.mktemp("files")
    np.savez(folder / "best.npz", **ARRAYS)
    np.savez_compressed(folder / "packed.npz", **ARRAYS)
    features(folder / "features")
    return folder


def arrays_as_written(path: Path) -> dict:
    "All arrays if some are missing and the others are right: a damaged directory loses some, and loading counts them."
    found = read_arrays(path)
    return ARRAYS | found if set(found) < set(ARRAYS) else found


@given(damage=damages())
@bounded
def test_weights_of_keras(files, damage):
    for name in ("best.npz", "packed.npz"):
        reads(arrays_as_written, files / name, ARRAYS, damage)


@given(damage=damages())
@bounded
def test_weights_of_pytorch(files, damage):
    torch = pytest.importorskip("torch")
    path = files / "weights.pt"
    if not path.exists():
        torch.save({name: torch.tensor(array) for name, array in ARRAYS.items()}, path)
    reads(read_torch, path, ARRAYS, damage)


header = st.binary(max_size=200) | st.text(max_size=100).map(str.encode)


@given(header=header, version=st.binary(min_size=2, max_size=2))
@bounded
def test_an_npz_with_any_header_of_an_array(files, header, version):
    "The checksums of the file are right; only the description of the array is not."
    path = files / "header.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("00000.npy", b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + bytes(64))
    try:
        read_arrays(path)
    except ValueError as error:
        assert path.name in str(error)


kinds = st.sampled_from(("<f4", "|O", "<U9", "V3", "nonsense", "<i8"))


@given(shape=st.lists(st.integers(-2, 2**40), max_size=4), kind=kinds)
@bounded
def test_an_npz_whose_array_has_another_shape_or_type(files, shape, kind):
    "Sixty-four bytes of data, and a header that promises anything, huge arrays and pickled objects included."
    path = files / "shape.npz"
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("00000.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))
    try:
        array, = read_arrays(path).values()
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert array.nbytes <= 64 and not array.dtype.hasobject


def features(folder: Path):
    "A folder of features as compute_features writes it: two studies in a shard."
    folder.mkdir()
    rng, shard = np.random.default_rng(0), {}
    for k, n in enumerate((3, 5)):
        shard |= {f"slices{k}": np.array([f"{k}.{i}" for i in range(n)]), f"z{k}": np.arange(n, dtype=float),
                  f"features{k}": rng.normal(size=(1, n, 4)).astype(np.float16),
                  f"logits{k}": rng.normal(size=(1, n)).astype(np.float32)}
    np.savez(folder / "00000.npz", **shard)
    (folder / META).write_text(json.dumps({"run": "efficientnet-fold0-seed0 0123456789ab", "size": 4, "views": 1}))
    index = {"study": ["a", "b"], "key": ["x", "y"], "shard": "00000.npz", "number": [0, 1], "slices": [3, 5]}
    pd.DataFrame(index).to_parquet(folder / INDEX, index=False)


def all_features(path: Path) -> list:
    store = FeatureStore(path.parent)
    names = "slices", "z", "features", "logits"
    return [[getattr(store.study(uid), name) for name in names] for uid in store.studies]


@given(damage=damages())
@bounded
def test_features(files, damage):
    path = files / "features" / "00000.npz"
    reads(all_features, path, all_features(path), damage)


probability = st.floats(0, 1) | st.just(float("nan"))


lists = st.lists(probability, min_size=1, max_size=20)


@given(exams=st.lists(probability, min_size=9, max_size=9), images=lists, change=st.integers(-200, 200))
@fewer
def test_a_result_is_what_was_saved_and_one_of_another_length_is_none(files, exams, images, change):
    "A file that is too short or too long is not used, so that the study is predicted again."
    folder = files / f"results{next(numbers)}"
    folder.mkdir()
    names = pd.MultiIndex.from_product([["a"], [str(i) for i in range(len(images))]], names=[STUDY, SLICE])
    pred = Predictions(pd.DataFrame([exams], ["a"], EXAM_LABELS), pd.Series(images, names))
    if np.isnan([*exams, *images]).all():
        with pytest.raises(ValueError, match="nothing but NaN"):
            save_result(folder, "key", pred)
        return
    save_result(folder, "key", pred)
    wanted = np.array([*exams, *[np.nan] * len(AUX_LABELS), *images])
    np.testing.assert_array_equal(load_result(folder, "key", len(images)), wanted)
    raw = (folder / "key").read_bytes()
    (folder / "key").write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    if change:
        assert load_result(folder, "key", len(images)) is None


rate = st.floats(1e-6, 1, allow_nan=False)
phases = st.lists(st.builds(Phase, st.integers(1, 20), rate), min_size=1, max_size=3).map(tuple)
window = st.sampled_from(PE_WINDOWS) | st.builds(Window, st.integers(-900, 900), st.integers(1, 2000))
windows = st.lists(window, min_size=1, max_size=3)
inputs = st.builds(InputConfig, windows.map(tuple), st.just("fixed"), st.sampled_from((32, 64, 256)))


keras = st.builds(KerasConfig, model=st.sampled_from(("efficientnet", "resnet3d")), phases=phases, pixels=inputs,
                  seed=st.integers(0, 9), affine=st.none() | st.builds(AffineRange), batch=st.integers(1, 64))
petaformer = st.builds(PetaFormerConfig, phases=phases, pixels=inputs, tta=st.integers(0, 9))


@given(config=keras | petaformer | st.builds(SequenceConfig, phases=phases))
@fewer
def test_settings_come_back_from_json_as_they_were(files, config):
    assert load_config(open_run(files / f"run{next(numbers)}", config)) == config


def test_a_compressed_member_of_an_unknown_kind_is_refused(tmp_path):
    "What zipfile cannot unpack: another method, an encrypted member."
    out = io.BytesIO()
    np.savez(out, **ARRAYS)
    for offset, value in ((8, 99), (6, 1)):  # of the local header: method, flags; in the directory two bytes further
        raw = bytearray(out.getvalue())
        raw[offset] = value
        raw[raw.index(b"PK\x01\x02") + offset + 2] = value
        (tmp_path / "best.npz").write_bytes(raw)
        with pytest.raises(ValueError, match="best.npz"):
            read_arrays(tmp_path / "best.npz")
