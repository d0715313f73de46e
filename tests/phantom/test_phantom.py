"Labels of the phantom against its geometry, rates against the competition's, files against the reader."
import hashlib
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.encaps import generate_frames
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLosslessSV1
from scipy.ndimage import binary_dilation
from scipy.stats import binomtest

from rsnape_kit.competition.labels import EXAM_LABELS, RULES, SLICE
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.data.batches import ImageBatches
from rsnape_kit.dicom.series import read_series
from rsnape_kit.dicom.slices import scan
from rsnape_kit.phantom.anatomy import Patient
from rsnape_kit.phantom.dicom_writer import Style, hex_id, write_series
from rsnape_kit.phantom.generate import Settings, label_table, make_competition, make_study
from rsnape_kit.phantom.heart import Heart
from rsnape_kit.phantom.paint import Tissue
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import (
    DEMO,
    MIN_AREA,
    REAL,
    Scan,
    draw_heart,
    draw_scan,
    draw_study,
    exam_labels,
    image_labels,
    twin,
    view_of,
)
from rsnape_kit.store.build import build_store
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.transforms.windows import Window

TRAIN = 7279  # studies, of which 2,211 have emboli and 157 are indeterminate (the competition's train.csv)
ALL = dict(negative_exam_for_pe=.6747, indeterminate=.0216)
POSITIVE = dict(rv_lv_ratio_gte_1=.425, leftsided_pe=.70, rightsided_pe=.85, central_pe=.18, chronic_pe=.13,
                acute_and_chronic_pe=.064)
COLUMNS = """StudyInstanceUID SeriesInstanceUID SOPInstanceUID pe_present_on_image negative_exam_for_pe qa_motion
    qa_contrast flow_artifact rv_lv_ratio_gte_1 rv_lv_ratio_lt_1 leftsided_pe chronic_pe true_filling_defect_not_pe
    rightsided_pe acute_and_chronic_pe central_pe indeterminate""".split()


SEEDS = {  # studies with emboli, found by drawing those in between too
    DEMO: (1, 4, 7, 9, 13, 15, 21, 22, 24, 26, 27, 28, 31, 32, 33, 37, 39, 45, 46, 47),
    REAL: (1, 7, 9, 15, 22, 26, 27, 31, 32, 33, 37, 39)}


def positive(k, difficulty=DEMO, **kind):
    "The k-th study with emboli."
    s = draw_study((77, SEEDS[difficulty][k]), difficulty, **kind)
    assert s.plan
    return s


def volume(s):
    "Every slice's HU and tissue."
    scanner = Scanner(s)
    return (np.stack(v) for v in zip(*(scanner.slice(k) for k in range(len(s.scan.z)))))


@pytest.fixture(scope="module")
def drawn():
    "Labels of many studies, without rendering."
    studies = [draw_study((31, k)) for k in range(900)]
    return pd.DataFrame([exam_labels(s) for s in studies]), [image_labels(s) for s in studies]


@pytest.mark.slow
def test_rates_are_the_competitions(drawn):
    exams, images = drawn
    positive = np.array([i.any() for i in images])
    assert binomtest(int(positive.sum()), len(positive), 2211 / TRAIN).pvalue > 1e-3
    for rows, rates in ((exams, ALL), (exams[positive], POSITIVE)):
        for label, rate in rates.items():
            assert binomtest(int(rows[label].sum()), len(rows), rate).pvalue > 1e-3, label
    share = np.array([i.mean() for i in images])[positive]
    assert .15 < share.mean() < .21 and .11 < np.median(share) < .175, "published: mean .182, median .144"
    assert np.quantile(share, .05) < .05 and .33 < np.quantile(share, .95) < .56, "published: .017 and .441"
    assert 25 < np.median([i.sum() for i in images if i.any()]) < 43, "published: 34"


