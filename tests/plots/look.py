"""A page as different readers meet it: a size, light or dark, on paper; and what axe-core finds wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.plots.browser import Page


class Seen(Page):
    """An opened page in a colour scheme."""

    def __init__(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        super().__init__(path, width, 900)
        self.scheme = scheme

    def open(self, path: Path) -> None:
        features = [{"name": "prefers-color-scheme", "value": self.scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        super().open(path)

    def print_it(self) -> None:
        """Show it as on paper."""
        self.call("Emulation.setEmulatedMedia", media="print")
        self.evaluate("new Promise((done) => setTimeout(done, 100))")

    def violations(self) -> list[str]:
        """What axe-core says against it, contrast of colours included."""
        spec = find_spec("axe_core_python")
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent.joinpath("axe.min.js").read_text(encoding="utf-8")
        self.evaluate(source + ";0")
        found: list[dict[str, Any]] = self.evaluate(
            "axe.run({resultTypes: ['violations']}).then((run) => run.violations.map((v) => "
            "({id: v.id, where: v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200))})))"
        )
        return [f"{each['id']}: {each['where']}" for each in found]

    def sideways(self) -> int:
        """How far the page itself can be scrolled to the side, px."""
        return int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


#: How a page is met: width in px, and scheme. The first two are looked at in every run of the tests.
WAYS = ((1280, "light"), (400, "dark"), (1280, "dark"), (400, "light"))


def assert_pleasant(path: Path, ways: Sequence[tuple[int, str]] = WAYS) -> None:
    """No error, request or violation, at this width and in this scheme, and on paper; nothing scrolls sideways."""
    for width, scheme in ways:
        with Seen(path, width, scheme) as page:
            assert page.errors == [] and page.network == [], (width, scheme)
            assert page.violations() == [], (width, scheme)
            assert page.sideways() <= 0, (width, scheme)
            page.print_it()
            ink = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
            assert ink == "#000000" and page.errors == []
