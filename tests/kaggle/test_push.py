"The real client of Kaggle against a server on loopback: what is sent, what is refused, what is reported."
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from kaggle_stub import Stub, connected

from rsnape_kit.kaggle.api import KaggleBusy, KaggleError
from rsnape_kit.kaggle.client import push, push_bundle, submit_kernel
from rsnape_kit.kaggle.kernels import export_kernels
from rsnape_kit.kaggle.plan import PLAN, Plan
from rsnape_kit.kaggle.runtime import COMPETITION
from rsnape_kit.utils.manifest import MANIFEST, write_manifest


@pytest.fixture
def stub(monkeypatch, tmp_path):
    "A stub of Kaggle and a client connected to it."
    with connected(Stub(), monkeypatch, tmp_path / "home") as stub:
        yield stub


def describe(folder, commit="abc"):
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    write_manifest(folder, "bundle", files, version="1.2", commit=commit)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "rsnape_kit" / "models").mkdir(parents=True)
    (folder / "rsnape_kit" / "__init__.py").write_text("__version__ = '1'")
    (folder / "rsnape_kit" / "models" / "image.py").write_text("x = 1")
    (folder / "site").mkdir()
    (folder / "site" / "six.py").write_text("x = 2")
    describe(folder)
    meta = {"id": "test/rsnape-kit", "title": "rsnape_kit", "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(meta))
    return folder


def change(folder, name, **values):
    "Change a folder's metadata; None removes a key."
    meta = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    return folder


def test_a_dataset_is_made_then_versioned_and_arrives_as_it_left(stub, bundle):
    first, second = push_bundle(bundle, poll=.01), push_bundle(bundle, poll=.01)
    assert (first.version, second.version) == (1, 2)
    assert first.url == "https://www.kaggle.com/datasets/test/rsnape-kit"
    assert len(stub.sent("CreateDataset")) == len(stub.sent("CreateDatasetVersion")) == 1
    assert stub.sent("CreateDatasetVersion")[0]["body"]["versionNotes"] == "1.2 abc"
    push_bundle(bundle, poll=.01, notes="five folds, seed 1")
    assert stub.sent("CreateDatasetVersion")[1]["body"]["versionNotes"] == "five folds, seed 1"
    left = {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert stub.datasets["test/rsnape-kit"]["files"] == {k: v for k, v in left.items() if k != "dataset-metadata.json"}


def test_waiting_ends_when_the_new_version_is_ready_not_when_the_old_one_is(stub, bundle):
    push_bundle(bundle, poll=.01)
    stub.pending, stub.lags = 5, True
    assert push_bundle(bundle, poll=.01).version == 2
    calls = [name for name, _ in stub.calls]
    later = calls[calls.index("CreateDatasetVersion"):]
    assert later.count("GetDatasetStatus") > 5


@pytest.mark.parametrize("name", ["site.zip", "manifest.json"])
def test_a_failed_upload_is_reported_and_nothing_is_published(stub, bundle, name):
    stub.faults["PUT " + name] = 400
    with pytest.raises(KaggleError, match="1 of 3 entries"):
        push_bundle(bundle, poll=.01)
    assert not stub.sent("CreateDataset")
    stub.faults.clear()
    assert push_bundle(bundle, poll=.01).version == 1  # a second attempt is not confused by the first


def test_a_file_that_changed_after_a_failed_upload_is_sent_again(stub, bundle):
    "Size and time of the file are unchanged, and the client only compares these."
    manifest = bundle / MANIFEST
    stub.faults["PUT site.zip"] = 400
    with pytest.raises(KaggleError, match="not uploaded"):
        push_bundle(bundle, poll=.01)
    before = manifest.stat()
    describe(bundle, "xyz")
    assert manifest.stat().st_size == before.st_size
    os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns))
    stub.faults.clear()
    push_bundle(bundle, poll=.01)
    assert b'"xyz"' in stub.datasets["test/rsnape-kit"]["files"][MANIFEST]


def test_a_version_that_kaggle_does_not_report_is_not_taken_for_the_new_one(stub, bundle):
    push_bundle(bundle, poll=.01)
    stub.faults["GetDataset"] = (500, {"message": "no"})
    with pytest.raises(KaggleError, match="which version test/rsnape-kit has now"):
        push_bundle(bundle, poll=.01)
    stub.faults.clear()
    stub.pending, stub.lags = 10_000, True
    with pytest.raises(KaggleError, match="no version after 1 that is ready .ready, version 1"):
        push_bundle(bundle, wait=.2, poll=.01)


@pytest.mark.parametrize("fault, words", [
    ((200, {"status": "error", "error": "The title is taken"}), "The title is taken"),
    ((200, {"status": "Ok", "url": "u", "invalidTags": ["lung"]}), "without the keywords"),
    ((500, {"code": 400, "message": "Quota exceeded"}), "Quota exceeded"),
])
def test_a_refused_dataset_is_an_error(stub, bundle, fault, words):
    stub.faults["CreateDataset"] = fault
    with pytest.raises(KaggleError, match=words):
        push_bundle(bundle, poll=.01)


