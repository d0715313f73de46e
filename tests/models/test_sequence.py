"Networks for sequences: the recurrent step against numpy, padding of any length, exam heads against the label rules."
from itertools import product

import numpy as np
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, allowed_combinations
from rsnape_kit.competition.priors import best_constants
from rsnape_kit.data.sequences import StudyFeatures, pad_studies, padded_length
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.registry import build_model, compile_model
from rsnape_kit.models.sequence import HEADS, KINDS, expected_logits, sequence
from rsnape_kit.runs.config import SequenceConfig
from rsnape_kit.testing import simulate_truth

F = 5


def study(n, seed=0) -> StudyFeatures:
    rng = np.random.default_rng([seed, n])
    return StudyFeatures(f"s{n}", np.arange(n).astype(str), 1.25 * np.arange(n),
                         rng.normal(size=(1, n, F)).astype("float16"), rng.normal(size=(1, n)).astype("float32"))


def network(kind, **settings):
    "A network whose head and correction are not at their start, so that every input matters."
    model = sequence(F, kind, units=4, heads=2, **settings)
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        if v.path.endswith(("correction/kernel", "exams/kernel", "exam_logits/kernel", "bias")):
            v.assign(rng.normal(0, .5, v.shape))
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(x, kernel, recurrent, bias):
    "One direction of a GRU, step by step: the formulae of Cho et al. 2014, reset after the matrix product."
    h, out, units = np.zeros(recurrent.shape[0]), [], recurrent.shape[0]
    for step in x:
        a, b = step @ kernel + bias[0], h @ recurrent + bias[1]
        z, r = (sigmoid(a[k * units:(k + 1) * units] + b[k * units:(k + 1) * units]) for k in (0, 1))
        h = z * h + (1 - z) * np.tanh(a[2 * units:] + r * b[2 * units:])
        out.append(h)
    return np.array(out)


def test_slices_are_read_in_both_directions_as_in_numpy_and_padding_is_skipped():
    keras, model = import_keras(), network("gru")
    inner = keras.Model(model.input, [model.get_layer("inputs").output, model.get_layer("read").output])
    some = [study(5), study(11)]
    x, h = (np.asarray(each, float) for each in inner(pad_studies(some)))
    weights = [np.asarray(w, float) for w in model.get_layer("gru0").get_weights()]
    for i, n in enumerate(map(len, some)):
        expected = np.concatenate([gru(x[i, :n], *weights[:3]), gru(x[i, :n][::-1], *weights[3:])[::-1]], 1)
        np.testing.assert_allclose(h[i, :n], expected, atol=2e-6)


def test_a_slice_is_joined_with_its_differences_to_the_neighbours():
    keras, model, one = import_keras(), sequence(F), study(7)
    found = np.asarray(keras.Model(model.input, model.get_layer("neighbours").output)(pad_studies([one])))[0]
    x = one.features[0].astype("float32")
    before, after = np.diff(x, axis=0, prepend=x[:1]), -np.diff(x, axis=0, append=x[-1:])
    np.testing.assert_array_equal(found[:7], np.concatenate([x, before, after], 1))
    assert not found[7:].any()


@pytest.mark.parametrize("head", HEADS)
def test_an_untrained_network_gives_the_first_stage_and_the_expected_exams(head):
    one, expected = study(9), best_constants(simulate_truth(400, slices=(3, 4, 5)))[0].to_numpy()
    network = sequence(F, head=head, expect_exam=expected)
    kernel = next(weight for weight in network.weights if "exam" in weight.path and weight.path.endswith("kernel"))
    kernel.assign(np.zeros(kernel.shape))  # it begins with small random numbers
    p = network(pad_studies([one]))
    np.testing.assert_allclose(np.asarray(p["images"])[0, :9], sigmoid(one.logits[0]), atol=1e-6)
    np.testing.assert_allclose(np.asarray(p["exams"])[0], expected, atol=2e-3)


def answers() -> list:
    "Each set of labels that are *yes* in a study that the rules, as the competition's page states them, allow."
    found = []
    for yes in product([False, True], repeat=9):
        has = dict(zip(EXAM_LABELS, yes))
        location = has["central_pe"] or has["leftsided_pe"] or has["rightsided_pe"]
        ratios = has["rv_lv_ratio_gte_1"] + has["rv_lv_ratio_lt_1"]
        chronic = has["chronic_pe"] + has["acute_and_chronic_pe"]
        normal = has["negative_exam_for_pe"] + has["indeterminate"]
        positive, nothing = ratios == 1 and location and chronic < 2, not (ratios or location or chronic)
        if (positive and not normal) or (nothing and normal == 1):
            found.append(yes)
    return found


