"The study page, driven and photographed in a real browser, against windows computed by hand."
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from browser import PROGRAM, Browser
from PIL import Image

from rsnape_kit.competition.labels import EXAM_LABELS, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.report.study_page import write_study_page
from rsnape_kit.report.viewer import encode_stack
from rsnape_kit.testing import ArraySource

COUNT, SIZE = 40, 128
NAME = '</script><script>document.title="stolen"</script>'  # no name may run
WINDOWS = {"lung": (-600, 1500), "PE": (100, 700), "mediastinal": (40, 400)}  # level, width


@pytest.fixture(scope="module")
def study():
    "Bars of known HU that move along z, a probability with a peak at slice 25 and a gap at slice 3, a heat map there."
    x = np.linspace(-1000, 500, SIZE)
    hu = np.stack([np.tile(np.roll(x, i), (SIZE, 1)) for i in range(COUNT)])
    table = pd.DataFrame({STUDY: NAME, "SeriesInstanceUID": "s", "SOPInstanceUID": [f"i{i}" for i in range(COUNT)],
                          "order": range(COUNT), "position": 2.5 * np.arange(COUNT) - 30, "problem": ""})
    table["spacing_x"], table["columns"] = .8, SIZE
    source = ArraySource(np.rint(4 * hu).astype(np.int16), table)
    p = .9 * np.exp(-(np.arange(COUNT) - 24)**2 / 20)
    p[2] = np.nan
    exams = pd.DataFrame([np.linspace(.1, .8, 9)], [NAME], EXAM_LABELS)
    heat = np.zeros((SIZE, SIZE), np.float32)
    heat[20:40, 90:110] = 1
    return hu, source, Predictions(exams, pd.Series(p, slice_index(table))), heat


@pytest.fixture(scope="module")
def path(study, tmp_path_factory):
    _, source, pred, heat = study
    return write_study_page(tmp_path_factory.mktemp("page") / "report.html", pred, source, heat={24: heat})


@pytest.fixture(scope="module")
def browser(path, tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        found.open(path)
        yield found


def shown(browser) -> int:
    "The number of the slice that the page says it shows."
    return int(re.match(r"slice (\d+) of 40", browser.eval("document.getElementById('place').textContent"))[1])


def picture(browser, selector="#slice") -> np.ndarray:  # float [SIZE, SIZE, 3]
    "Photograph an element, in the pixels of the slice."
    browser.eval("document.getElementById('slice').decode()")
    box = browser.box(selector)
    box["y"] += browser.eval("window.scrollY")
    image = Image.open(io.BytesIO(browser.photograph(**box))).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), float)


def test_wheel_slider_and_keys_choose_the_slice(browser):
    assert shown(browser) == 25  # the most suspicious
    for key, expected in (("Home", 1), ("ArrowUp", 2), ("PageUp", 12), ("ArrowDown", 11), ("End", 40), ("ArrowUp", 40)):
        browser.key(key)
        assert shown(browser) == expected, key
    marks = json.loads(browser.eval("document.getElementById('data').textContent"))["marks"]
    assert marks == [21, 24, 27]  # of .9 at slice 25, half is reached four slices away at most
    assert "here 0.450" in browser.eval("document.getElementById('rule').textContent")
    for key, order in (("p", marks[::-1]), ("n", marks[1:])):
        for mark in order:
            browser.key(key)
            assert shown(browser) == mark + 1
    box = browser.box("#view")
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = shown(browser)
    for turn, change in ((-40, 1), (-120, 3), (80, -2), (10, 0)):  # pixels; a touchpad's small turns add up
        browser.mouse("mouseWheel", *middle, deltaX=0, deltaY=turn)
        before += change
        assert shown(browser) == before
    browser.eval("{const s = document.getElementById('slider'); s.value = 6; s.dispatchEvent(new Event('input'))}")
    assert shown(browser) == 7


@pytest.mark.parametrize("window", WINDOWS)
def test_the_windows_show_the_hu_of_the_slice(browser, study, window):
    level, width = WINDOWS[window]
    browser.eval("document.querySelector('#heat-switch:checked')?.click()")
    for key, place in (("Home", 0), ("PageUp", 10)):
        browser.key(key)
        browser.key(str(list(WINDOWS).index(window) + 1))
        expected = 255 * np.clip((study[0][place] - (level - width / 2)) / width, 0, 1)
        rows = slice(40, 60)  # without the texts
        assert np.abs(picture(browser)[rows].mean(2) - expected[rows]).mean() < 8
    assert browser.eval("document.querySelector('[data-window][aria-pressed=true]').textContent") == window


