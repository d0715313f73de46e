"The store: lossless, reproducible to the byte, and consistent after kill -9 at any moment."
import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import ct_files
import numpy as np
import pandas as pd
import pytest
from ct_files import NATIVE, ct_file, reference, stored_values
from pydicom.uid import JPEGLosslessSV1

from rsnape_kit.dicom.decode import DicomError
from rsnape_kit.dicom.series import read_series
from rsnape_kit.dicom.slices import scan
from rsnape_kit.store import build
from rsnape_kit.store.build import build_store
from rsnape_kit.store.dicom_source import DicomSource
from rsnape_kit.store.downsample import to_fixed_point
from rsnape_kit.store.slice_store import SliceStore, read_footer
from rsnape_kit.utils.manifest import read_manifest, write_manifest


@pytest.fixture(autouse=True)
def quiet():
    ct_files.quiet()


def competition(root, studies=6, slices=8, shape=(64, 64), syntaxes=NATIVE[:2]):
    "A folder in the competition's layout."
    for s in range(studies):
        for i in range(slices):
            study, series, name = f"{s:012x}", f"{s:03x}aaaaaaaaa", f"{s:03x}{i:09x}"
            path = root / study / series / f"{name}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            ct_file(path, stored_values(shape, bits=12, seed=100 * s + i), syntaxes[i % len(syntaxes)], bits=12,
                    StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=name,
                    ImagePositionPatient=[-150, -150, 1.5 * (slices - i)])
    return root


def shards(folder):
    "Name and bytes of every shard."
    return {p.name: p.read_bytes() for p in folder.glob("*.slices")}


def test_store_and_source_equal_pydicom(tmp_path):
    root = competition(tmp_path / "train", shape=(512, 512), slices=3)
    store, direct = SliceStore(build_store(root, tmp_path / "store")), DicomSource(root)
    for i, path in enumerate(direct.table.path):
        hu = reference(path).clip(-1024, 8191).astype(int)
        expected = hu[::2, ::2] + hu[1::2, ::2] + hu[::2, 1::2] + hu[1::2, 1::2]
        np.testing.assert_array_equal(store[i], expected)
        np.testing.assert_array_equal(direct[i], expected)
    columns = [c for c in direct.table if c != "path"]
    pd.testing.assert_frame_equal(store.table[columns], direct.table[columns])
    full = SliceStore(build_store(root, tmp_path / "full", size=512))
    assert full.size == 512 and full.table.exact.all()
    np.testing.assert_array_equal(full[2] / 4, reference(direct.table.path[2]).clip(-1024, 8191))


@pytest.mark.parametrize("size", [256, 36])  # in one call; slice by slice, as 36 is no multiple of 8
def test_parts_open_as_one_and_damage_is_found(tmp_path, size):
    root = competition(tmp_path / "train", shape=(512, 512), slices=4)
    expected = SliceStore(build_store(root, tmp_path / "whole", size))[:]
    paths = [build_store(root, tmp_path / f"part{i}", size, part=(i, 2)) for i in range(2)]
    mixed = SliceStore(*paths)
    assert [len(SliceStore(path)) > 0 for path in paths] == [True, True]
    np.testing.assert_array_equal(mixed[:], expected)
    rows = np.random.default_rng(0).integers(0, len(mixed), 100)
    with ThreadPoolExecutor(4) as threads:
        for row, image in zip(rows, threads.map(mixed.__getitem__, rows)):
            np.testing.assert_array_equal(image, expected[row])
    shard = next(paths[1].glob("*.slices"))
    first, raw = read_footer(shard)[0].iloc[0], bytearray(shard.read_bytes())
    raw[first.start:first.start + first.bytes] = bytes(first.bytes)  # not a valid chunk
    shard.write_bytes(raw)
    damaged = SliceStore(paths[1])
    with pytest.raises(ValueError, match="slice 0 is damaged.*delete it and build"):
        damaged[:]
    with pytest.warns(UserWarning, match=f"{shard.name}: 1 slices are damaged; copy the shard again, or delete it"):
        assert damaged.verify() == [0]


