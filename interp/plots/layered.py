"""Graphs whose nodes have rows, as features and errors of dictionaries do: boxes in rows, curves between them."""

from __future__ import annotations

import html
from collections import defaultdict

import numpy as np
from bokeh.core.properties import value
from bokeh.layouts import column, row
from bokeh.models import (
    CDSView,
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    HoverTool,
    IndexFilter,
    LinearColorMapper,
    TapTool,
)  # fmt: skip
from bokeh.models.widgets.sliders import Slider
from bokeh.plotting import figure

from ..circuits.drawing import Drawing
from ..errors import PlotError
from .page import FONT, INK, MUTED, PAGE, Figure, Plot, color_scale, panel, tooltip
from .scale import LIGHT, colour, dark, diverging, signed

#: px of a box and of the room between boxes and rows.
WIDE, HIGH, GAP = 38, 20, 4
#: px between rows, of few and of many.
BETWEEN = (74, 16)
SHOWN = 150


def plot_layered(drawing: Drawing, *, title: str | None = None, max_edges: int = 500) -> Figure:
    """Draw a graph in rows. A slider sets how many of the strongest edges are shown; a click on a node lights its paths.

    Raises:
        PlotError: nothing to draw.
    """
    if not drawing.boxes:
        raise PlotError("the circuit has no nodes to draw")
    ranked = sorted(drawing.edges, key=lambda edge: -abs(drawing.edges[edge]))[:max_edges]
    x, y, ticks = placed(drawing)
    index = {box.name: number for number, box in enumerate(drawing.boxes)}
    scores = [box.score for box in drawing.boxes] + list(drawing.edges.values())
    mapper = diverging(scores)
    nodes = boxes_of(drawing, x, y, mapper)
    lines = curves_of(drawing, ranked[::-1], index, x, y, mapper)
    start = min(len(ranked), SHOWN)
    first = IndexFilter(indices=[i for i, rank in enumerate(lines.data["rank"]) if rank < start])
    seen = IndexFilter(indices=list(range(len(drawing.boxes))))
    plot = canvas(drawing, (x, y), ticks, (nodes, seen), (lines, first))
    controls: list[figure | Slider] = [color_scale(mapper, drawing.quantity)]
    slider = None
    if len(ranked) > 1:
        slider = Slider(
            title="strongest edges shown", start=1, end=len(ranked), value=start, step=1, width=320, margin=0
        )
        controls = [slider, *controls]
    light = CustomJS(code=LIGHT, args={
        "slider": slider, "edges": lines, "nodes": nodes, "edge_filter": first, "node_filter": seen, "of_nodes": False,
    })  # fmt: skip
    nodes.selected.js_on_change("indices", light)
    if slider is not None:
        slider.js_on_change("value", light)
    cut = f" · the {len(ranked):,} strongest are drawn" if len(ranked) < len(drawing.edges) else ""
    about = f"{drawing.about}{cut}\nClick a node to light the paths that lead to it and away from it."
    return Figure(column(row(*controls, spacing=44), plot, spacing=4), title or drawing.title, about)


