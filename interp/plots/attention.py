"""Attention patterns: a few heads side by side, or all heads as tiles with one of them drawn large.

Imports bokeh and numpy; patterns may be torch tensors, which are only asked for their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.events import Tap
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, LinearColorMapper
from bokeh.models.ui.ui_element import UIElement
from bokeh.models.widgets.inputs import Select
from bokeh.models.widgets.sliders import Slider
from bokeh.palettes import Blues256
from bokeh.plotting import figure
from bokeh.transform import transform

from ..errors import PlotError
from .given import head_of, labels_of, numbers, whole
from .labels import told_apart, visible
from .page import INK, MUTED, PAGE, Figure, color_scale, label_cells, panel, tooltip

SIDE_BY_SIDE = 4  # more heads than this are tiles beside one large panel

TILE, GAP, LINE = (
    92,
    14,
    26,
)  # px of the largest tile, between tiles, and between their rows, where a label stands
MAX_WEIGHTS = 12_000_000  # a page holds every weight as four bytes, in base64

_DRAW = """
const n = size, heads = labels.length, all = weights.data.all;
const at = (h) => new Float32Array(all.buffer, all.byteOffset + 4 * n * n * (layer_of() * heads + h), n * n);
function layer_of() { return layer ? layer.value - layer.start : 0; }
for (let h = 0; h < heads; h++) tiles.data.image[h].set(at(h));
const h = labels.indexOf(head.value), chosen = at(h), cells = detail.data;
for (let i = 0; i < cells.cell.length; i++) cells.weight[i] = chosen[cells.cell[i]];
title.text = (layer ? "layer " + layer.value + " · " : "") + head.value;
mark.data = {x: [tiles.data.x[h] + 0.5], y: [tiles.data.y[h] + 0.5]};
tiles.change.emit(); detail.change.emit();
"""
_PICK = """
const {x, y} = cb_obj, left = tiles.data.x, low = tiles.data.y;
for (let h = 0; h < labels.length; h++)
  if (x >= left[h] && x <= left[h] + 1 && y >= low[h] && y <= low[h] + 1) head.value = labels[h];
