"""PetaFormer: studies per second forward and per training step, by kind of attention, and what the input costs.

Kinds alternate in one run, and the least time of a few rounds counts. `--device cuda --size 256 --batch 8` measures a
GPU, in the precision that training would choose there; the defaults are small enough for two cores.
"""
import argparse
import time
from functools import partial

import numpy as np
import pandas as pd
import torch

from rsnape_kit.competition.labels import SLICE, STUDY
from rsnape_kit.inference.torch_predictor import autocast, group_batches, resolve_precision, tensors
from rsnape_kit.models.petaformer import ATTENTION, PetaFormer, make_attention
from rsnape_kit.runs.config import PetaFormerConfig
from rsnape_kit.training.torch_learner import group_loss
from rsnape_kit.transforms.input_config import InputConfig
from rsnape_kit.transforms.windows import PE


class Noise:
    "A source of synthetic slices in memory; every row is the same slice."

    def __init__(self, studies: int, slices: int, size: int = 256):
        self.size = size
        self.slice = np.random.default_rng(0).integers(-4096, 6000, (size, size)).astype(np.int16)
        self.table = pd.DataFrame({STUDY: np.repeat([f"study{i}" for i in range(studies)], slices),
                                   SLICE: [f"slice{i}" for i in range(studies * slices)]})

    def read(self, rows, out):
        out[:] = self.slice
        return out


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(tasks: dict, repeat: int, device) -> dict:
    "The least wall and the least CPU seconds of each task, taken alternately after a warm-up."
    best = {}
    for number in range(repeat + 1):
        for name, task in tasks.items():
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            task()
            wait(device)
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                best[name] = tuple(map(min, zip(best.get(name, spent), spent)))
    return best


def forward(model, images, precision):
    with torch.inference_mode(), autocast(precision):
        model.eval()(images)


def step(model, optimizer, images, targets, precision):
    with autocast(precision):
        pred = model.train()(images)
    group_loss(pred, *targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def attend(module, tokens, seen, train: bool):
    module.train(train)
    if not train:
        with torch.inference_mode():
            return module(tokens, seen)
    module(tokens, seen).square().mean().backward()


def show(title, best, studies, reference):
    print(f"\n{title}\n{'':32}{'studies/s':>12}{'wall s':>10}{'CPU s':>10}{'ratio, wall':>13}{'CPU':>8}")
    for name, (wall, cpu) in best.items():
        print(f"{name:32}{studies / wall:12.2f}{wall:10.4f}{cpu:10.4f}{best[reference][0] / wall:13.2f}"
              f"{best[reference][1] / cpu:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=96, help="pixels along a side")
    parser.add_argument("--groups", type=int, default=63)
    parser.add_argument("--batch", type=int, default=1, help="studies per step")
    parser.add_argument("--slices", type=int, default=234, help="slices per study; 234 is the competition's median")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    precision = resolve_precision("auto", device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}, precision {precision}; "
          f"{args.batch} x {args.groups} x 5 slices of {args.size} px")

    tokens = torch.randn(args.batch, 3 * args.groups + 1, 128, device=device)
    seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)
    attention = {kind: make_attention(kind, 128, 6, 8, .1).to(device) for kind in ATTENTION}
    attention["as reformer-pytorch's defaults"] = original(device)
    for train in (False, True):
        tasks = {kind: partial(attend, module, tokens, seen, train) for kind, module in attention.items()}
        show(f"transformer alone, {tokens.shape[1]} tokens, {'forward and backward' if train else 'forward'}",
             alternate(tasks, args.repeat, device), args.batch, "as reformer-pytorch's defaults")

    config = PetaFormerConfig(pixels=InputConfig((PE,), "fixed", args.size), groups=args.groups, batch=args.batch)
    source = Noise(4 * args.batch, args.slices)
    batches = group_batches(source, source.table[STUDY].unique(), config, view=1)
    images = next(iter(tensors(batches)))[0].to(device)
    y, e = torch.rand(images.shape[:3], device=device).round(), torch.rand(args.batch, 13, device=device).round()
    targets = y, torch.ones_like(y) / y[0].numel(), e, torch.ones_like(e) / 13
    models = {kind: PetaFormer(attention=kind).to(device) for kind in ATTENTION}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for model in models.values():
            model.backbone.to(memory_format=torch.channels_last)
    optimizers = {kind: torch.optim.AdamW(model.parameters(), 1e-4) for kind, model in models.items()}
    tasks = {kind: partial(forward, model, images, precision) for kind, model in models.items()}
    show("whole network, forward", alternate(tasks, args.repeat, device), args.batch, "reformer")
    tasks = {kind: partial(step, model, optimizers[kind], images, targets, precision)
             for kind, model in models.items()}
    steps = alternate(tasks, args.repeat, device)
    show("whole network, training step", steps, args.batch, "reformer")
    seconds = alternate({"input": lambda: [None for _ in tensors(batches)]}, args.repeat, device)["input"]
    wall = seconds[0] / len(batches)
    print(f"\ninput (augmented, {args.slices} slices per study, without reading): {wall:.4f} s per batch, "
          f"{wall / steps['reformer'][0]:.1%} of a training step, prepared meanwhile; "
          f"{args.batch * args.slices / wall:,.0f} slices/s")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def original(device):
    "The Reformer as in the 30th place's code: feed-forward in 100 pieces, reversible layers, hashes in evaluation too."
    from reformer_pytorch import Autopadder, Reformer
    net = Autopadder(Reformer(128, 6, 8, lsh_dropout=.1)).to(device)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, tokens, seen):
            return self.net(tokens.clone().requires_grad_(self.training), input_mask=seen)

    return Plain()


if __name__ == "__main__":
    main()
