"""A page in headless Chromium, driven over the DevTools protocol through two pipes: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import PlotError
from ..files import path_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 180.0  # s that one answer, or a page that draws itself, may take
_SIDE = 16000  # px; Chromium's limit on the side of a surface
_FLAGS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads descriptor 3 and writes 4; the pipes' own numbers are above those.
_PIPES = 'exec "$0" "$@" 3</dev/fd/{} 4>/dev/fd/{}'


def find_chromium() -> str | None:
    """Path of a Chromium: $INTERP_CHROMIUM, else the first of `BROWSERS` on the PATH, else None."""
    if chosen := os.environ.get("INTERP_CHROMIUM"):
        return shutil.which(str(path_of(chosen, PlotError, "INTERP_CHROMIUM")))
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """One tab of a Chromium of its own, closed with the `with` block; pages are drawn at `scale` px per CSS px.

    Raises:
        PlotError: no Chromium, or it ended or fell silent; the message says what it printed.
    """

    def __init__(self, width: int = 1280, height: int = 800, scale: float = 1.0) -> None:
        self.size, self.scale = (width, height), scale
        self._buffer, self._id, self._session, self._patience = b"", 0, None, PATIENCE

    def __enter__(self) -> Browser:
        executable = find_chromium()
        if executable is None:
            raise PlotError(
                "a picture needs headless Chromium, and none was found: install Chromium or Chrome "
                f"({', '.join(BROWSERS)}), or set INTERP_CHROMIUM to its path, or save as .html"
            )
        if sys.platform == "win32":
            raise PlotError("a picture can be made on Linux and macOS only: save as .html and print the page")
        self._name = executable
        with ExitStack() as undo:
            folder = undo.enter_context(TemporaryDirectory(prefix="interp-browser-", ignore_cleanup_errors=True))
            self._log = Path(folder, "log")
            self._start(folder, undo)
            undo.callback(self._stop)
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.call("Page.enable")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _start(self, folder: str, undo: ExitStack) -> None:
        """Start Chromium between two pipes."""
        import fcntl

        flags = [
            *_FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={self.size[0]},{self.size[1]}",
            f"--force-device-scale-factor={self.scale:g}",
        ]  # fmt: skip
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # Chromium refuses to start as root with it
        with ExitStack() as theirs, open(self._log, "wb") as log:
            ends = []
            for side in (0, 1):  # it reads the first pipe and writes the second
                pipe = os.pipe()
                undo.callback(os.close, pipe[1 - side])
                theirs.callback(os.close, pipe[side])
                ends.append(fcntl.fcntl(pipe[side], fcntl.F_DUPFD, 10))
                theirs.callback(os.close, ends[-1])
                if side:
                    self._from = pipe[0]
                else:
                    self._to = pipe[1]
            command = ["sh", "-c", _PIPES.format(*ends), self._name, *flags]
            self._process = subprocess.Popen(command, pass_fds=ends, stdout=log, stderr=log)

    def _stop(self) -> None:
        """Ask Chromium to end; make it, where it does not."""
        self._session, self._patience = None, 10.0
        try:
            with suppress(PlotError, OSError, subprocess.TimeoutExpired):
                self.call("Browser.close")
                self._process.wait(20)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()

    def open(self, path: Path) -> None:
        """Go to a page of ours and wait until it says that all is drawn."""
        self.call("Page.navigate", url=Path(path).absolute().as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def sides(self) -> tuple[int, int]:
        """Width and height of the page, px, as it says."""
        width, height = self.evaluate("['width', 'height'].map((side) => +document.documentElement.dataset[side])")
        return int(width), int(height)

    def png(self) -> bytes:
        """The whole page, however far it reaches beyond the window."""
        width, height = self.sides()
        shrink = min(1.0, _SIDE / (self.scale * max(width, height)))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": shrink}
        return self.screenshot(clip=clip, captureBeyondViewport=True)

    def screenshot(self, **options: Any) -> bytes:
        """A PNG of the window, or as `Page.captureScreenshot` takes it."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def evaluate(self, code: str) -> Any:
        """The JSON value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise PlotError(f"in the page: {result['exceptionDetails']['exception'].get('description', code)}")
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise PlotError(f"after {seconds:g} s the page in Chromium has not come to: {condition}")
            time.sleep(0.02)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its answer; events that arrive before it go to `event`."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._to, data) :]
        except BrokenPipeError:
            raise self._ended(method) from None
        end = time.monotonic() + self._patience
        while True:
            answer = json.loads(self._line(method, end))
            if answer.get("id") != self._id:
                self.event(answer)
            elif "error" in answer:
                raise PlotError(f"Chromium refused {method}: {answer['error']}")
            else:
                return answer["result"]

    def event(self, event: dict[str, Any]) -> None:
        """What happened in the page between two answers; nothing here needs it."""

    def _line(self, method: str, end: float) -> bytes:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise PlotError(f"Chromium ({self._name}) did not answer {method} within {self._patience:g} s")
            chunk = os.read(self._from, 1 << 20)
            if not chunk:
                raise self._ended(method)
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        return line

    def _ended(self, method: str) -> PlotError:
        try:
            code = f"ended with code {self._process.wait(5)}"
        except subprocess.TimeoutExpired:
            code = f"closed its pipe at {method}"
        printed = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        return PlotError(f"Chromium ({self._name}) {code}: {' | '.join(printed)}")