@pytest.mark.slow
def test_every_study_obeys_the_hierarchy(drawn):
    exams, images = drawn
    yes, positive = exams[list(EXAM_LABELS)].to_numpy(bool), np.array([i.any() for i in images])
    for rule in RULES:
        assert rule.holds(yes, positive).all(), rule.name
    poor = exams.qa_motion | exams.qa_contrast
    assert (poor[exams.indeterminate == 1] == 1).all() and poor[exams.indeterminate == 0].mean() < .02


def test_slices_per_study_are_the_competitions():
    rng = np.random.default_rng(0)
    n = np.array([len(draw_scan(Patient(), rng).z) for _ in range(2000)])
    assert n.min() >= 60 and n.max() <= 1083 and 220 < np.median(n) < 248 and 360 < np.quantile(n, .95) < 420


@pytest.mark.parametrize("k", range(6))
def test_emboli_lie_where_the_labels_say(k):
    s = positive(k, slices=60, size=256)
    exam, present = exam_labels(s), image_labels(s)
    _, tissue = volume(s)
    clot = tissue == Tissue.CLOT
    pixel = s.scan.spacing**2
    counted = clot.sum((1, 2)) * pixel
    assert (counted[~present] < 3 * MIN_AREA).all() and (counted[s.areas[:, 0] > 6 * MIN_AREA] > 0).all()
    np.testing.assert_allclose(counted.sum(), s.areas[:, 0].sum(), rtol=.2, atol=60)
    z, _, column = np.nonzero(clot)
    x = np.array([view_of(s.scan, s.patient, s.scan.z[i])[0] for i in z]) + column * s.scan.spacing / s.patient.scale
    left, right = (x > 32).any(), (x < -20).any()  # beyond the main arteries
    assert not left or exam["leftsided_pe"]
    assert not right or exam["rightsided_pe"]
    assert left or right or exam["central_pe"]
    assert exam["leftsided_pe"] or not (x > 45).any()


def test_tissues_have_their_hounsfield_units():
    s = draw_study((77, 1), slices=24, size=256)
    s = replace(s, patient=replace(s.patient, lung=-860), blood=replace(s.blood, artery=380, aorta=250, mixing=8))
    hu, tissue = volume(s)
    bounds = {Tissue.FAT: (-115, -85), Tissue.MUSCLE: (35, 65), Tissue.LUNG: (-900, -800), Tissue.PA: (365, 395),
              Tissue.AORTA: (235, 265), Tissue.LV: (s.blood.left - 15, s.blood.left + 15)}
    for t, (lo, hi) in bounds.items():
        inner = hu[_eroded(tissue == t)]
        assert len(inner) > 50 and lo < np.median(inner) < hi, (t.name, len(inner), np.median(inner))
    assert 150 < np.median(hu[tissue == Tissue.BONE]) < 700 and hu[tissue == Tissue.AIRWAY].min() < -900


def _eroded(mask):
    return ~binary_dilation(~mask, np.ones((1, 5, 5)))


def test_larger_clots_strain_the_heart():
    ratio = {ml: np.mean([draw_heart(np.random.default_rng(k), ml).right for k in range(400)]) for ml in (0, .3, 10)}
    assert ratio[0] < ratio[.3] < ratio[10] and Heart().right < ratio[10]


def test_a_twin_differs_only_in_its_clots():
    s = positive(0, slices=24, size=256)
    (a, tissue), (b, other) = volume(s), volume(twin(s))
    near = binary_dilation(tissue == Tissue.CLOT, np.ones((1, 7, 7)))
    near[s.areas[:, 0] > 0] |= binary_dilation((tissue == Tissue.PA), np.ones((1, 3, 3)))[s.areas[:, 0] > 0]
    assert (a == b)[~near].all() and (a != b).any()
    assert (b.astype(int) - a)[tissue == Tissue.CLOT].mean() > 150
    assert not (other == Tissue.CLOT).any() and exam_labels(twin(s))["negative_exam_for_pe"]


