"""A page in headless Chromium, driven over the DevTools protocol through two pipes: no port needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from interp.plots.page import find_chromium

# What is drawn on canvases is text to a reader and pixels to the DOM: keep each word and the corners of its
# ink, of the last drawing of each canvas.
_RECORD_TEXT = """
const drawn = window.drawnText = new Map(), context = CanvasRenderingContext2D.prototype;
const {fillText, clearRect} = context;
context.clearRect = function (...box) { drawn.set(this.canvas, []); return clearRect.apply(this, box); };
context.fillText = function (text, x, y, ...more) {
  const ink = this.measureText(text), at = this.getTransform();
  const left = x - ink.actualBoundingBoxLeft, right = x + ink.actualBoundingBoxRight;
  const top = y - ink.actualBoundingBoxAscent, bottom = y + ink.actualBoundingBoxDescent;
  const corners = [[left, top], [right, top], [right, bottom], [left, bottom]].map(([a, b]) => {
    const p = at.transformPoint(new DOMPoint(a, b)); return [p.x, p.y]; });
  if (!drawn.has(this.canvas)) drawn.set(this.canvas, []);
  drawn.get(this.canvas).push({text, corners, width: this.canvas.width, height: this.canvas.height});
  return fillText.call(this, text, x, y, ...more);
};
"""


class Page:
    """An opened page: `errors` and `requests` collect what it logged and asked for.

    Args:
        path: an .html file; the page is ready when Bokeh has drawn it.
        width, height: size of the window in CSS px.
    """

    def __init__(self, path: Path, width: int = 1440, height: int = 900) -> None:
        self.path, self.size = Path(path), (width, height)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._buffer, self._id, self._session = b"", 0, None

    def __enter__(self) -> Page:
        browser = find_chromium()
        assert browser, "CI=true asks for Chromium, and there is none"
        self._profile = tempfile.TemporaryDirectory(prefix="interp-browser-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read, from_write)]  # clear of 3 and 4, which follow
        os.close(to_read)
        os.close(from_write)
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-quic", "--disable-dev-shm-usage",
            f"--user-data-dir={self._profile.name}", f"--window-size={self.size[0]},{self.size[1]}",
            "--remote-debugging-pipe",
        ]  # fmt: skip
        redirect = f'exec "$0" "$@" 3</dev/fd/{ends[0]} 4>/dev/fd/{ends[1]}'
        self._process = subprocess.Popen(
            ["sh", "-c", redirect, browser, *flags],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for fd in ends:
            os.close(fd)
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=_RECORD_TEXT)
        self.call("Page.navigate", url=self.path.absolute().as_uri())
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(20)
        except Exception:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; events that arrive before its answer are collected."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
                chunk = os.read(self._from, 1 << 20) if ready else b""
                if not chunk:
                    raise RuntimeError(f"Chromium did not answer {method}")
                self._buffer += chunk
            line, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._event(answer)
        raise RuntimeError(f"Chromium did not answer {method}")

    def _event(self, event: dict[str, Any]) -> None:
        data = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(data["exceptionDetails"].get("exception", {}).get("description", str(data)))
            case "Runtime.consoleAPICalled" if data["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(a.get("value", a)) for a in data["args"]))
            case "Log.entryAdded" if data["entry"]["level"] in ("error", "warning"):
                self.errors.append(data["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(data["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(data["url"])

    @property
    def network(self) -> list[str]:
        """Requests that would leave the machine: all but the page itself and data it holds."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", self.path.absolute().as_uri()))]

    def evaluate(self, code: str) -> Any:
        """The JSON value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", code))
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {condition}; console: {self.errors}")
            time.sleep(0.05)

    def mouse(self, x: float, y: float, click: bool = False) -> None:
        """Move to a point of the window, and perhaps click there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, model_id: str, x: float, y: float) -> tuple[float, float]:
        """Where data coordinates of the Bokeh figure with this id are in the window, scrolled into view."""
        return tuple(
            self.evaluate(f"""(() => {{
            const view = Bokeh.index.find_one_by_id({json.dumps(model_id)});
            view.el.scrollIntoView({{block: "center"}});
            const box = view.canvas_view.el.getBoundingClientRect(), frame = view.frame;
            return [box.left + frame.x_scale.compute({x}), box.top + frame.y_scale.compute({y})];
        }})()""")
        )

    def shadow_text(self) -> str:
        """All text of the page, through the shadow roots in which Bokeh draws."""
        return self.evaluate("""(() => {
            const walk = (node) => [...node.childNodes].map((child) =>
                child.nodeType === 3 ? child.textContent
                : ["STYLE", "SCRIPT"].includes(child.nodeName) ? ""
                : (child.shadowRoot ? walk(child.shadowRoot) : "") + " " + walk(child)).join("");
            return walk(document.body);
        })()""")

    def drawn(self) -> list[list[dict[str, Any]]]:
        """Per canvas the words on it: text, four corners of the ink, width and height of the canvas."""
        return self.evaluate("[...drawnText.values()]")

    def screenshot(self, path: Path) -> Path:
        """A PNG of the window."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return Path(path)
