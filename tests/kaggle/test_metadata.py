"""Metadata as real users write them: the preflight's verdict against that of the client itself, which is run for real.

An entry of a table is a change of good metadata, listed under what Kaggle makes of it: `takes` (accepted, and run as it
is written), `refuses` (the client raises), `changes` (accepted, but dropped, replaced or run as something else). The
variants are those of public repositories in 2026: templates of `kaggle kernels init`, texts for booleans, files of
`kaggle kernels pull`, R, scripts, pinned images, model sources. The preflight must have no fault for what Kaggle takes,
and one for all that is refused or changed. `STRICTER` lists what it refuses although the client takes it, and why.
"""
import json

import pytest
from kaggle_stub import Stub, connected

from rsnape_kit.kaggle.dataset import Note, check_dataset, metadata_faults
from rsnape_kit.kaggle.kernel_metadata import kernel_metadata_faults, switch
from rsnape_kit.kaggle.preflight import kernel_findings
from rsnape_kit.kaggle.runtime import COMPETITION
from rsnape_kit.kaggle_commands import check

extended = pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
GONE = object()  # a key that is left out
NAME = "test/rsnape-kit-explore"
KERNEL = {"id": NAME, "title": "rsnape-kit explore", "code_file": "k.ipynb", "language": "python",
          "kernel_type": "notebook",
          "is_private": True, "enable_gpu": False, "enable_tpu": False, "enable_internet": True, "dataset_sources": [],
          "competition_sources": [COMPETITION], "kernel_sources": [], "model_sources": []}
SCRIPT = {"code_file": "k.py", "kernel_type": "script"}
TEXTS = {"is_private": "true", "enable_gpu": "true", "enable_tpu": "false", "enable_internet": "true"}
PINNED = "gcr.io/kaggle-private-byod/python@sha256:" + "0" * 64

