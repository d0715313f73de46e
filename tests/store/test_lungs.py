"The lung box against the phantom's own lungs, unusual bodies, real CT, and as a crop from stores and files."
import shutil
from dataclasses import astuple, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import SLICE, STUDY
from rsnape_kit.data.batches import ImageBatches, StudyBatches
from rsnape_kit.data.crops import crops_of
from rsnape_kit.inference.features import RowSubset
from rsnape_kit.inference.heatmaps import OccludedSlices
from rsnape_kit.inference.results import fetch_study
from rsnape_kit.models.input_layer import device_render
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.phantom.paint import Tissue
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import REAL, draw_study
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.downsample import to_fixed_point
from rsnape_kit.store.lungs import COLUMNS, MEDIAN, LungBox, lung_box, lung_boxes
from rsnape_kit.store.slice_store import INDEX, SliceStore, read_footer, read_index, write_shard
from rsnape_kit.testing import ArraySource
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.utils.manifest import MANIFEST

FIELD = 350.  # mm


def edges(box):
    return np.array([box.top, box.bottom, box.left, box.right])


def iou(a, b):
    "Intersection over union of two boxes."
    sides = [(min(a[k + 1], b[k + 1]) - max(a[k], b[k]), a[k + 1] - a[k], b[k + 1] - b[k]) for k in (0, 2)]
    both, one, other = (first * second for first, second in zip(*sides))
    return both / (one + other - both) if min(sides[0][0], sides[1][0]) > 0 else 0.


@cache
def phantom(seed, slices, zoom=1., prone=False, size=256):
    "Pixels, lung voxels and spacing of a synthetic study; zoom: of its field of view."
    study = draw_study((5, seed), REAL, slices=slices, size=size)
    scan = study.scan
    middle = scan.x0 + scan.spacing * size / 2, scan.y0 + scan.spacing * size / 2
    scan = replace(scan, spacing=scan.spacing * zoom, x0=middle[0] - scan.spacing * zoom * size / 2,
                   y0=middle[1] - scan.spacing * zoom * size / 2)
    study = replace(study, scan=scan, patient=replace(study.patient, prone=prone))
    hu, tissue = zip(*map(Scanner(study).slice, range(slices)))
    spacing = np.diff(scan.z).mean(), scan.spacing, scan.spacing
    return np.stack([to_fixed_point(one, size) for one in hu]), np.stack(tissue) == Tissue.LUNG, spacing


@pytest.mark.parametrize("seed, slices, zoom, prone", [
    (0, 24, 1., False), (1, 24, 1., False), (2, 16, 1.4, False), (3, 16, .85, False), (7, 40, 1., False),
    (9, 24, 1., True), (12, 24, 1.2, True), (4, 200, 1., False)])
def test_the_box_is_that_of_the_phantoms_own_lungs(seed, slices, zoom, prone):
    size = 128 if slices == 200 else 256
    volume, lungs, spacing = phantom(seed, slices, zoom, prone, size)
    box = lung_box(volume, *spacing, margin=0)
    (top, bottom), (left, right), (first, last) = (
        np.flatnonzero(lungs.any(axes))[[0, -1]] for axes in ((0, 2), (0, 1), (1, 2)))
    assert (box.source, box.note) == ("lungs", "")
    assert iou(edges(box), np.array([top, bottom + 1, left, right + 1]) / size) > .93
    assert abs(box.first - first) <= max(1, .05 * slices) and abs(box.last - last) <= max(1, .05 * slices)
    wide = lung_box(volume, *spacing)
    up, down, across, end = np.rint(edges(wide) * size).astype(int)
    assert lungs[:, up:down, across:end].sum() == lungs.sum()


y, x = (np.mgrid[:256, :256] + .5) / 256


def ellipse(top, bottom, left, right):
    return ((2 * y - top - bottom) / (bottom - top))**2 + ((2 * x - left - right) / (right - left))**2 < 1


RIGHT, LEFT, BODY = (.3, .75, .2, .45), (.32, .74, .55, .82), (.2, .85, .1, .9)
LUNGS = np.array([.3, .75, .2, .82])


def chest(n=20, right=-850, left=-850, **more):
    "A chest of ellipses; more: HU of further ellipses by name."
    hu = np.full((256, 256), -1000)
    hu[ellipse(*BODY)], hu[ellipse(*RIGHT)], hu[ellipse(*LEFT)] = 40, right, left
    hu[ellipse(.45, .5, .475, .525)] = -1000  # trachea
    for value, place in more.values():
        hu[place] = value
    return np.repeat(4 * hu[None], n, 0).astype(np.int16)


