"""The page on which layers and heads are chosen: tiles of all heads, one large panel, and the prompt as text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from bokeh.events import Tap
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, LinearColorMapper
from bokeh.models.ui.ui_element import UIElement
from bokeh.models.widgets.buttons import Toggle
from bokeh.models.widgets.groups import RadioButtonGroup
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.sliders import Slider
from bokeh.plotting import figure
from bokeh.transform import transform

from .labels import extent
from .page import INK, MUTED, PAGE, Plot, label_cells, panel, tooltip

TILE, GAP, LINE = (
    92,
    14,
    26,
)  # px of the largest tile, between tiles, and between their rows, where a label stands
#: Weights are held as 0 to 254; 255 is what no query can attend to.
_NONE = 255
_DRAW = """
const n = size, heads = labels.length, all = weights.data.all, byValue = value && value.active;
const at_layer = layer ? layer.value - layer.start : 0;
const pattern = (h) => {
  const start = n * n * (at_layer * heads + h), out = new Float32Array(n * n);
  const norms = byValue ? norm.data.all : null, own = n * (at_layer * heads + h);
  for (let i = 0; i < n * n; i++) {
    const w = all[start + i];
    out[i] = w === 255 ? NaN : w / 254 * (norms ? norms[own + i % n] : 1);
  }
  return out;
};
for (let h = 0; h < heads; h++) tiles.data.image[h].set(pattern(h));
const h = labels.indexOf(head.value), chosen = tiles.data.image[h], cells = detail.data, at = lit.data.at[0];
for (let i = 0; i < cells.cell.length; i++) cells.weight[i] = chosen[cells.cell[i]];
title.text = (layer ? "layer " + layer.value + " · " : "") + head.value + (byValue ? ", weighted by values" : "");
mark.data = {x: [tiles.data.x[h] + 0.5], y: [tiles.data.y[h] + 0.5]};
for (let j = 0; j < n; j++) {
  const w = way.active === 0 ? chosen[at * n + j] : chosen[j * n + at];
  words.data.weight[j] = isNaN(w) ? 0 : w;
  words.data.ink[j] = words.data.weight[j] > 0.5 ? "#fffffe" : "#222223";  // the page leaves these as they are
  words.data.edge[j] = j === at ? "#d6604d" : "#d8d8d8";
  words.data.reads[j] = words.data.full[at] + (way.active === 0 ? " reads " : " is read by ") + words.data.full[j];
}
tiles.change.emit(); detail.change.emit(); words.change.emit();
"""
_LIGHT = """
const at = cb_data.index.indices[0];
if (at !== undefined && at !== lit.data.at[0]) { lit.data = {at: [at]}; lit.change.emit(); }
"""
_PICK = """
const {x, y} = cb_obj, left = tiles.data.x, low = tiles.data.y;
for (let h = 0; h < labels.length; h++)
  if (x >= left[h] && x <= left[h] + 1 && y >= low[h] && y <= low[h] + 1) head.value = labels[h];
