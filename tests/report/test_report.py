"The report: figures against slow, obvious references, the page against HTML's rules, pictures against DICOM."
import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL
from rsnape_kit.competition.metric import competition_loss, loss_table, metric_weights
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.ensemble.weight_fitting import blend_oof, fit_weights
from rsnape_kit.phantom.generate import make_competition
from rsnape_kit.report.curves import precision_recall, rank_predictions, reliability_band, roc
from rsnape_kit.report.pages import write_report
from rsnape_kit.report.scores import by_group, interval, resample, study_losses
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.testing import simulate_model, simulate_truth


@pytest.fixture(scope="module")
def world():
    "A truth, two models of it, and a slices table."
    truth = simulate_truth(150, slices=(4, 8, 12), seed=1)
    models = {f"m{i}": simulate_model(truth, skill, i)[0] for i, skill in enumerate((1., .6))}
    slices = truth.images.index.to_frame(index=False).assign(SeriesInstanceUID="", thickness=1.25)
    slices["order"] = slices.groupby("StudyInstanceUID").cumcount()
    return truth, models, slices


def repeated(pred, draw):
    "The studies of a draw as studies of their own."
    exams, images = [], []
    for study, times in zip(pred.exams.index, draw.astype(int)):
        for i in range(times):
            exams.append(pred.exams.loc[[study]].set_axis([f"{study}/{i}"]))
            own = pred.images[study]
            index = slice_index(([f"{study}/{i}"] * len(own), own.index + f"/{i}"))
            images.append(pd.Series(own.to_numpy(), index))
    images = pd.concat(images)
    return Predictions(pd.concat(exams), pd.Series(images.to_numpy(), slice_index(images.index.to_frame(index=False))))


def test_draws_equal_scoring_the_drawn_studies(world):
    truth, models, _ = world
    draws = resample(len(truth.exams), 3, seed=5)
    losses, ranked = study_losses(truth, models["m0"]), rank_predictions(truth, models["m0"], IMAGE_LABEL)
    for draw in draws:
        drawn, pred = repeated(truth, draw), repeated(models["m0"], draw)
        assert losses.total(draw[None])[0] == pytest.approx(competition_loss(drawn, pred), rel=1e-12)
        per_label = (draw @ losses.sums.to_numpy()) / (draw @ losses.weights.to_numpy())
        assert per_label == pytest.approx(loss_table(drawn, pred).loss.to_numpy(), rel=1e-12)
        weight = metric_weights(drawn).images.to_numpy()
        for kind, theirs in ((roc, roc_auc_score), (precision_recall, average_precision_score)):
            expected = theirs(drawn.images[weight > 0], pred.images[weight > 0], sample_weight=weight[weight > 0])
            assert kind(ranked, draw[None]).area[1] == pytest.approx(expected, rel=1e-9)


def test_bands_equal_a_loop_over_draws_and_thresholds(world):
    truth, models, _ = world
    draws, label = resample(len(truth.exams), 20), "rightsided_pe"
    ranked = rank_predictions(truth, models["m1"], label)
    y, p = truth.exams[label].to_numpy(), models["m1"].exams[label].to_numpy()
    precisions, observed = [], []
    for draw in draws:
        at = [(draw @ (y * (p >= t)), draw @ (p >= t)) for t in np.unique(p)[::-1]]
        precisions.append([next(hit / n for hit, n in at if n and hit >= r * (draw @ y) - 1e-9)
                           for r in (.25, .5, .99)])
        inside = (.2 <= p) & (p < .3)
        observed.append(draw @ (y * inside) / (draw @ inside))
    curve = precision_recall(ranked, draws)
    expected = interval(precisions)
    assert curve.low[[25, 50, 99]] == pytest.approx(expected[0])
    assert curve.high[[25, 50, 99]] == pytest.approx(expected[1])
    table = reliability_band(ranked, draws)
    row = table[(table.predicted >= .2) & (table.predicted < .3)].iloc[0]
    assert (row.low, row.high) == pytest.approx(interval(observed))