KERNELS = {
    "takes": [
        {}, TEXTS, TEXTS | SCRIPT, {"is_private": "False", "enable_gpu": "True"}, {key: GONE for key in TEXTS},
        {"is_private": False}, {"enable_internet": "false"}, {"title": GONE, "id_no": 12345},
        {"id": GONE, "id_no": 12345}, {"id_no": 7}, {"id_no": None}, {"title": None},
        {"title": "The RSNA kit, explored"}, {"title": "rsnape_kit explore"}, {"id": "test/RSNAPE-kit-explore"},
        {"title": "Explorer le kit à l'hôpital"}, {"language": "r", "code_file": "k.irnb"},
        {"language": "r", "code_file": "k.R", "kernel_type": "script"},
        {"language": "rmarkdown", "code_file": "k.Rmd", "kernel_type": "script"},
        {"dataset_sources": ["Some_One/data", "timoboz/my-awesome-dataset"]},
        {"dataset_sources": ["a-1/wheels-v3/2"]}, {"dataset_sources": ["Valerio1988/MindSet-lite"]},
        {"dataset_sources": GONE, "kernel_sources": GONE},
        {"kernel_sources": ["huikang/pip-install-arc3", "test/rsnape-kit-train-0/12"]},
        {"model_sources": ["sorokin/qwen3_4b_grids15_sft139/Transformers/bfloat16/1", "google/bert/TensorFlow2/bem/1"]},
        {"competition_sources": ["LANL-Earthquake-Prediction", COMPETITION]}, {"competition_sources": []},
        {"keywords": ["gpu", "utility script"]}, {"keywords": []}, {"model_sources": GONE, "keywords": None},
        {"machine_shape": ""}, {"machine_shape": None}, {"machine_shape": "NvidiaTeslaT4", "enable_gpu": True},
        {"machine_shape": "NvidiaTeslaT4"}, {"machine_shape": "tpuV5e8", "enable_tpu": "true"},
        {"machine_shape": "Gpu", "enable_gpu": "true"}, {"machine_shape": "None"},
        {"machine_shape": "NvidiaL4", "enable_gpu": True}, {"machine_shape": "NvidiaRtxPro6000", "enable_gpu": True},
        {"machine_shape": "TpuV6E8", "enable_tpu": True}, {"machine_shape": "NvidiaTeslaA100"},
        {"machine_shape": "NvidiaH100"}, {"machine_shape": "NvidiaL4X1"}, {"machine_shape": "NvidiaB200"},
        {"docker_image": PINNED, "docker_image_pinning_type": "original", "enable_gpu": True},
        {"docker_image_pinning_type": "latest", "machine_shape": "Gpu"}, {"docker_image": None},
        {"enable_tpu": True, "docker_image_pinning_type": "latest"}, {"created_by": "a script of mine"},
    ],
    "refuses": [
        {"title": "kit"}, {"title": 12345}, {"code_file": GONE}, {"code_file": ""},
        {"code_file": "INSERT_CODE_FILE_PATH_HERE"}, {"id": GONE}, {"id": ""}, {"id": 5}, {"id": NAME + "/3"},
        {"id": "test/kit"}, {"id": "test/"}, {"id_no": "12345"}, {"language": "Python"}, {"language": GONE},
        {"language": "julia"}, {"language": "Pick one of: {python,r,rmarkdown}"}, {"kernel_type": "Notebook"},
        {"kernel_type": GONE}, {"code_file": "k.py"}, {"is_private": "yes"}, {"enable_gpu": 1}, {"enable_tpu": None},
        {"enable_internet": ""}, {"dataset_sources": ["data"]}, {"dataset_sources": "a/data"},
        {"dataset_sources": None}, {"dataset_sources": ["a/b/c/d"]}, {"kernel_sources": ["a/prep"]},
        {"kernel_sources": ["train"]}, {"model_sources": ["google/bert"]},
        {"model_sources": ["google/bert/TensorFlow2/bem/latest"]}, {"competition_sources": COMPETITION},
        {"competition_sources": [1]}, {"keywords": "gpu"}, {"docker_image_pinning_type": "pinned"},
        {"docker_image": 31041}, {"machine_shape": ["NvidiaTeslaT4"]}, {"model_sources": ["models/a/b/c/d/1"]},
    ],
    "changes": [
        {"dataset_sources": ["datasets/a/data"]}, {"kernel_sources": ["code/svendaj/numerai-data"]},
        {"competition_sources": [f"competitions/{COMPETITION}"]},
        {"machine_shape": "NvidiaTeslaP100", "enable_gpu": True}, {"machine_shape": "TpuV38"},
        {"machine_shape": "Tpu1VmV38", "enable_tpu": True}, {"machine_shape": " nvidiateslap100 "},
        {"enable_tpu": True, "docker_image": PINNED},
        {"machine_shape": "TpuV5E8", "docker_image_pinning_type": "original"}, {"enable_gpuu": True},
        {"dataset_source": ["a/data"]}, {"code_file": "k.ipynb", "kernel_type": "script"},
    ],
}
SENT = {"is_private": "isPrivate", "enable_gpu": "enableGpu", "enable_tpu": "enableTpu",
        "enable_internet": "enableInternet"}
