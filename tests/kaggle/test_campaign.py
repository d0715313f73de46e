"A whole campaign by the real client against a server that imitates Kaggle's sessions: it ends, whatever is in its way."
import json
import os
import re
from collections import Counter
from functools import partial

import pytest
import requests
from conftest import ROOT
from kaggle_sessions import Kaggle
from kaggle_stub import DROP, LOSE, connected

from rsnape_kit.cli import main
from rsnape_kit.kaggle.api import KaggleError, client
from rsnape_kit.kaggle.campaign import plan_campaign, run_campaign
from rsnape_kit.kaggle.campaign_driver import CampaignSettings
from rsnape_kit.kaggle.campaign_state import CAMPAIGN, Campaign
from rsnape_kit.kaggle.kernels import export_kernels, kernels_of
from rsnape_kit.kaggle.plan import Plan
from rsnape_kit.kaggle.runtime import COMPETITION
from rsnape_kit.utils.manifest import write_manifest
from rsnape_kit.utils.processes import exclusive

PARTS = ["prepare-0", "prepare-1"]
RUNS = ["train-a-fold-0", "train-a-fold-1", "train-b-fold-0", "train-b-fold-1"]  # b reads a's run of the same fold
ALL = [*PARTS, *RUNS, "blend", "submit"]
FAILED = ("ERROR", {}, "Traceback (most recent call last):\nMemoryError: 29 GB are not enough\n[NbConvertApp] done\n")


def name(kernel: str) -> str:
    return f"test/rsnape-kit-{kernel}"


def write(folder, kernel: str, sources=(), kind="cpu"):
    stage, _, fold = kernel.partition("-")[0], *kernel.partition("-fold-")[1:]
    path = folder / kernel
    path.mkdir(parents=True)
    values = f'MODEL = "{kernel[6]}"\nFOLD = {fold}\n' if fold else ""
    (path / f"{stage}.py").write_text(values + f"open('/kaggle/working/submission.csv')  # {kernel}\n")
    (path / "kernel-metadata.json").write_text(json.dumps({
        "id": name(kernel), "title": f"rsnape-kit {kernel.replace('-', ' ')}", "code_file": f"{stage}.py",
        "language": "python", "kernel_type": "script", "is_private": True, "enable_gpu": kind == "gpu",
        "enable_tpu": kind == "tpu", "enable_internet": False, "competition_sources": [COMPETITION],
        "dataset_sources": ["test/rsnape-kit"], "kernel_sources": [name(each) for each in sources]}))


@pytest.fixture
def kernels(tmp_path):
    "Two parts of a store, two models on two folds, blend and submission."
    folder = tmp_path / "kernels"
    for part in PARTS:
        write(folder, part)
    for fold in "01":
        write(folder, f"train-a-fold-{fold}", PARTS, "tpu")
        write(folder, f"train-b-fold-{fold}", [*PARTS, f"train-a-fold-{fold}"], "gpu")
    write(folder, "blend", RUNS)
    write(folder, "submit", kind="gpu")
    return folder


