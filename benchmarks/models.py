"""Speed and memory of the Keras models: forward passes, training steps, and folded frames against TimeDistributed.

    python benchmarks/models.py                                  # demo sizes, two minutes on two cores
    python benchmarks/models.py --full --backend jax --precision bfloat16 --peak 989    # on a GPU of 989 TFLOP/s
"""
import argparse
import resource
import time

import numpy as np

from rsnape_kit.models.efficientnet import backbone, efficientnet
from rsnape_kit.models.keras_backend import import_keras, jit, profile
from rsnape_kit.models.losses import pack_targets, weighted_bce
from rsnape_kit.models.volume import efficientnet3d, fold_frames, resnet3d

rng = np.random.default_rng(0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--full", action="store_true", help="full-size models; needs a GPU")
    parser.add_argument("--batch", type=int, help="slices; default 16, or 256 with --full")
    parser.add_argument("--frames", type=int, help="frames of a study; default 16, or 256 with --full")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peak", type=float, help="the device's peak in TFLOP/s, to print the share reached")
    return parser.parse_args()


def models(args):
    "Yield (name, model, batch)."
    size, small = (256, {}) if args.full else (64, {"width": .25})
    frames, batch = args.frames or (256 if args.full else 16), args.batch or (256 if args.full else 16)
    shared = {"size": size, "precision": args.precision, "recompute": args.full}
    yield "efficientnet b1", efficientnet("b1", size, precision=args.precision, **small), batch
    yield f"resnet3d x {frames}", resnet3d(frames, **shared, **small), 1
    yield f"efficientnet3d x {frames}", efficientnet3d("b0", frames, **shared, **small), 1


def random_batch(model, n):
    x = rng.integers(0, 256, (n, *model.input_shape[1:]), dtype=np.uint8)
    outputs = model.output if isinstance(model.output, dict) else {"": model.output}
    y = {head: rng.integers(0, 2, (n, *tensor.shape[1:])).astype("float32") for head, tensor in outputs.items()}
    packed = {head: pack_targets(value, np.ones_like(value)) for head, value in y.items()}
    return x, packed if isinstance(model.output, dict) else packed[""]


def seconds(call, repeat):
    "Return seconds of the first call, then the median wall and CPU seconds."
    start = time.perf_counter()
    call()
    first, walls, cpus = time.perf_counter() - start, [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return first, np.median(walls), np.median(cpus)


def device_memory():
    "Return the device's peak memory in bytes if known, else this process' peak."
    keras = import_keras()
    if keras.config.backend() == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, model, n, args):
    "Print a line of the table."
    several = isinstance(model.output, dict)
    losses = {head: weighted_bce() for head in model.output} if several else weighted_bce()
    model.compile("adam", losses, jit_compile=jit())
    x, packed = random_batch(model, n)
    _, forward, forward_cpu = seconds(lambda: model.predict_on_batch(x), args.repeat)
    first, step, step_cpu = seconds(lambda: np.max(model.train_on_batch(x, packed)), args.repeat)
    rate = 3 * profile(model, n)["flops"] / step
    share = f"{rate / args.peak / 1e12:8.1%}" if args.peak else ""
    print(f"{name:<20}{n:>8}{forward:>9.3f}s{forward_cpu:>7.2f}s{n / forward:>9.1f}{step:>9.3f}s{step_cpu:>7.2f}s"
          f"{n / step:>9.2f}{first:>7.1f}s{rate / 1e9:>9.1f}{device_memory() / 2**30:>10.2f}{share}", flush=True)


def run_models(args):
    print(f"{'model':<20}{'samples':>8}{'forward':>10}{'cpu':>8}{'/s':>9}{'step':>10}{'cpu':>8}{'/s':>9}{'first':>8}"
          f"{'GFLOP/s':>9}{'peak GiB':>10}{'   share' if args.peak else ''}")
    for name, model, n in models(args):
        measure(name, model, n, args)


def run_folded(args):
    "Compare folded frames with TimeDistributed, alternating."
    keras = import_keras()
    frame, frames = backbone("b0", 32, width=.25, depth=.1), 8
    x, made = rng.normal(size=(2, frames, 32, 32, 3)).astype("float32"), {}
    for name, layer in {"TimeDistributed": keras.layers.TimeDistributed(frame), "folded": fold_frames(frame)}.items():
        inputs = keras.Input(x.shape[1:])
        made[name] = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalMaxPooling3D()(layer(inputs))))
        made[name].compile("adam", "mse", jit_compile=jit())
    y, first, later = np.ones((2, 1)), {}, {name: [] for name in made}
    for name, model in made.items():
        start = time.perf_counter()
        model.train_on_batch(x, y)
        first[name] = time.perf_counter() - start
    for _ in range(5 * args.repeat):
        for name, model in made.items():
            start = time.perf_counter()
            model.train_on_batch(x, y)
            later[name].append(time.perf_counter() - start)
    print(f"\n{frames} frames of 32 x 32{'':<8}first step{'':<6}later steps")
    for name in made:
        print(f"{name:<26}{first[name]:>9.2f}s{1e3 * np.median(later[name]):>14.1f}ms")
    a, b = made
    print(f"{'ratio':<26}{first[a] / first[b]:>9.1f} {np.median(later[a]) / np.median(later[b]):>14.1f}")


if __name__ == "__main__":
    arguments = parse()
    keras = import_keras(arguments.backend)
    print(f"Keras {keras.version()} on {arguments.backend}, {arguments.precision}")
    run_models(arguments)
    run_folded(arguments)