def test_intervals_have_their_nominal_coverage():
    losses = []
    for seed in range(120):
        truth = simulate_truth(120, slices=(3, 5, 8), seed=seed)
        losses.append(study_losses(truth, simulate_model(truth, seed=seed + 1000)[0]))
    sums, weights = (sum(getattr(part, what).to_numpy().sum() for part in losses) for what in ("sums", "weights"))
    expected = sums / weights
    draws = resample(120, 200)
    covered = [low <= expected <= high for low, high in (interval(part.total(draws)) for part in losses)]
    assert .88 <= np.mean(covered) <= 1  # binomial: 95 % of 120, less three standard deviations


def test_groups_are_scored_like_separate_sets(world):
    truth, models, _ = world
    groups = pd.Series(np.resize(["a", "b", None], len(truth.exams)), truth.exams.index)
    losses = (study_losses(truth, pred) for pred in (models["m0"], constant_prior(truth)))
    found = by_group(next(losses), groups, next(losses), resample(150, 10))
    assert list(found.index) == ["a", "b", "unknown"]
    for name, row in found.iterrows():
        own = truth.exams.index[groups.fillna("unknown") == name]
        assert row.loss == pytest.approx(competition_loss(truth.select(own), models["m0"].select(own)), rel=1e-12)
        expected = competition_loss(truth.select(own), constant_prior(truth).select(own))
        assert row.reference == pytest.approx(expected, rel=1e-12)


