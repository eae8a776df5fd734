"""The page: standalone, quiet, and whole; its labels safe; its failures told."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from bokeh.io import curdoc

from interp.errors import PlotError
from interp.plots.browser import Browser, find_chromium
from interp.plots.labels import plain, told_apart, visible
from interp.plots.page import Figure, label_cells, panel
from tests.plots.browser import Page


def picture(width: int = 300, height: int = 200, title: str = 'A <title> & "more"') -> Figure:
    plot = panel((-0.5, 1.5), (-0.5, 0.5), width, height, "panel")
    plot.rect([0, 1], [0, 0], 1, 1)
    label_cells(plot, [" a", "$$$$"], ["0"], width // 2, height)
    return Figure(plot, title, "first line\nsecond <line>")


def test_page_opens_without_an_error_or_a_request(tmp_path: Path, chromium: str) -> None:
    with Page(picture().save(tmp_path / "page.html")) as page:
        assert page.errors == []
        assert page.network == []
        assert page.evaluate("document.title") == 'A <title> & "more"'
        assert "first line" in page.shadow_text() and "second <line>" in page.shadow_text()


def test_the_browser_helper_sees_errors_and_requests(tmp_path: Path, chromium: str) -> None:
    text = (
        picture()
        .html()
        .replace(
            "</main>",
            "</main><script src='http://127.0.0.1:9/x.js'></script><script>throw new Error('seen')</script>",
        )
    )
    (tmp_path / "bad.html").write_text(text)
    with Page(tmp_path / "bad.html") as page:
        assert page.network == ["http://127.0.0.1:9/x.js"]
        assert any("seen" in error for error in page.errors)


@pytest.mark.parametrize("size", [(300, 200), (1500, 1700)])
def test_png_holds_the_whole_page(tmp_path: Path, chromium: str, size: tuple[int, int]) -> None:
    path = picture(*size).save(tmp_path / "page.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 2 * size[0] + 2 * 56  # at two pixels per CSS pixel, with the margins
    assert height >= 2 * size[1] + 2 * 90
    if size[0] > 1000:
        assert width < 2 * size[0] + 400  # no wider than its content


def test_png_waits_for_a_page_that_is_slow_to_draw(tmp_path: Path, chromium: str) -> None:
    late = "const d=document.documentElement.dataset;setTimeout(()=>{d.width=700;d.height=1900;d.ready='yes'},1500)"
    (tmp_path / "late.html").write_text(f"<html><body><script>{late}</script></body></html>")
    with Browser(scale=1.5) as browser:
        browser.open(tmp_path / "late.html")
        assert struct.unpack(">II", browser.png()[16:24]) == (1050, 2850)


def test_png_without_a_browser_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CHROMIUM", str(tmp_path / "nowhere"))
    assert find_chromium() is None
    with pytest.raises(PlotError, match=r"install Chromium or Chrome.*INTERP_CHROMIUM.*save as \.html"):
        picture().save(tmp_path / "page.png")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("INTERP_CHROMIUM", str(broken))
    with pytest.raises(PlotError, match="ended with code 3: no display"):
        picture().save(tmp_path / "page.png")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
    held = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(PlotError, match="ended with code 3"), Browser():
            pass
    assert len(os.listdir("/dev/fd")) == held


def test_save_refuses_other_suffixes_and_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"'page\.jpg'.*one of \.html, \.png, \.pdf, \.svg"):
        picture().save(tmp_path / "page.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlotError, match=r"cannot write .*page\.html"):
        picture().save(tmp_path / "file" / "page.html")


def test_a_figure_can_be_saved_twice_and_holds_no_bokeh_state(tmp_path: Path) -> None:
    before = list(curdoc().roots)
    figure = picture()
    first = figure.save(tmp_path / "a.html").stat().st_size
    assert abs(figure.save(tmp_path / "b.html").stat().st_size - first) < 2000
    assert curdoc().roots == before
    assert "bokeh-widgets" not in figure.html()  # only the parts of BokehJS that the picture needs


def test_importing_the_room_changes_no_theme() -> None:
    code = (
        "from bokeh.io import curdoc; from bokeh.plotting import figure;"
        "before = curdoc().theme, figure().title.text_font; import interp.plots;"
        "assert before == (curdoc().theme, figure().title.text_font)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_notebooks_get_the_page_in_a_frame(tmp_path: Path, chromium: str) -> None:
    bundle = picture(height=900)._repr_mimebundle_()
    assert bundle["text/plain"] == "Figure('A <title> & \"more\"')"
    (tmp_path / "notebook.html").write_text(
        "<!DOCTYPE html><html><body>" + bundle["text/html"] + "<script>"
        "const f = document.querySelector('iframe'), t = setInterval(() => {"
        "if (f.contentDocument.documentElement?.dataset.ready && f.clientHeight > 900)"
        " { clearInterval(t); document.documentElement.dataset.ready = 'yes'; }}, 50)</script></body></html>"
    )
    with Page(tmp_path / "notebook.html") as page:  # ready once the frame has drawn and has grown to fit
        assert page.errors == []
        assert [url for url in page.network if not url.startswith("about:")] == []


def test_show_opens_a_temporary_page(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    picture().show()
    page = Path(opened[0].removeprefix("file://"))
    assert "<title>A &lt;title&gt;" in page.read_text()
    page.unlink()
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or False)
    with pytest.raises(PlotError, match=r"the page is .*figure\.html"):
        picture().show()


def test_labels_show_whitespace_shorten_and_never_become_tex() -> None:
    assert visible(" John") == "·John"
    assert visible("\n\t") == "↵⇥"
    assert visible("") == "∅"
    assert visible("\x07") == r"\x07"
    assert visible(" antidisestablishmentarianism") == "·antidisestab…"
    assert len(visible("x" * 14)) == 14 and visible("x" * 14) == "x" * 14
    for tex in ("$$x$$", "$$$$", r"\[x\]", r"\(x\)"):
        assert plain(tex) != tex and plain(tex).replace("\u200b", "") == tex
        assert not any(mark in plain(tex) for mark in ("$$", r"\[", r"\("))
    assert plain("$5 and \\n") == "$5 and \\n"


def test_repeated_labels_are_told_apart_by_their_index() -> None:
    assert told_apart(["·a", "·b", "·a"]) == ["0 ·a", "·b", "2 ·a"]
    assert told_apart(["·a", "·a"], [4, -1]) == ["4 ·a", "-1 ·a"]