"""


def plot_attention(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention patterns: queries down, keys across, weights from 0 to 1.

    Up to four heads stand side by side; more are tiles beside one large panel, with a choice of head and
    layer.
    What no query can attend to (the causal upper triangle, where it is all zero) stays blank.

    Args:
        pattern: what `interp.lens.attention_patterns` gives, or weights [head, query, key] or [layer, head, query,
            key], numpy or torch.
        tokens: one label per position; patterns of `attention_patterns` bring their own.
        heads: indices of heads, or (layer, head) for a pattern with layers; None: all.
        title: heading of the page.

    Raises:
        PlotError: shapes that do not fit, heads out of range, weights outside 0–1, too many for a page.
    """
    named = getattr(pattern, "coords", {})
    if tokens is None and "token" not in named:
        raise PlotError("plot_attention needs tokens, one label per position, for a pattern that brings none")
    tokens = labels_of(pattern["token"].values if tokens is None else tokens)
    weights, layered = _weights(pattern, len(tokens))
    labels = [f"head {h}" for h in range(weights.shape[1])]
    layers = pattern["layer"].values.reshape(-1).tolist() if "layer" in named else list(range(weights.shape[0]))
    if heads is not None:
        weights, labels = _choose(weights, heads, layered, layers)
    elif layers != list(range(layers[0], layers[0] + len(layers))):
        raise PlotError(f"layers {layers} are not consecutive: choose (layer, head) of them with heads=")
    if weights.size > MAX_WEIGHTS:
        raise PlotError(f"{weights.size:,} weights are too many for one page: choose some with heads= or fewer layers")
    n = len(tokens)
    if not np.nan_to_num(weights[:, :, *np.triu_indices(n, 1)]).any():
        weights[:, :, *np.triu_indices(n, 1)] = np.nan
    names = told_apart([visible(t) for t in tokens])
    full = [f"{i} “{visible(t, 200)}”" for i, t in enumerate(tokens)]
    mapper = LinearColorMapper(palette=list(Blues256[::-1]), low=0, high=1, nan_color="rgba(0,0,0,0)")
    scale = color_scale(mapper, "attention weight")
    if weights.shape[0] == 1 and len(labels) <= SIDE_BY_SIDE:
        cell = int(np.clip(1100 / len(labels) / n - 8, 12, 30))
        across = max(1, min(len(labels), 1240 // (cell * n + 110)))
        panels = [_panel(w, label, names, full, mapper, cell)[0] for w, label in zip(weights[0], labels, strict=True)]
        rows = [row(*panels[i : i + across], spacing=22) for i in range(0, len(panels), across)]
        layout = column(scale, *rows, spacing=14)
    else:
        first = layers[0] if layered and heads is None else None
        layout = column(scale, _explorer(weights, labels, names, full, mapper, first), spacing=14)
    return Figure(layout, title or "Attention patterns", "queries down, keys across; each row is what one query reads")


def _weights(pattern: Any, n: int) -> tuple[np.ndarray, bool]:
    """A float32 copy [layer, head, query, key], and whether the pattern had layers."""
    try:
        weights = numbers("the pattern", pattern)
    except PlotError as error:
        raise PlotError(
            f"plot_attention draws numbers, not a {type(pattern).__name__}: give interp.lens.attention_patterns(model, "
            f"prompt), or weights [head, query, key] ({error})"
        ) from None
    if weights.ndim not in (3, 4) or 0 in weights.shape:
        raise PlotError(f"a pattern is [head, query, key] or [layer, head, query, key], not of shape {weights.shape}")
    if weights.shape[-2:] != (n, n):
        raise PlotError(f"pattern {weights.shape} has {weights.shape[-2:]} queries and keys, but there are {n} tokens")
    low, high = np.nanmin(weights, initial=0), np.nanmax(weights, initial=0)
    if low < -1e-3 or high > 1 + 1e-3:
        raise PlotError(f"weights lie between {low:.3g} and {high:.3g}, not 0 and 1: are these scores before softmax?")
    return weights.reshape(-1, *weights.shape[-3:]), weights.ndim == 4


def _choose(
    weights: np.ndarray, heads: Sequence[Any], layered: bool, layers: list[int]
) -> tuple[np.ndarray, list[str]]:
    count = weights.shape[1]
    heads = heads.tolist() if hasattr(heads, "tolist") else heads
    if not isinstance(heads, tuple | list):
        raise PlotError(f"heads={heads!r}: give a list of indices, or of (layer, head)")
    if not heads:
        raise PlotError("heads is empty: name at least one, or leave it out for all")
    pairs = [h for h in heads if isinstance(h, tuple | list)]
    if pairs and (len(pairs) < len(heads) or not layered or any(len(p) != 2 for p in pairs)):
        raise PlotError(f"heads={list(heads)}: give indices, or (layer, head) for a pattern [layer, head, query, key]")
    for h in heads:
        layer, head = head_of("a head", h) if pairs else (layers[0], whole("a head", h))
        if not (layer in layers and 0 <= head < count):
            held = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
            raise PlotError(f"head {h} is out of range: the pattern has {held}, heads 0 to {count - 1}")
    if pairs:
        return np.stack([weights[layers.index(layer), head] for layer, head in pairs])[None], [
            f"L{a}.H{b}" for a, b in pairs
        ]
    return weights[:, list(heads)], [f"head {h}" for h in heads]


def _panel(
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


def _explorer(
    weights: np.ndarray,
    labels: list[str],
    names: list[str],
    full: list[str],
    mapper: LinearColorMapper,
    first: int | None,
) -> UIElement:
    """All heads of one layer (from `first`, if layers have numbers) as tiles beside one large panel.

    A tap on a tile, or the widgets, choose what is drawn large.
    """
    n, (layers, count) = len(names), weights.shape[:2]
    cell = int(np.clip(560 / n, 12, 30))
    room = PAGE - cell * n - 170  # what the large panel and its labels leave beside them
    beside = room >= 320
    across = min(6, math.ceil(math.sqrt(count))) if beside else min(count, 12)
    tile = int(np.clip((room if beside else PAGE) / across - GAP, 46, TILE))
    overview, tiles, mark = _tiles(weights[0], labels, mapper, across, tile)
    title = labels[0] if first is None else f"layer {first} · {labels[0]}"
    large, detail = _panel(weights[0, 0], title, names, full, mapper, cell)
    choices: list[str | tuple[Any, str]] = [*labels]
    head = Select(title="head", value=labels[0], options=choices, width=120, margin=0)
    start = first or 0
    layer = Slider(title="layer", start=start, end=start + max(layers - 1, 1), value=start, step=1, width=240, margin=0)
    widgets: list[Any] = [layer, head] if layers > 1 else [head]
    arguments = {
        "weights": ColumnDataSource({"all": weights.reshape(-1)}), "tiles": tiles, "detail": detail,
        "mark": mark, "title": large.title, "labels": labels, "size": n, "head": head,
        "layer": layer if layers > 1 else None,
    }  # fmt: skip
    for widget in widgets:
        widget.js_on_change("value", CustomJS(args=arguments, code=_DRAW))
    overview.js_on_event(Tap, CustomJS(args={"tiles": tiles, "labels": labels, "head": head}, code=_PICK))
    pictures = row(overview, large, spacing=28) if beside else column(overview, large, spacing=10)
    return column(row(*widgets, spacing=20), pictures, spacing=10)


def _tiles(
    weights: np.ndarray, labels: list[str], mapper: LinearColorMapper, across: int, tile: int
) -> tuple[figure, ColumnDataSource, ColumnDataSource]:
    """Patterns [head, query, key] as small images, with the sources of the images and of the frame."""
    x = [(h % across) * (1 + GAP / tile) for h in range(len(labels))]
    y = [-(h // across) * (1 + LINE / tile) for h in range(len(labels))]
    left, right, low, high = -0.06, max(x) + 1.06, min(y) - 0.06, 1 + 22 / tile
    plot = panel((left, right), (low, high), int(tile * (right - left)), int(tile * (high - low)))
    # the empty toolbar stays: without one Bokeh clips a figure that stands beside another
    plot.update(outline_line_color=None, tools=[])
    plot.axis.visible = False
    tiles = ColumnDataSource({"image": list(weights.copy()), "x": x, "y": y})
    drawn: dict[str, Any] = {"color_mapper": mapper, "origin": "top_left", "anchor": "bottom_left"}
    plot.image("image", "x", "y", 1, 1, source=tiles, **drawn)
    plot.rect([a + 0.5 for a in x], [b + 0.5 for b in y], 1, 1, fill_color=None, line_color="#d8d8d8")
    plot.text(x=x, y=[b + 1 + 4 / tile for b in y], text=labels, text_font_size="11px", text_color=MUTED)
    mark = ColumnDataSource({"x": [x[0] + 0.5], "y": [y[0] + 0.5]})
    plot.rect("x", "y", 1.04, 1.04, source=mark, fill_color=None, line_color="#d6604d", line_width=2)
    return plot, tiles, mark