STRICTER = [  # the client takes these
    ("the slug of the template is no slug", {"id": "test/INSERT_KERNEL_SLUG_HERE", "title": "INSERT_TITLE_HERE"}),
    ("a slug has no underscores", {"id": "test/rsnape_kit_explore"}),
    ("the client adds the user name of its token, which the check does not know", {"id": "rsnape-kit-explore"}),
    ("the owner is a placeholder", {"id": "OWNER/rsnape-kit-explore"}),
    ("Kaggle allows 50 characters", {"title": "x" * 51}),
    ("only one of the two can be had", {"enable_gpu": True, "enable_tpu": True}),
    ("the two contradict each other", {"machine_shape": "TpuV5E8", "enable_gpu": "true"}),
    ("an empty name is no source", {"dataset_sources": [""]}),
    ("spaces belong to no name", {"competition_sources": ["rsna pe"]}),
    ("a slug has no dots", {"dataset_sources": ["a/data.v2"]}),
]
SUBMITTED = [  # refused only of a kernel whose submission.csv is to be scored
    ("a code competition takes no kernel with internet", {"enable_internet": "true"}),
    ("the default is true", {"enable_internet": GONE}), ("its data is missing", {"competition_sources": []}),
]
DATA = {"id": "test/rsnape-kit", "title": "rsnape_kit", "licenses": [{"name": "apache-2.0"}]}
DATASETS = {
    "takes": [
        {}, {"licenses": [{"name": "CC0-1.0"}]}, {"licenses": [{"name": "other", "title": "see the description"}]},
        {"licenses": [{"name": "US-Government-Works"}]}, {"subtitle": "a subtitle of twenty and more"},
        {"subtitle": ""}, {"keywords": ["lung", "medicine"]}, {"description": "# Data", "isPrivate": True},
        {"resources": [{"path": "a.csv", "description": "a"}]}, {"id": "test/RSNAPE-kit"}, {"id_no": 12345},
    ],
    "refuses": [
        {"id": GONE}, {"id": "rsnape-kit"}, {"title": GONE}, {"title": "kit"}, {"title": "x" * 51},
        {"id": "test/kit"}, {"id": "test/" + "x" * 51}, {"licenses": GONE}, {"licenses": []},
        {"licenses": [{"name": "other"}, {"name": "CC0-1.0"}]}, {"licenses": [{}]}, {"licenses": "CC0-1.0"},
        {"subtitle": "short"}, {"subtitle": "x" * 81}, {"title": "INSERT_TITLE_HERE"},
        {"id": "test/INSERT_SLUG_HERE"}, {"resources": [{"path": "gone.csv"}]},
        {"resources": [{"path": "a.csv"}, {"path": "a.csv"}]}, {"keywords": "lung"},
    ],
}
STRICTER_DATASETS = [
    ("not in Kaggle's documentation", {"licenses": [{"name": "MIT"}]}),
    ("the version counts for nothing", {"id": "test/rsnape-kit/1"}),
    ("a slug has letters, digits and dashes", {"id": "test/rsnape_kit"}),
    ("the owner is a placeholder", {"id": "OWNER/rsnape-kit"}),
]