def test_sizes_and_padding(tmp_path):
    for name, shape in {"a": (512, 512), "b": (768, 768), "c": (512, 400), "d": (256, 256)}.items():
        values = stored_values(shape, bits=13)
        values[:9, :9] = 0
        (tmp_path / "in" / name).mkdir(parents=True)
        ct_file(tmp_path / f"in/{name}/1.dcm", values, intercept="-3024", StudyInstanceUID="1", SeriesInstanceUID=name)
    store = SliceStore(build_store(tmp_path / "in", tmp_path / "store"))
    assert store.table.exact.tolist() == [True, False, False, True]
    raw = SliceStore(build_store(tmp_path / "in", tmp_path / "raw", keep_padding=True))
    for i, path in enumerate(scan(tmp_path / "in").path):
        assert store[i].min() == -4096 and raw[i].min() == -4 * 3024
        np.testing.assert_array_equal(store[i], to_fixed_point(reference(path)))
        np.testing.assert_array_equal(raw[i], to_fixed_point(reference(path, -8192), lowest=-8192))
    big = reference(scan(tmp_path / "in").path[1]).reshape(256, 3, 256, 3).sum((1, 3))
    np.testing.assert_array_equal(store[1], np.rint(big * 4 / 9))


def test_same_bytes_on_any_executor_from_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "STUDIES_PER_SHARD", 2)
    root = competition(tmp_path / "train")
    expected = shards(build_store(root, tmp_path / "here"))
    assert len(expected) == 3
    shuffled = scan(root).sample(frac=1, random_state=1)
    server = get_context("forkserver")  # a new process, in which strings have other hashes
    server.set_forkserver_preload(["rsnape_kit.store.build"])
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, server) as processes:
        assert shards(build_store(shuffled, tmp_path / "threads", executor=threads)) == expected
        assert shards(build_store(root, tmp_path / "processes", executor=processes)) == expected
    monkeypatch.setattr(build, "executor_for", lambda *_: ProcessPoolExecutor(1, server))
    assert shards(build_store(root, tmp_path / "own")) == expected


@pytest.mark.slow
def test_same_bytes_on_dask(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    monkeypatch.setattr(build, "STUDIES_PER_SHARD", 2)
    root = competition(tmp_path / "train")
    expected = shards(build_store(root, tmp_path / "here"))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            table = scan(root, client.get_executor(), batch_files=10)
            pd.testing.assert_frame_equal(table, scan(root))
            assert shards(build_store(root, tmp_path / "dask", executor=client.get_executor())) == expected


def test_parts_on_many_mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "STUDIES_PER_SHARD", 2)
    root = competition(tmp_path / "train", studies=9, slices=4)
    whole = SliceStore(build_store(root, tmp_path / "whole"))
    parts = [build_store(root, tmp_path / f"part{i}", part=(i, 3)) for i in range(3)]
    counts = [len(SliceStore(p)) for p in parts]
    assert sum(counts) == 36 and max(counts) < 36
    moved = parts[0].rename(tmp_path / "elsewhere")
    store = SliceStore(parts[2], moved, parts[1])
    pd.testing.assert_frame_equal(store.table, whole.table)
    np.testing.assert_array_equal(store[:], whole[:])
    study = whole.table.StudyInstanceUID[20]
    np.testing.assert_array_equal(store[store.study(study)], whole[(whole.table.StudyInstanceUID == study).to_numpy()])
    some = [build_store(root, tmp_path / f"of40-{i}", part=(i, 40)) for i in range(40)]  # most of them empty
    np.testing.assert_array_equal(SliceStore(*some)[:], whole[:])
    empty = next(s for s in map(SliceStore, some) if len(s) == 0)
    assert empty[:].shape == (0, 256, 256) and list(empty.table) == list(whole.table)
    full = build_store(root, tmp_path / "full", size=512)
    with pytest.raises(ValueError, match="built with different `size` values"):
        SliceStore(moved, full)
    padded = build_store(root, tmp_path / "padded", part=(1, 3), keep_padding=True)
    with pytest.raises(ValueError, match="built with different `lowest` values"):
        SliceStore(moved, padded)
    study = scan(root).query("StudyInstanceUID == @study")
    halves = [build_store(half, tmp_path / name) for name, half in
              {"low": study.iloc[:2], "high": study.iloc[2:].assign(order=[5, 6])}.items()]
    with pytest.raises(ValueError, match="is in more than one of"):
        SliceStore(*halves)


