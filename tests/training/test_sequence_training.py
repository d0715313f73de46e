"Sequence runs: resumed exactly, out of fold in both stages, and what a planted leak would have gained."
import json
import signal

import numpy as np
import pandas as pd
import pytest
import warm

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, IMAGE_LABEL, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.priors import constant_prior, position_prior
from rsnape_kit.data.sequences import HeldFeatures, StudyFeatures
from rsnape_kit.inference.averaging import ProbabilityAverager
from rsnape_kit.inference.features import predict_sequences
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.report.scores import gain_over
from rsnape_kit.runs.config import Phase, SequenceConfig
from rsnape_kit.testing import simulate_truth
from rsnape_kit.training.sequence_trainer import fit_sequences

MODEL = '''
from rsnape_kit.models.keras_backend import import_keras
from rsnape_kit.models.registry import register_model


def reader(features):
    "A network that reads each slice by itself. It has few layers, since a framework takes seconds to compile many."
    keras = import_keras()
    layers, ops = keras.layers, keras.ops
    inputs = {"features": keras.Input((None, features), dtype="float16", name="features"),
              "mask": keras.Input((None,), dtype="bool", name="mask")}
    x = layers.Dense(8, "relu")(ops.cast(inputs["features"], "float32"))
    x = layers.Dropout(.2)(x) * ops.cast(inputs["mask"], "float32")[..., None]
    exams = layers.Dense(9, "sigmoid")(ops.sum(x, 1) / ops.sum(ops.cast(inputs["mask"], "float32"), 1, keepdims=True))
    return keras.Model(inputs, {"images": layers.Dense(1, "sigmoid")(x)[..., 0], "exams": exams})


register_model("reader", reader, "sequence")
'''
exec(MODEL)
SESSION = MODEL + '''
import os, signal, sys
from pathlib import Path
import numpy as np
from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.data.sequences import SequenceBatches
from rsnape_kit.models.keras_backend import save_weights
from rsnape_kit.models.registry import build_model
from rsnape_kit.runs.config import KerasConfig, Phase, SequenceConfig
from rsnape_kit.runs.folder import open_run
from rsnape_kit.testing import ArraySource, simulate_truth
from rsnape_kit.training.trainer import source_fingerprint, train
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE


def tiny(size, channels):
    "A network of slices: one convolution."
    layers = import_keras().layers
    inputs = import_keras().Input((size, size, channels), dtype="uint8")
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(6, 5, 3, activation="relu")(layers.Rescaling(1 / 255)(inputs)))
    return import_keras().Model(inputs, layers.Dense(1, "sigmoid")(x))


register_model("tiny", tiny)
out, die, change = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
truth = simulate_truth(24, slices=(4, 6, 8))
table = truth.images.index.to_frame(index=False)
table = table.assign(order=table.groupby(STUDY).cumcount(), intercept=-1024.)
hu = np.random.default_rng(0).normal(0, 60, (len(table), 32, 32)) + 200 * truth.images.to_numpy()[:, None, None]
source, split = ArraySource(np.rint(4 * hu).astype(np.int16), table), make_folds(truth.exams.index, truth, 2)
image = KerasConfig(model="tiny", pixels=InputConfig((PE,), "fixed", 32), batch=16, split=split.fingerprint)
run = open_run(out / "runs" / image.name, image)
if not (run / "best.npz").exists():
    save_weights(build_model(image), run / "best.npz")
if change:  # other labels of one study of the fold that is held out; of a kind by which folds are not stratified
    exams, images = truth.exams.copy(), truth.images.copy()
    study = next(s for s in split.valid(0) if exams.leftsided_pe[s] and not exams.central_pe[s])
    exams.loc[study, ["leftsided_pe", "central_pe"]] = 0, 1
    images[study] = 1 - images[study].to_numpy()
    images.iloc[images.index.get_loc(study).start] = 1
    truth = Predictions(exams, images)
    print(study)
config = SequenceConfig(inner=2, batch=4, views=2, ema=.9, clip=1., phases=(Phase(1, 5e-3), Phase(1, 1e-3)))
if die != "never":
    epoch, step = map(int, die.split("-"))
    real = SequenceBatches.__getitem__
    def get(self, i):
        if self.shuffle and (self.epoch, i) == (epoch, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, i)
    SequenceBatches.__getitem__ = get
print(train("reader", source, 0, config, truth=truth, folds=split, out=out / "runs", image_runs=[run], tta=1,
            progress=False))
'''

FORWARD = '''
import json
import numpy as np
from rsnape_kit.data.sequences import StudyFeatures, pad_studies
from rsnape_kit.models.sequence import sequence
rng = np.random.default_rng(0)
some = [StudyFeatures(str(n), np.arange(n).astype(str), 2. * np.arange(n), rng.normal(size=(1, n, 5)).astype("float16"),
                      rng.normal(size=(1, n)).astype("float32")) for n in (3, 10)]
found = {}
for kind, head in (("gru", "independent"), ("transformer", "hierarchy")):
    model = sequence(5, kind, units=4, heads=2, head=head)
    for v in model.trainable_variables:
        v.assign(rng.normal(0, .4, v.shape))
    found[kind] = {head: np.asarray(p).astype(float).tolist() for head, p in model(pad_studies(some)).items()}
answer = json.dumps(found)
print(answer)
'''


