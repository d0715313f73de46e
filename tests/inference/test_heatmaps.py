"Grad-CAM against central differences in numpy, and what takes its place for runs that cannot have it."
import numpy as np
import pandas as pd
import pytest
from small_runs import keras_run, torch_run

from rsnape_kit.competition.labels import SERIES, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.inference.heatmaps import heat_maps
from rsnape_kit.inference.keras_predictor import grad_cam
from rsnape_kit.models.efficientnet import pool_layer
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.testing import ArraySource

POOLS = {"max": lambda x: x.max((0, 1)), "avg": lambda x: x.mean((0, 1)),
         "gem": lambda x: (np.maximum(x, 1e-6)**3).mean((0, 1))**(1 / 3)}


@pytest.mark.parametrize("pool", POOLS)
def test_it_is_the_definition_by_central_differences(pool):
    "One value of the last feature map after the other is moved; pool and head are computed by hand."
    keras, rng, step = import_keras(), np.random.default_rng(0), 1e-6
    inputs = keras.Input((12, 12, 2), dtype="uint8")
    maps = keras.layers.Conv2D(5, 3, 3, activation="softplus")(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, "sigmoid")(keras.layers.Dropout(.5)(pool_layer(pool)(maps))))
    model.layers[-1].kernel.assign(rng.normal(.5, 1, (5, 2)))
    x = rng.integers(0, 255, (3, 12, 12, 2)).astype(np.uint8)
    features = np.asarray(keras.Model(inputs, maps)(x), float)
    weights = np.asarray(model.layers[-1].kernel, float)[:, 0]
    expected = []
    for one in features:
        change = np.zeros_like(one)
        for place in np.ndindex(one.shape):
            up, down = one.copy(), one.copy()
            up[place] += step
            down[place] -= step
            change[place] = (POOLS[pool](up) - POOLS[pool](down)) @ weights / (2 * step)
        expected.append(np.maximum((one * change.mean((0, 1))).sum(-1), 0))
    np.testing.assert_allclose(grad_cam(model)(x), expected, atol=1e-5)
    assert np.max(expected) > .01


@pytest.mark.parametrize("kind", ["groups", "damaged"])
def test_runs_that_cannot_are_named_and_occlusion_takes_over(tmp_path, kind):
    run = torch_run(tmp_path) if kind == "groups" else keras_run(tmp_path, "efficientnet")
    if kind == "damaged":
        (run / "best.npz").write_bytes(b"PK\x03\x04 damaged")
    rng, asked = np.random.default_rng(0), []
    table = pd.DataFrame({STUDY: "s", SERIES: "t", SLICE: [f"i{i}" for i in range(6)], "order": range(6)})
    source = ArraySource(rng.integers(-4000, 4000, (6, 64, 64)).astype(np.int16), table)

    def predict(runs, copies, tta, out, time_budget):
        asked.extend(runs)
        index = slice_index(copies.table)
        return {"m": Predictions(pd.DataFrame(index=index.unique(0)), pd.Series(.5, index))}

    with pytest.warns(UserWarning, match=rf"{run.name} makes no Grad-CAM.*occlusion"):
        found = heat_maps([run], source, [2], predict=predict, method="gradcam")
    assert asked == [run] and list(found) == [2] and not found[2].any()