def normalised(logits) -> np.ndarray:
    "Probabilities of the labels if each allowed answer has the weight exp(sum of its labels' logits), in a loop."
    weights = {yes: np.exp(sum(z for z, y in zip(logits, yes) if y)) for yes in answers()}
    return np.array([sum(w for yes, w in weights.items() if yes[k]) for k in range(9)]) / sum(weights.values())


def test_the_hierarchy_head_is_a_softmax_over_the_allowed_answers():
    model, keras = network("gru", head="hierarchy"), import_keras()
    inner = keras.Model(model.input, [model.get_layer("exam_logits").output, model.output["exams"]])
    logits, p = (np.asarray(each, float) for each in inner(pad_studies([study(5), study(11)])))
    assert abs(logits).max() > .5
    np.testing.assert_allclose(p, [normalised(row) for row in logits], atol=1e-6)


def test_expected_logits_give_the_probabilities_of_any_mixture_of_answers():
    rng, yes = np.random.default_rng(0), allowed_combinations()[0]
    for concentration in (.05, .3, 2) * 20:
        p = (.95 * rng.dirichlet(np.full(44, concentration)) + .05 / 44) @ yes
        np.testing.assert_allclose(normalised(expected_logits(p)), p, atol=1e-3)
    for impossible in (np.full(9, .5), np.full(9, .01), np.full(9, .99), np.eye(9)[0]):
        assert np.isfinite(expected_logits(impossible)).all()


def test_a_bag_of_hierarchy_heads_trains_in_float16_and_stays_coherent():
    network = {"units": 4, "head": "hierarchy"}
    config = SequenceConfig(features=F, inner=2, precision="float16", network=network, clip=1.)
    truth = simulate_truth(40, slices=(5, 6, 7))
    model = compile_model(build_model(config, truth), config)
    model.run_eagerly = True  # three steps are quicker than tracing one
    x = pad_studies([study(5), study(7)])
    y = {"images": np.ones((2, 2, 8, 2), "float32"), "exams": np.ones((2, 2, 9, 2), "float32")}
    before = model.predict_on_batch(x)["exams"]
    for _ in range(3):
        model.train_on_batch(x, y)
    p = {label: after for label, after in zip(EXAM_LABELS, np.moveaxis(model.predict_on_batch(x)["exams"], -1, 0))}
    assert p["central_pe"].dtype == np.float32 and (np.stack(list(p.values()), -1) != before).all()
    positive = p["rv_lv_ratio_gte_1"] + p["rv_lv_ratio_lt_1"]
    np.testing.assert_allclose(positive + p["negative_exam_for_pe"] + p["indeterminate"], 1, atol=1e-6)
    assert (p["chronic_pe"] + p["acute_and_chronic_pe"] < positive).all()
    locations = np.stack([p[label] for label in ("central_pe", "leftsided_pe", "rightsided_pe")])
    assert (locations.max(0) < positive).all() and (positive < locations.sum(0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_at_any_length(kind):
    model = network(kind)
    for n in (1, 8, 63, 1083):
        one = study(n)
        exact = {name: value[:, :n] for name, value in pad_studies([one]).items()}
        beside = pad_studies([one, study(min(n + 40, 1083), seed=1)])
        mask = beside["mask"]
        rubbish = {name: np.where(mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), value, np.array(7, value.dtype))
                   for name, value in beside.items() if name != "mask"} | {"mask": mask}
        alone, padded = model.predict_on_batch(exact), model.predict_on_batch(rubbish)
        np.testing.assert_allclose(padded["images"][0, :n], alone["images"][0], atol=2e-6)
        np.testing.assert_allclose(padded["exams"][0], alone["exams"][0], atol=2e-6)
        assert padded["images"].shape[1] == padded_length(min(n + 40, 1083))


def test_an_unknown_kind_or_head_is_named():
    with pytest.raises(ValueError, match="kind is 'rnn', expected one of gru, lstm, transformer"):
        sequence(F, "rnn")
    with pytest.raises(ValueError, match="head is 'tree', expected one of independent, hierarchy"):
        sequence(F, head="tree")