def session(folder, die="never", *change, backend="tensorflow", more=""):
    return warm.run(SESSION + more, str(folder), die, *change, backend=backend)


def finished(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    finished(session(folder))
    return folder / "runs" / "reader-fold0-seed0"


def history(run):
    return pd.read_csv(run / "history.csv", float_precision="round_trip").drop(columns=["seconds", "cpu_seconds"])


def test_killed_and_resumed_equals_unbroken(unbroken, tmp_path):
    assert session(tmp_path, "1-1").returncode == -signal.SIGKILL
    finished(session(tmp_path))
    broken = tmp_path / "runs" / "reader-fold0-seed0"
    pd.testing.assert_frame_equal(history(unbroken), history(broken), check_exact=True)
    for name in ("best.npz", "checkpoint/state.npz"):
        with np.load(unbroken / name) as a, np.load(broken / name) as b:
            assert set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a)
    a, b = (Predictions.load(run / "oof") for run in (unbroken, broken))
    pd.testing.assert_frame_equal(a.exams, b.exams, check_exact=True)
    pd.testing.assert_series_equal(a.images, b.images, check_exact=True)
    assert json.loads((broken / "config.json").read_text())["settings"]["image_runs"][0].startswith("tiny-fold0-seed0 ")


def test_a_studys_own_labels_do_not_reach_its_prediction(unbroken, tmp_path):
    "To the bit: the network that predicts it has neither seen it nor shared a step with one that has."
    study = finished(session(tmp_path, "never", "change"))[0]
    before, after = (Predictions.load(run / "oof") for run in (unbroken, tmp_path / "runs" / "reader-fold0-seed0"))
    same = (before.exams == after.exams).all(axis=1)
    assert same[study] and (before.images[study] == after.images[study]).all()
    assert 0 < (~same).sum() < len(same)  # the other networks have learned from it


def test_jax_computes_and_trains_as_tensorflow_does(unbroken, tmp_path):
    assert import_keras().config.backend() == "tensorflow"
    here: dict = {}
    exec(FORWARD, here)
    there = json.loads(finished(session(tmp_path, backend="jax", more=FORWARD))[-1])
    for kind, heads in json.loads(here["answer"]).items():
        for head, p in heads.items():
            q = np.array(there[kind][head])
            real = np.arange(q.shape[2]) < np.array([[[3]], [[10]]]) if head == "images" else True
            np.testing.assert_allclose(np.where(real, p, 0), np.where(real, q, 0), atol=1e-5)
    a, b = (pd.read_csv(run / "history.csv") for run in (unbroken, tmp_path / "runs" / "reader-fold0-seed0"))
    np.testing.assert_allclose(a.loss, b.loss, rtol=.2)  # dropout draws other numbers


# What follows plants a leak: the labels have nothing to do with the pixels, and an image run has learned them by heart.
def memory(truth: Predictions, seen) -> HeldFeatures:
    "Features in which an image run recalls the labels of the studies it has seen; those of other studies are noise."
    rng, studies = np.random.default_rng(0), []
    for name, images in truth.images.groupby(level=0):
        n, known = len(images), name in seen
        recalled = np.column_stack([np.tile(truth.exams.loc[name, list(EXAM_LABELS)], (n, 1)), images])
        x = np.where(known, 2 * recalled - 1, rng.choice([-1, 1], (n, 10))) + .1 * rng.normal(size=(n, 10))
        logits = (3 * x[None, :, 9]).astype("float32")
        studies.append(StudyFeatures(name, images.index.get_level_values(1).to_numpy(), np.arange(float(n)),
                                     x[None].astype("float16"), logits))
    return HeldFeatures(studies)


def gains(tmp_path, truth, features, studies, others) -> dict:
    "Train on the features of some studies, and return the gain of the out-of-fold predictions over both priors."
    config = SequenceConfig(model="reader", inner=2, steps=20, phases=(Phase(6, 1e-2, one_cycle=.25),), features=10)
    own, other = truth.select(studies), truth.select(others)
    inner = make_folds(studies, own, 2).of
    model = fit_sequences(tmp_path, config, features, own, other, inner, lambda model: {"val_loss": 0.}, progress=False)
    table = truth.images.index.to_frame(index=False).assign(order=lambda t: t.groupby(STUDY).cumcount())
    averager, rows = ProbabilityAverager(table, EXAM_LABELS), table.groupby(STUDY, sort=False).indices
    predict_sequences(model, features, {study: rows[study] for study in studies}, averager, config, inner=inner)
    priors = {"constant": constant_prior(truth, table), "position": position_prior(truth, table)}
    return gain_over(own, averager.predictions(), priors, [*EXAM_LABELS, IMAGE_LABEL])


def test_a_planted_leak_gains_nothing_on_studies_the_image_run_has_not_seen(tmp_path):
    truth = simulate_truth(300, slices=(5, 8, 12))
    split = make_folds(truth.exams.index, truth, 2)
    features = memory(truth, split.train(0))  # the image run of fold 0
    honest = gains(tmp_path / "honest", truth, features, split.valid(0), split.train(0))
    leaky = gains(tmp_path / "leaky", truth, features, split.train(0), split.valid(0))
    print(honest, leaky)
    assert honest["at_least"] < 0 and honest["gain"] < .02
    assert leaky["at_least"] > .1  # had its studies been those that the image run has seen