def test_kill_9_at_any_moment(tmp_path, monkeypatch):
    "A process is killed repeatedly while it builds; it leaves only complete shards, and the build resumes."
    monkeypatch.setattr(build, "STUDIES_PER_SHARD", 1)
    root = competition(tmp_path / "train", studies=40, slices=12, shape=(128, 128))
    expected = shards(build_store(root, tmp_path / "expected", size=64))
    assert len(expected) == 40
    out, rng, kills, kept = tmp_path / "out", np.random.default_rng(0), 0, {}
    while not (out / build.INDEX).exists():
        before = len(list(out.glob("*.slices"))) if out.exists() else 0
        process = get_context("fork").Process(target=build_store, args=(root, out, 64))
        process.start()
        try:
            until = before + rng.integers(2, 12)
            while process.is_alive() and (len(list(out.glob("*.slices"))) if out.exists() else 0) < until:
                time.sleep(.002)
            time.sleep(rng.random() * .02)
        finally:
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
        for shard in out.glob("*.slices"):
            assert shard.read_bytes() == expected[shard.name]
            assert kept.setdefault(shard.name, shard.stat().st_mtime_ns) == shard.stat().st_mtime_ns, "written twice"
    assert kills >= 3
    assert shards(out) == expected and not list(out.glob("*.tmp"))
    np.testing.assert_array_equal(SliceStore(out)[:], SliceStore(tmp_path / "expected")[:])


def test_a_script_without_main_gets_an_error_with_the_fix(tmp_path):
    "Its worker processes would run the script again; they end instead, and the error names the reason."
    competition(tmp_path / "train", studies=2, slices=2)
    (tmp_path / "script.py").write_text(
        "from rsnape_kit.store import build\n"
        "from concurrent.futures import ProcessPoolExecutor\nfrom multiprocessing import get_context\n"
        "build.executor_for = lambda *_: ProcessPoolExecutor(1, mp_context=get_context('spawn'))\n"
        f"build.build_store({os.fspath(tmp_path / 'train')!r}, {os.fspath(tmp_path / 'out')!r}, size=32)\n")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1 and "put the main part under `if __name__" in done.stderr.splitlines()[-1]