def written(folder, name, good, change):
    "Write metadata with a change, and files that it may name; return the metadata."
    meta = {key: value for key, value in (good | change).items() if value is not GONE}
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "source": ["x = 1"]}
    spec = {"language": "R", "name": "ir"} if meta.get("language") == "r" else {"language": "python", "name": "python3"}
    notebook = {"cells": [cell], "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
    for file in ("k.ipynb", "k.irnb"):
        (folder / file).write_text(json.dumps(notebook))
    for file in ("k.py", "k.R", "k.Rmd", "a.csv"):
        (folder / file).write_text("x = 1\n")
    (folder / name).write_text(json.dumps(meta))
    return meta


@pytest.fixture
def stub(monkeypatch, tmp_path):
    with connected(Stub(), monkeypatch, tmp_path / "home") as stub:
        yield stub


@pytest.fixture
def client(stub):
    "Kaggle's client as it is, connected to the stub."
    stub.pending = 0
    api = extended.KaggleApi()
    api.authenticate()
    return api


def refused(call, *arguments, **options) -> str:
    "Return the client's error; empty if it sends the request."
    try:
        call(*arguments, **options)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fault_texts(found) -> list:
    return [text for text in found if not isinstance(text, Note)]


def rows(table: dict) -> list:
    return [(verdict, change) for verdict, changes in table.items() for change in changes]


def label(row):
    return f"{row[0]} {json.dumps(row[1], default=lambda value: 'GONE')}"


@pytest.mark.filterwarnings("ignore")
def test_kernels_as_people_write_them(client, stub, tmp_path, capsys):
    wrong = []
    for row in rows(KERNELS):
        meta = written(tmp_path, "kernel-metadata.json", KERNEL, row[1])
        stub.calls.clear()
        capsys.readouterr()
        error, found = refused(client.kernels_push, str(tmp_path)), kernel_findings(tmp_path)
        mismatch = "title does not resolve" in capsys.readouterr().out
        if bool(error) != (row[0] == "refuses") or bool(stub.sent("SaveKernel")) == bool(error):
            wrong.append(f"the client: {label(row)}: {error or 'takes it'}")
        if bool(fault_texts(found)) == (row[0] == "takes"):
            wrong.append(f"the preflight: {label(row)}: {fault_texts(found)}")
        sent = {key: stub.sent("SaveKernel")[0][SENT[key]] for key in SENT} if not error else {}
        if sent != {key: switch(meta, key) for key in sent}:
            wrong.append(f"switches: {label(row)}: {sent}")
        if not error and not fault_texts(found) and mismatch != any("becomes the slug" in text for text in found):
            wrong.append(f"the title: {label(row)}: {meta.get('title')}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("why, change", STRICTER + SUBMITTED)
def test_what_is_refused_although_the_client_takes_it(client, tmp_path, why, change):
    good = KERNEL | {"id": "test/pe-submit", "title": "pe submit"} if (why, change) in SUBMITTED else KERNEL
    meta = written(tmp_path, "kernel-metadata.json", good, change)
    assert not refused(client.kernels_push, str(tmp_path))
    assert fault_texts(kernel_metadata_faults(meta, submits=(why, change) in SUBMITTED))


@pytest.mark.filterwarnings("ignore")
def test_datasets_as_people_write_them(client, stub, tmp_path):
    wrong, folder = [], tmp_path / "data"
    folder.mkdir()
    for row in rows(DATASETS):
        written(folder, "dataset-metadata.json", DATA, row[1])
        stub.calls.clear()
        stub.datasets.clear()
        error = refused(client.dataset_create_new, str(folder), quiet=True)
        found = check_dataset(folder)
        if bool(error) != (row[0] == "refuses") or bool(stub.sent("CreateDataset")) == bool(error):
            wrong.append(f"the client: {label(row)}: {error or 'takes it'}")
        if bool(found) == (row[0] == "takes"):
            wrong.append(f"the check: {label(row)}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("why, change", STRICTER_DATASETS)
def test_datasets_that_are_refused_although_the_client_takes_them(client, tmp_path, why, change):
    meta = written(tmp_path, "dataset-metadata.json", DATA, change)
    assert not refused(client.dataset_create_new, str(tmp_path), quiet=True)
    assert fault_texts(metadata_faults(meta))


def test_the_command_prints_both_and_fails_for_faults_only(tmp_path, capsys):
    written(tmp_path, "kernel-metadata.json", KERNEL, {"title": "another title", "machine_shape": "NvidiaH100"})
    check(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["warning", "warning", str(tmp_path)]
    assert "'another-title'" in lines[0] and "H100" in lines[1] and lines[2].endswith("no faults")
    written(tmp_path, "kernel-metadata.json", KERNEL, {"title": "another title", "machine_shape": "NvidiaTeslaP100"})
    with pytest.raises(SystemExit, match="NvidiaTeslaP100 is retired") as ended:
        check(tmp_path)
    assert "another-title" in capsys.readouterr().out and "another-title" not in str(ended.value)
    with pytest.raises(SystemExit) as ended:
        check(tmp_path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and len(found["faults"]) == 1
    assert "is retired" in found["faults"][0] and "slug" in found["warnings"][0]
    check(tmp_path, allow=["is retired", "becomes the slug"], json=True)
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path), "faults": [], "warnings": []}
    check(tmp_path, allow=["is retired", "becomes the slug"])
    assert capsys.readouterr().out == f"{tmp_path}: no faults\n"
