"Networks for sequences: the recurrent step against numpy, padding of any length, exam heads against the label rules."
from itertools import product

import numpy as np
import pytest

from rsnape_kit.competition.labels import EXAM_LABELS, allowed_combinations
from rsnape_kit.competition.priors import best_constants
from rsnape_kit.data.sequences import StudyFeatures, pad_studies, padded_length
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.losses import weighted_bce
from rsnape_kit.models.registry import build_model, compile_model
from rsnape_kit.models.sequence import HEADS, KINDS, expected_logits, sequence
from rsnape_kit.runs.config import SequenceConfig, check_config
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
        if v.path.endswith(("correction/kernel", "exam_logits/kernel", "bias")):
            v.assign(rng.normal(0, .5, v.shape))
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(given, kernel, bias):
    "One direction of a GRU, step by step: the formulae of Cho et al. 2014, reset after the matrix product."
    h, out, units = np.zeros(len(kernel)), [], len(kernel)
    for a in given:
        b = h @ kernel + bias
        z, r = (sigmoid(a[k * units:(k + 1) * units] + b[k * units:(k + 1) * units]) for k in (0, 1))
        h = z * h + (1 - z) * np.tanh(a[2 * units:] + r * b[2 * units:])
        out.append(h)
    return np.array(out)


def lstm(given, kernel, bias):
    "One direction of an LSTM, step by step: the formulae of Gers et al. 2000, the forget gate's bias raised by 1."
    h, c, out = np.zeros(len(kernel)), np.zeros(len(kernel)), []
    for a in given:
        i, f, new, o = np.split(a + h @ kernel + bias, 4)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(new)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


@pytest.mark.parametrize("kind, slow", [("gru", gru), ("lstm", lstm)])
def test_slices_are_read_in_both_directions_as_in_numpy_and_padding_is_skipped(kind, slow):
    keras, model = import_keras(), network(kind, networks=3)
    inner = keras.Model(model.input, [model.get_layer(name).output for name in ("gates0", f"{kind}0")])
    some = [study(5), study(11)]
    given, h = (np.asarray(each, float) for each in inner(pad_studies(some)))
    kernel, bias = (np.asarray(w, float) for w in model.get_layer(f"{kind}0").get_weights())
    for (i, n), net in product(enumerate(map(len, some)), range(3)):
        up, down = np.split(given[i, net, :n], 2, axis=1)
        expected = [slow(up, kernel[net], bias[net]), slow(down[::-1], kernel[3 + net], bias[3 + net])[::-1]]
        np.testing.assert_allclose(h[i, net, :n], np.concatenate(expected, 1), atol=2e-6)


def test_attention_is_the_mean_of_all_real_slices_by_their_likeness_to_each():
    keras, model = import_keras(), network("transformer", networks=2)
    parts = ["attention0_query", "attention0_key", "attention0_value", "attention0_out"]
    inner = keras.Model(model.input, [model.get_layer(name).output for name in parts])
    some = [study(5), study(11)]
    q, k, v, out = (np.asarray(each, float) for each in inner(pad_studies(some)))
    kernel, bias = (np.asarray(w, float) for w in model.get_layer("attention0_out").get_weights())
    for (i, n), net in product(enumerate(map(len, some)), range(2)):
        for t in range(n):
            heads = []
            for at in (slice(0, 4), slice(4, 8)):  # two heads of four numbers
                likeness = np.exp([q[i, net, t, at] @ k[i, net, s, at] / 2 for s in range(n)])
                heads.append(likeness / likeness.sum() @ v[i, net, :n, at])
            expected = np.concatenate(heads) @ kernel[net] + bias[net].ravel()
            np.testing.assert_allclose(out[i, net, t], expected, atol=2e-6)