def test_a_dataset_that_fails_or_never_gets_ready_is_an_error(stub, bundle):
    push_bundle(bundle, poll=.01)
    stub.pending = 10_000
    with pytest.raises(KaggleError, match="no version after 1 that is ready .blobs_received"):
        push_bundle(bundle, wait=.2, poll=.01)
    stub.faults["GetDatasetStatus"] = (200, {"status": "FAILED"})
    with pytest.raises(KaggleError, match="its state is failed"):
        push_bundle(bundle, wait=5, poll=.01)


def test_a_wrong_token_is_distinguished_from_a_missing_dataset(stub, bundle):
    stub.faults["GetDatasetStatus"] = (401, {"code": 401, "message": "Unauthenticated"})
    with pytest.raises(KaggleError, match="is the API token valid"):
        push_bundle(bundle, poll=.01)
    assert not stub.blobs


@pytest.mark.parametrize("values", [
    {"id": "OWNER/rsnape-kit"}, {"id": None}, {"title": "kit"}, {"licenses": []}, {"licenses": [{"name": "MIT"}]},
    {"subtitle": "short"}, {"id": "test/rsnape-kit/1"}])
def test_wrong_dataset_metadata_is_refused_before_anything_is_sent(stub, bundle, values):
    with pytest.raises(KaggleError, match="is not sent"):
        push_bundle(change(bundle, "dataset-metadata.json", **values))
    assert not stub.calls


def test_a_damaged_bundle_is_refused_before_anything_is_sent(stub, bundle):
    (bundle / "site" / "six.py").write_text("x = 3")
    with pytest.raises(KaggleError, match="not the file that the manifest names"):
        push_bundle(bundle)
    assert not stub.calls


@pytest.fixture
def kernels(stub, tmp_path):
    "The kernels of a small plan, and the repository's template at the top, of the user test; what they read is there."
    plan = Plan("test", models=("efficientnet", "petaformer"), folds=(0,), parts=1)
    for folder in export_kernels(plan, tmp_path / "kernels"):
        stub.complete |= set(json.loads((folder / "kernel-metadata.json").read_text())["kernel_sources"])
    (tmp_path / "kernels" / PLAN).unlink()
    text = (ROOT / "kernel-metadata.json").read_text().replace('"OWNER/', '"test/')
    (tmp_path / "kernel-metadata.json").write_text(text)
    for name in ("test/rsnape-kit", "test/rsnape-kit-tpu"):
        stub.add_dataset(name)
    return tmp_path


def test_every_kernel_is_pushed_whole(stub, kernels):
    folders = [*sorted((kernels / "kernels").iterdir()), kernels]
    for number, folder in enumerate(folders, 1):
        pushed = push(folder)
        meta, sent = json.loads((folder / "kernel-metadata.json").read_text()), stub.calls[-1][1]
        assert pushed.version == number and pushed.url == f"https://www.kaggle.com/code/{meta['id']}"
        assert sent["enableInternet"] is False and sent["isPrivate"] is True
        assert (sent["enableGpu"], sent["enableTpu"]) == (meta["enable_gpu"], meta["enable_tpu"])
        assert sent.get("machineShape") == meta.get("machine_shape")
        assert sent["competitionDataSources"] == [COMPETITION]
        assert sent["datasetDataSources"] == ["test/rsnape-kit-tpu" if meta["enable_tpu"] else "test/rsnape-kit"]
        assert sent.get("kernelDataSources", []) == meta["kernel_sources"]
        text = json.loads(sent["text"])
        assert text["metadata"]["kernelspec"]["language"] == "python"
        assert "rsnape_kit.kaggle import attach" in text["cells"][1]["source"]


def test_plain_kaggle_kernels_push_works_from_the_top_of_the_repository(stub, kernels):
    result = subprocess.run([sys.executable, "-m", "kaggle", "kernels", "push"], cwd=kernels, capture_output=True,
                            text=True, env={**os.environ, "KAGGLE_API_ENVIRONMENT": "LOCALHOST"})
    assert "Kernel version 1 successfully pushed" in result.stdout, result.stderr
    sent = stub.sent("SaveKernel")[0]
    assert sent["slug"] == "test/rsnape-kit-submit" and "submission.csv" in sent["text"]


def test_a_kernel_is_not_started_without_its_sources(stub, kernels):
    folder = change(kernels / "kernels" / "submit", "kernel-metadata.json",
                    kernel_sources=["test/training", "test/rsnape-kit-submit"])
    stub.kernel_states = ["RUNNING"]
    with pytest.raises(KaggleError, match="kernel_sources has test/training, which is running, not complete: wait"):
        push(folder)
    stub.faults["GetKernelSessionStatus"] = (404, {"code": 404, "message": "Not found"})
    stub.datasets.clear()
    with pytest.raises(KaggleError, match="2 faults:\n- dataset_sources has test/rsnape-kit, which does not exist"):
        push(folder)
    assert not stub.sent("SaveKernel")
    push(folder, allow=["which does not exist"])
    assert len(stub.sent("SaveKernel")) == 1


