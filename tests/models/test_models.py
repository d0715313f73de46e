"The same networks on TensorFlow and JAX: same counts, and with the same weights the same answers."
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

CODE = '''
import sys
import numpy as np
from rsnape_kit.models.keras_backend import import_keras, jit
from rsnape_kit.models import efficientnet as image, volume
keras, out = import_keras(), {}
rng = np.random.default_rng(0)
small = {
    "image": (image.efficientnet("b0", 32, pool="gem", width=.25, depth=.1), (2, 32, 32, 3)),
    "resnet3d": (volume.resnet3d(3, 32, width=.125, depth=.3), (2, 3, 32, 32, 3)),
    "efficientnet3d": (volume.efficientnet3d("b0", 3, 32, width=.25, depth=.1), (2, 3, 32, 32, 3)),
}
for name, (model, shape) in small.items():
    model.jit_compile = jit()
    model.set_weights([np.asarray(rng.uniform(.5, 1.5, w.shape) if w.path.endswith(("variance", "gamma", "power")) else
                                  rng.normal(0, .2, w.shape), "float32") for w in model.weights])
    said = model.predict_on_batch(rng.integers(0, 256, shape, dtype=np.uint8))
    said = said if isinstance(said, dict) else {"": said}
    out |= {name + head: np.asarray(value) for head, value in said.items()}
out["counts"] = np.array([image.body("b0", 32).count_params()] + [model.count_params() for model, _ in small.values()])
np.savez(sys.argv[1], **out)
'''


@pytest.mark.slow
def test_both_frameworks_agree(tmp_path):
    answers = []
    for backend in ("tensorflow", "jax"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        result = subprocess.run([sys.executable, "-c", CODE, tmp_path / f"{backend}.npz"], env=env, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        answers.append(dict(np.load(tmp_path / f"{backend}.npz")))
    tensorflow, jax = answers
    volumes = [name + head for name in ("resnet3d", "efficientnet3d") for head in ("images", "exams")]
    assert set(tensorflow) == {"image", "counts", *volumes}
    for name, value in tensorflow.items():
        np.testing.assert_allclose(value, jax[name], atol=1e-3, err_msg=name)
    assert tensorflow["counts"][0] == 4_049_564  # as published
