"Networks for sequences: the recurrent step against numpy, and padding of any length."
import numpy as np
import pytest

from rsnape_kit.data.sequences import StudyFeatures, pad_studies, padded_length
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.sequence import KINDS, sequence

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
        if v.path.endswith(("correction/kernel", "exams/kernel", "bias")):
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


def test_an_untrained_network_gives_the_first_stage_and_the_expected_exams():
    one, expected = study(9), np.linspace(.1, .9, 9)
    p = sequence(F, expect_exam=expected)(pad_studies([one]))
    np.testing.assert_allclose(np.asarray(p["images"])[0, :9], sigmoid(one.logits[0]), atol=1e-6)
    np.testing.assert_allclose(np.asarray(p["exams"])[0], expected, atol=.02)


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


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind is 'rnn', expected one of gru, lstm, transformer"):
        sequence(F, "rnn")