@pytest.fixture
def small(tmp_path):
    "One training and the submission."
    write(tmp_path / "small", "train-a-fold-0", kind="tpu")
    write(tmp_path / "small", "submit", kind="gpu")
    return tmp_path / "small"


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "x.py").write_text("x = 1")
    write_manifest(folder, "bundle", ["x.py"], version="1")
    meta = {"id": "test/rsnape-kit", "title": "rsnape_kit", "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    stub = Kaggle()
    stub.add_dataset("test/rsnape-kit")
    with connected(stub, monkeypatch, tmp_path / "home"):
        yield stub


def drive(folder, bundles=(), passes=60, **options):
    "Run a campaign without pauses; it must end within some passes. Return its state, what is left, pauses and reports."
    pauses, shown = [], []

    def sleep(seconds):
        pauses.append(seconds)
        assert len(pauses) < passes, shown[-2:]

    settings = CampaignSettings(**{key: options.pop(key) for key in list(options)
                                   if key in ("limits", "sessions", "strict", "submit")})
    campaign, left = run_campaign(folder, bundles, settings, sleep=sleep, show=shown.append, **options)
    return campaign, left, pauses, shown


def states(campaign) -> dict:
    return {kernel: campaign.kernel(name(kernel)).state for kernel in ALL if name(kernel) in campaign.kernels}


def pushed_once(kaggle, kernels=ALL) -> bool:
    return {each: kaggle.pushes(name(each)) for each in kernels} == dict.fromkeys(kernels, 1)


def sources(kaggle, kernel: str) -> set:
    "Kernels whose outputs the last version of a kernel was started with."
    sent = kaggle.kernels[name(kernel)][-1]["sent"].get("kernelDataSources", [])
    return {each.removeprefix("test/rsnape-kit-") for each in sent}


def test_a_campaign_ends_with_a_score(kaggle, kernels, bundle):
    kaggle.datasets.clear()
    campaign, left, _, shown = drive(kernels, [bundle])
    assert left == "" and states(campaign) == dict.fromkeys(ALL, "done") and pushed_once(kaggle)
    assert (campaign.entry.state, campaign.entry.score) == ("scored", "0.204")
    assert kaggle.submissions[0]["description"] == "rsnape_kit: rsnape-kit-submit version 1"
    assert kaggle.most == {"gpu": 1, "tpu": 1, "cpu": 2} and len(kaggle.sent("CreateDataset")) == 1
    order = [body["slug"].removeprefix("test/rsnape-kit-") for body in kaggle.sent("SaveKernel")]
    assert order[:3] == [*PARTS, "train-a-fold-0"] and order[-2:] == ["blend", "submit"]
    assert sources(kaggle, "submit") == {*RUNS, "blend"}
    assert "quota: GPU 1.0 h used, 29.0 h left" in shown[-1] and "8 done" in shown[-1] and len(shown) == len(set(shown))
    calls = len(kaggle.calls)
    assert drive(kernels, [bundle])[1] == "" and len(kaggle.calls) == calls + 1  # again: only the quota is asked for


def test_a_changed_bundle_is_sent_again(kaggle, small, bundle):
    drive(small, [bundle])
    (bundle / "x.py").write_text("x = 2")
    write_manifest(bundle, "bundle", ["x.py"], version="2")
    drive(small, [bundle])
    assert [body["body"]["versionNotes"] for body in kaggle.sent("CreateDatasetVersion")] == ["1", "2"]
    assert pushed_once(kaggle, ["train-a-fold-0", "submit"])


def test_a_kernel_waits_for_the_new_version_of_its_dataset(kaggle, small, bundle):
    kaggle.lags, kaggle.pending = True, 6  # the old version is called ready meanwhile
    drive(small, [bundle])
    calls = [method for method, _ in kaggle.calls]
    assert len(kaggle.sent("CreateDatasetVersion")) == 1
    assert calls[calls.index("CreateDatasetVersion"):calls.index("SaveKernel")].count("GetDatasetStatus") > 6


@pytest.mark.parametrize("exists", [True, False])
def test_a_dataset_whose_confirmation_was_lost_is_not_sent_again(kaggle, small, bundle, exists):
    method = "CreateDatasetVersion" if exists else "CreateDataset"
    kaggle.datasets = kaggle.datasets if exists else {}
    kaggle.hiccups = {(method, 1): LOSE, (method, 2): (200, {"status": "error", "error": "the title is in use"})}
    assert drive(small, [bundle])[1] == "" and kaggle.datasets["test/rsnape-kit"]["version"] == 1 + exists
    assert pushed_once(kaggle, ["train-a-fold-0", "submit"])


@pytest.mark.parametrize("how", ["text", "status"])
def test_refused_sessions_are_waited_for(kaggle, kernels, how):
    kaggle.limits, kaggle.refuses_by = {"gpu": 1, "tpu": 1, "cpu": 1}, how
    kaggle.length = 4
    campaign, left, pauses, shown = drive(kernels, limits={"gpu": 4, "tpu": 4, "cpu": 4}, passes=99)
    assert left == "" and states(campaign) == dict.fromkeys(ALL, "done") and pushed_once(kaggle)
    assert set(kaggle.most.values()) == {1} and any("not now: pushing" in text for text in shown)
    assert 2.5 <= pauses[0] <= 5 and max(pauses) > 9


HICCUPS = [("SaveKernel", DROP), ("SaveKernel", LOSE), ("SaveKernel", (503, {"message": "down"})),
           ("GetKernelSessionStatus", (502, {"message": "down"})), ("GetKernelSessionStatus", LOSE),
           ("ListKernelSessionOutput", DROP), ("GetKernel", (429, {"message": "slow down"})),
           ("GetDatasetStatus", DROP), ("CreateCodeSubmission", LOSE), ("CreateCodeSubmission", DROP),
           ("ListSubmissions", (500, {"message": "down"}))]


@pytest.mark.parametrize("method, fault", HICCUPS)
def test_a_broken_connection_changes_nothing(kaggle, small, method, fault):
    kaggle.hiccups = {(method, number): fault for number in (1, 2, 4)}
    campaign, left, _, _ = drive(small)
    assert left == "" and campaign.entry.state == "scored" and len(kaggle.submissions) == 1
    assert pushed_once(kaggle, ["train-a-fold-0", "submit"])


def test_a_network_that_is_gone_for_a_while_is_waited_for(kaggle, small):
    stub, respond = kaggle, kaggle.respond
    stub.respond = lambda method, body: DROP if 10 < len(stub.calls) + lost.total() < 22 and not lost.update([1]) else \
        respond(method, body)
    lost = Counter()
    _, left, pauses, _ = drive(small)
    assert left == "" and lost.total() > 5 and pushed_once(stub, ["train-a-fold-0", "submit"])
    assert max(pauses[:-1]) <= 300


@pytest.mark.parametrize("method", ["GetKernelSessionStatus", "GetKernel", "SaveKernel", "CreateCodeSubmission"])
def test_an_expired_login_is_made_again(kaggle, small, method):
    kaggle.hiccups = {(method, number): (401, {"code": 401, "message": "expired"}) for number in (1, 3)}
    assert drive(small)[1] == "" and pushed_once(kaggle, ["train-a-fold-0", "submit"]) and len(kaggle.submissions) == 1


def test_a_login_without_a_network_is_waited_for(kaggle, small, monkeypatch):
    attempts = []

    def login():
        attempts.append(1)
        if len(attempts) < 4:
            raise requests.ConnectionError("no route to www.kaggle.com")
        return client()

    monkeypatch.setattr("rsnape_kit.kaggle.campaign.client", login)
    _, left, pauses, shown = drive(small)
    assert left == "" and len(attempts) == 4 and "not now: the login failed: no route" in shown[1]
    assert pauses[0] <= 5 and pauses[2] >= 10


class Killed(BaseException):
    "What no handler of the driver catches."


def kill_at(number: int, before: bool, end):
    "Return a replacement of Campaign.save that ends the process before or after a write of the file."
    count, save = Counter(), Campaign.save

    def dying(campaign, path):
        count.update([1])
        if before and count.total() == number:
            end()
        save(campaign, path)
        if count.total() == number:
            end()

    return dying


def die():
    raise Killed


@pytest.mark.parametrize("before", [True, False])
def test_a_killed_driver_goes_on_where_it_was(kaggle, small, monkeypatch, before):
    "Killed at each write of the file in turn, it still pushes and enters everything once."
    expected = None
    for number in range(1, 99):
        kaggle.kernels.clear(), kaggle.submissions.clear(), (small / CAMPAIGN).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Campaign, "save", kill_at(number, before, die))
            try:
                drive(small)
                break
            except Killed:
                pass
        campaign, left, _, _ = drive(small)
        assert left == "" and len(kaggle.submissions) == 1, number
        assert pushed_once(kaggle, ["train-a-fold-0", "submit"]), number
        expected = expected or campaign
        assert campaign == expected, number
    assert number > 10