def placed(drawing: Drawing) -> tuple[np.ndarray, np.ndarray, dict[float, str]]:
    """Where boxes stand, in px, and where each row has its name. Boxes of one place, or that fill a row, stand in lines."""
    members: dict[tuple[int, float | None], list[int]] = defaultdict(list)
    for number, box in enumerate(drawing.boxes):
        members[box.row, box.column].append(number)
    x, y = np.zeros(len(drawing.boxes)), np.zeros(len(drawing.boxes))
    room = PAGE - 150
    across = room / max(1, len(drawing.columns)) if drawing.columns else room
    each = max(1, int(across // (WIDE + GAP)))
    ticks, bottom = {}, 0.0
    between = float(np.clip(800 / len(drawing.rows) - HIGH, BETWEEN[1], BETWEEN[0]))
    for number, name in enumerate(drawing.rows):
        groups = [(place, group) for (at, place), group in members.items() if at == number]
        tallest = max((-(-len(group) // each) for _, group in groups), default=1)
        for place, group in groups:
            order = sorted(group, key=lambda i: -(drawing.boxes[i].score or 0.0))
            for line, start in enumerate(range(0, len(order), each)):
                some = order[start : start + each]
                middle = room / 2 if place is None else (place + 0.5) * across
                for spot, member in enumerate(some):
                    x[member] = middle + (spot - (len(some) - 1) / 2) * (WIDE + GAP)
                    y[member] = bottom + line * (HIGH + GAP)
        ticks[bottom + (tallest - 1) * (HIGH + GAP) / 2] = name
        bottom += tallest * (HIGH + GAP) + between
    return x, y, ticks


def boxes_of(drawing: Drawing, x: np.ndarray, y: np.ndarray, mapper: LinearColorMapper) -> ColumnDataSource:
    """Columns of the boxes."""
    fill = ["#ffffff" if box.score is None else colour(box.score, mapper) for box in drawing.boxes]
    says = [
        "".join(
            f"<div><span style='color:{MUTED}'>{html.escape(k)}</span> {html.escape(v)}</div>"
            for k, v in box.says.items()
        )
        for box in drawing.boxes
    ]
    return ColumnDataSource({
        "name": [box.name for box in drawing.boxes], "label": [box.label for box in drawing.boxes], "x": x, "y": y,
        "w": [max(WIDE, 7 * len(box.label) + 8) if box.column is None and box.score is None else WIDE
              for box in drawing.boxes],
        "fill": fill, "ink": ["#ffffff" if dark(one) else INK for one in fill], "alpha": np.ones(len(x)),
        "rank": np.full(len(x), -1, dtype=np.int32), "says": says,
        "score": ["none" if box.score is None else signed(box.score) for box in drawing.boxes],
    })  # fmt: skip


def curves_of(
    drawing: Drawing,
    edges: list[tuple[str, str]],
    index: dict[str, int],
    x: np.ndarray,
    y: np.ndarray,
    mapper: LinearColorMapper,
) -> ColumnDataSource:
    """Columns of the curves, from the top of one box to the bottom of another."""
    t = np.linspace(0, 1, 24)
    ease = t * t * (3 - 2 * t)
    starts, ends = ([index[edge[side]] for edge in edges] for side in (0, 1))
    scores = np.array([drawing.edges[edge] for edge in edges])
    share = np.sqrt(np.abs(scores) / (np.abs(scores).max(initial=0.0) or 1.0))
    alpha = 0.15 + 0.75 * share
    return ColumnDataSource({
        "xs": [x[a] + (x[b] - x[a]) * ease for a, b in zip(starts, ends, strict=True)],
        "ys": [y[a] + HIGH / 2 + (y[b] - y[a] - HIGH) * t for a, b in zip(starts, ends, strict=True)],
        "width": 0.6 + 3.4 * share, "color": [colour(score, mapper) for score in scores],
        "alpha": alpha, "plain": alpha.copy(), "says": [signed(score) for score in scores],
        "rank": np.arange(len(edges), dtype=np.int32)[::-1], "name": [" → ".join(edge) for edge in edges],
        "start": starts, "ends": [[end] for end in ends],
    })  # fmt: skip


def canvas(
    drawing: Drawing,
    at: tuple[np.ndarray, np.ndarray],
    ticks: dict[float, str],
    nodes: tuple[ColumnDataSource, IndexFilter],
    lines: tuple[ColumnDataSource, IndexFilter],
) -> figure:
    """The figure: curves under boxes under their labels, rows and columns named."""
    x, y = at
    left, right = float(x.min()) - WIDE, float(x.max()) + WIDE
    if drawing.columns:
        left, right = min(left, 0.0), max(right, float(PAGE - 150))
    low, high = float(y.min()) - HIGH, float(y.max()) + HIGH
    plot: Plot = panel((left, right), (low, high), int(right - left), int(high - low))
    plot.update(outline_line_color=None, name="circuit")
    plot.yaxis.ticker = FixedTicker(ticks=list(ticks))
    plot.yaxis.major_label_overrides = ticks
    plot.yaxis.major_tick_line_color = None
    plot.xaxis.visible = bool(drawing.columns)
    if drawing.columns:
        width = (PAGE - 150) / len(drawing.columns)
        plot.xaxis.ticker = FixedTicker(ticks=[(place + 0.5) * width for place in range(len(drawing.columns))])
        plot.xaxis.major_label_overrides = {(i + 0.5) * width: name for i, name in enumerate(drawing.columns)}
        plot.xaxis.major_label_orientation = 0.0 if width > 7 * max(map(len, drawing.columns)) else 0.9
    of_lines, of_nodes = ({"source": s, "view": CDSView(filter=shown)} for s, shown in (lines, nodes))
    curves = plot.multi_line(
        "xs", "ys", **of_lines, line_color="color", line_width="width", line_alpha="alpha", line_cap="round",
        hover_line_color=INK, hover_line_alpha=1.0,
    )  # fmt: skip
    boxes = plot.rect(
        "x", "y", "w", HIGH, **of_nodes, fill_color="fill", fill_alpha="alpha", line_color=MUTED, line_alpha="alpha",
        border_radius=4, hover_line_color="#d6604d",
    )  # fmt: skip
    words = plot.text(
        "x", "y", "label", **of_nodes, text_color="ink", text_alpha="alpha", text_align="center",
        text_baseline="middle", text_font_size="10px", text_font=value(FONT),
    )  # fmt: skip
    boxes.nonselection_glyph = words.nonselection_glyph = None  # the callback fades what is not lit
    plot.add_tools(
        TapTool(renderers=[boxes]),
        HoverTool(renderers=[curves], tooltips=tooltip("<b>@name</b>", [("score", "<b>@says</b>")]), line_policy="interp",
                  attachment="below"),
        HoverTool(renderers=[boxes], tooltips=tooltip("<b>@name</b>@says{safe}", [("score", "<b>@score</b>")]),
                  attachment="right"),
    )  # fmt: skip
    return plot