STYLES = [
    Style(),
    Style(ExplicitVRLittleEndian, 0, True, 16, windows=2, padding="nonsense", head_first=True),
    Style(JPEGLosslessSV1, -1024, True, 16, padding="right", missing=("SliceThickness", "WindowCenter", "KVP")),
    Style(JPEGLosslessSV1),
    Style(ImplicitVRLittleEndian, -8192, False, 16, "HFP", True, True, shuffled=True, first=57),
    Style(ExplicitVRLittleEndian, -1000, True, 16, "FFP", True, False, table=-700.125),
    Style(ImplicitVRLittleEndian, 0, True, 16, "FFS", False, True,
          missing=("RescaleSlope", "RescaleIntercept", "SliceLocation")),
]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: f"{s.syntax[-2:]} {s.intercept} {s.position}")
@pytest.mark.parametrize("size", [64, 512])
def test_every_variety_reads_back_exactly(style, size, tmp_path):
    s = draw_study((5, 5), slices=7, size=size)
    pad = -3024 if style.signed or style.intercept < -3024 else -1024
    s = replace(s, scan=replace(s.scan, pad=pad, z=np.delete(s.scan.z, 3)))  # one slice is missing
    ids = "5ad01e", "e115", [hex_id("sop", k) for k in range(6)]
    voxels = write_series(tmp_path / "a" / "b", s, style, ids)
    hu, tissue = volume(s)
    table = scan(tmp_path)
    assert list(table.SOPInstanceUID) == ids[2]
    assert table.problem.tolist() == ["", "", "", "gap before", "", ""]
    np.testing.assert_allclose(np.diff(table.position), np.diff(s.scan.z), atol=1e-4)
    assert np.array_equal(read_series(table, lowest=-4000), hu)
    assert np.array_equal(np.argwhere(tissue == Tissue.CLOT), voxels) or not s.plan
    first = pydicom.dcmread(table.path.iloc[0])
    if style.syntax == JPEGLosslessSV1:  # pydicom has no decoder of its own
        stored = imagecodecs.jpeg_decode(next(generate_frames(first.PixelData)))
        stored = stored.view(np.int16) if style.signed else stored
    else:
        stored = first.pixel_array
    stored = stored.astype(int) * int(first.get("RescaleSlope", 1)) + int(first.get("RescaleIntercept", 0))
    assert np.array_equal(stored[::-1 if style.flip_rows else 1, ::-1 if style.flip_columns else 1], hu[0])


def test_a_hidden_side_never_holds_the_embolus(tmp_path):
    "All four stored orientations through files, store and batches; exchanged sides would fail."
    kinds = [(k, difficulty) for difficulty in SEEDS for k in range(len(SEEDS[difficulty]))]
    studies = [positive(k, difficulty, slices=12, size=96) for k, difficulty in kinds]
    flips, clots, rows = itertools.cycle(itertools.product((False, True), repeat=2)), {}, []
    for k, (s, (flip_rows, flip_columns)) in enumerate(zip(studies, flips)):
        ids = hex_id(k), hex_id(k, "series"), [hex_id(k, i) for i in range(12)]
        style = Style(flip_rows=flip_rows, flip_columns=flip_columns, signed=True, bits=16)
        for i, row, column in write_series(tmp_path / "train" / ids[0] / ids[1], s, style, ids):
            clots.setdefault(ids[2][i], []).append((row, column))
        rows.append(label_table(ids, image_labels(s).astype(int), exam_labels(s)))
    store = SliceStore(build_store(tmp_path / "train", tmp_path / "store", size=96))
    pd.concat(rows).to_csv(tmp_path / "train.csv", index=False)
    truth = Predictions.from_train_csv(tmp_path / "train.csv")
    sides = truth.exams[["leftsided_pe", "rightsided_pe"]]
    exchanged = truth.exams.assign(leftsided_pe=sides.rightsided_pe, rightsided_pe=sides.leftsided_pe)
    assert (sides.sum(axis=1) < 2).sum() > 10 and sides.any().all() and store.table.flip_rows.sum() == 12 * 16

    def hidden(truth):
        "(Clot pixels hidden by the mask at p=1, all pixels hidden)."
        how = dict(batch=12, pixels=InputConfig((Window(0, 4000),), "fixed", 96))
        plain, masked = ImageBatches(store, truth, **how), ImageBatches(store, truth, mask=SideMask(p=1), **how)
        clot = gone = 0
        for i in range(len(plain)):
            away = (plain[i][0] != masked[i][0])[..., 0]
            gone += away.sum()
            for name, changed in zip(store.table[SLICE].iloc[plain.rows(i)], away):
                clot += sum(changed[place] for place in clots.get(name, []))
        return clot, gone

    clot, gone = hidden(truth)
    assert clot == 0 and gone > 1e5
    assert hidden(Predictions(exchanged, truth.images))[0] > 30