def box_of(volume, spacing=FIELD / 256, **settings):
    return lung_box(volume, 10., spacing, spacing, **{"margin": 0} | settings)


ARMS = {f"arm{k}": (30, ellipse(.4, .65, *at)) for k, at in enumerate([(.005, .09), (.91, .995)])}
COUCH = {"couch": (-905, (y > .86) & (y < .94)), "shell": (-300, (y > .94) & (y < .95))}
UNUSUAL = {
    "plain": chest(), "two slices": chest(2), "one slice": chest(1), "arms": chest(**ARMS), "couch": chest(**COUCH),
    "bowel gas": chest(gas=(-1000, ellipse(.76, .83, .4, .6))), "emphysema": chest(20, -985, -985),
    "padding around the circle": np.where(np.hypot(y - .5, x - .5) > .5, -8192, chest()).astype(np.int16)}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_studies_have_the_same_box(name):
    box = box_of(UNUSUAL[name])
    assert box.source == "lungs" and np.abs(edges(box) - LUNGS).max() < 1 / 64


def test_a_prone_patient_has_the_mirrored_box():
    flipped = box_of(chest(**COUCH)[:, ::-1].copy())
    assert np.abs(edges(flipped) - [1 - LUNGS[1], 1 - LUNGS[0], *LUNGS[2:]]).max() < 1 / 64


def test_a_lung_without_air_is_mirrored():
    for volume in (chest(left=40), chest(right=40), chest(left=40, **ARMS)):
        box = box_of(volume)
        assert box.source == "lungs" and box.note == "one lung, mirrored at the middle of the body"
        assert abs((box.left + box.right) / 2 - .5) < 1 / 32 and box.left <= .2 + 1 / 64


def test_lungs_that_the_field_of_view_cuts_off_reach_its_edges():
    box = box_of(chest(**COUCH)[:, 32:224, 64:200].copy())  # columns .25 to .78
    assert box.source == "lungs" and (box.left, box.right) == (0, 1)
    assert np.abs(np.array([box.top, box.bottom]) - (LUNGS[:2] * 256 - 32) / 192).max() < 1 / 64


FALLBACKS = {
    "no lungs": (chest(20, 40, 40), "body", BODY),
    "air only": (np.full((9, 64, 64), -4000, np.int16), "centre", MEDIAN),
    "padding": (np.full((9, 64, 64), -8192, np.int16), "centre", MEDIAN),
    "water": (np.zeros((9, 64, 64), np.int16), "centre", MEDIAN),
    "two slices of water": (np.zeros((2, 8, 8), np.int16), "centre", MEDIAN)}


@pytest.mark.parametrize("name", FALLBACKS)
def test_without_lungs_the_box_falls_back(name):
    volume, source, expected = FALLBACKS[name]
    box = box_of(volume, FIELD / volume.shape[-1])
    assert box.source == source and box.note and (box.first, box.last) == (0, len(volume) - 1)
    assert np.abs(edges(box) - expected).max() < 1 / 64


@pytest.mark.parametrize("spacing", [np.nan, 0., -1., np.inf])
def test_without_spacing_the_margin_is_a_fraction(spacing):
    box = box_of(chest(), spacing, margin=10.)
    assert "no pixel spacing" in box.note and box.aspect == 1
    assert np.allclose(edges(box), edges(box_of(chest(), margin=10.)))


def test_real_chests_have_boxes_like_the_competitions(real_ct):
    boxes = []
    for name in ("cip_ct64_series", "lidc_small"):
        source = DicomSource(real_ct / name)
        boxes.append(lung_boxes(source).drop_duplicates())
    boxes = pd.concat(boxes)
    assert len(boxes) == 4 and (boxes.lung_source == "lungs").all() and (boxes.lung_note == "").all()
    height, width = boxes.lung_bottom - boxes.lung_top, boxes.lung_right - boxes.lung_left
    assert abs(height.median() - .59) < .1 and abs(width.median() - .78) < .1  # the competition's medians
    assert (abs(height - .59) < .2).all() and (abs(width - .78) < .25).all()
    assert (boxes.lung_left + boxes.lung_right).div(2).between(.45, .56).all()
    assert (boxes.lung_top + boxes.lung_bottom).div(2).between(.41, .61).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A competition of four studies and its store."
    folder = tmp_path_factory.mktemp("lungs")
    make_competition(folder / "made", 3, 1, slices=16, size=128, seed=3)
    build_store(folder / "made" / "train", folder / "store", size=128)
    return folder