def test_a_driver_that_was_ended_by_the_system_goes_on(kaggle, kernels):
    for number in (4, 7, 6, 9):
        if not (child := os.fork()):
            Campaign.save = kill_at(number, number % 2 == 0, lambda: os._exit(9))
            try:
                drive(kernels)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    campaign, left, _, _ = drive(kernels)
    assert left == "" and states(campaign) == dict.fromkeys(ALL, "done")
    assert pushed_once(kaggle) and len(kaggle.submissions) == 1


def test_a_lost_state_is_found_again_on_kaggle(kaggle, kernels):
    drive(kernels)
    (kernels / CAMPAIGN).unlink()
    campaign, left, _, _ = drive(kernels)
    assert left == "" and states(campaign) == dict.fromkeys(ALL, "done")
    assert pushed_once(kaggle) and len(kaggle.submissions) == 1
    (kernels / CAMPAIGN).unlink()
    (kernels / "blend" / "blend.py").write_text("x = 2")  # what Kaggle has is not this
    drive(kernels, submit=False)
    assert kaggle.pushes(name("blend")) == 2 and kaggle.pushes(name("train-b-fold-0")) == 1
    (kernels / CAMPAIGN).unlink()
    drive(kernels, again=["all"])
    assert kaggle.pushes(name("blend")) == 3 and kaggle.pushes(name("train-b-fold-0")) == 2


