"answer.json against its JSON Schema and the predictions, answer.csv, and the printed table."
import json
from dataclasses import replace

import jsonschema
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, SERIES, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.ensemble.calibration import Calibration
from rsnape_kit.ensemble.ensemble import Ensemble, default_ensemble
from rsnape_kit.report.answer_tables import answer_text, save_answer, short_names
from rsnape_kit.report.answers import Answer, answer_schema, make_answer, predict_stages
from rsnape_kit.testing import simulate_model, simulate_truth

FOLDER = ROOT / "docs"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Predictions of three models, one calibrated and one without exams, and the folder of their answer."
    truth = simulate_truth(6, slices=(5, 9, 14), seed=2)
    preds = {f"m{i}": simulate_model(truth, seed=i)[0] for i in (1, 2)}
    some = preds["m2"].images.mask(np.arange(len(truth.images)) % 7 == 0)
    preds["images"] = Predictions(preds["m1"].exams * np.nan, some)
    table = truth.images.index.to_frame(index=False).assign(SeriesInstanceUID="1.2.3", problem="", position=2.5)
    table["order"] = table.groupby(STUDY).cumcount()
    table.loc[0, "problem"] = "filled from a neighbour"
    equal = default_ensemble(list(preds)).blend_weights
    halved = Calibration({label: (.5, -1.) for label in (*EXAM_LABELS, IMAGE_LABEL)})
    ensemble = Ensemble(equal, calibrations={"m1": halved})
    stages = predict_stages(preds, ensemble, table)
    folder = tmp_path_factory.mktemp("answer")
    save_answer(make_answer(stages, table, problems={"study2": 'odd "quoted", <b>'}), folder)
    return preds, stages, folder


def test_the_file_fits_the_schema_that_the_documentation_has(saved):
    schema = json.loads((FOLDER / "answer.schema.json").read_text())
    assert schema == json.loads(json.dumps(answer_schema())), "write docs/answer.schema.json anew from answer_schema()"
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads((saved[2] / "answer.json").read_text())
    valid = jsonschema.Draft202012Validator(schema)
    valid.validate(content)
    for damage in ({"studies": None}, {"format": 2}, {"more": 1}):
        assert not valid.is_valid(content | damage)
    content["studies"][0]["labels"]["central_pe"]["blended"] = 1.2
    assert not valid.is_valid(content)


def test_every_value_is_that_of_its_stage(saved):
    preds, stages, folder = saved
    content = json.loads((folder / "answer.json").read_text())
    odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    for study in content["studies"]:
        for label, value in study["labels"].items():
            raw = {name: preds[name].exams.at[study["study"], label] for name in ("m1", "m2")}
            assert value["raw"] == raw | {"images": None}
            assert odds(value["calibrated"]["m1"]) == pytest.approx(.5 * odds(value["raw"]["m1"]) - 1, abs=1e-4)
            assert value["calibrated"]["m2"] == value["raw"]["m2"]
            assert value["blended"] == pytest.approx((value["calibrated"]["m1"] + value["calibrated"]["m2"]) / 2)
            assert value["yes"] is (value["consistent"] > .5)
        for each in study["slices"]:
            uid = study["study"], each["slice"]
            raw = {name: None if np.isnan(pred.images[uid]) else pred.images[uid] for name, pred in preds.items()}
            assert each["raw"] == raw and each["series"] == "1.2.3"
            assert each["consistent"] == stages.consistent.images[uid]
            assert each["blended"] == pytest.approx(np.mean([p for p in each["calibrated"].values() if p is not None]))
    first = content["studies"][0]
    assert first["warnings"] == [f"1 of {len(first['slices'])} slices: filled from a neighbour"]
    assert content["studies"][2]["warnings"] == ['odd "quoted", <b>']


def test_the_table_has_the_same_values_in_long_form(saved):
    _, stages, folder = saved
    table = pd.read_csv(folder / "answer.csv", float_precision="round_trip", keep_default_na=True)
    exams, images = table[table[SLICE].isna()], table[table[SLICE].notna()]
    wide = exams.pivot(index=STUDY, columns="label", values="consistent")
    pd.testing.assert_frame_equal(wide[list(EXAM_LABELS)], stages.consistent.exams, check_names=False)
    own = images.set_index([STUDY, SLICE])["blended"]
    pd.testing.assert_series_equal(own, stages.blended.images, check_names=False)
    assert set(images["label"]) == {IMAGE_LABEL} and (images[SERIES] == "1.2.3").all()
    assert exams["images raw"].isna().all()


def test_a_failed_save_leaves_the_last_table_whole(saved, tmp_path, monkeypatch):
    answer = Answer.load(saved[2] / "answer.json")
    _, table = save_answer(answer, tmp_path)
    before = table.read_bytes()

    def stop(frame, path, **settings):
        path.write_text("half a tab")
        raise OSError("stopped")

    monkeypatch.setattr(pd.DataFrame, "to_csv", stop)
    with pytest.raises(OSError, match="stopped"):
        save_answer(answer, tmp_path)
    assert table.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"answer.json", "answer.csv"}


def test_the_printed_table_has_one_column_a_study_and_no_long_header(saved):
    answer = Answer.load(saved[2] / "answer.json")
    long = [f"1.2.840.{'7' * 50}.{i}" for i in range(len(answer.studies))]
    answer = replace(answer, studies=tuple(replace(each, study=uid) for each, uid in zip(answer.studies, long)))
    text = answer_text(answer, across=3)
    blocks = [block.splitlines() for block in text.split("\n\n")[:2]]
    for number, lines in enumerate(blocks):
        assert [line.split()[0] for line in lines[1:10]] == list(EXAM_LABELS)
        assert lines[0].split() == [short_names(long)[uid] for uid in long[3 * number:3 * number + 3]]
        assert max(map(len, lines)) < 100
    assert all(text.count(uid) == 1 for uid in long)  # written out once, below
    assert ".500" not in "".join(blocks[0] + blocks[1])


def test_values_that_the_rules_moved_are_marked_and_not_printed_as_undecided(saved):
    answer = Answer.load(saved[2] / "answer.json")
    moved = {(each.study, label) for each in answer.studies for label, value in each.labels.items()
             if (value.blended > .5) != value.yes}
    assert moved, "the simulated blend has no inconsistent study, choose another seed"
    text = answer_text(answer, across=6).split("\n\n")[0].splitlines()
    columns = text[0].split()
    for line in text[1:10]:
        label, *cells = line.replace("-> ", "->").split()
        words = [cell for cell in cells if not cell[0].isdigit()]
        arrows = {(study, label) for study, word in zip(columns, words) if word.startswith("->")}
        assert arrows == {(study, name) for study, name in moved if name == label}
