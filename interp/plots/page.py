"""Figure: a Bokeh layout as a standalone page, a PNG, or inline in a notebook. Imports bokeh.

Nothing here touches Bokeh's global state: no current document, no theme, no `output_notebook`.
"""

from __future__ import annotations

import html
import json
import math
import os
import sys
import tempfile
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.embed.util import OutputDocumentFor
from bokeh.models import AllLabels, BasicTicker, FixedTicker, LinearColorMapper, Range1d
from bokeh.models.annotations import ColorBar, Title
from bokeh.models.ui.ui_element import UIElement
from bokeh.plotting import figure

from ..errors import PlotError
from ..files import path_of, write_atomically
from .labels import extent, plain
from .saving import png, written
from .standalone import standalone
from .theme import FONT, INK, MUTED, RULE

PAGE = 1240  # px that a laptop shows beside the scroll bar


@dataclass(frozen=True, eq=False, repr=False)
class Figure:
    """A picture under a title and an optional subtitle (one line of text per line): a Bokeh layout, or HTML of its own.

    `body` and `script` are the picture where `layout` is None: text that is coloured.
    """

    layout: UIElement | None
    title: str
    subtitle: str = ""
    body: str = ""
    script: str = ""

    def html(self) -> str:
        """The whole page as text, BokehJS inlined: opens with no network."""
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self.subtitle.splitlines())
        header = f"<header><h1>{html.escape(self.title)}</h1>{lines}</header>"
        return standalone(self.title, [header, self], bare=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as Bokeh's own JSON: its models hold functions, which cannot be."""
        if self.layout is None:
            return Figure, (None, self.title, self.subtitle, self.body, self.script)
        with OutputDocumentFor([self.layout], always_new=True) as document:
            return _restored, (serialize_json(document.to_json(deferred=False)), self.title, self.subtitle)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a standalone .html page, or a .png, .pdf or .svg of it through headless Chromium.

        Raises:
            PlotError: another suffix, a place that cannot be written, or no browser for a picture.
        """
        path = path_of(path, PlotError)
        data = written(path.suffix, path.name)(self.html(), self.title, self.subtitle, self.layout is not None)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise PlotError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def png(self, scale: float = 2.0) -> bytes:
        """A PNG of the whole page at `scale` device pixels per CSS pixel.

        Raises:
            PlotError: no Chromium, or it failed; the message says what it printed.
        """
        return png(self.html(), scale)

    def show(self) -> None:
        """Draw inline in a notebook; elsewhere open a temporary page in the default browser.

        Raises:
            PlotError: no browser could be opened; the message says where the page is.
        """
        if _in_notebook():
            from IPython.display import display

            display(self)
            return
        folder = Path(tempfile.mkdtemp(prefix="interp-"))  # stays: the browser reads it after we return
        page = self.save(folder / "figure.html")
        if not webbrowser.open(page.as_uri()):
            raise PlotError(f"no browser could be opened; the page is {page}")

    def __repr__(self) -> str:
        return f"Figure({self.title!r})"

    def _repr_html_(self) -> str:
        """The page in an iframe: no state shared with the notebook, and it survives a reload."""
        fit = "const d=this.contentDocument.documentElement;new MutationObserver(()=>{this.style.height="
        fit += "(+d.dataset.height||600)+'px'}).observe(d,{attributes:true});d.dataset.shown='yes'"
        page, title, fit = (html.escape(text, quote=True) for text in (self.html(), self.title, fit))
        style = "width:100%;height:600px;border:0;background:#fff"
        return f'<iframe srcdoc="{page}" title="{title}" style="{style}" onload="{fit}"></iframe>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self._repr_html_(), "text/plain": repr(self)}


#: A bokeh figure: its methods for glyphs are made at run time and have no types.
Plot = Any


def _restored(document: str, title: str, subtitle: str) -> Figure:
    """A figure from the JSON of a document that holds its layout alone."""
    read = Document.from_json(json.loads(document))
    layout = read.roots[0]
    read.remove_root(layout)
    return Figure(layout, title, subtitle)  # type: ignore[arg-type]


def panel(x: tuple[float, float], y: tuple[float, float], width: int, height: int, title: str = "") -> figure:
    """An empty Bokeh figure in the house style: a frame of `width` × `height` px over the ranges x, y."""
    plot = figure(
        frame_width=width, frame_height=height, min_border=0, x_range=Range1d(start=x[0], end=x[1]),
        y_range=Range1d(start=y[0], end=y[1]), title=plain(title) or None,
        tools="box_zoom,reset,save", toolbar_location="above", outline_line_color=RULE,
        background_fill_color=None, border_fill_color=None,
    )  # fmt: skip
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.grid.visible = False
    if isinstance(plot.title, Title):
        plot.title.update(text_font=FONT, text_font_size="13px", text_color=INK, text_font_style="bold")
    for axis in plot.axis:
        axis.update(
            axis_line_color=None, minor_tick_line_color=None, major_tick_line_color=RULE, major_tick_in=0,
            major_tick_out=4, major_label_text_font=FONT, major_label_text_font_size="11px",
            major_label_text_color=INK, axis_label_text_font=FONT, axis_label_text_font_size="12px",
            axis_label_text_font_style="normal", axis_label_text_color=MUTED, major_label_standoff=4,
        )  # fmt: skip
    return plot


def label_cells(plot: figure, columns: list[str], rows: list[str], width: int, height: int) -> None:
    """Name the cells of a grid on both axes, with slanted, upright or fewer labels where they would touch."""
    longest = max(map(extent, columns), default=0)
    if width * 0.92 < longest:
        slanted = width >= 19  # below that, lines of 11 px type at 45° touch
        plot.xaxis.major_label_orientation = math.pi / 4 if slanted else math.pi / 2
        plot.xaxis.major_label_text_font_size = "11px" if width >= 13 else "10px"
        if slanted:  # the first label reaches out to the left of its cell
            plot.min_border_left = max(0, int(longest * 0.71 - width / 2) + 8)
    for axis, labels, room in ((plot.xaxis, columns, width), (plot.yaxis, rows, height)):
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if s * room >= 12)
        axis.update(
            ticker=FixedTicker(ticks=list(range(0, len(labels), step))), major_label_policy=AllLabels(),
            major_label_overrides=dict(enumerate(labels)),
        )  # fmt: skip


def color_scale(mapper: LinearColorMapper, title: str) -> figure:
    """A horizontal colour bar of its own, for several panels that share one scale."""
    plot = panel((0, 1), (0, 1), 334, 1)
    plot.update(toolbar_location=None, outline_line_color=None)
    plot.axis.visible = False
    plot.scatter([0.5], [0.5], alpha=0)  # Bokeh warns of a figure without a glyph
    bar = ColorBar(
        color_mapper=mapper, orientation="horizontal", height=12, width=332, padding=0, margin=0,
        ticker=BasicTicker(desired_num_ticks=5), title=plain(title), bar_line_color=RULE,
        major_tick_line_color=None, title_standoff=6, label_standoff=5, title_text_font=FONT,
        title_text_font_style="normal", title_text_font_size="12px",
        title_text_color=MUTED, major_label_text_font=FONT, major_label_text_font_size="11px",
        major_label_text_color=INK, background_fill_alpha=0,
    )  # fmt: skip
    plot.add_layout(bar, "below")
    return plot


def tooltip(heading: str, lines: list[tuple[str, str]]) -> str:
    """A hover in the house style: `heading` and (name, value) lines, written with Bokeh's @columns."""
    cells = "".join(
        f"<tr><td style='color:{MUTED};padding-right:12px'>{k}</td><td style='text-align:right'>{v}</td></tr>"
        for k, v in lines
    )
    style = f"font:12px {FONT};color:{INK};line-height:1.5"
    table = f"<table style='border-spacing:0;font:inherit'>{cells}</table>" if cells else ""
    return f"<div style='{style}'><div>{heading}</div>{table}</div>"


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
