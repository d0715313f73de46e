"The networks on TensorFlow and JAX have the same parameter counts, and with the same weights the same predictions."
import numpy as np
import pytest
import warm

from rsnape_kit.inference.keras_predictor import predict_all, slice_logits, with_features
from rsnape_kit.models.keras_backend import import_keras

CODE = '''
import sys
import numpy as np
from rsnape_kit.models.keras_backend import import_keras, jit, zero_weights
from rsnape_kit.models import efficientnet as image, volume
keras, out = import_keras(), {}
rng = np.random.default_rng(0)
# All weights are set below; for the initial ones XLA would compile a random generator per shape.
with zero_weights():
    small = {
        "image": (image.efficientnet("b0", 32, pool="gem", width=.25, depth=.1), (2, 32, 32, 3)),
        "resnet3d": (volume.resnet3d(3, 32, width=.125, depth=.3), (2, 3, 32, 32, 3)),
        "efficientnet3d": (volume.efficientnet3d("b0", 3, 32, width=.25, depth=.1), (2, 3, 32, 32, 3)),
    }
    whole = image.backbone("b0", 32).count_params()
for name, (model, shape) in small.items():
    model.jit_compile = jit()
    model.set_weights([np.asarray(rng.uniform(.5, 1.5, w.shape) if w.path.endswith(("variance", "gamma", "power")) else
                                  rng.normal(0, .2, w.shape), "float32") for w in model.weights])
    p = model.predict_on_batch(rng.integers(0, 256, shape, dtype=np.uint8))
    p = p if isinstance(p, dict) else {"": p}
    out |= {name + head: np.asarray(value) for head, value in p.items()}
out["counts"] = np.array([whole] + [model.count_params() for model, _ in small.values()])
np.savez(sys.argv[1], **out)
'''


@pytest.mark.slow
def test_both_frameworks_agree(tmp_path):
    results = []
    for backend in ("tensorflow", "jax"):
        result = warm.run(CODE, tmp_path / f"{backend}.npz", backend=backend)
        assert result.returncode == 0, result.stderr[-2000:]
        results.append(dict(np.load(tmp_path / f"{backend}.npz")))
    tensorflow, jax = results
    volumes = [name + head for name in ("resnet3d", "efficientnet3d") for head in ("images", "exams")]
    assert set(tensorflow) == {"image", "counts", *volumes}
    for name, value in tensorflow.items():
        np.testing.assert_allclose(value, jax[name], atol=1e-3, err_msg=name)
    assert tensorflow["counts"][0] == 4_049_564  # as published


class Slices(list):
    batch = 4


def test_predictions_and_features_are_of_the_image_label_whatever_else_a_network_has_learned():
    rng, keras = np.random.default_rng(0), import_keras()
    inputs = keras.Input((8, 8, 3), dtype="uint8", name="image")
    vector = keras.layers.Flatten()(keras.layers.AveragePooling2D(4)(keras.layers.Rescaling(1 / 255)(inputs)))
    several = keras.Model(inputs, keras.layers.Dense(8, "sigmoid")(vector))
    x = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    first = np.asarray(several(x))[:, :1]
    found = np.concatenate([p["images"] for _, p in predict_all(several, Slices([x[:4], x[4:]]))])
    np.testing.assert_allclose(found, first, atol=1e-6)
    with_vectors = with_features(several)(x)
    np.testing.assert_allclose(np.asarray(with_vectors["images"]), first, atol=1e-6)
    logits = slice_logits(several, np.asarray(with_vectors["features"]))
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), first[:, 0], atol=1e-6)
    assert np.ptp(first) > .01