def test_incomplete_files_are_written_again(tmp_path):
    out = build_store(competition(tmp_path / "train"), tmp_path / "out", size=64)
    (shard, raw), = shards(out).items()
    for damage in (raw[:len(raw) // 2], raw[:-1], b"", raw[:-20] + b"x" + raw[-19:]):
        (out / shard).write_bytes(damage)
        with pytest.raises(ValueError, match="not a complete shard"):
            read_footer(out / shard)
        build_store(tmp_path / "train", out, size=64)
        assert shards(out) == {shard: raw}
    (out / build.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="build it again, it resumes"):
        SliceStore(out)


def test_a_damaged_shard_is_written_again_after_it_is_deleted(tmp_path):
    root = competition(tmp_path / "train")
    out = build_store(root, tmp_path / "out", size=64)
    (shard, raw), = shards(out).items()
    (out / shard).write_bytes(raw[:300] + bytes([raw[300] ^ 1]) + raw[301:])
    build_store(root, out, size=64)
    with pytest.raises(ValueError, match=f"{shard}.* delete it and build the store again"):
        SliceStore(out)[:]
    (out / shard).unlink()
    build_store(root, out, size=64)
    assert shards(out) == {shard: raw}


def test_a_shard_truncated_while_the_store_is_open_is_an_error(tmp_path):
    out = build_store(competition(tmp_path / "train"), tmp_path / "out", size=64)
    (shard, raw), = shards(out).items()
    store = SliceStore(out)
    os.truncate(out / shard, 800)
    for i in range(len(store)):
        with pytest.raises(ValueError, match=f"{shard}: slice {i} is damaged"):
            store[i]


def test_wrong_offsets_in_an_index_are_an_error(tmp_path):
    out = build_store(competition(tmp_path / "train"), tmp_path / "out", size=64)
    index, shards = pd.read_parquet(out / build.INDEX), read_manifest(out)["shards"]
    for wrong in (index.start - 2 ** 40, index.start + 1):
        index.assign(start=wrong).to_parquet(out / build.INDEX)
        write_manifest(out, "store", [build.INDEX], shards=shards)  # otherwise the index itself is refused
        store = SliceStore(out)
        for i in range(len(store)):
            with pytest.raises(ValueError, match=f"slice {i} is damaged"):
                store[i]


def test_out_must_have_the_right_type_and_shape(tmp_path):
    root = competition(tmp_path / "train", studies=1, slices=3)
    for source in (SliceStore(build_store(root, tmp_path / "out", size=32)), DicomSource(root, 32)):
        for out in (np.empty((2, 32, 32), np.int16), np.empty((3, 16, 16), np.int16), np.empty((3, 32, 32), np.uint16),
                    np.empty((3, 32, 32, 2), np.int16)[..., 0]):
            with pytest.raises(ValueError, match="expected int16"):
                source.read([0, 1, 2], out)


def test_too_many_open_files_are_not_damage(tmp_path, monkeypatch):
    store = SliceStore(build_store(competition(tmp_path / "train"), tmp_path / "out", size=64))

    def fails(*_):
        raise OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(OSError, match="Too many open files"):
        store[0]


def test_a_finished_store_is_not_changed(tmp_path):
    "It may lie on a read-only mount: opening it and building it again write nothing."
    root = competition(tmp_path / "train")
    out = build_store(root, tmp_path / "out", size=64)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    inside = out.stat().st_mtime_ns  # changes when a file is created or removed
    build_store(root, out, size=64)
    assert len(SliceStore(out)) == 48
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before and out.stat().st_mtime_ns == inside


def test_two_builds_at_a_time(tmp_path):
    "While another process holds the folder, a build raises an error; once that process is killed, the build succeeds."
    root, out = competition(tmp_path / "train"), tmp_path / "out"
    code = f"import time; from pathlib import Path; from rsnape_kit.utils.processes import exclusive\n" \
           f"with exclusive(Path({os.fspath(out)!r})):\n print('holds', flush=True); time.sleep(600)"
    out.mkdir()
    (out / "0000-0000000000000000.slices.00.tmp").touch()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(RuntimeError, match="out is being built by another process; wait for it"):
            build_store(root, out, size=64)
        assert list(out.glob("*.tmp"))
    finally:
        process.kill()
        process.wait()
    build_store(root, out, size=64)
    assert not list(out.glob("*.tmp")) and len(SliceStore(out)) == 48


def test_the_fingerprint_covers_content_but_not_place(tmp_path):
    root = competition(tmp_path / "train", studies=1, slices=3)
    os.symlink("/gone/slice.dcm", root / "000000000000/000aaaaaaaaa/lost.dcm")
    out = build_store(root, tmp_path / "out", size=64)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert shards(build_store(tmp_path / "elsewhere", out, size=64))  # the fingerprint has no paths
    with open(scan(tmp_path / "elsewhere").path[0], "ab") as file:
        file.write(bytes(64))
    with pytest.raises(ValueError, match="shards of other slices or settings"):
        build_store(tmp_path / "elsewhere", out, size=64)
    source = DicomSource(tmp_path / "elsewhere", 64)
    with pytest.raises(ValueError, match="keep_padding has no effect on a pixel source"):
        build_store(source, tmp_path / "padded", size=64, keep_padding=True)
    with pytest.raises(ValueError, match="size=0"):
        build_store(tmp_path / "elsewhere", tmp_path / "none", size=0)


def test_tables_from_csv_files_and_names_that_are_not_utf8(tmp_path):
    root = competition(tmp_path / "train", studies=1, slices=3)
    first = scan(root).path[0]
    os.rename(first, os.fsencode(os.path.dirname(first)) + b"/odd\xff\xfe.dcm")
    store = SliceStore(build_store(root, tmp_path / "out", size=64))
    assert [p for p in store.table.path if p.endswith("/odd\\udcff\\udcfe.dcm")]
    scan(root).iloc[1:].to_csv(tmp_path / "table.csv", index=False, errors="ignore")
    ids = dict.fromkeys(["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"], str)
    again = DicomSource(pd.read_csv(tmp_path / "table.csv", dtype=ids), 64)
    assert again[:].std() > 0 and set(again.table.problem) == {""}


def test_builds_with_other_settings_are_not_mixed(tmp_path):
    root = competition(tmp_path / "train")
    out = build_store(root, tmp_path / "out", size=64)
    for other in ({"size": 32}, {"size": 64, "part": (0, 2)}, {"size": 64, "keep_padding": True}):
        with pytest.raises(ValueError, match="shards of other slices or settings"):
            build_store(root, out, **other)
    SliceStore(out)


MEMORY = """
import resource, sys
import pandas as pd
from rsnape_kit.store.build import build_store
from rsnape_kit.dicom.slices import scan
one, out, n = scan(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def store(n, out):
    table = pd.concat([one] * n, ignore_index=True)
    table["order"] = range(n)
    table["SOPInstanceUID"] = [f"{i:012x}" for i in range(n)]
    table["StudyInstanceUID"] = [f"{i // 200:012x}" for i in range(n)]
    build_store(table, out)
store(50, out + "/warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store(n, out + "/cold")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_flat(tmp_path):
    "950 slices hold 125 MB as images and some 55 MB compressed; a build needs a few MB for any number of slices."
    (tmp_path / "in").mkdir()
    ct_file(tmp_path / "in/1.dcm", stored_values((512, 512), bits=12))
    path = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "in", tmp_path, "950"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 * 1024, f"{int(done.stdout) / 1024:.0f} MB more"


def test_faults_are_filled_marked_and_listed(tmp_path):
    root = competition(tmp_path / "train", studies=2, slices=5)
    files = scan(root).path
    os.truncate(files[2], 3000)
    for path in files[5:]:
        os.truncate(path, 3000)
    with pytest.raises(ValueError, match=f"study '000000000001': none of its 5 slices can be read: .*{files[5]}"):
        build_store(root, tmp_path / "refused", size=32)
    out = build_store(root, tmp_path / "out", size=32, max_unreadable=1)
    store, names = SliceStore(out), scan(root).SOPInstanceUID
    np.testing.assert_array_equal(store[2], store[1])
    assert (store[5:] == -4096).all()
    assert store.table.problem[2].count(f"filled from {names[1]}") == 1
    assert store.table.problem[5:].str.contains("no slice of its series is readable").all()
    assert store.table.exact.tolist() == [True, True, False, True, True] + [False] * 5
    listed = pd.read_csv(out / "problems.csv", dtype=str)
    assert listed.SOPInstanceUID.tolist() == [names[i] for i in (2, 5, 6, 7, 8, 9)]
    with pytest.raises(DicomError, match="3000|less than expected|shorter"):
        DicomSource(root, 32, on_error="raise")[2]
    direct = DicomSource(root, 32, max_unreadable=1)
    with ThreadPoolExecutor(4) as pool:
        for i, values in zip(list(range(10)) * 4, pool.map(direct.__getitem__, list(range(10)) * 4)):
            np.testing.assert_array_equal(values, store[i])
    assert direct.table.problem.tolist() == store.table.problem.tolist()


def test_faults_of_the_machine_stop_a_build(tmp_path, monkeypatch):
    root = competition(tmp_path / "train", studies=2, slices=3, syntaxes=[JPEGLosslessSV1])
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"pip install 'rsnape_kit\[dicom\]'"):
        patch.setitem(sys.modules, "imagecodecs", None)
        build_store(root, tmp_path / "out", size=32)
    assert not shards(tmp_path / "out") and not list((tmp_path / "out").glob("*.tmp"))
    store = SliceStore(build_store(root, tmp_path / "out", size=32))
    assert not store.table.problem.any() and store[:].std() > 0


def test_filled_slices_give_a_warning_and_can_be_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "STUDIES_PER_SHARD", 1)
    root = competition(tmp_path / "train", studies=2, slices=3)
    expected, table = shards(build_store(root, tmp_path / "expected", size=32)), scan(root)
    out = tmp_path / "out"
    os.rename(table.path[0], tmp_path / "away")
    with pytest.warns(UserWarning, match="out: 1 of 6 slices .* filled, see problems.csv .* build again"):
        build_store(table, out, size=32)
    os.rename(tmp_path / "away", table.path[0])
    (shard,) = set(pd.read_csv(out / "problems.csv").shard)
    (out / shard).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_store(table, out, size=32)
    assert shards(out) == expected


def test_neighbours_are_found_in_any_order_of_rows(tmp_path):
    table = scan(competition(tmp_path / "train", studies=2, slices=4))
    os.truncate(table.path[1], 3000)
    mixed = DicomSource(table.iloc[[0, 4, 1, 5, 2, 6, 3, 7]], 32)
    np.testing.assert_array_equal(mixed[2], mixed[0])
    assert f"filled from {table.SOPInstanceUID[0]}" in mixed.table.problem[2]
    twice = table.iloc[[1, 2, 3, 0, 1]]  # rows with one index
    stack = read_series(twice, on_error="fill")
    np.testing.assert_array_equal(stack[[0, 4]], stack[[3, 3]])
    assert twice.problem.str.count("filled").tolist() == [1, 0, 0, 0, 1]


def test_labels_beside_the_pixels(tmp_path):
    root = competition(tmp_path / "train", studies=3, slices=3)
    table = scan(root)
    keys = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"]
    labels = table[keys].assign(pe_present_on_image=np.arange(9) % 2).sample(frac=1, random_state=0)
    store = SliceStore(build_store(root, tmp_path / "out", size=32, labels=labels))
    assert store.table.pe_present_on_image.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert store.table.SOPInstanceUID.tolist() == table.SOPInstanceUID.tolist()
    with pytest.raises(ValueError, match="no label row matches a slice"):
        build_store(root, tmp_path / "none", size=32, labels=labels.assign(StudyInstanceUID="0"))


def test_many_threads_read_one_store(tmp_path):
    store = SliceStore(build_store(competition(tmp_path / "train"), tmp_path / "out", size=64))
    expected, rng = store[:], np.random.default_rng(0)
    jobs = [rng.integers(0, len(store), 16) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for rows, values in zip(jobs, pool.map(store.__getitem__, jobs)):
            np.testing.assert_array_equal(values, expected[rows])


def test_real_ct(real_ct, tmp_path):
    store = SliceStore(build_store(real_ct / "lidc_small", tmp_path / "out"))
    assert len(store) == 39 and store.table.exact.all() and store.verify() == []
    for i, path in enumerate(scan(real_ct / "lidc_small").path):
        hu = reference(path).clip(-1024, 8191)
        np.testing.assert_array_equal(store[i], hu.reshape(256, 2, 256, 2).sum((1, 3)))
    small = SliceStore(build_store(real_ct / "cip_ct64_series", tmp_path / "small"))
    np.testing.assert_array_equal(small[40][::4, ::4], 4 * reference(scan(real_ct / "cip_ct64_series").path[40]))


@pytest.mark.parametrize("name", ["manifest.json", "problems.csv", "1.2.3/4.dcm", ".git/config", "a.tmp"])
def test_a_store_is_not_built_among_other_files(tmp_path, name):
    "Such as the manifest of a run, where the folder of a run was given for a store."
    (tmp_path / "in").mkdir()
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    ct_file(tmp_path / "in/1.dcm", stored_values((64, 64), bits=12))
    with pytest.raises(FileExistsError, match=f"run holds {name} and was not written .* name another folder"):
        build_store(tmp_path / "in", tmp_path / "run")
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [tmp_path / "run" / name]
    assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("lost", ["", "index.parquet manifest.json", "manifest.json *.parquet *.csv *.slices"])
def test_a_build_that_was_killed_is_resumed(tmp_path, lost):
    "Whatever it had written, in a folder that existed before."
    root, out = competition(tmp_path / "train", studies=2, slices=2), tmp_path / "out"
    out.mkdir()
    expected = shards(build_store(root, out, size=32))
    for path in [path for pattern in lost.split() for path in out.glob(pattern)]:
        path.unlink()
    for name in (f"{next(iter(expected))}.0123.tmp", ".lock"):
        (out / name).write_bytes(b"half")
    build_store(root, out, size=32)
    assert shards(out) == expected and len(SliceStore(out)) == 4
