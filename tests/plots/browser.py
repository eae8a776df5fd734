"""A page of ours, opened as a reader would: what it logged, asked for and wrote, and a mouse."""

from __future__ import annotations

import atexit
import json
from pathlib import Path
from typing import Any

from interp.plots.browser import Browser

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


_kept: list[Browser] = []


def chromium() -> Browser:
    """The Chromium in which all pages of this process are tabs; a new one where it has ended."""
    if not _kept or _kept[-1]._process.poll() is not None:
        _kept.append(Browser().__enter__())
        atexit.register(_kept[-1].__exit__)
    return _kept[-1]


class Page(Browser):
    """An opened page, a tab of its own: `errors` and `requests` collect what it logged and asked for.

    Args:
        path: an .html file; the page is ready when Bokeh has drawn it.
        width, height: size of the window in CSS px.
    """

    def __init__(self, path: Path, width: int = 1440, height: int = 900) -> None:
        super().__init__(width, height)
        self.path = Path(path)
        self.errors: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Page:
        host = chromium()
        self._name, self._log, self._process = host._name, host._log, host._process
        self._to, self._from = host._to, host._from
        self._tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        try:
            self._session = self.call("Target.attachToTarget", targetId=self._tab, flatten=True)["sessionId"]
            width, height = self.size
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.call("Emulation.setDeviceMetricsOverride", **metrics)
            self.call("Page.enable")
            for domain in ("Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.call("Page.addScriptToEvaluateOnNewDocument", source=_RECORD_TEXT)
            self.open(self.path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.call("Target.closeTarget", targetId=self._tab)

    def event(self, event: dict[str, Any]) -> None:
        """Keep what the page logged and asked for; a closed tab may have a last word."""
        if event.get("sessionId") != self._session:
            return
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

    def save(self, path: Path) -> Path:
        """A PNG of the window."""
        Path(path).write_bytes(self.screenshot())
        return Path(path)
