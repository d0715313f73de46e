"""Input pipelines, from files to batches: the 30th-place solution's, rewritten after its notebooks, and this library's.

All pipelines run alternately in one process, so that ratios also hold on a busy machine: in each round every pipeline
makes batches for some seconds; results are medians over rounds. Rates are slices per CPU-second (all threads together)
and per second. Every pipeline makes exactly the slices it is credited with: the records hold complete batches only.

Differences that matter for the comparison:
- The original's study pipeline processes one study at a time (an advantage for this library in seconds on many cores,
  not in CPU-seconds) and adds random JPEG quality as noise; the variant without it compares equal work.
- The original's reader for inference gives 512 px, which its network resizes to 256; this library's gives 256.

    python benchmarks/pipeline.py                        # some six minutes
    python benchmarks/pipeline.py --rounds 5 --seconds 3 --only training fit
"""
import argparse
import gc
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import pandas as pd
from _synthetic import write

from rsnape_kit.competition.labels import AUX_LABELS, EXAM_LABELS, IMAGE_LABEL, SLICE, STUDY
from rsnape_kit.competition.predictions import Predictions
from rsnape_kit.competition.tables import slice_index
from rsnape_kit.data.adapters import keras_dataset
from rsnape_kit.data.batches import GroupBatches, ImageBatches, StudyBatches
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.slice_store import SliceStore
from rsnape_kit.store.tfrecords import LABELS, TAGS, read_tfrecords, write_tfrecords
from rsnape_kit.transforms.affine import STUDY_RANGE, AffineRange
from rsnape_kit.transforms.masks import SideMask
from rsnape_kit.utils import cores

FRAMES = 56


# ---- the files

def make_truth(table: pd.DataFrame) -> Predictions:
    "Every second study is positive, on the right, in its middle."
    n = table.groupby(STUDY)["order"].transform("size")
    odd = pd.factorize(table[STUDY])[0] % 2 == 1
    images = pd.Series((odd & ((table["order"] - n / 2).abs() < n / 8)).to_numpy(float), slice_index(table))
    yes = images.groupby(level=0, sort=False).max()
    exams = pd.DataFrame({label: yes * (label in ("rightsided_pe", "rv_lv_ratio_lt_1")) for label in EXAM_LABELS})
    return Predictions(exams.assign(negative_exam_for_pe=1 - yes), images)


def write_studies(source: DicomSource, truth: Predictions, path: Path):
    "The volume models' records: each study's frames as JPEGs of three windows."
    import tensorflow as tf

    def text(value):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    def numbers(values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[int(value) for value in values]))

    with tf.io.TFRecordWriter(str(path)) as out:
        for study, count in source.table[STUDY].value_counts().items():
            images = ImageBatches(source, studies=[study], batch=count)[0]
            jpegs = tf.stack([tf.io.encode_jpeg(image, quality=95) for image in images])
            features = {"study_labels": numbers([0] * 13), "image_labels": numbers(truth.images[study]),
                        "images": text(tf.io.serialize_tensor(jpegs).numpy())}
            out.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


# ---- the original, image level