class Reader(HTMLParser):
    "Parser that checks the order of elements and collects ids, references and visible text."

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.wanted, self.outside, self.text = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object"), f"{tag} has no place on the page"
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href"):
                (self.wanted if value.startswith("#") else self.outside).append(value)
            self.wanted += re.findall(r"url\((#[^)]+)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, world):
    "A page with everything but pixels, and its path."
    truth, models, slices = world
    path = tmp_path_factory.mktemp("report") / "report.html"
    folds = pd.Series(np.resize(np.arange(5), len(truth.exams)), truth.exams.index)
    ensemble = blend_oof(models, truth, folds)
    write_report(path, truth, {"ensemble": ensemble, **models}, slices=slices,
                 weights=fit_weights(models, truth, folds), groups={"centre": pd.Series("north", truth.exams.index)},
                 stages={"predict": 75.}, times=30, worst=2)
    return path, ensemble


def test_page_is_complete_and_self_contained(pages):
    text = pages[0].read_text()
    page = Reader(text)
    assert len(page.ids) == len(set(page.ids)), "ids must be unique in a document"
    assert {name[1:] for name in page.wanted} <= set(page.ids)
    assert all(address.startswith("data:image/png;base64,") for address in page.outside)
    assert "@import" not in text and "url(h" not in text
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(drawing)
    for variable in set(re.findall(r"var\((--\w+)\)", text)):
        assert text.count(f"{variable}:#") == 2, f"{variable} needs a light and a dark value"


def test_page_shows_the_values_of_the_metric(pages, world):
    truth, models, slices = world
    text = " ".join(" ".join(Reader(pages[0].read_text()).text).split())
    for pred in (pages[1], *models.values(), constant_prior(truth)):
        assert f"{competition_loss(truth, pred):.4f}" in text
    for label, row in loss_table(truth, pages[1]).iterrows():
        assert f"{row.loss:.3f}" in text and f"{row['share']:.1%}" in text and label in text.replace("_ ", "_")
    auc = roc_auc_score(truth.exams.central_pe, pages[1].exams.central_pe)
    assert f"AUC {auc:.3f}" in text
    for words in ("Scanners", "By slice thickness", "By centre", "Blend", "Consistency", "Worst studies", "1 min 15 s"):
        assert words in text


def test_same_input_same_bytes(tmp_path, world):
    truth, models, slices = world
    pages = [write_report(tmp_path / name, truth, {"m": models["m0"]}, slices, times=10, worst=1) for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()


@pytest.mark.parametrize("kind", ["images", "exams", "gaps", "healthy", "one study"])
def test_odd_predictions_still_give_a_page(tmp_path, world, kind):
    truth, models, slices = world
    pred = models["m0"]
    if kind == "images":
        pred = Predictions(pred.exams * np.nan, pred.images)
    elif kind == "exams":
        pred = Predictions(pred.exams, pred.images * np.nan)
    elif kind == "gaps":
        pred = Predictions(pred.exams.mask(pred.exams.index.to_series() == "study3"), pred.images)
    elif kind == "healthy":
        truth = truth.select(truth.exams.index[truth.exams.negative_exam_for_pe == 1])
    else:
        truth = truth.select(truth.exams.index[:1])
    whole = write_report(tmp_path / "r.html", truth, {"odd": pred, "m1": models["m1"]}, slices, times=10, worst=1)
    text = whole.read_text()
    Reader(text)
    assert "nan" not in re.sub(r'aria-label="[^"]*"', "", text).lower()


def test_names_cannot_break_the_page(tmp_path, world):
    truth, models, slices = world
    name = '<script>alert("x")</script> & co'
    text = write_report(tmp_path / "r.html", truth, {name: models["m0"]}, slices, groups={name: pd.Series(
        name, truth.exams.index)}, stages={name: 1.}, title=name, note=name, times=5, worst=1).read_text()
    assert "<script" not in text
    assert name in "".join(Reader(text).text)


def test_slices_on_the_page_are_those_of_the_files(tmp_path):
    competition = make_competition(tmp_path / "phantom", studies=2, test_studies=1, slices=8, size=512, seed=5,
                                   difficulty="demo")
    source = DicomSource(competition / "train")
    truth = Predictions.from_train_csv(competition / "train.csv")
    model = simulate_model(truth)[0]
    text = write_report(tmp_path / "r.html", truth, {"m": model}, source=source, times=5, worst=1).read_text()
    makers = {pydicom.dcmread(path).Manufacturer for path in competition.glob("train/*/*/*.dcm")}
    assert "By manufacturer" in text and all(maker in text for maker in makers)
    study = re.search(r"<h3>(\w+) <small>", text)[1]
    own = source.table[source.table.StudyInstanceUID == study].sort_values("position")
    found = re.findall(r'alt="slice (\d+) of 8".*?base64,([^"]*)".*?predicted (\S+), (embolus|none)</figcaption>', text)
    assert len(found) == 6
    for place, encoded, predicted, word in found:
        row = own.iloc[int(place) - 1]
        assert word == ("embolus" if truth.images[study, row.SOPInstanceUID] else "none")
        assert predicted == f"{model.images[study, row.SOPInstanceUID]:.2f}"
        ds = pydicom.dcmread(competition / "train" / row.path)
        hu = ds.pixel_array * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
        hu = hu[::-1] if row.flip_rows else hu
        hu = np.maximum(hu[:, ::-1] if row.flip_columns else hu, -1024).reshape(256, 2, 256, 2).mean((1, 3))
        expected = np.clip((hu[36:-36, 36:-36] - (100 - 350)) / 700, 0, 1) * 255
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        assert np.abs(shown - expected).max() <= 5  # 64 grey levels


def test_a_failed_report_leaves_the_last_one(tmp_path, world):
    truth, models, slices = world
    path = write_report(tmp_path / "r.html", truth, {"m": models["m0"]}, times=5, worst=1)
    before = path.read_bytes()
    short = models["m1"].select(truth.exams.index[1:])
    with pytest.raises(ValueError, match="no prediction for study"):
        write_report(path, truth, {"m": short}, times=5)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_more_models_than_colours(tmp_path, world):
    truth, models, _ = world
    many = {f"model {i}": models["m0"] for i in range(6)}
    text = write_report(tmp_path / "r.html", truth, many, times=5, worst=1).read_text()
    assert all(f">{name}<" in text for name in many)
    assert len(EXAM_LABELS) == 9 and text.count("<figure>") == 30
