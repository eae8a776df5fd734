"""The site of docs/: every public name stands in the reference once, every page in the contents, nothing asks the network."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import interp
from interp import cli

from .plots.browser import Page

ROOT = Path(interp.__file__).parents[1]
DOCS = ROOT / "docs"


def entries(part: object) -> list[str]:
    """The pages of a part of the contents."""
    if isinstance(part, str):
        return [part]
    return [page for one in (part.values() if isinstance(part, dict) else part) for page in entries(one)]  # type: ignore[attr-defined]


def test_every_public_name_stands_in_the_reference_once() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))
    shown = Counter(re.findall(r"^::: interp\.(\w+)$", text, re.MULTILINE))
    assert shown == Counter(interp.__all__)


def test_what_else_the_reference_shows_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))
    names = re.findall(r"^::: interp\.(\w+(?:\.\w+)+)$", text, re.MULTILINE)
    assert names
    for name in names:
        assert pkgutil.resolve_name(f"interp.{name}") is not None


def test_the_page_of_the_command_line_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert page.split("```text\n")[1].split("```")[0].split() == capsys.readouterr().out.split()


def test_every_page_stands_in_the_contents() -> None:
    (nav,) = re.findall(r"^nav:\n(?:[ -].*\n)+", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = entries(yaml.safe_load(nav)["nav"])
    assert len(pages) == len(set(pages))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} == set(pages)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    if find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the site needs mkdocs: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "WARNING" not in ran.stderr, ran.stderr
    return folder


def test_the_reference_has_parameters_and_examples(site: Path) -> None:
    page = (site / "reference" / "experiments.html").read_text(encoding="utf-8")
    for words in ('id="interp.patch"', "Parameters:", "Examples:", "&gt;&gt;&gt; "):
        assert words in page


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["index", "reference/plans", "tutorials/tour", "families"])
def test_pages_open_from_a_folder_and_ask_for_nothing_else(name: str, width: int, site: Path, chromium: str) -> None:
    with opened(site / f"{name}.html", width) as page:
        assert page.errors == []
        outside = [url for url in page.requests if not url.startswith((site.as_uri(), "data:", "blob:"))]
        assert outside == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


def test_search_needs_no_server(site: Path, chromium: str) -> None:
    with opened(site / "reference" / "plots.html", 1280) as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.evaluate("document.querySelector('.md-search__input').focus()")
        for letter in "causal_trace":
            page.call("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            page.call("Input.dispatchKeyEvent", type="keyUp", key=letter)
        found = page.evaluate("""(async () => { for (let i = 0; i < 200; i++) {
            const links = [...document.querySelectorAll(".md-search-result__link")];
            if (links.length) return links.map((link) => link.href);
            await new Promise((done) => setTimeout(done, 50)); } return []; })()""")
        assert any("experiments.html" in link and "interp.causal_trace" in link for link in found), found
        assert page.errors == []


class opened(Page):
    """A page of the site: ready when the theme has set it up."""

    def __init__(self, path: Path, width: int) -> None:
        super().__init__(path, width)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        self.evaluate("""(async () => { for (let i = 0; i < 200; i++) {
            if (document.readyState === "complete" && document.documentElement.classList.contains("js")) return;
            await new Promise((done) => setTimeout(done, 50)); } })()""")