def original_images(path: Path, batch: int, times: int = 1):
    "tf.data as in the training notebook of the image model: everything in floats, slice by slice, batch last."
    import tensorflow as tf

    form = {name: tf.io.FixedLenFeature([], tf.string) for name in (*TAGS, "image")}
    form |= {name: tf.io.FixedLenFeature([], tf.int64) for name in LABELS}

    def parse(example):
        data = tf.io.parse_single_example(example, form)
        return {name: tf.cast(value, form[name].dtype) for name, value in data.items()}

    def window(image, level, width):
        image = tf.clip_by_value(image, level - width // 2, level + width // 2)
        image = image - tf.reduce_min(image)
        return image / tf.reduce_max(image)

    def prepare(data):
        image = tf.cast(tf.io.decode_raw(data["image"], tf.int16), tf.float32)
        image = tf.image.resize(tf.reshape(image, [512, 512, 1]), [256, 256])
        gone, kept = tf.zeros((256, 90, 1)), tf.ones((256, 166, 1))
        for label, mask in (("leftsided_pe", (kept, gone)), ("rightsided_pe", (gone, kept))):
            hide = tf.logical_and(data[label] == 0, tf.random.uniform([]) < .5)
            image = tf.cond(hide, lambda image=image, mask=mask: image * tf.concat(mask, 1), lambda image=image: image)
        image = image * tf.strings.to_number(data["RescaleSlope"]) + tf.strings.to_number(data["RescaleIntercept"])
        windows = [window(image, *pair) for pair in ((-600, 1500), (100, 700), (40, 400))]
        return tf.concat(windows, 2), data["pe_present_on_image"]

    data = tf.data.TFRecordDataset([str(path)], num_parallel_reads=tf.data.AUTOTUNE).map(parse, tf.data.AUTOTUNE)
    data = data.map(prepare, tf.data.AUTOTUNE)
    data = data.map(lambda image, label: (gathered(image, *draw(16.), 256), label), tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.deterministic = False  # named experimental_deterministic in the original
    return data.with_options(options).prefetch(tf.data.AUTOTUNE).repeat(times).batch(batch, drop_remainder=True)


def draw(shift: float):
    "The original's random numbers: rotation, shear, two zooms, two shifts."
    import tensorflow as tf

    z = tf.random.normal([6])
    return 10. * z[0], 3. * z[1], 1. + z[2] / 20., 1. + z[3] / 20., shift * z[4], shift * z[5]


def gathered(image, rotation, shear, height, width, up, right, size: int):
    "The original's affine transform: a product of four matrices, all coordinates, gather_nd."
    import tensorflow as tf

    r, s, zero, one = rotation * np.pi / 180, shear * np.pi / 180, tf.zeros([]), tf.ones([])
    turn = tf.reshape(tf.stack([tf.cos(r), tf.sin(r), zero, -tf.sin(r), tf.cos(r), zero, zero, zero, one]), [3, 3])
    lean = tf.reshape(tf.stack([one, tf.sin(s), zero, zero, tf.cos(s), zero, zero, zero, one]), [3, 3])
    zoom = tf.reshape(tf.stack([1 / height, zero, zero, zero, 1 / width, zero, zero, zero, one]), [3, 3])
    move = tf.reshape(tf.stack([one, zero, up, zero, one, right, zero, zero, one]), [3, 3])
    matrix = tf.matmul(tf.matmul(turn, lean), tf.matmul(zoom, move))
    x = tf.repeat(tf.range(size // 2, -size // 2, -1), size)
    y = tf.tile(tf.range(-size // 2, size // 2), [size])
    places = tf.matmul(matrix, tf.cast(tf.stack([x, y, tf.ones_like(x)]), tf.float32))
    places = tf.clip_by_value(tf.cast(places, tf.int32), 1 - size // 2, size // 2)
    where = tf.transpose(tf.stack([size // 2 - places[0], size // 2 - 1 + places[1]]))
    return tf.reshape(tf.gather_nd(image, where), [size, size, -1])


# ---- the originals of studies and of inference

def original_studies(path: Path, noise: bool):
    "tf.data as in the volume model's notebook, study by study: 56 JPEG frames, decoded, with noise, transformed alike."
    import tensorflow as tf

    form = {"study_labels": tf.io.FixedLenFeature([13], tf.int64), "images": tf.io.FixedLenFeature([], tf.string),
            "image_labels": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)}

    def prepare(example):
        data = tf.io.parse_single_example(example, form)
        jpegs, labels = tf.io.parse_tensor(data["images"], tf.string), data["image_labels"]
        n = tf.shape(labels)[0]
        at = tf.range(0, n, n // FRAMES)[:FRAMES]
        images = []
        for jpeg in tf.unstack(tf.gather(jpegs, at), FRAMES):
            image = tf.image.decode_jpeg(jpeg, channels=3)
            images.append(tf.image.random_jpeg_quality(image, 30, 100) if noise else image)
        images = tf.reshape(tf.cast(tf.stack(images), tf.float32) / 256, [FRAMES, 256, 256, 3])
        flat = tf.reshape(tf.transpose(images, [1, 2, 0, 3]), [256, 256, FRAMES * 3])
        flat = tf.reshape(gathered(flat, *draw(8.), 256), [256, 256, FRAMES, 3])
        return tf.transpose(flat, [2, 0, 1, 3]), tf.gather(labels, at), data["study_labels"]

    data = tf.data.TFRecordDataset([str(path)], num_parallel_reads=tf.data.AUTOTUNE).map(prepare)
    return data.prefetch(tf.data.AUTOTUNE).batch(1)


def original_inference(folder: Path):
    "The original submission's reader: decodes every file for its position, and again for its pixels, at 512 px."
    import pydicom
    import torch
    from pydicom.pixels import apply_modality_lut

    torch.set_num_threads(1)  # more threads would wait busily for each other, which would count against the original

    rows = []
    for path in sorted(folder.glob("*/*/*.dcm")):
        data = pydicom.dcmread(path)
        data.pixel_array  # noqa: B018 (decodes, to skip damaged files)
        rows.append((data.StudyInstanceUID, float(data.ImagePositionPatient[2]), data.SOPInstanceUID, path))
    table = pd.DataFrame(rows, columns=[STUDY, "z", SLICE, "path"]).sort_values([STUDY, "z"])
    for _, study in table.groupby(STUDY):
        images = []
        for path in study.path:
            data = pydicom.dcmread(path)
            hu = torch.from_numpy(apply_modality_lut(data.pixel_array, data).astype(np.float32))[None, None]
            hu = torch.nn.functional.interpolate(hu, size=512, mode="nearest")[0, 0]
            images.append(((torch.clamp(hu, -250, 450) + 250) * 255 / 700).to(torch.uint8))
        at = np.linspace(2, len(images) - 3, 63).round().astype(int)
        yield torch.stack([torch.stack([images[k] for k in range(i - 2, i + 3)]) for i in at])


# ---- measuring

def compare(title: str, args, pipelines: dict) -> dict:  # name -> [rounds, CPU and wall s] a slice
    "Run the pipelines, which return the number of slices made, alternately; print medians of rates and of ratios."
    spent = {name: [] for name in pipelines}
    for one in pipelines.values():  # compile, map, warm up
        one()
    for _ in range(args.rounds):
        for name, one in pipelines.items():
            gc.collect()  # deleting a tf.data graph waits seconds for its tuning thread; keep that out of the timing
            wall, cpu, count = time.perf_counter(), time.process_time(), 0
            while count == 0 or time.perf_counter() - wall < args.seconds:
                count += one()
            spent[name].append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))
    spent = {name: np.array(rounds) for name, rounds in spent.items()}
    first, all_ = next(iter(spent.values())), np.array(list(spent.values()))
    rates, ratios = 1 / np.median(all_, 1), np.median(first / all_, 1)
    print(f"\n{title:<62}{'slices / CPU-s':>16}{'x':>7}{'slices / s':>14}{'x':>7}")
    for name, rate, ratio in zip(pipelines, rates, ratios, strict=True):
        print(f"  {name:<60}{rate[0]:>16,.0f}{ratio[0]:>7.1f}{rate[1]:>14,.0f}{ratio[1]:>7.1f}", flush=True)
    return spent


def parts(name: str, whole, made, step):
    "Print how the CPU time per slice in fit is divided."
    whole, made, step = (1e6 * np.median(spent[:, 0]) for spent in (whole, made, step))
    print(f"  {name}: of {whole:,.0f} us per slice {made:,.0f} make the batches, {step:,.0f} are fit's own step, "
          f"{whole - made - step:,.0f} the rest: copying to the backend, queues, two batches for fit's inspection",
          flush=True)


class Repeated:
    "A longer epoch, as in real training, so that the cost per epoch does not count."

    def __init__(self, batches, times: int):
        self.batches, self.times = batches, times
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __len__(self):
        return self.times * len(self.batches)

    def __getitem__(self, i):
        return self.batches[i % len(self.batches)]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def drain(batches, slices: int) -> int:
    "Exhaust an iterable; return its number of slices."
    for _ in batches:
        pass
    return slices


def fit_model(shape: tuple, dtype: str, device: bool = False):
    "Build a model with almost no computation, to measure the cost of fit itself."
    import keras

    inputs = keras.Input(shape, dtype=dtype, name="stored")
    first = keras.ops.cast(inputs[:, 0, :4] if device else inputs[:, 0, :4, 0], "float32")
    if device:
        params = keras.Input((9,), dtype="int32", name="params")
        inputs, first = {"stored": inputs, "params": params}, first + keras.ops.cast(params[:, :4], "float32")
    model = keras.Model(inputs, keras.layers.Dense(1, "sigmoid")(first))
    model.compile("sgd", "binary_crossentropy", jit_compile=False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=12)
    parser.add_argument("--slices", type=int, default=234, help="of each study; 234 is the competition's median")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1., help="minimum seconds per pipeline and round")
    parser.add_argument("--only", nargs="*", default=["training", "studies", "inference", "fit"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args, folder: Path):
    write(folder / "dicom", args.studies, args.slices)
    dicom = DicomSource(folder / "dicom")
    truth = make_truth(dicom.table)
    labels = truth.exams.reindex(columns=EXAM_LABELS + AUX_LABELS).fillna(0).loc[dicom.table[STUDY]]
    labels = labels.assign(**{IMAGE_LABEL: truth.images.to_numpy()}).reset_index(drop=True)
    total, whole = len(dicom.table), len(dicom.table) // args.batch * args.batch
    if not whole:
        raise SystemExit(f"{total} slices do not fill a batch of {args.batch}: give more --slices or a smaller --batch")
    records, = write_tfrecords(dicom.table.join(labels).iloc[:whole], folder, per_file=10**6)
    write_studies(dicom, truth, folder / "studies.tfrec")
    with ThreadPoolExecutor(cores()) as pool:
        build_store(dicom, folder / "store", executor=pool)
    store = SliceStore(folder / "store")
    print(f"{total} slices, {cores()} cores, batches of {args.batch}")

    def images(source, studies=None, **extra):
        how = dict(batch=args.batch, mask=SideMask(), affine=AffineRange(), shuffle=True)
        return ImageBatches(source, truth, studies, **how, **extra)

    if "training" in args.only:
        graph, recorded = original_images(records, args.batch), read_tfrecords(records)
        from_records, from_dicom, from_store = (
            images(recorded, recorded.table[STUDY].unique()), images(dicom), images(store))
        device, one_thread = images(store, device=True), images(store, device=True, workers=1)
        compare("Training input, image model", args, {
            "original: records, tf.data graph": lambda: drain(graph, whole),
            "records, fused pass": lambda: drain(from_records, whole),
            "DICOM, fused pass": lambda: drain(from_dicom, whole),
            "store, fused pass": lambda: drain(from_store, whole),
            "store, int16 for the device": lambda: drain(device, whole),
            "the same on one thread": lambda: drain(one_thread, whole)})
    if "studies" in args.only:
        frames, noisy, plain = FRAMES * args.studies, *(original_studies(folder / "studies.tfrec", noise)
                                                       for noise in (True, False))
        ours = StudyBatches(store, truth, frames=FRAMES, affine=STUDY_RANGE, shuffle=True)
        spent = compare(f"Training input, {FRAMES} frames of each study", args, {
            "original: JPEG frames, random quality": lambda: drain(noisy, frames),
            "the same without random quality": lambda: drain(plain, frames),
            "store, fused pass": lambda: drain(ours, frames)})
        noisy_, plain_, ours_ = (rounds[:, 0] for rounds in spent.values())
        print(f"  store, fused pass, in CPU time: {np.median(noisy_ / ours_):.1f} times the original; "
              f"{np.median(plain_ / ours_):.1f} times the original's like-for-like variant, without random quality")
    if "inference" in args.only:
        files = folder / "dicom"
        compare("Inference input, groups of five neighbours, from DICOM files", args, {
            "original: two passes of pydicom": lambda: drain(original_inference(files), total),
            "scan and fused pass": lambda: drain(GroupBatches(DicomSource(files)), total),
            "the same on one thread": lambda: drain(GroupBatches(DicomSource(files), workers=1), total)})
    if "fit" in args.only:
        through_fit(args, whole, records, images(store), images(store, device=True))


def through_fit(args, whole: int, records: Path, host, device):
    "Measure the three pipelines through fit, and the parts of this library's time."
    floats, bytes_ = (fit_model((256, 256, 3), kind) for kind in ("float32", "uint8"))
    raw, how = fit_model((256, 256), "int16", device=True), dict(verbose=0, shuffle=False)
    times = 4  # each call of fit takes a tenth of a second to prepare
    graph, many = original_images(records, args.batch, times), times * whole
    host, device = Repeated(host, times), Repeated(device, times)
    host_data, device_data = keras_dataset(host), keras_dataset(device)

    def fit(model, data, slices):
        model.fit(data, **how)
        return slices

    fitted = compare("Through model.fit of a model with almost no computation", args, {
        "original graph": lambda: fit(floats, graph, many),
        "store, uint8": lambda: fit(bytes_, host_data, many),
        "store, int16 for the device": lambda: fit(raw, device_data, many)})
    made = {"store, uint8": host, "store, int16 for the device": device}
    alone = compare("Its parts: the pipelines alone", args, {
        name: lambda one=one: drain(one, many) for name, one in made.items()})
    same = [again(next(iter(one)), len(one)) for one in made.values()]
    steps = compare("Its parts: fit on one ready batch, repeated", args, {
        name: lambda model=model, data=data: fit(model, data, many)
        for name, model, data in zip(made, (bytes_, raw), same, strict=True)})
    print("\nWhere the CPU time of fit goes")
    for name in made:
        parts(name, fitted[name], alone[name], steps[name])


def again(batch, times: int):
    "Return one batch of backend tensors, repeated."
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(tf.nest.map_structure(tf.convert_to_tensor, batch)).repeat(times)


if __name__ == "__main__":
    main()