def test_a_limit_of_sessions_is_an_error_of_its_own(stub, kernels):
    text = "Maximum batch GPU session count of 2 reached."
    for status, body in ((200, {"error": text}), (400, {"message": text}), (200, {"error": "Your quota is used up"})):
        stub.faults["SaveKernel"] = (status, body)
        with pytest.raises(KaggleBusy, match="session count of 2|quota"):
            push(kernels / "kernels" / "submit")


@pytest.mark.parametrize("response, words", [
    ({"error": "Maximum batch session count reached"}, "Maximum batch session"),
    ({"url": "u", "versionNumber": 2, "invalidDatasetSources": ["test/rsnape-kit"]}, "without dataset_sources"),
    ({}, "no address"), ({"url": "u"}, "no version"), ([1], "no address"),
    ({"url": "u", "versionNumber": 2, "invalidCompetitionSources": ["rsna"]}, "without competition_sources"),
    ({"url": "u", "versionNumber": 2, "invalidKernelSources": ["test/prepare"]}, "without kernel_sources"),
])
def test_what_the_client_only_prints_is_an_error(stub, kernels, response, words):
    stub.faults["SaveKernel"] = (200, response)
    with pytest.raises(KaggleError, match=words):
        push(kernels / "kernels" / "submit")


@pytest.mark.parametrize("values", [
    {"id": "OWNER/rsnape-kit-submit"}, {"title": "INSERT_TITLE_HERE"}, {"enable_internet": None},
    {"enable_internet": True},
    {"competition_sources": ["competitions/rsna"]}, {"dataset_sources": ["datasets/test/rsnape-kit"]},
    {"dataset_sources": []}, {"machine_shape": "TpuV38"}, {"code_file": "gone.ipynb"}, {"kernel_type": "script"},
    {"enable_gpu": True, "enable_tpu": True}, {"enable_gpuu": True}])
def test_wrong_kernel_metadata_is_refused_before_anything_is_sent(stub, kernels, values):
    with pytest.raises(KaggleError, match="is not sent"):
        push(change(kernels / "kernels" / "submit", "kernel-metadata.json", **values))
    assert not stub.calls


def test_submitting_waits_for_the_run(stub, kernels):
    assert COMPETITION in submit_kernel(kernels, version=4, message="best constants", poll=.01)
    assert len(stub.sent("GetKernelSessionStatus")) == 3
    sent = stub.sent("CreateCodeSubmission")[0]
    assert (sent["kernelOwner"], sent["kernelSlug"], sent["kernelVersion"]) == ("test", "rsnape-kit-submit", 4)
    assert (sent["fileName"], sent["competitionName"]) == ("submission.csv", COMPETITION)


def test_a_run_that_failed_is_not_submitted(stub, kernels):
    stub.kernel_states = ["ERROR"]
    with pytest.raises(KaggleError, match="ended as error: Out of memory"):
        submit_kernel(kernels, poll=.01)
    assert not stub.sent("CreateCodeSubmission")


def test_the_newest_version_is_submitted_and_named(stub, kernels):
    stub.kernel_states = ["COMPLETE"]
    push(kernels)
    push(kernels)
    assert submit_kernel(kernels, wait=0).startswith("version 2 of test/rsnape-kit-submit")
    assert stub.sent("CreateCodeSubmission")[0]["kernelVersion"] == 2
    stub.faults["GetKernel"] = (200, {})
    with pytest.raises(KaggleError, match="name one"):
        submit_kernel(kernels, wait=0)


@pytest.mark.parametrize("response", [{}, {"message": ""}, {"message": "Submission not allowed: too many today"}])
def test_a_submission_that_is_not_confirmed_is_an_error(stub, kernels, response):
    stub.kernel_states = ["COMPLETE"]
    stub.faults["CreateCodeSubmission"] = (200, response)
    with pytest.raises(KaggleError, match="did not confirm version 3"):
        submit_kernel(kernels, version=3, poll=.01)


@pytest.mark.parametrize("name", ["OWNER/rsnape-kit-submit", None, "submit"])
def test_a_kernel_without_a_name_is_not_submitted(stub, kernels, name):
    with pytest.raises(KaggleError, match="is not sent"):
        submit_kernel(change(kernels, "kernel-metadata.json", id=name))
    assert not stub.calls


def test_a_run_that_is_not_done_is_not_submitted(stub, kernels):
    stub.kernel_states = ["RUNNING"]
    with pytest.raises(KaggleError, match="still running after 0 s"):
        submit_kernel(kernels, wait=0)


def test_a_refused_submission_is_an_error(stub, kernels):
    stub.kernel_states = ["COMPLETE"]
    stub.faults["CreateCodeSubmission"] = (400, {"code": 400, "message": "Submission limit reached"})
    with pytest.raises(KaggleError, match="Submission limit reached"):
        submit_kernel(kernels, version=1, poll=.01)


def test_without_credentials_the_error_names_the_way_to_get_them(stub, kernels, monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(KaggleError, match="not logged in"):
        push(kernels / "kernels" / "submit")
