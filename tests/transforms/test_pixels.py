"Rendering compared with the original's floating point, with and without numba, and from many threads."
import hashlib
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rsnape_kit.transforms.affine import MODES, AffineRange, crop_matrix
from rsnape_kit.transforms.input_config import InputConfig, make_render_params
from rsnape_kit.transforms.masks import SideMask, fill_values
from rsnape_kit.transforms.render import render_reference, render_slice
from rsnape_kit.transforms.windows import SCALES, Window

DIGEST = """
import hashlib, sys, warnings
import numpy as np
if {blocked}:
    sys.modules["numba"] = None
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig, make_render_params
from rsnape_kit.transforms.render import render_slice
from rsnape_kit.transforms.windows import PE
rng, digest = np.random.default_rng(5), hashlib.sha256()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(12):
        stored = rng.integers(-4096, 32765, (64, 64)).astype(np.int16)
        mode, scale = ("nearest", "bilinear")[i // 2 % 2], ("image", "fixed")[i // 4 % 2]
        config = InputConfig(size=(48, 64)[i % 2], mode=mode, scale=scale)
        params = make_render_params(AffineRange().sample(rng)[None], rng.random((1, 2)) < .5, [-4096], 64,
                                    config.size)[0]
        out = np.zeros((config.size, config.size, 3), np.uint8)
        render_slice(stored, params, config, out)
        digest.update(out)
    single = np.zeros((64, 64, 1), np.uint8)
    render_slice(stored, params, InputConfig((PE,), size=64), single)
    digest.update(single)
print(digest.hexdigest(), [str(w.message) for w in caught if "numba" in str(w.message)].__len__())
"""


def rendered(stored, params, config):
    out = np.zeros((config.size, config.size, len(config.windows)), np.uint8)
    render_slice(stored.copy(), params, config, out)
    return out


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from(SCALES), mode=st.sampled_from(MODES), half=st.integers(1, 40),
       source=st.integers(1, 40), wild=st.floats(0, 4), channels=st.integers(1, 4))
def test_rendering_equals_the_reference_for_any_setting(seed, scale, mode, half, source, wild, channels):
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(-4096, 32765, 2))
    stored = rng.integers(low, high + 1, (2 * source, 2 * source)).astype(np.int16)
    windows = tuple(Window(float(rng.uniform(-1200, 8000)), float(rng.uniform(.3, 8191))) for _ in range(channels))
    config = InputConfig(windows, scale, 2 * half, mode)
    matrix = AffineRange(20 * wild, 6 * wild, .1 * wild, .1 * wild).sample(rng)
    matrix = crop_matrix(rng.uniform(50, 500), 300, 350) @ matrix
    hide, fill = rng.random((1, 2)) < .5, rng.integers(-4096, 32765, 1)
    params = make_render_params(matrix[None], hide, fill, 2 * source, 2 * half)[0]
    np.testing.assert_array_equal(rendered(stored, params, config), render_reference(stored.copy(), params, config))


