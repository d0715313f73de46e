"The stub of Kaggle with sessions: limits, lifecycles over requests, outputs, logs, quota, submissions, scores."
import json

from kaggle_stub import Stub

KEYS = {"kernelDataSources": "invalidKernelSources", "datasetDataSources": "invalidDatasetSources"}
DONE = {"result.json": {"finished": True}}


class Kaggle(Stub):
    """Kernels of one user. A session is queued, runs, and ends after some requests for its status.

    `outcomes` has the ends of a kernel's sessions in order, each as (status, files) or (status, files, log); after the
    last, and for other kernels, sessions complete with a result.json that says that they are finished.
    """

    def __init__(self):
        super().__init__()
        self.kernels = {}  # name -> its versions
        self.outcomes = {}
        self.limits = {"gpu": 2, "tpu": 1, "cpu": 5}
        self.refuses_by = "text"  # how a push beyond a limit is refused: 'text' in the response, or 'status' 400
        self.length = 2  # requests for the status until a session ends
        self.most = dict.fromkeys(self.limits, 0)  # sessions that ran at once
        self.submissions = []
        self.scoring = 2  # requests for the list until a submission has its score

    def pushes(self, name: str) -> int:
        return len(self.kernels.get(name, []))

    def running(self, kind: str) -> int:
        versions = [version for each in self.kernels.values() for version in each]
        return sum(version["kind"] == kind and version["left"] > 0 for version in versions)

    def SaveKernel(self, body):
        name, kind = body["slug"], "tpu" if body["enableTpu"] else "gpu" if body["enableGpu"] else "cpu"
        if self.running(kind) >= self.limits[kind]:
            text = f"Maximum batch {kind.upper()} session count of {self.limits[kind]} reached."
            return (200, {"error": text}) if self.refuses_by == "text" else (400, {"code": 400, "message": text})
        missing = {KEYS[key]: [each for each in body.get(key) or [] if not self._has_output(each)] for key in KEYS}
        versions = self.kernels.setdefault(name, [])
        ends = self.outcomes.get(name, [])
        status, files, *log = ends[len(versions)] if len(versions) < len(ends) else ("COMPLETE", DONE)
        if name.endswith("submit"):
            files = files | {"submission.csv": {}}
        versions.append({"kind": kind, "left": self.length, "status": status, "files": files,
                         "log": log[0] if log else "", "sent": body})
        self.most[kind] = max(self.most[kind], self.running(kind))
        return 200, {"ref": "/" + name, "url": f"https://www.kaggle.com/code/{name}", "versionNumber": len(versions),
                     **{key: names for key, names in missing.items() if names}}

    def _has_output(self, name: str) -> bool:
        complete = [each for each in self.kernels.get(name, []) if each["left"] == 0 and each["status"] == "COMPLETE"]
        return name in self.datasets or bool(complete)

    def _versions(self, body) -> list:
        return self.kernels.get(f"{body['userName']}/{body['kernelSlug']}", [])

    def GetKernel(self, body):
        if not (versions := self._versions(body)):
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        sent = versions[-1]["sent"]
        return 200, {"blob": {"source": sent["text"]}, "metadata": {
            "slug": body["kernelSlug"], "currentVersionNumber": len(versions),
            "kernelDataSources": sent.get("kernelDataSources", [])}}

    def GetKernelSessionStatus(self, body):
        if not (versions := self._versions(body)):
            return 404, {"code": 404, "message": "Not found"}
        last = versions[-1]
        status = "QUEUED" if last["left"] == self.length else "RUNNING" if last["left"] else last["status"]
        last["left"] = max(last["left"] - 1, 0)
        return 200, {"status": status}

    def ListKernelSessionOutput(self, body):
        versions, page = self._versions(body), int(body.get("pageToken") or 0)
        name, names = f"{body['userName']}/{body['kernelSlug']}", sorted(versions[-1]["files"])
        url = f"http://files.localhost/{name}/{len(versions)}"
        files = [{"fileName": each, "url": f"{url}/{each}"} for each in names[page:page + 1]]  # one a page
        more = {"nextPageToken": str(page + 1)} if page + 1 < len(names) else {}
        log = json.dumps([{"stream_name": "stderr", "data": versions[-1]["log"]}])
        return 200, {"files": files, "log": log, **more}

    def download(self, path: str) -> tuple:
        owner, slug, version, file = path.strip("/").split("/")
        return 200, json.dumps(self.kernels[f"{owner}/{slug}"][int(version) - 1]["files"][file]).encode()

    def GetAcceleratorQuotaStatistics(self, body):
        return 200, {"gpuQuota": {"timeUsed": "3600s", "totalTimeAllowed": "108000s"},
                     "quotaRefreshTime": "2026-12-05T00:00:00Z"}

    def CreateCodeSubmission(self, body):
        self.submissions.append({"ref": len(self.submissions) + 1, "description": body["submissionDescription"],
                                 "status": "PENDING", "left": self.scoring})
        return 200, {"message": f"Successfully submitted to {body['competitionName']}", "ref": len(self.submissions)}

    def ListSubmissions(self, body):
        for each in self.submissions:
            each["left"] -= 1
            if each["left"] < 0:
                each.update(status="COMPLETE", publicScore="0.204")
        shown = [{key: value for key, value in each.items() if key != "left"} for each in self.submissions]
        return 200, {"submissions": shown}