def digests(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_bytes_do_not_depend_on_the_executor(tmp_path):
    kind = dict(studies=4, test_studies=3, slices=6, size=64, seed=3, difficulty="demo", twins=True)
    server = multiprocessing.get_context("forkserver")  # a new process, in which strings have other hashes
    server.set_forkserver_preload(["rsnape_kit.phantom.generate"])
    with ThreadPoolExecutor(1) as one, ProcessPoolExecutor(2, server) as two:
        make_competition(tmp_path / "one", executor=one, **kind)
        make_competition(tmp_path / "two", executor=two, **kind)
    make_competition(tmp_path / "default", **kind)
    first = digests(tmp_path / "one")
    assert first == digests(tmp_path / "two") == digests(tmp_path / "default") and len(first) > 7 * 6
    other = digests(make_competition(tmp_path / "other", **{**kind, "seed": 4}))
    assert not set(first.values()) & {v for k, v in other.items() if k.endswith(".dcm")}


def test_an_interrupted_competition_is_resumed(tmp_path):
    kind = dict(studies=3, test_studies=1, slices=5, size=64)
    before = digests(make_competition(tmp_path, **kind))
    (tmp_path / "truth" / "studies" / "train_00001.json").unlink()
    (tmp_path / "train.csv").unlink()
    lost = make_study(Settings(**kind), "train", 1)[1]
    (tmp_path / "train" / lost[0] / lost[1] / f"{lost[2][0]}.dcm").unlink()
    assert digests(make_competition(tmp_path, **kind)) == before
    with pytest.raises(ValueError, match="other settings"):
        make_competition(tmp_path, **{**kind, "seed": 1})


def test_the_layout_is_the_competitions(tmp_path):
    make_competition(tmp_path, 5, 3, slices=6, size=64, difficulty="demo")
    files = "train.csv", "test.csv", "sample_submission.csv"
    train, test, sample = (pd.read_csv(tmp_path / f, dtype=str) for f in files)
    assert list(train) == COLUMNS and list(test) == COLUMNS[:3] and list(sample) == ["id", "label"]
    for split, table in (("train", train), ("test", test)):
        paths = {f"{r.StudyInstanceUID}/{r.SeriesInstanceUID}/{r.SOPInstanceUID}.dcm" for r in table.itertuples()}
        assert paths == {str(p.relative_to(tmp_path / split)) for p in (tmp_path / split).rglob("*.dcm")}
        assert all(len(i) == 12 and int(i, 16) >= 0 for i in table.SOPInstanceUID)
    assert set(sample.id) == set(test.SOPInstanceUID) | {f"{s}_{k}" for s in test.StudyInstanceUID for k in EXAM_LABELS}
    table = scan(tmp_path / "train")
    assert list(train.SOPInstanceUID) != list(table.SOPInstanceUID)  # rows out of order
    truth = pd.read_csv(tmp_path / "truth" / "test.csv", dtype=str)
    assert set(truth.SOPInstanceUID) == set(test.SOPInstanceUID)


def test_scan_defaults_are_plain():
    assert draw_scan(Patient(), np.random.default_rng(0), clean=True).pad == Scan().pad == -1024
