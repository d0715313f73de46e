"The fused pass against the original's floats, with and without numba, and from many threads."
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsnape_kit.transforms.affine import MODES, AffineRange, crop_matrix
from rsnape_kit.transforms.masks import SideMask, fill_values
from rsnape_kit.transforms.render import InputConfig, make_render_params, render, render_reference
from rsnape_kit.transforms.windows import SCALES, Window

DIGEST = """
import hashlib, sys, warnings
import numpy as np
if {blocked}:
    sys.modules["numba"] = None
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.render import InputConfig, make_render_params, render
from rsnape_kit.transforms.windows import PE
rng, digest = np.random.default_rng(5), hashlib.sha256()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(12):
        stored = rng.integers(-4096, 32765, (64, 64)).astype(np.int16)
        mode, scale = ("nearest", "bilinear")[i // 2 % 2], ("image", "fixed")[i // 4 % 2]
        pixels = Pixels(size=(48, 64)[i % 2], mode=mode, scale=scale)
        job = make_jobs(AffineRange().sample(rng)[None], rng.random((1, 2)) < .5, [-4096], 64, pixels.size)[0]
        out = np.zeros(pixels.size**2 * 3, np.uint8)
        render(stored, job, pixels, out)
        digest.update(out)
    apart = np.zeros(64 * 64 * 5, np.uint8)
    render(stored, job, Pixels((PE,), size=64), apart, 3, 5)
    digest.update(apart)
print(digest.hexdigest(), [str(w.message) for w in caught if "numba" in str(w.message)].__len__())
"""


def rendered(stored, job, pixels):
    out = np.zeros((pixels.size, pixels.size, len(pixels.windows)), np.uint8)
    render(stored.copy(), job, pixels, out.reshape(-1))
    return out


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from(SCALES), mode=st.sampled_from(MODES), half=st.integers(1, 40),
       source=st.integers(1, 40), wild=st.floats(0, 4), channels=st.integers(1, 4))
def test_fused_is_the_slow_way_for_any_setting(seed, scale, mode, half, source, wild, channels):
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(-4096, 32765, 2))
    stored = rng.integers(low, high + 1, (2 * source, 2 * source)).astype(np.int16)
    windows = tuple(Window(float(rng.uniform(-1200, 8000)), float(rng.uniform(.3, 8191))) for _ in range(channels))
    pixels = InputConfig(windows, scale, 2 * half, mode)
    matrix = AffineRange(20 * wild, 6 * wild, .1 * wild, .1 * wild).sample(rng)
    matrix = crop_matrix(rng.uniform(50, 500), 300, 350) @ matrix
    job = make_render_params(matrix[None], rng.random((1, 2)) < .5, rng.integers(-4096, 32765, 1), 2 * source, 2 * half)[0]
    np.testing.assert_array_equal(rendered(stored, job, pixels), render_reference(stored.copy(), job, pixels))


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
    maps, hide = AffineRange().matrices(rng.standard_normal((24, 6))), rng.random((24, 2)) < .5
    jobs, pixels = make_render_params(maps, hide, [-4096] * 24, 96, 96), InputConfig(size=96)

    def all_of_them(way):
        return hashlib.sha256(b"".join(way(slices[i].copy(), jobs[i], pixels) for i in range(24)))

    with ThreadPoolExecutor(8) as pool:
        digests = {digest.hexdigest() for digest in pool.map(all_of_them, [rendered] * 16)}
    assert digests == {all_of_them(render_reference).hexdigest()}


def original(raw, slope, intercept, hide, matrix):
    "The 30th place's training notebook in float32, step by step: resize, mask stored values, rescale, windows, gather."
    image = raw.astype(np.float32).reshape(256, 2, 256, 2).mean((1, 3), dtype=np.float32)
    image[:, 166:] *= not hide[0]
    image[:, :90] *= not hide[1]
    image = image * np.float32(slope) + np.float32(intercept)
    channels = []
    for level, width in ((-600, 1500), (100, 700), (40, 400)):
        clipped = np.clip(image, level - width // 2, level + width // 2)
        clipped = clipped - clipped.min()
        channels.append(clipped / clipped.max())
    up, right = np.repeat(np.arange(128, -128, -1), 256), np.tile(np.arange(-128, 128), 256)
    places = (matrix * [[1, 1, 256], [1, 1, 256], [1, 1, 1]]).astype(np.float32)
    places = places @ np.stack([up, right, np.ones(256 * 256)]).astype(np.float32)
    places = np.clip(places.astype(np.int32), -127, 128)
    return np.stack(channels, -1)[128 - places[0], 127 + places[1]].reshape(256, 256, 3)


def against_the_original(raw, slope, intercept, seed):
    "How many bytes are those of the original, and how far the others are where the same pixel was picked."
    rng = np.random.default_rng(seed)
    matrix, hide = AffineRange().sample(rng), rng.random(2) < .5
    hu = np.clip(raw * slope + intercept, -1024, 8191)
    stored = np.rint(hu).astype(np.int32).reshape(256, 2, 256, 2).sum((1, 3)).astype(np.int16)
    one_column = np.array([[1, 0, 0], [0, 1, -1 / 256], [0, 0, 1]])  # the original's identity moves the image by one
    job = make_render_params((matrix @ one_column)[None], hide[None], fill_values([intercept], "zero"), 256, 256)[0]
    ours = rendered(stored, job, InputConfig(fill="zero"))
    return np.abs(ours - 255 * original(raw, slope, intercept, hide, matrix))


def test_the_original_on_made_up_slices():
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[-1:1:512j, -1:1:512j]
    for seed in range(6):
        tissue = np.where(rows**2 + columns**2 < .7, 1060, 0) + np.where(np.hypot(rows, columns - .3) < .2, 350, 0)
        raw = np.maximum(tissue + rng.normal(0, 30, (512, 512)), 0).astype(np.int16)
        off = against_the_original(raw, 1, -1024, seed)
        assert (off <= .51).mean() >= .999


@pytest.mark.parametrize("study", ["LIDC-IDRI-0001", "LIDC-IDRI-0003"])
def test_the_original_on_real_slices(real_ct, study):
    pydicom = pytest.importorskip("pydicom")
    paths = sorted((real_ct / "lidc_small" / study).rglob("*.dcm"))[::5]
    assert paths
    for seed, path in enumerate(paths):
        data = pydicom.dcmread(path)
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        raw = np.maximum(data.pixel_array, (-1024 - intercept) / slope).astype(np.int16)  # padding to air
        assert (against_the_original(raw, slope, intercept, seed) <= .51).mean() >= .999


def test_a_masked_slice_keeps_its_embolus():
    "Constructed studies: whatever is hidden, the pixels that make the label stay."
    rng = np.random.default_rng(2)
    for _ in range(300):
        left, right, central = rng.random(3) < .4
        stored = np.full((64, 64), 100, np.int16)
        columns = np.flatnonzero(np.repeat([right, central, left], [22, 20, 22]))
        spots = [(int(rng.integers(64)), int(column)) for column in rng.choice(columns, 3)] if len(columns) else []
        for spot in spots:
            stored[spot] = 1700
        hide = SideMask(p=.8).sample(rng, float(left), float(right))
        job = make_render_params(np.eye(3)[None], [hide], [-4096], 64, 64)[0]
        seen = rendered(stored, job, InputConfig((Window(100, 700),), "fixed", 64))[..., 0]
        assert [seen[spot] for spot in spots] == [246] * len(spots)
        assert (seen == 246).sum() == len(set(spots))
