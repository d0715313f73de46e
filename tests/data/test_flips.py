"Flips left to right: images, labels and predictions change sides together, from the batches to the mean of the views."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from small_runs import PIXELS

from rsnape_kit.competition.labels import EXAM_LABELS, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.data.batches import GroupBatches, StudyBatches
from rsnape_kit.runs.config import KerasConfig, PetaFormerConfig
from rsnape_kit.testing import ArraySource
from rsnape_kit.transforms.affine import AffineRange
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.transforms.windows import PE

ONLY_FLIP = AffineRange(0, 0, 0, 0)  # every other augmentation is off
SIDES = ["leftsided_pe", "rightsided_pe"]


def studies(n=6, size=32, frames=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(f"s{s}", f"{s}.{i}", i) for s in range(n) for i in range(frames)]
    table = pd.DataFrame(rows, columns=[STUDY, SLICE, "order"])
    return ArraySource(rng.integers(-1200, 2400, (len(table), size, size)).astype(np.int16), table)


def mirrored(source):
    return ArraySource(np.ascontiguousarray(source[np.arange(len(source.table))][..., ::-1]), source.table)


def swapped(exams: pd.DataFrame) -> pd.DataFrame:
    return exams.rename(columns=dict(zip(SIDES, SIDES[::-1])))[list(exams)]


def check_views(predict):
    "`predict` has a source, the probability of a flip and a view. An untrained network's sides have nothing in common."
    source = studies()
    turned, plain, both = (predict(source, 1., 1), predict(mirrored(source), 0., 0), predict(source, .5, 1))
    pd.testing.assert_frame_equal(turned.exams, swapped(plain.exams), atol=1e-6)
    np.testing.assert_allclose(turned.images, plain.images, atol=1e-6)
    assert (plain.exams[SIDES[0]] - plain.exams[SIDES[1]]).abs().max() > 1e-4
    as_is = predict(source, 0., 0)
    flipped = np.isclose(both.exams, turned.exams, atol=1e-6).all(1)
    assert 0 < flipped.sum() < 6 and np.allclose(both.exams[~flipped], as_is.exams[~flipped], atol=1e-6)


def test_a_flipped_view_of_a_volume_model_is_that_of_the_mirrored_study_with_its_sides_swapped_back():
    from rsnape_kit.inference.keras_predictor import make_views, predict_batches
    from rsnape_kit.models.registry import build_model
    config = KerasConfig(model="resnet3d", pixels=PIXELS, frames=4, batch=3, network={"width": .125})
    built = build_model(config)
    rng = np.random.default_rng(0)
    built.set_weights([w + rng.normal(0, .2, w.shape) * (w.ndim == 2) for w in built.get_weights()])
    check_views(lambda source, flip, view: predict_batches(
        built, make_views(replace(config, affine=replace(ONLY_FLIP, flip=flip)), source, None, [view])))


def test_a_flipped_view_of_petaformer_is_that_of_the_mirrored_study_with_its_sides_swapped_back():
    torch = pytest.importorskip("torch")
    from rsnape_kit.inference.torch_predictor import predict_views
    from rsnape_kit.models.registry import build_model
    torch.manual_seed(0)
    network = dict(width=.125, depth=.1, dim=24, layers=1, heads=4, attention="encoder")
    config = PetaFormerConfig(network=network, pixels=PIXELS, groups=2, slices=3, batch=2)
    built = build_model(config).eval()
    for weight in built.exam_head[-1].parameters():
        torch.nn.init.normal_(weight)
    check_views(lambda source, flip, view: predict_views(
        built, replace(config, affine=replace(ONLY_FLIP, flip=flip)), source, None, (view,)).predictions())


def one_sided(n=60, size=16):
    "Studies with a bright spot on their left or nowhere, and such with one on their right, which are for testing."
    rng, found = np.random.default_rng(0), []
    for side, name in ((slice(11, 15), "left"), (slice(1, 5), "right"), (slice(0, 0), "none")):
        hu = rng.normal(0, 40, (n, size, size))
        hu[:, 6:10, side] += 250
        table = pd.DataFrame({STUDY: [f"{name}{i}" for i in range(n)], SLICE: [f"{name}{i}.0" for i in range(n)]})
        exams = pd.DataFrame(0., pd.Index(table[STUDY]), EXAM_LABELS)
        yes = float(name != "none")
        exams[["leftsided_pe", "rightsided_pe"]] = float(name == "left"), float(name == "right")
        exams[["negative_exam_for_pe", "rv_lv_ratio_lt_1"]] = 1 - yes, yes
        found.append((np.rint(4 * hu).astype(np.int16), table, exams, pd.Series(yes, slice_index(table))))
    pixels, tables, exams, images = zip(*found)
    source = ArraySource(np.concatenate(pixels), pd.concat(tables, ignore_index=True))
    return source, Predictions(pd.concat(exams), pd.concat(images))


class Cut:
    "Batches of which only the first slice of each item is shown."

    def __init__(self, batches, first):
        self.batches, self.set_epoch, self.first = batches, batches.set_epoch, first

    def __iter__(self):
        return ((x[:, self.first], *rest) for x, *rest in self.batches)


def logistic_regression(batches, epochs=12, rate=.5):
    "Learn exam labels from the pixels of a study's only slice; return a function of pixels."
    weights = np.zeros((16 * 16 + 1, 9))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for x, y, *_ in batches:
            inputs = np.hstack([x.reshape(len(x), -1) / 255 - .5, np.ones((len(x), 1))])
            weights -= rate * inputs.T @ (1 / (1 + np.exp(-inputs @ weights)) - y["exams"]) / len(x)
    return lambda x: 1 / (1 + np.exp(-np.hstack([x.reshape(len(x), -1) / 255 - .5, np.ones((len(x), 1))]) @ weights))


@pytest.mark.parametrize("kind", [StudyBatches, GroupBatches])
def test_both_sides_are_learnt_from_studies_with_emboli_on_one_side(kind):
    source, truth = one_sided()
    names = truth.exams.index
    seen, new = names[~names.str.startswith("right")], names[names.str.startswith("right")]
    how = dict(frames=1) if kind is StudyBatches else dict(groups=2, width=1)
    found = {}
    for flip in (0., .5):
        settings = dict(batch=12, pixels=InputConfig((PE,), "fixed", 16), **how)
        batches = kind(source, truth, seen, affine=replace(ONLY_FLIP, flip=flip),
                       mask=SideMask(), shuffle=True, **settings)
        first = slice(None) if kind is StudyBatches else slice(1)
        learnt = logistic_regression(Cut(batches, first))
        x = np.concatenate([x for x, *_ in Cut(kind(source, truth, new, **settings), first)])
        found[flip] = pd.DataFrame(learnt(x), columns=EXAM_LABELS)[SIDES].mean()
    assert found[0.].rightsided_pe < .1, "a side without an example cannot be learnt"
    assert found[.5].rightsided_pe > .8 and found[.5].leftsided_pe < .2