def without_boxes(store, out):
    "A copy of a store as it was built before there were boxes."
    shutil.copytree(store, out)
    for path in out.glob("*.slices"):
        table, meta = read_footer(path)
        old, source = table.drop(columns=[*COLUMNS, "start", "bytes", "crc32"]), SliceStore(store)
        rows = source.table.set_index(SLICE).index.get_indexer(old[SLICE])
        write_shard(path, old, iter(source[rows]), meta)
    for name in (INDEX, MANIFEST):
        (out / name).unlink()
    return out


def test_a_store_keeps_the_boxes_and_older_ones_compute_them(made, tmp_path):
    store, files = SliceStore(made / "store"), DicomSource(made / "made" / "train", 128)
    kept = store.table[COLUMNS]
    pd.testing.assert_frame_equal(lung_boxes(files), kept, check_dtype=False)
    for rows in store.table.groupby(STUDY).indices.values():
        row = store.table.iloc[rows[0]]
        step, side = np.diff(store.table.position.iloc[rows]), row.spacing_y * row["rows"] / 128
        own = lung_box(store[rows], float(np.median(step)), side, row.spacing_x * row["columns"] / 128)
        saved = LungBox(*kept.iloc[rows[0]])
        assert saved.source == "lungs" and np.allclose(edges(own), edges(saved))
    names = {path.name for path in (made / "store").glob("*.slices")}
    old = without_boxes(made / "store", tmp_path / "old")
    shards = {path: path.read_bytes() for path in old.glob("*.slices")}
    build_store(made / "made" / "train", old, size=128)  # the index is made again, from the shards as they are
    assert {path.name for path in shards} == names and all(path.read_bytes() == raw for path, raw in shards.items())
    older = SliceStore(old)
    assert not set(COLUMNS) & set(older.table) and (older[:] == store[:]).all()
    pd.testing.assert_frame_equal(lung_boxes(older), kept, check_dtype=False)
    assert read_index(old).attrs == read_index(made / "store").attrs


@pytest.mark.parametrize("crop", ["lungs", "lungs-stretched"])
def test_training_prediction_features_and_heat_maps_crop_alike(made, crop):
    store, files = SliceStore(made / "store"), DicomSource(made / "made" / "train", 128)
    pixels = InputConfig(size=64, crop=crop, scale="fixed")
    wanted = crops_of(store, crop)
    assert (wanted == crops_of(files, crop)).all() and (wanted != np.eye(3)).any()
    assert (ImageBatches(store, batch=48, pixels=pixels)[0] == ImageBatches(files, batch=48, pixels=pixels)[0]).all()
    rows = store.study(store.table[STUDY].iloc[20])
    fresh = DicomSource(made / "made" / "train", 128)
    array = ArraySource(store[rows], fresh.table.iloc[rows])
    for part in (fetch_study(store, rows), fetch_study(fresh, rows), RowSubset(fresh, rows), array):
        assert (crops_of(part, crop) == wanted[rows]).all()
    slices = fresh.table.iloc[rows[3:5]].assign(**lung_boxes(fresh).iloc[rows[3:5]])
    copies = OccludedSlices(store[rows[3:5]][:, None], ["a", "b"], 32, 32, slices)
    assert (crops_of(copies, crop) == wanted[rows[0]]).all()
    device = StudyBatches(store, batch=3, frames=4, pixels=pixels, device=True)
    got = device_render(*(device[0][name] for name in ("stored", "params")), pixels)
    assert (np.asarray(got) == StudyBatches(store, batch=3, frames=4, pixels=pixels)[0]).all()


def test_the_crop_shows_the_box_and_keeps_the_shape():
    "A square crop has the pixels of a plain cut-out around the centre of the box."
    table = pd.DataFrame({STUDY: "a", SLICE: [f"{k}" for k in range(20)], "order": range(20)})
    box = LungBox(0, 19, 80 / 256, 176 / 256, 64 / 256, 192 / 256, 1., "lungs", "")
    source = ArraySource(chest(), table.assign(**dict(zip(COLUMNS, astuple(box)))))
    whole = ImageBatches(source, batch=20, pixels=InputConfig(scale="fixed"))[0]
    square, stretched = (ImageBatches(source, batch=20, pixels=InputConfig(size=128, crop=crop, scale="fixed"))[0]
                         for crop in ("lungs", "lungs-stretched"))
    assert (square == whole[:, 64:192, 64:192]).all()
    assert (stretched[:, 64, [0, -1]] == whole[:, 128, [64, 191]]).all()
    assert (stretched[:, 0, 64] == whole[:, 80, 128]).all()
