"Watching a run and waiting for a score through the real client, from a server on loopback that has hiccups."
import pytest

from rsnape_kit.kaggle.client import KaggleError
from rsnape_kit.kaggle.runtime import COMPETITION
from rsnape_kit.kaggle.scores import submissions, watch_kernel, watch_score

pytest.importorskip("kaggle.api.kaggle_api_extended", reason="pip install kaggle==2.2.4 six")
from kaggle_files import connected  # noqa: E402


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    with connected(monkeypatch, tmp_path / "home") as stub:
        yield stub


def listed(ref, status="COMPLETE", score="0.2", description="mine", **more):
    return {"ref": ref, "date": f"2026-11-{ref:02}T09:30:15.000Z", "description": description, "status": status,
            "publicScore": score, "privateScore": "", **more}


def test_a_run_is_watched_through_hiccups(kaggle, capsys):
    kaggle.kernel_states = ["QUEUED", "QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    kaggle.first = [None, (502, {}), (429, {"code": 429, "message": "Too many requests"})]
    watch_kernel("me/submit", poll=0, sleep=lambda seconds: None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [f"the kernel me/submit is {state}, 0 min so far" for state in ("queued", "running")]


def test_a_failed_run_names_the_log(kaggle):
    kaggle.kernel_states = ["ERROR"]
    with pytest.raises(KaggleError, match="ended as error: Out of memory. Read `rsnape logs me/submit`"):
        watch_kernel("me/submit")


def test_submissions_are_listed_newest_first(kaggle):
    kaggle.submissions = [listed(3), listed(9, "PENDING", ""), listed(5, "ERROR", "", errorDescription="no\nfile")]
    newest, failed, oldest = submissions()
    assert [each.ref for each in (newest, failed, oldest)] == [9, 5, 3]
    assert str(newest) == "2026-11-09 09:30  pending   no score yet  mine"
    assert str(failed) == "2026-11-05 09:30  error     no file  mine"
    assert str(oldest) == "2026-11-03 09:30  complete  public 0.2  mine"
    assert kaggle.sent("ListSubmissions")[0]["competitionName"] == COMPETITION


def test_the_score_of_the_new_submission_is_waited_for(kaggle):
    kaggle.submissions = [listed(1)]
    known = [each.ref for each in submissions()]
    kaggle.submissions.append(listed(2, description="a colleague's"))
    steps = [lambda: kaggle.submissions.append(listed(3, "PENDING", "")), lambda: kaggle.first.append((503, {})),
             lambda: kaggle.submissions[-1].update(status="COMPLETE", publicScore="0.204", privateScore="0.211")]
    done = watch_score(known, "mine", sleep=lambda seconds: steps.pop(0)())
    assert (done.ref, done.public, done.private) == (3, "0.204", "0.211") and not steps


def test_a_submission_that_fails_or_stays_without_a_score_is_an_error(kaggle):
    kaggle.submissions = [listed(4, "ERROR", "", errorDescription="Notebook Timeout")]
    with pytest.raises(KaggleError, match="could not score the submission: Notebook Timeout"):
        watch_score([], "mine")
    with pytest.raises(KaggleError, match="the submission is still pending after 0 min"):
        watch_score([4], "mine", wait=-1)
