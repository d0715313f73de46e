"TFRecords: what is wrong with them, and what the kit does."

from functools import partial
from pathlib import Path

from matrix import Case, either, error, flips, survives, unchanged


def record(data: bytes) -> bytes:
    from rsnape_kit.store.tfrecords import masked

    head = len(data).to_bytes(8, "little")
    return head + masked(head).to_bytes(4, "little") + data + masked(data).to_bytes(4, "little")


def example(**features) -> bytes:
    "A record of one tf.train.Example."
    import tensorflow as tf

    kinds = {
        bytes: lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v])),
        int: lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=[v])),
        float: lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=[v])),
    }
    made = {name: kinds[type(value)](value) for name, value in features.items() if value is not None}
    return record(tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString(deterministic=True))


SLICE = {
    "StudyInstanceUID": b"s",
    "SeriesInstanceUID": b"e",
    "SOPInstanceUID": b"i",
    "Rows": b"2",
    "Columns": b"2",
    "image": b"\1\0\2\0\3\0\4\0",
    "RescaleSlope": b"1",
    "RescaleIntercept": b"0",
    "InstanceNumber": b"1",
    "ImagePositionPatient": b"[0, 0, 1]",
}


def records(folder: Path, content):
    "All slices of a file of records, and their problems."
    from rsnape_kit.store.tfrecords import read_tfrecords

    (folder / "a.tfrec").write_bytes(content())
    source = read_tfrecords(folder / "a.tfrec", 2)
    return source[:].tolist(), source.table.problem.tolist()


RECORDS = {
    "the file is empty": (lambda: b"", ("empty",)),
    "the file is text": (lambda: b"hello, world. hello", ("TFRecord",)),
    "the file is compressed": (lambda: b"\x1f\x8b" + bytes(50), ("compressed",)),
    "a record is cut": (lambda: example(**SLICE)[:-1], ("truncated",)),
    "a record is empty": (lambda: record(b""), ("StudyInstanceUID",)),
    "a record is no example": (lambda: record(b"\xff" * 9), ("Example",)),
    "the record is of another schema": (lambda: example(foo=b"x"), ("StudyInstanceUID", "foo")),
    "an id is a number": (lambda: example(**SLICE | {"StudyInstanceUID": 5}), ("StudyInstanceUID", "is 5")),
    "an id is empty": (lambda: example(**SLICE | {"SOPInstanceUID": b""}), ("SOPInstanceUID",)),
    "an id is not UTF-8": (lambda: example(**SLICE | {"SeriesInstanceUID": b"\xff"}), ("SeriesInstanceUID",)),
    "an id is missing": (lambda: example(**SLICE | {"SOPInstanceUID": None}), ("SOPInstanceUID",)),
    "the image is a number": (lambda: example(**SLICE | {"image": 7}), ("image", "is 7")),
    "a label is 2": (lambda: example(**SLICE | {"pe_present_on_image": 2}), ("pe_present_on_image", "is 2")),
    "a label is text": (lambda: example(**SLICE | {"pe_present_on_image": b"1"}), ("pe_present_on_image",)),
    **{
        f"{name} is {value!r}": (
            lambda name=name, value=value: example(**SLICE | {name: value}),
            ("none of its 1 slices",),
        )
        for name, value in (
            ("Rows", b"-2"),
            ("Rows", b"1e400"),
            ("Columns", b"2.5"),
            ("Rows", b""),
            ("image", b""),
            ("BitsStored", b"99"),
            ("BitsStored", b"0"),
            ("RescaleSlope", b"1e400"),
            ("RescaleSlope", b"slope"),
        )
    },
}
CASES = [
    Case("TFRecords", what, partial(records, content=content), error(ValueError, "a.tfrec", *words))
    for what, (content, words) in RECORDS.items()
]
CASES += [
    Case(
        "TFRecords",
        "Rows is a number: read all the same",
        lambda folder: (
            records(folder, lambda: example(**SLICE | {"Rows": 2, "Columns": 2.0}))[0],
            records(folder, lambda: example(**SLICE))[0],
        ),
        unchanged(),
    )
]


def flipped_records(folder: Path):
    from rsnape_kit.store.tfrecords import read_tfrecords

    path = folder / "a.tfrec"
    path.write_bytes(
        b"".join(
            example(**SLICE | {"SOPInstanceUID": f"i{k}".encode(), "ImagePositionPatient": f"[0, 0, {k}]".encode()})
            for k in range(2)
        )
    )
    return survives(path, lambda path: read_tfrecords(path, 2)[:].tolist(), flips)


CASES += [Case("TFRecords", "one flipped bit", flipped_records, either())]
