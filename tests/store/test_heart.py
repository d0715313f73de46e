"The heart's box and slices against the phantom's own ventricles, on real CT, where there are no lungs, and in batches."
from functools import cache

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.competition.labels import STUDY
from rsnape_kit.data.batches import ImageBatches, StudyBatches
from rsnape_kit.phantom.paint import Tissue
from rsnape_kit.phantom.scanner import Scanner
from rsnape_kit.phantom.study import REAL, draw_study
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.downsample import to_fixed_point
from rsnape_kit.store.heart import heart_boxes
from rsnape_kit.testing import ArraySource
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import HEART

SIDE = 64  # pixels, those that the lungs are found on


@cache
def phantom(seed, slices):
    "A source of one synthetic study, a scan like the competition's in fewer slices, and its voxels of the ventricles."
    study = draw_study((11, seed), REAL, slices=slices, size=SIDE)
    hu, tissue = zip(*map(Scanner(study).slice, range(slices)))
    side = {"rows": SIDE, "columns": SIDE, "spacing_y": study.scan.spacing, "spacing_x": study.scan.spacing}
    table = pd.DataFrame({STUDY: "a", "SOPInstanceUID": [f"{k}" for k in range(slices)], "order": range(slices),
                          "position": study.scan.z, **side})
    ventricles = np.isin(np.stack(tissue), [Tissue.RV, Tissue.LV])
    return ArraySource(np.stack([to_fixed_point(one, SIDE) for one in hu]), table), ventricles


def edges(boxes):
    return boxes[["heart_top", "heart_bottom", "heart_left", "heart_right"]].iloc[0].to_numpy(float)


@pytest.mark.parametrize("seed, slices", [(seed, 24) for seed in range(8)] + [(8, 120), (9, 10)])
def test_the_box_holds_the_phantoms_ventricles(seed, slices):
    source, ventricles = phantom(seed, slices)
    boxes = heart_boxes(source)
    shown, with_heart = boxes.heart_shown.to_numpy(), ventricles.any((1, 2))
    assert shown[with_heart].all() and shown.mean() < .8
    top, bottom, left, right = edges(boxes) * SIDE
    (up, down), (first, last) = (np.flatnonzero(ventricles.any(axes))[[0, -1]] + [0, 1] for axes in ((0, 2), (0, 1)))
    assert top <= up + 1 and down <= bottom + 1 and left <= first + 1 and last <= right + 1
    assert (down - up) * (last - first) / ((bottom - top) * (right - left)) > .2  # .1 of the image


def test_the_box_of_real_chests_holds_the_heart(real_ct):
    "Slices and edges of the heart as a person reads them in a series of 79 slices, pixels of 64."
    boxes = heart_boxes(DicomSource(real_ct / "cip_ct64_series"))
    shown = np.flatnonzero(boxes.heart_shown)
    assert shown[0] <= 24 and 42 <= shown[-1] < 60
    top, bottom, left, right = edges(boxes)
    assert top < .15 and bottom > .56 and left < .36 and right > .78
    others = heart_boxes(DicomSource(real_ct / "lidc_small")).drop(columns="heart_shown").drop_duplicates()
    size = others[["heart_bottom", "heart_right"]].to_numpy() - others[["heart_top", "heart_left"]].to_numpy()
    assert len(others) == 3 and (size > .25).all() and (size < .6).all()


@pytest.mark.parametrize("pixels", [np.zeros((6, 64, 64)), np.full((6, 64, 64), -4096)])
def test_without_lungs_all_slices_are_shown(pixels):
    source = ArraySource(pixels.astype(np.int16), pd.DataFrame({STUDY: ["a"] * 6, "order": range(6)}))
    boxes = heart_boxes(source)
    assert boxes.heart_shown.all() and (np.diff(edges(boxes))[[0, 2]] > .3).all()


def test_batches_show_the_heart_only():
    "Frames of a study are slices with heart; each is what a batch of slices shows."
    source, ventricles = phantom(8, 120)
    pixels = InputConfig((HEART,), "fixed", 32, crop="heart")
    studies = StudyBatches(source, frames=16, pixels=pixels)
    rows = studies.rows(0)[0]
    assert heart_boxes(source).heart_shown.to_numpy()[rows].all() and ventricles.any((1, 2))[rows].sum() >= 5
    alone = ImageBatches(source, batch=120, pixels=pixels)[0]
    assert (studies[0][0] == alone[rows]).all()
    training = StudyBatches(source, frames=16, pixels=pixels, random_frames=True)
    for epoch in range(5):
        training.set_epoch(epoch)
        assert heart_boxes(source).heart_shown.to_numpy()[training.rows(0)[0]].all()