def test_a_changed_kernel_is_named_and_runs_again_with_what_reads_it(kaggle, kernels):
    drive(kernels)
    code = kernels / "train-b-fold-0" / "train.py"
    code.write_text(code.read_text() + "x = 1")
    _, left, _, _ = drive(kernels)
    assert left.startswith("changed since they ran: rsnape-kit-train-b-fold-0; ") and pushed_once(kaggle)
    _, left, _, _ = drive(kernels, again=["train-b-fold-0"])
    twice = [each for each in ALL if kaggle.pushes(name(each)) == 2]
    assert left == "" and twice == ["train-b-fold-0", "blend", "submit"] and len(kaggle.submissions) == 2


def test_the_kernels_of_a_plan(kaggle, tmp_path):
    "The real notebooks; one fold fails, so the blend's notebook is told to go on without it."
    plan = Plan("test", models=("efficientnet",), folds=(0, 1), parts=2, accelerators={"efficientnet": "gpu"})
    export_kernels(plan, tmp_path / "kernels")
    kaggle.outcomes[name("train-efficientnet-fold-1")] = [FAILED]
    campaign, left, _, _ = drive(tmp_path / "kernels")
    assert "train-efficientnet-fold-1 failed" in left and campaign.entry.state == "scored"
    assert sources(kaggle, "submit") == {"train-efficientnet-fold-0", "blend"}
    cells = "".join(each["source"] for each in json.loads(kaggle.kernels[name("blend")][0]["sent"]["text"])["cells"])
    assert "ALLOW_PARTIAL = True" in cells and kaggle.most["gpu"] == 2
    export_kernels(plan, tmp_path / "kernels")  # what the campaign has left there is no obstacle
    assert [text.split()[0] for text in plan_campaign(tmp_path / "kernels")] == ["leave"]