def test_same_bytes_without_numba_and_one_warning():
    def digest(blocked):
        done = subprocess.run([sys.executable, "-c", DIGEST.format(blocked=blocked)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    compiled, plain = digest(False), digest(True)
    assert compiled[0] == plain[0]
    assert (compiled[1], plain[1]) == ("0", "1")


def test_many_threads_at_once():
    rng = np.random.default_rng(0)
    slices = rng.integers(-4096, 9000, (24, 96, 96)).astype(np.int16)
    matrices, hide = AffineRange().matrices(rng.standard_normal((24, 6))), rng.random((24, 2)) < .5
    all_params, config = make_render_params(matrices, hide, [-4096] * 24, 96, 96), InputConfig(size=96)

    def digest_of(function):
        return hashlib.sha256(b"".join(function(slices[i].copy(), all_params[i], config) for i in range(24)))

    with ThreadPoolExecutor(8) as pool:
        digests = {digest.hexdigest() for digest in pool.map(digest_of, [rendered] * 16)}
    assert digests == {digest_of(render_reference).hexdigest()}


def original(raw, slope, intercept, hide, matrix):
    "The 30th place's training notebook in float32, step by step: resize, mask stored values, rescale, windows, gather."
    channels = original_windows(raw, slope, intercept, hide)
    return channels.reshape(-1, 3)[original_places(matrix)].reshape(256, 256, 3)


def original_windows(raw, slope, intercept, hide=(False, False)):
    "Three windows in [0, 1], float32 [256, 256, 3]."
    image = raw.astype(np.float32).reshape(256, 2, 256, 2).mean((1, 3), dtype=np.float32)
    image[:, 166:] *= not hide[0]
    image[:, :90] *= not hide[1]
    image = image * np.float32(slope) + np.float32(intercept)
    channels = []
    for level, width in ((-600, 1500), (100, 700), (40, 400)):
        clipped = np.clip(image, level - width // 2, level + width // 2)
        clipped = clipped - clipped.min()
        channels.append(clipped / clipped.max())
    return np.stack(channels, -1)


def original_places(matrix):
    "The source pixel of each pixel, int [256 * 256]."
    up, right = np.repeat(np.arange(128, -128, -1), 256), np.tile(np.arange(-128, 128), 256)
    places = (matrix * [[1, 1, 256], [1, 1, 256], [1, 1, 1]]).astype(np.float32)
    places = places @ np.stack([up, right, np.ones(256 * 256)]).astype(np.float32)
    places = np.clip(places.astype(np.int32), -127, 128)
    return (128 - places[0]) * 256 + 127 + places[1]


def difference_to_original(raw, slope, intercept, seed):
    "Absolute difference of each byte from the original's value."
    rng = np.random.default_rng(seed)
    normals, hide = rng.standard_normal(6), rng.random(2) < .5
    hu = np.clip(raw * slope + intercept, -1024, 8191)
    stored = np.rint(hu).astype(np.int32).reshape(256, 2, 256, 2).sum((1, 3)).astype(np.int16)
    ours = AffineRange(offset=-1 / 256).matrices(normals)  # the original's identity is off by one column
    params = make_render_params(ours[None], hide[None], fill_values([intercept], "zero"), 256, 256)[0]
    ours = rendered(stored, params, InputConfig(fill="zero"))
    return np.abs(ours - 255 * original(raw, slope, intercept, hide, AffineRange().matrices(normals)))


def test_equals_the_original_on_synthetic_slices():
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[-1:1:512j, -1:1:512j]
    for seed in range(6):
        tissue = np.where(rows**2 + columns**2 < .7, 1060, 0) + np.where(np.hypot(rows, columns - .3) < .2, 350, 0)
        raw = np.maximum(tissue + rng.normal(0, 30, (512, 512)), 0).astype(np.int16)
        difference = difference_to_original(raw, 1, -1024, seed)
        assert (difference <= .51).mean() >= .999


@pytest.mark.parametrize("study", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_equals_the_original_on_real_slices(real_ct, study):
    pydicom = pytest.importorskip("pydicom")
    paths = sorted((real_ct / "lidc_small" / study).rglob("*.dcm"))[::5]
    assert paths
    for seed, path in enumerate(paths):
        data = pydicom.dcmread(path)
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        raw = np.maximum(data.pixel_array, (-1024 - intercept) / slope).astype(np.int16)  # padding to air
        assert (difference_to_original(raw, slope, intercept, seed) <= .51).mean() >= .999


def test_jpeg_noise_comes_between_windows_and_transform_as_in_the_original():
    "The steps of the ResNet3D notebook: windows, JPEG by another encoder (Pillow's), gather."
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[-1:1:512j, -1:1:512j]
    raw = np.maximum(np.where(rows**2 + columns**2 < .7, 1060, 0) + rng.normal(0, 30, (512, 512)), 0).astype(np.int16)
    stored = (raw.astype(np.int32) - 1024).reshape(256, 2, 256, 2).sum((1, 3)).astype(np.int16)
    normals, affine = rng.standard_normal(6), AffineRange(shift=8 / 256, offset=-1 / 256)
    params = make_render_params(affine.matrices(normals)[None], [(False, False)], [-4096], 256, 256)[0]
    for quality in (30, 99):
        file = io.BytesIO()
        picture = np.rint(255 * original_windows(raw, 1, -1024)).astype(np.uint8)
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        places = original_places(AffineRange(shift=8 / 256).matrices(normals))
        expected = np.asarray(Image.open(file)).reshape(-1, 3)[places].reshape(256, 256, 3)
        difference = np.abs(rendered(stored, np.append(params, quality), InputConfig()).astype(int) - expected)
        assert (difference <= 1).mean() >= .998


def test_a_masked_slice_keeps_its_embolus():
    "The embolus of a synthetic study stays visible for any choice of hidden sides."
    rng = np.random.default_rng(2)
    for _ in range(300):
        left, right, central = rng.random(3) < .4
        stored = np.full((64, 64), 100, np.int16)
        columns = np.flatnonzero(np.repeat([right, central, left], [22, 20, 22]))
        spots = [(int(rng.integers(64)), int(column)) for column in rng.choice(columns, 3)] if len(columns) else []
        for spot in spots:
            stored[spot] = 1700
        hide = SideMask(p=.8).sample(rng, float(left), float(right))
        params = make_render_params(np.eye(3)[None], [hide], [-4096], 64, 64)[0]
        channel = rendered(stored, params, InputConfig((Window(100, 700),), "fixed", 64))[..., 0]
        assert [channel[spot] for spot in spots] == [246] * len(spots)
        assert (channel == 246).sum() == len(set(spots))
