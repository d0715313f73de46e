"""One session of a toy PetaFormer run, for tests that kill it or run it in several processes.

python petaformer_session.py OUT [--kill epoch step] [--tear epoch] [NAME=VALUE ...]
"""
import os
import signal
import sys

import numpy as np
import pandas as pd
import torch

from rsnape_kit.competition.folds import make_folds
from rsnape_kit.competition.labels import EXAM_LABELS, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.runs.config import PetaFormerConfig, Phase
from rsnape_kit.runs.recipes import override_settings
from rsnape_kit.testing import ArraySource
from rsnape_kit.training import torch_checkpoint as resume_torch
from rsnape_kit.training.trainer import train
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE


def toy(studies: int = 16):
    "Noise with a bright spot on positive slices; each fifth study is long enough to come in two parts."
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(studies) % 5 == 4, 16, 8)
    table = pd.DataFrame([(f"study{s:02}", f"{s:02}.{i}", i) for s, n in enumerate(lengths) for i in range(n)],
                         columns=[STUDY, SLICE, "order"])
    y = (rng.random(len(table)) < .3) * (table[STUDY].str[-1].astype(int) % 2)
    slices = rng.normal(0, 200, (len(table), 32, 32))
    slices[y == 1, 8:16, 8:16] += 1500
    images = pd.Series(y.to_numpy(float), slice_index(table))
    exams = pd.DataFrame(0., table[STUDY].unique(), EXAM_LABELS)
    exams["rightsided_pe"] = images.groupby(level=0).max()
    exams["negative_exam_for_pe"] = 1 - exams.rightsided_pe
    return ArraySource(slices.astype(np.int16), table), Predictions(exams, images)


def kill_at(epoch: int, step: int):
    "kill -9 after a step."
    plain = resume_torch.Checkpoint.after_loss

    def after_loss(self):
        plain(self)
        if self.learn.training and (self.learn.epoch, self.learn.iter) == (epoch, step):
            os.kill(os.getpid(), signal.SIGKILL)

    resume_torch.Checkpoint.after_loss = after_loss


def tear_at(epoch: int):
    "kill -9 in the middle of writing a checkpoint."
    plain = torch.save

    def save(value, path):
        plain(value, path)
        if str(path).endswith("state.pt") and len(pd.read_csv(path.parent / "history.csv")) == epoch + 1:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def main(out, *rest):
    torch.set_num_threads(1)
    rest = list(rest)
    if "--kill" in rest:
        at = rest.index("--kill")
        kill_at(int(rest[at + 1]), int(rest[at + 2]))
        del rest[at:at + 3]
    if "--tear" in rest:
        at = rest.index("--tear")
        tear_at(int(rest[at + 1]))
        del rest[at:at + 2]
    network = dict(width=.125, depth=.1, dim=24, layers=1, heads=4)
    small = PetaFormerConfig(network=network, pixels=InputConfig((PE,), "fixed", 32), groups=4, slices=3, batch=2,
                             phases=(Phase(4, 1e-2, one_cycle=.25),), backbone_lr=1.)
    config = override_settings(small, rest)
    source, truth = toy()
    split = make_folds(source.table[STUDY].unique(), None, 4)
    run = train("petaformer", source, 0, config, truth=truth, folds=split, out=out, earlier=(), device="cpu",
                progress=False)
    if os.environ.get("RANK", "0") == "0":  # two processes would print into each other's line
        print(run)
    assert not {"tensorflow", "keras", "jax"} & set(sys.modules), "a process that trains with PyTorch imported it"


if __name__ == "__main__":
    main(*sys.argv[1:])