def test_a_slice_is_joined_with_its_differences_to_the_neighbours():
    keras, model, one = import_keras(), sequence(F, networks=2), study(7)
    parts = [model.get_layer(name).output for name in ("projected", "neighbours")]
    x, found = (np.asarray(each) for each in keras.Model(model.input, parts)(pad_studies([one])))
    x = x[0, :, :7]
    before, after = np.diff(x, axis=1, prepend=x[:, :1]), -np.diff(x, axis=1, append=x[:, -1:])
    np.testing.assert_array_equal(found[0, :, :7], np.concatenate([x, before, after], 2))
    assert x.any() and not found[0, :, 7:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_a_bag_share_nothing(kind):
    "Answers of one network depend on its own weights alone, and so do the gradients: to the bit."
    model, x = network(kind, networks=3, dropout=0.), pad_studies([study(5), study(11)])
    y = {"images": np.ones((2, 3, 12, 2), "float32"), "exams": np.ones((2, 3, 9, 2), "float32")}
    model.compile(import_keras().optimizers.AdamW(1e-2, weight_decay=.3), {head: weighted_bce() for head in y})
    model.run_eagerly = True
    before, start = model.predict_on_batch(x), model.get_weights()
    model.train_on_batch(x, y)
    after = model.predict_on_batch(x)
    model.set_weights(start)
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    model.optimizer.learning_rate.assign(1e-2)
    y["exams"][:, 1], y["images"][:, 1, :, 0] = 0, 0  # the second network is taught something else
    model.train_on_batch(x, y)
    other = model.predict_on_batch(x)
    for head in y:
        assert (before[head] != after[head]).any((0, 2)).all()
        np.testing.assert_array_equal(other[head][:, ::2], after[head][:, ::2])
        assert (other[head][:, 1] != after[head][:, 1]).any()


@pytest.mark.parametrize("head", HEADS)
def test_an_untrained_network_gives_the_first_stage_and_the_expected_exams(head):
    one, expected = study(9), best_constants(simulate_truth(400, slices=(3, 4, 5)))[0].to_numpy()
    network = sequence(F, head=head, expect_exam=expected)
    kernel = next(weight for weight in network.weights if "exam" in weight.path and weight.path.endswith("kernel"))
    kernel.assign(np.zeros(kernel.shape))  # it begins with small random numbers
    p = network(pad_studies([one]))
    np.testing.assert_allclose(np.asarray(p["images"])[0, 0, :9], sigmoid(one.logits[0]), atol=1e-6)
    np.testing.assert_allclose(np.asarray(p["exams"])[0, 0], expected, atol=2e-3)


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
    np.testing.assert_allclose(p[:, 0], [normalised(row) for row in logits[:, 0]], atol=1e-6)


def test_expected_logits_give_the_probabilities_of_any_mixture_of_answers():
    rng, yes = np.random.default_rng(0), allowed_combinations()[0]
    for concentration in (.05, .3, 2) * 20:
        p = (.95 * rng.dirichlet(np.full(44, concentration)) + .05 / 44) @ yes
        np.testing.assert_allclose(normalised(expected_logits(p)), p, atol=1e-3)
    for impossible in (np.full(9, .5), np.full(9, .01), np.full(9, .99), np.eye(9)[0]):
        assert np.isfinite(expected_logits(impossible)).all()


def test_a_bag_of_hierarchy_heads_trains_in_float16_and_stays_coherent():
    network = {"units": 4, "head": "hierarchy"}
    config = SequenceConfig(features=F, inner=2, precision="float16", network=network)
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
        np.testing.assert_allclose(padded["images"][0, 0, :n], alone["images"][0, 0], atol=2e-6)
        np.testing.assert_allclose(padded["exams"][0], alone["exams"][0], atol=2e-6)
        assert padded["images"].shape[2] == padded_length(min(n + 40, 1083))


def test_clipping_would_tie_the_networks_of_a_bag_together_and_is_refused():
    with pytest.raises(ValueError, match="clip=1.0 would make the networks of the bag depend on each other"):
        check_config(SequenceConfig(clip=1.))


def test_an_unknown_kind_or_head_is_named():
    with pytest.raises(ValueError, match="kind is 'rnn', expected one of gru, lstm, transformer"):
        sequence(F, "rnn")
    with pytest.raises(ValueError, match="head is 'tree', expected one of independent, hierarchy"):
        sequence(F, head="tree")