"""


def pattern_panel(
    weights: np.ndarray, title: str, names: list[str], full: list[str], mapper: LinearColorMapper, cell: int
) -> tuple[figure, ColumnDataSource]:
    """One labelled pattern [query, key], cell by cell for the hover."""
    n = len(names)
    plot = panel((-0.5, n - 0.5), (n - 0.5, -0.5), cell * n, cell * n, title)
    at = np.flatnonzero(~np.isnan(weights)).astype(np.int32)
    query, key = at // n, at % n
    source = ColumnDataSource({
        "query": query, "key": key, "cell": at, "weight": weights.ravel()[at],
        "reads": np.array([f"{full[q]} → {full[k]}" for q, k in zip(query, key, strict=True)]),
    })  # fmt: skip
    color = transform("weight", mapper)
    cells = plot.rect(
        "key", "query", 1, 1, source=source, fill_color=color, line_color="#f0f0f0" if cell >= 12 else None,
        hover_fill_color=color, hover_line_color=INK,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tooltip("@reads", [("weight", "<b>@weight{0.000}</b>")])))
    label_cells(plot, names, names, cell, cell)
    plot.update(outline_line_color=None)
    plot.yaxis.axis_label, plot.xaxis.axis_label = "query", "key"
    return plot, source


def explorer(
    weights: np.ndarray,
    labels: list[str],
    names: list[str],
    full: list[str],
    mapper: LinearColorMapper,
    first: int | None,
    norms: np.ndarray | None,
) -> UIElement:
    """All heads of one layer (from `first`, if layers have numbers) as tiles beside one large panel, over the prompt as text.

    A tap on a tile, or the widgets, choose what is drawn large; the token under the mouse lights what it reads.
    """
    n, (layers, count) = len(names), weights.shape[:2]
    cell = int(np.clip(560 / n, 12, 30))
    room = PAGE - cell * n - 170  # what the large panel and its labels leave beside them
    beside = room >= 320
    across = min(6, math.ceil(math.sqrt(count))) if beside else min(count, 12)
    tile = int(np.clip((room if beside else PAGE) / across - GAP, 46, TILE))
    coarse = np.where(np.isnan(weights), _NONE, np.round(np.nan_to_num(weights).clip(0, 1) * 254)).astype(np.uint8)
    shown = np.where(coarse[0] == _NONE, np.nan, coarse[0] / 254).astype(np.float32)
    overview, tiles, mark = _tiles(shown, labels, mapper, across, tile)
    title = labels[0] if first is None else f"layer {first} · {labels[0]}"
    large, detail = pattern_panel(shown[0], title, names, full, mapper, cell)
    strip, words, hover = _strip(shown[0], names, full, mapper)
    choices: list[str | tuple[Any, str]] = [*labels]
    head = Select(title="head", value=labels[0], options=choices, width=120, margin=0)
    start = first or 0
    layer = Slider(title="layer", start=start, end=start + max(layers - 1, 1), value=start, step=1, width=240, margin=0)
    way = RadioButtonGroup(labels=["lights what it reads", "lights what reads it"], active=0, margin=(16, 0, 0, 0))
    value = Toggle(label="weighted by values", active=False, margin=(16, 0, 0, 0)) if norms is not None else None
    lit = ColumnDataSource({"at": [n - 1]})
    arguments = {
        "weights": ColumnDataSource({"all": coarse.reshape(-1)}), "tiles": tiles, "detail": detail, "words": words,
        "mark": mark, "title": large.title, "labels": labels, "size": n, "head": head, "way": way, "value": value,
        "norm": None if norms is None else ColumnDataSource({"all": norms.astype(np.float32).reshape(-1)}), "lit": lit,
        "layer": layer if layers > 1 else None,
    }  # fmt: skip
    draw = CustomJS(args=arguments, code=_DRAW)
    chosen: list[tuple[UIElement, str]] = [
        (head, "value"),
        (way, "active"),
        *([(layer, "value")] if layers > 1 else []),
    ]
    for widget, what in [*chosen, *([(value, "active")] if value is not None else []), (lit, "data")]:
        widget.js_on_change(what, draw)
    hover.callback = CustomJS(args={"lit": lit}, code=_LIGHT)
    overview.js_on_event(Tap, CustomJS(args={"tiles": tiles, "labels": labels, "head": head}, code=_PICK))
    pictures = row(overview, large, spacing=28) if beside else column(overview, large, spacing=10)
    widgets: list[UIElement] = [layer, head] if layers > 1 else [head]
    return column(row(*widgets, way, *([value] if value is not None else []), spacing=20), strip, pictures, spacing=10)


def _strip(
    weights: np.ndarray, names: list[str], full: list[str], mapper: LinearColorMapper
) -> tuple[figure, ColumnDataSource, HoverTool]:
    """The prompt as lines of tokens, each coloured by how much the last one reads it; [query, key] weights."""
    n, x, line = len(names), 0.0, 0
    left, lines, widths = [], [], [extent(name) + 12 for name in names]
    for width in widths:
        if x + width > PAGE - 40 and x:
            x, line = 0.0, line + 1
        left.append(x)
        lines.append(line)
        x += width + 2
    seen = np.nan_to_num(weights[-1])
    words = ColumnDataSource({
        "x": [a + width / 2 for a, width in zip(left, widths, strict=True)], "y": lines, "width": widths, "word": names,
        "full": full, "weight": seen, "ink": ["#fffffe" if weight > 0.5 else "#222223" for weight in seen],
        "edge": ["#d6604d" if place == n - 1 else "#d8d8d8" for place in range(n)],
        "reads": [f"{full[-1]} reads {one}" for one in full],
    })  # fmt: skip
    plot = panel((-2, PAGE - 40), (max(lines) + 0.6, -0.6), PAGE - 38, 26 * (max(lines) + 1) + 6)
    plot.update(outline_line_color=None, toolbar_location=None)
    plot.axis.visible = False
    color = transform("weight", mapper)
    boxes = plot.rect("x", "y", "width", 0.86, source=words, fill_color=color, line_color="edge")
    plot.text("x", "y", text="word", source=words, text_color="ink", text_font_size="11px", text_align="center",
              text_baseline="middle")  # fmt: skip
    hover = HoverTool(renderers=[boxes], tooltips=tooltip("@reads", [("weight", "<b>@weight{0.000}</b>")]))
    plot.add_tools(hover)
    return plot, words, hover


def _tiles(
    weights: np.ndarray, labels: list[str], mapper: LinearColorMapper, across: int, tile: int
) -> tuple[figure, ColumnDataSource, ColumnDataSource]:
    """Patterns [head, query, key] as small images, with the sources of the images and of the frame."""
    x = [(h % across) * (1 + GAP / tile) for h in range(len(labels))]
    y = [-(h // across) * (1 + LINE / tile) for h in range(len(labels))]
    left, right, low, high = -0.06, max(x) + 1.06, min(y) - 0.06, 1 + 22 / tile
    plot: Plot = panel((left, right), (low, high), int(tile * (right - left)), int(tile * (high - low)))
    # the empty toolbar stays: without one Bokeh clips a figure that stands beside another
    plot.update(outline_line_color=None, tools=[])
    plot.axis.visible = False
    tiles = ColumnDataSource({"image": list(weights.copy()), "x": x, "y": y})
    plot.image("image", "x", "y", 1, 1, source=tiles, color_mapper=mapper, origin="top_left", anchor="bottom_left")
    plot.rect([a + 0.5 for a in x], [b + 0.5 for b in y], 1, 1, fill_color=None, line_color="#d8d8d8")
    plot.text(x=x, y=[b + 1 + 4 / tile for b in y], text=labels, text_font_size="11px", text_color=MUTED)
    mark = ColumnDataSource({"x": [x[0] + 0.5], "y": [y[0] + 0.5]})
    plot.rect("x", "y", 1.04, 1.04, source=mark, fill_color=None, line_color="#d6604d", line_width=2)
    return plot, tiles, mark