def test_the_profile_follows_the_slice_and_leads_to_it(browser, study):
    p = study[2].images.to_numpy()
    for selector, across in (("#profile", True), ("#coronal", False)):
        box = browser.box(selector)
        for place in (30, 2, 17):
            share = (place + .5) / COUNT
            x = box["x"] + box["width"] * (share if across else .5)
            browser.click(x, box["y"] + box["height"] * (.5 if across else 1 - share))
            assert shown(browser) == place + 1
            assert float(browser.eval("document.getElementById('cursor').getAttribute('x1')")) == place + .5
            assert float(browser.eval("document.getElementById('level').getAttribute('y1')")) == COUNT - place - .5
            text = browser.eval("document.getElementById('probability').textContent")
            assert text == ("not predicted" if np.isnan(p[place]) else f"embolus {p[place]:.3f}")
            millimetres = f"{2.5 * place - 30:.1f} mm".replace("-", "−")
            assert millimetres in browser.eval("document.getElementById('place').textContent")


def test_the_heat_map_lies_on_its_slice_and_goes_at_a_key(browser):
    browser.key("Home")
    browser.eval("document.querySelector('#heat-switch:not(:checked)')?.click()")
    assert browser.eval("document.getElementById('heat').hidden") is True  # this slice has none
    browser.eval("document.querySelector('[data-slice=\"24\"]').click()")
    browser.eval("document.getElementById('heat').decode()")
    colour = picture(browser)
    red = colour[..., 0] - colour[..., 2]
    assert red[25:35, 95:105].mean() > 60 and np.abs(red[60:120, :80]).max() < 5
    browser.key("h")
    plain = picture(browser)
    assert np.abs(plain[..., 0] - plain[..., 2]).max() < 5
    browser.key("h")


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_it_fits_a_phone_and_a_dark_room(browser, path, width):
    browser.resize(width, 800, mobile=width < 500)
    colours = {}
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert browser.eval("document.documentElement.scrollWidth") <= width
        ground = browser.eval("getComputedStyle(document.body).backgroundColor")
        colours[scheme] = np.mean([int(part) for part in re.findall(r"\d+", ground)])
        (path.parent / f"{width}-{scheme}.png").write_bytes(browser.photograph())
    assert colours["light"] > 240 and colours["dark"] < 40
    first, second = browser.box("#place"), browser.box("#probability")
    assert first["x"] + first["width"] <= second["x"] or first["y"] + first["height"] <= second["y"] + 1
    box = browser.box("#view")
    assert abs(box["width"] - box["height"]) < 2 and box["width"] > .6 * min(width, 900) - 16
    browser.resize(1000, 1300)


def test_nothing_is_fetched_and_no_name_runs(browser, path):
    wanted = [event["params"]["request"]["url"] for event in browser.events
              if event.get("method") == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in wanted} <= {"file", "data"}
    assert [url for url in wanted if url.startswith("file")] == [path.as_uri()]
    assert not {"Runtime.exceptionThrown", "Log.entryAdded"} & {event.get("method") for event in browser.events}
    assert browser.eval("document.title") == "Pulmonary embolism study page"
    assert NAME in browser.eval("document.body.innerText")
    refused = browser.eval("fetch('http://127.0.0.1:9/').then(() => 'sent', error => String(error))")
    assert refused.startswith("TypeError")
    blocked = [event for event in browser.events if event.get("method") == "Log.entryAdded"]
    assert "Content Security Policy" in json.dumps(blocked)


def test_noise_of_many_slices_stays_below_the_limit():
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3)).astype(np.uint8)
    for most in (900_000, 300_000, 90_000):
        coded = encode_stack(noise, most)
        assert sum(len(each) for part in coded.values() for each in part) <= most
        assert [len(part) for part in coded.values()] == [60] * 3


def test_a_study_without_suspicion_has_no_marks_and_says_so(study, tmp_path):
    if PROGRAM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    _, source, pred, _ = study
    low = write_study_page(tmp_path / "low.html", Predictions(pred.exams, pred.images / 9.5), source)
    with Browser(tmp_path / "profile") as browser:
        browser.open(low)
        assert "No slice is marked" in browser.eval("document.getElementById('rule').textContent")
        assert browser.eval("document.querySelectorAll('.mark, [data-slice]').length") == 0
        before = shown(browser)
        browser.key("n")
        assert shown(browser) == before
        browser.key("ArrowUp")
        assert shown(browser) == before + 1
        (tmp_path / "low.png").write_bytes(browser.photograph())
    some = write_study_page(tmp_path / "some.html", Predictions(pred.exams, pred.images / 8.5), source)
    with Browser(tmp_path / "other profile") as browser:  # a new one cannot still show the former page
        browser.open(some)
        assert browser.eval("document.querySelectorAll('[data-slice]').length") == 1  # .106
        (tmp_path / "some.png").write_bytes(browser.photograph())