def test_the_commands_of_the_readme(kaggle, tmp_path, monkeypatch, capsys):
    "Pasted together in an empty folder: datasets, every kernel once, and a submission with its score."
    block = re.search(r"## To Kaggle\n.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    commands = [line.partition("#")[0].replace("NAME", "test").split() for line in block.splitlines()]
    assert len(commands) == 5
    kaggle.datasets.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rsnape_kit.kaggle.bundle.resolve", lambda *_: [])  # pip cannot reach an index past the stub
    monkeypatch.setattr("rsnape_kit.kaggle.campaign.run_campaign", partial(run_campaign, sleep=lambda seconds: None))
    for program, *words in commands:
        assert program == "rsnape"
        try:
            main(words)
        except SystemExit as end:
            assert words == ["campaign"] and end.code is None, end
    assert capsys.readouterr().out.strip().endswith("everything is done")
    assert set(kaggle.datasets) == {"test/rsnape-kit", "test/rsnape-kit-tpu"}
    assert [len(versions) for versions in kaggle.kernels.values()] == [1] * len(kernels_of(Plan()))
    assert [each["status"] for each in kaggle.submissions] == ["COMPLETE"]


def late(progress: float) -> tuple:
    return "COMPLETE", {"result.json": {"finished": False, "reason": "time is up", "progress": progress}}


def test_a_session_that_runs_out_of_time_is_resumed(kaggle, kernels):
    kaggle.outcomes[name("train-a-fold-1")] = [late(.4), late(.8)]
    campaign, left, _, _ = drive(kernels)
    assert left == "" and kaggle.pushes(name("train-a-fold-1")) == 3
    sent = [each["sent"].get("kernelDataSources") for each in kaggle.kernels[name("train-a-fold-1")]]
    assert [name("train-a-fold-1") in each for each in sent] == [False, True, True]
    assert campaign.kernel(name("train-a-fold-1")).sessions == 3 and len(kaggle.kernels[name("train-b-fold-1")]) == 1


@pytest.mark.parametrize("ends, sessions, words", [
    ([late(.4), late(.4)], 6, "two sessions ended at the same progress, 0.4"),
    ([late(.1), late(.2), late(.3)], 3, "after 3 sessions, the limit")])
def test_a_training_that_does_not_get_on_is_stopped(kaggle, kernels, ends, sessions, words):
    kaggle.outcomes[name("train-a-fold-1")] = ends
    campaign, left, _, _ = drive(kernels, sessions=sessions)
    assert words in left and kaggle.pushes(name("train-a-fold-1")) == len(ends)
    assert sources(kaggle, "blend") == {"train-a-fold-0", "train-b-fold-0"} and campaign.entry.state == "scored"


def test_a_failed_fold_is_left_out_and_can_be_tried_again(kaggle, kernels):
    kaggle.outcomes[name("train-a-fold-1")] = [FAILED]
    campaign, left, _, shown = drive(kernels)
    assert "rsnape-kit-train-a-fold-1 failed: ended as error; MemoryError: 29 GB are not enough" in left
    assert "rsnape-kit-train-b-fold-1 did not start: it needs train-a-fold-1" in left and "--retry" in left
    assert sources(kaggle, "blend") == {"train-a-fold-0", "train-b-fold-0"}
    assert sources(kaggle, "submit") == {"train-a-fold-0", "train-b-fold-0", "blend"}
    assert "without train-a-fold-1, train-b-fold-1" in shown[-1]
    assert campaign.entry.state == "scored"

    campaign, left, _, _ = drive(kernels, retry=True)
    assert left == "" and states(campaign) == dict.fromkeys(ALL, "done")
    assert {each: kaggle.pushes(name(each)) for each in ("train-a-fold-0", "train-a-fold-1", "blend", "submit")} == {
        "train-a-fold-0": 1, "train-a-fold-1": 2, "blend": 2, "submit": 2}
    assert sources(kaggle, "blend") == set(RUNS) and len(kaggle.submissions) == 2


def test_strict_and_a_campaign_without_any_run_stop_before_the_blend(kaggle, kernels):
    kaggle.outcomes = {name(f"train-a-fold-{fold}"): [FAILED, FAILED] for fold in "01"}
    kaggle.outcomes[name("train-a-fold-0")] = []
    _, left, _, _ = drive(kernels, strict=True)
    assert "rsnape-kit-blend did not start" in left and not kaggle.pushes(name("blend")) and not kaggle.submissions
    kaggle.outcomes[name("train-b-fold-0")] = [None, FAILED]
    kaggle.outcomes[name("train-a-fold-0")] = [None, FAILED]
    _, left, _, _ = drive(kernels, retry=True, again=["train-a-fold-0", "train-b-fold-0"])
    assert "rsnape-kit-submit did not start" in left and not kaggle.pushes(name("blend")) and not kaggle.submissions


def test_a_vanished_dataset_stops_its_kernels_only(kaggle, kernels):
    meta = kernels / "train-a-fold-1" / "kernel-metadata.json"
    meta.write_text(meta.read_text().replace("test/rsnape-kit\"", "test/weights\""))
    campaign, left, _, _ = drive(kernels)
    assert "dataset_sources has test/weights, which does not exist" in left and campaign.entry.state == "scored"
    assert not kaggle.pushes(name("train-a-fold-1")) and pushed_once(kaggle, ["train-a-fold-0", "blend", "submit"])


def test_a_bundle_that_was_deleted_on_kaggle_is_sent_again(kaggle, small, bundle):
    drive(small, [bundle], once=True)
    drive(small, [bundle], once=True)
    kaggle.datasets.clear()
    assert drive(small, [bundle])[1] == ""
    assert len(kaggle.sent("CreateDataset")) == 1 and pushed_once(kaggle, ["train-a-fold-0", "submit"])


def test_a_source_outside_the_campaign_is_waited_for(kaggle, kernels):
    for part in PARTS:  # somebody pushes them by hand
        kaggle.SaveKernel({"slug": name(part), "text": "", "enableTpu": False, "enableGpu": False})
    for part in PARTS:
        (kernels / part / "kernel-metadata.json").unlink()
    campaign, left, _, shown = drive(kernels)
    assert left == "" and pushed_once(kaggle)
    assert "kernel_sources has test/rsnape-kit-prepare-0, which is queued, not complete" in shown[0]


def test_some_models_and_folds(kaggle, kernels):
    campaign, left, _, _ = drive(kernels, models=["a"], folds=[1])
    assert left == "" and not kaggle.pushes(name("train-a-fold-0"))
    assert sources(kaggle, "blend") == {"train-a-fold-1"} and sources(kaggle, "submit") == {"train-a-fold-1", "blend"}


@pytest.mark.parametrize("words, problem", [
    ("--models c", "trains model c: expected some of a, b"), ("--folds 0 7", "trains fold 7: expected some of 0, 1"),
    ("--models b --folds 1", "has no kernels of these models and folds")])
def test_models_and_folds_of_no_kernel_are_refused(kaggle, kernels, words, problem):
    "Nothing is started: the submission would run, and be entered, without any model."
    (kernels / "train-b-fold-1" / "train.py").unlink()
    (kernels / "train-b-fold-1" / "kernel-metadata.json").unlink()
    for option in ("--once", "--dry-run"):
        with pytest.raises(SystemExit, match=problem):
            main(["campaign", str(kernels), option, *words.split()])
    assert not kaggle.calls


def test_the_next_command_keeps_to_the_chosen_models_and_folds(kaggle, kernels):
    _, left, _, _ = drive(kernels, models=["a", "b"], folds=[1], strict=True, once=True)
    assert left.endswith(f"go on with: rsnape campaign {kernels} --models a b --folds 1 --strict")


def test_the_submission_of_another_account_is_entered_too(kaggle, small):
    "Both are version 1; what the first account has entered is not in the list of the second."
    drive(small)
    kaggle.submissions.clear()
    for path in small.glob("*/kernel-metadata.json"):
        path.write_text(path.read_text().replace("test/rsnape-kit-", "other/rsnape-kit-"))
    assert plan_campaign(small)[-1] == "enter the submission of rsnape-kit-submit"
    campaign, left, _, _ = drive(small)
    assert left == "" and len(kaggle.submissions) == 1 and campaign.entry.kernel == "other/rsnape-kit-submit"


def test_a_run_without_a_submission_is_not_entered(kaggle, small, monkeypatch):
    monkeypatch.setattr(kaggle, "ListKernelSessionOutput", lambda body: (200, {"files": [], "log": "no output"}))
    _, left, _, _ = drive(small)
    assert "rsnape-kit-submit failed: no submission.csv among its outputs" in left and not kaggle.submissions


def test_faults_of_a_kernel_are_found_before_it_is_sent(kaggle, kernels):
    meta = kernels / "train-a-fold-1" / "kernel-metadata.json"
    meta.write_text(meta.read_text().replace('"language": "python"', '"language": "perl"'))
    _, left, _, _ = drive(kernels)
    assert "language is 'perl'" in left and not kaggle.pushes(name("train-a-fold-1"))


def test_a_refused_login_stops_the_driver_and_no_kernel(kaggle, kernels):
    kaggle.faults["GetKernel"] = (401, {"code": 401, "message": "Unauthenticated"})
    with pytest.raises(KaggleError, match="is the API token valid"):
        drive(kernels)
    kaggle.faults.clear()
    assert drive(kernels)[1] == ""


def test_a_second_driver_is_refused(kaggle, small):
    with exclusive(small / CAMPAIGN), pytest.raises(RuntimeError, match="another process drives this campaign"):
        drive(small)


def test_a_dry_run_shows_the_order_and_sends_nothing(kaggle, kernels, bundle):
    found = plan_campaign(kernels, [bundle])
    assert found[0].startswith("send the dataset test/rsnape-kit") and not kaggle.calls
    assert [text.split()[1].rpartition("/")[2] for text in found[1:-1]] == [
        *PARTS, "train-a-fold-0", "train-a-fold-1", "train-b-fold-0", "train-b-fold-1", "blend", "submit"]
    assert found[-1] == "enter the submission of rsnape-kit-submit" and not (kernels / CAMPAIGN).exists()


def test_a_dry_run_shows_what_is_run_again_and_what_is_not(kaggle, kernels):
    kaggle.outcomes = {name("train-b-fold-0"): [FAILED]}
    drive(kernels)
    failed, = plan_campaign(kernels)
    assert failed.startswith("leave rsnape-kit-train-b-fold-0, which failed (option --retry): ended as error")
    pushes = ["train-b-fold-0", "blend", "submit"]
    for options in ({"retry": True}, {"again": ["train-b-fold-0"]}):
        assert plan_campaign(kernels, **options)[0].startswith("find the dataset test/rsnape-kit on Kaggle")
        assert [text.split()[1].rpartition("/")[2] for text in plan_campaign(kernels, **options)[1:-1]] == pushes
        assert plan_campaign(kernels, **options)[-1] == "enter the submission of rsnape-kit-submit"


def test_a_folder_that_is_no_bundle_is_named(kaggle, kernels, tmp_path):
    with pytest.raises(SystemExit, match="nothing/dataset-metadata.json does not exist"):
        main(["campaign", str(kernels), "--once", "--bundles", str(tmp_path / "nothing")])
    assert not kaggle.calls


def test_a_damaged_state_says_what_to_do(kaggle, small):
    drive(small)
    (small / CAMPAIGN).write_text((small / CAMPAIGN).read_text()[:99])
    with pytest.raises(SystemExit, match="damaged or no JSON .* delete it and run the campaign again"):
        main(["campaign", str(small), "--once"])
    (small / CAMPAIGN).unlink()
    assert drive(small)[1] == "" and pushed_once(kaggle, ["train-a-fold-0", "submit"]) and len(kaggle.submissions) == 1


def test_the_command_makes_one_pass_and_names_the_next_step(kaggle, kernels, capsys):
    with pytest.raises(SystemExit, match="8 kernels are running or waiting, go on with: rsnape campaign"):
        main(["campaign", str(kernels), "--once", "--limit", "cpu=1"])
    assert kaggle.pushes(name("prepare-0")) == 1 and not kaggle.pushes(name("prepare-1"))
    main(["campaign", str(kernels), "--dry-run"])
    assert "wait for rsnape-kit-prepare-0\npush" in capsys.readouterr().out
