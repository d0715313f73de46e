"Drive a headless Chromium over a pipe: no driver, no package, no port."
import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")


class Browser:
    "One page in a browser; a context."

    def __init__(self, profile: Path, width: int = 1000, height: int = 1300):
        theirs, self._out = os.pipe()
        self._in, back = os.pipe()
        pipes = f'exec "$@" 3<&{theirs} 4>&{back}'
        self.process = subprocess.Popen(["bash", "-c", pipes, "sh", PROGRAM, *FLAGS, f"--user-data-dir={profile}"],
                                        pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        os.close(theirs), os.close(back)
        self._number, self._rest, self._session, self.events = 0, b"", None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._out)  # the browser ends with its pipe
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self._in)

    def _receive(self, seconds: float) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser said nothing for {seconds} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise RuntimeError(f"the browser ended with status {self.process.wait()}")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def __call__(self, method: str, **params) -> dict:
        "Run a command of the DevTools protocol; events that arrive meanwhile are kept."
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        os.write(self._out, data)
        while True:
            answer = self._receive(60)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path):
        "Load a file and wait until it is shown."
        self("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(60))

    def eval(self, script: str):
        "Return the value of a JavaScript expression; promises are awaited."
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str):
        "Press a key."
        text = {"text": name} if len(name) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, **(text if kind == "keyDown" else {}))

    def mouse(self, kind: str, x: float, y: float, **more):
        "Send an event of the mouse."
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float):
        "Press and release the left button."
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", buttons=int(kind == "mousePressed"), clickCount=1)

    def resize(self, width: int, height: int, mobile: bool = False):
        "Set the size of the window."
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def box(self, selector: str) -> dict:
        "Return x, y, width, height of an element in the window, scrolled into it."
        self.eval(f"document.querySelector({selector!r}).scrollIntoView({{block: 'nearest'}})")
        return self.eval(f"(() => {{const b = document.querySelector({selector!r}).getBoundingClientRect();"
                         "return {x: b.x, y: b.y, width: b.width, height: b.height}})()")

    def photograph(self, **clip) -> bytes:
        "Return a PNG of the window, or of a part of the document."
        part = {"clip": clip | {"scale": 1}} if clip else {}
        return base64.b64decode(self("Page.captureScreenshot", format="png", **part)["data"])
