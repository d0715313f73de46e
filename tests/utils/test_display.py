"Objects in notebooks: their values, escaped, without reading what is not in memory."
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import rsnape_kit as rk
from rsnape_kit.competition.folds import Folds
from rsnape_kit.competition.labels import SLICE, STUDY
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.data import feature_store
from rsnape_kit.data.sequences import StudyFeatures
from rsnape_kit.ensemble.calibration import Calibration
from rsnape_kit.ensemble.ensemble import default_ensemble
from rsnape_kit.kaggle.draft import SubmissionState
from rsnape_kit.store import slice_store
from rsnape_kit.testing import ArraySource, simulate_model, simulate_truth
from rsnape_kit.utils.display import object_html
from rsnape_kit.utils.files import write_json

HOSTILE = "<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    "Tags, attributes' names and texts of HTML; all tags must be closed in order."

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], set(), set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page(shown) -> Page:
    "What a notebook is given, checked: no scripts, styles, pictures or links."
    found = Page(shown._repr_html_())
    assert found.tags <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "small", "span"}
    assert found.attributes <= {"style", "title"} and len(repr(shown)) < 500
    return found


def hostile_predictions(value=.25) -> rk.Predictions:
    rows = pd.DataFrame({STUDY: [HOSTILE, HOSTILE, "b"], SLICE: ["1", "2", "3"]})
    return rk.Predictions(pd.DataFrame({"central_pe": value}, [HOSTILE, "b"]), pd.Series(value, slice_index(rows)))


def test_values_are_those_of_the_object():
    texts = page(hostile_predictions()).texts
    assert HOSTILE in texts and texts.count("0.25") == 2 * 3 + 2 * 2  # mean, least, largest, two studies; of two labels
    truth = simulate_truth(40)
    oofs = {"a": simulate_model(truth)[0], "b": simulate_model(truth, seed=1)[0]}
    ensemble = rk.fit_ensemble(oofs, truth)
    weights = ensemble.blend_weights
    for shown in (page(ensemble), page(weights)):
        assert {f"{value:.4g}" for value in weights.table().to_numpy().ravel() if 0 < value < 1} <= set(shown.texts)
        assert f"{weights.losses['blend']['central_pe']:.4g}" in shown.texts
    assert f"{ensemble.losses['consistent']:.4f}" in repr(ensemble) and "a, b" in repr(weights)
    calibration = rk.fit_calibration(oofs["a"], truth)
    assert f"{calibration.coefficients['central_pe'][0]:.4g}" in page(calibration).texts


def test_empty_objects_and_those_of_nan_show_themselves():
    truth = simulate_truth(4)
    nothing = truth.select([])
    ensemble, slices = default_ensemble(), nothing.images.index.to_frame(index=False)
    state = SubmissionState(ensemble, slices, nothing.to_submission(), HOSTILE)
    for shown in (nothing, hostile_predictions(np.nan), ensemble, ensemble.blend_weights, Calibration({}),
                  Folds(pd.Series([], dtype=int)), rk.Plan(), state):
        page(shown)
    assert HOSTILE in page(state).texts
    state.problems = {HOSTILE: ValueError(HOSTILE)}
    assert HOSTILE in "".join(page(state).texts)


def test_a_store_of_slices_or_features_reads_nothing_to_show_itself(tmp_path, monkeypatch):
    table = pd.DataFrame({STUDY: [HOSTILE] * 2 + ["b"] * 4, "SeriesInstanceUID": "s", SLICE: list("123456"),
                          "order": [0, 1, 0, 1, 2, 3], "problem": HOSTILE})
    source = ArraySource(np.zeros((6, 32, 32), np.int16), table)
    store = rk.SliceStore(rk.build_store(source, tmp_path / "store", size=32))
    arrays = np.array(["x"], object), np.zeros(1), np.ones((2, 1, 4), "f2"), np.zeros((2, 1), "f4")
    studies = [StudyFeatures(name, *arrays) for name in (HOSTILE, "b")]
    out = tmp_path / "features"
    out.mkdir()
    write_json(out / feature_store.META, {"run": f"image {HOSTILE}", "size": 4, "views": 2})
    rows = feature_store.write_shard(out, feature_store.NO_ROWS, studies, {HOSTILE: "k", "b": "l"})
    feature_store.write_index(out, rows)
    features, reads = rk.FeatureStore(out), []
    monkeypatch.setattr("builtins.open", lambda *_, **__: reads.append("open"))
    monkeypatch.setattr(slice_store, "read_parquet", lambda *_: reads.append("index"))
    monkeypatch.setattr(slice_store.SliceStore, "_map", lambda *_: reads.append("shard"))
    monkeypatch.setattr(feature_store, "read_arrays", lambda *_: reads.append("features"))
    shown, other = page(store).texts, page(features).texts
    assert not reads and not store._maps
    assert shown.count(HOSTILE) == 2 + 3 and ["slices", "6", "studies", "2"] == shown[1:5]
    assert HOSTILE in other and ["studies", "2", "slices", "2"] == other[1:5]
    with pytest.raises(TypeError):  # the counters are those that reading passes
        store[0]
    assert reads


def test_only_the_rows_that_are_shown_are_touched():
    class Table:
        "Stands for a table too large to walk: only its head can be taken."
        index = pd.RangeIndex(1_790_594)

        def __len__(self):
            return len(self.index)

        def head(self, rows):
            return pd.DataFrame({"value": range(rows)})

        @property
        def columns(self):
            return ["value"]

        shape = 1_790_594, 1

    found = Page(object_html(1, {}, {"slices": Table()}, rows=4))
    assert "slices, the first 4 of 1,790,594" in "".join(found.texts) and found.texts[-4:] == list("0123")
