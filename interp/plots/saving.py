"""Pictures of pages: PNG, PDF and SVG, through headless Chromium."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

from ..errors import PlotError
from .browser import Browser
from .theme import FONT, INK, MUTED

#: One root of Bokeh, redrawn as vectors; what stands beside the plots (choices) is left out.
_SVG = "[...Bokeh.index].map((view) => view.export('svg', false).ctx.get_serialized_svg(true))[0]"


@contextmanager
def opened(page: str, scale: float = 1.0) -> Iterator[Browser]:
    """A page in a browser of its own, as wide as its content."""
    with tempfile.TemporaryDirectory(prefix="interp-page-") as folder, Browser(scale=scale) as browser:
        path = Path(folder, "page.html")
        path.write_text(page, encoding="utf-8")
        browser.open(path)
        browser.evaluate("document.documentElement.dataset.whole = 'yes'")
        browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        yield browser


def png(page: str, scale: float) -> bytes:
    """A picture of the whole page."""
    with opened(page, scale) as browser:
        return browser.png()


def pdf(page: str) -> bytes:
    """The page on one sheet of its own size, in vectors but for canvases."""
    with opened(page, 2.0) as browser:
        width, height = browser.sides()
        inches = {"paperWidth": width / 96, "paperHeight": (height + 1) / 96}
        margins = dict.fromkeys(("marginTop", "marginBottom", "marginLeft", "marginRight"), 0)
        browser.call("Emulation.setEmulatedMedia", media="screen")
        said = browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=False, **inches, **margins)
        return base64.b64decode(said["data"])


def svg(page: str, title: str, subtitle: str, drawn: bool) -> bytes:
    """Vectors of what Bokeh drew under title and subtitle; of coloured text (not `drawn`) the page itself inside an SVG."""
    with opened(page) as browser:
        if not drawn:
            width, height = browser.sides()
            code = "new XMLSerializer().serializeToString(document.querySelector('main'))"
            styles = "[...document.querySelectorAll('style')].map((style) => style.textContent).join('\\n')"
            body = f"<style>{escape(browser.evaluate(styles))}</style>{browser.evaluate(code)}"
            box = f'<div xmlns="http://www.w3.org/1999/xhtml" style="font-family:{FONT}">{body}</div>'
            inside = f'<foreignObject width="{width}" height="{height}">{box}'
            return framed(title, width, height, inside + "</foreignObject>")
        picture = browser.evaluate(_SVG)
        inner = browser.evaluate(
            f"(() => {{ const found = new DOMParser().parseFromString({picture!r}, 'image/svg+xml').documentElement;"
            " return [+found.getAttribute('width'), +found.getAttribute('height')]; })()"
        )
    lines = [(20, 19, INK, 600, title), *((18, 13, MUTED, 400, line) for line in subtitle.splitlines())]
    top, texts = 10, []
    for step, size, color, weight, text in lines:
        top += step
        words = f'<text x="16" y="{top}" font-size="{size}" font-weight="{weight}" fill="{color}">{escape(text)}</text>'
        texts.append(words)
    head = f'<g font-family="{FONT}">{"".join(texts)}</g><g transform="translate(16 {top + 12})">{picture}</g>'
    longest = max((8 * len(text) for *_, text in lines), default=0)
    return framed(title, int(max(inner[0], longest) + 32), int(top + 28 + inner[1]), head)


def framed(title: str, width: int, height: int, inside: str) -> bytes:
    """An SVG document on white."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{inside}</svg>\n'
    ).encode()


#: What a suffix is written by: (page, title, subtitle, whether Bokeh drew it) -> bytes.
WRITERS: dict[str, Callable[[str, str, str, bool], bytes]] = {
    ".html": lambda page, *_: page.encode(),
    ".png": lambda page, *_: png(page, 2.0),
    ".pdf": lambda page, *_: pdf(page),
    ".svg": svg,
}


def written(suffix: str, name: str) -> Callable[[str, str, str, bool], bytes]:
    """What writes such files. PlotError: nothing does."""
    if suffix not in WRITERS:
        raise PlotError(f"cannot save a figure as {name!r}: the suffix must be one of {', '.join(WRITERS)}")
    return WRITERS[suffix]
