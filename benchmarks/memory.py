"""Estimated activation memory beside that of the compiled training step (JAX on the CPU), for each full recipe.

    python benchmarks/memory.py                         # some minutes a line; volume models at 16 and 32 frames
    python benchmarks/memory.py resnet3d --frames 256   # full size
    python benchmarks/memory.py --count                 # costs of a sample, as `runs.machine` has them

Nothing is computed. The share comes from two numbers of samples or frames, so that weights and gradients do not
count. PetaFormer: what autograd saves at full size beside what follows from two small sizes.
"""
import argparse
import os
from dataclasses import replace

from rsnape_kit.models.keras_backend import import_keras, zero_weights
from rsnape_kit.models.registry import build_model, compile_model
from rsnape_kit.runs.machine import _count_saved, costs_key, count_costs
from rsnape_kit.runs.recipes import FULL

# Memory is planned before machine code is made, so quick code is enough; the scheduler saves memory, as on a TPU.
FLAGS = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
         "--xla_cpu_enable_concurrency_optimized_scheduler=false")


def step_bytes(config, n: int) -> int:
    "Return the bytes of temporary buffers of a compiled training step for `n` samples."
    import jax
    with zero_weights():
        model = compile_model(build_model(config), config)
    model.optimizer.build(model.trainable_variables)
    x = jax.ShapeDtypeStruct((n, *model.input_shape[1:]), "uint8")
    outputs = model.output if isinstance(model.output, dict) else {"": model.output}
    packed = {head: jax.ShapeDtypeStruct((n, *each.shape[1:], 2), "float32") for head, each in outputs.items()}
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables,
              model.metrics_variables)
    state = tuple([variable.value for variable in group] for group in groups)
    step = jax.jit(lambda state, x, y: model.train_step(state, (x, y)), donate_argnums=0)
    compiled = step.lower(state, x, packed if isinstance(model.output, dict) else packed[""]).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def sizes(config, frames):
    "Yield the settings and numbers of samples to compare."
    if config.is_volume:
        yield from ((replace(config, frames=n), 1) for n in ((frames,) if frames else (16, 32)))
    else:
        yield from ((config, n) for n in (4, 16))


def compare(config, frames):
    "Print estimates and compiled memory at two sizes, and the share of their differences."
    rows = []
    for settings, n in sizes(config, frames):
        rows.append((n * count_costs(settings).activations, step_bytes(settings, n)))
        shape = f"{settings.frames} frames" if config.is_volume else f"{n} slices"
        print(f"{config.model:<15}{'recomputed' if config.network.get('recompute') else 'kept':<12}{shape:<12}"
              f"{rows[-1][0] / 2**30:>8.3f}{rows[-1][1] / 2**30:>10.3f} GiB{rows[-1][1] / rows[-1][0]:>8.2f}")
    if len(rows) == 2:
        (a, b), (c, d) = rows
        print(f"{'':<39}share of a further sample {(d - b) / (c - a):.2f}", flush=True)


def compare_torch(config):
    "Print what autograd saves for one item at full size, beside the estimate."
    estimate, found = count_costs(config).activations, _count_saved(config)[1]
    print(f"{config.model:<27}{'1 item':<12}{estimate / 2**30:>8.3f}{found / 2**30:>10.3f} GiB{found / estimate:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(FULL))
    parser.add_argument("--frames", type=int, help="one number of frames instead of 16 and 32")
    parser.add_argument("--count", action="store_true", help="print the costs of a sample only")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    import_keras("jax")
    for name in arguments.models:
        ways = [FULL[name]]
        if FULL[name].entry.accepts("recompute"):
            ways.append(replace(FULL[name], network=FULL[name].network | {"recompute": True}))
        for way in ways:
            if arguments.count:
                print(f"{costs_key(way)!r}: {count_costs(way)}", flush=True)
            elif way.entry.framework == "torch":
                compare_torch(way)
            else:
                compare(way, arguments.frames)
