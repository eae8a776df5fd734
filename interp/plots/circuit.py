"""Circuits: a graph laid out by layer from embed to logits, and a matrix of senders and receivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from bokeh.core.properties import value
from bokeh.layouts import column, row
from bokeh.models import (
    CDSView,
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    IndexFilter,
    LinearColorMapper,
    TapTool,
)  # fmt: skip
from bokeh.models.widgets.sliders import Slider
from bokeh.plotting import figure

from ..circuits import Circuit
from ..circuits.drawing import Drawing
from ..circuits.nodes import node
from ..errors import CircuitError, PlotError
from .circuit_layout import Drawn, Layout, Patterns, drawn_edges, edge_source, node_names, node_source
from .given import head_of
from .layered import plot_layered
from .page import FONT, INK, PAGE, Figure, Plot, color_scale, label_cells, panel, tooltip
from .scale import LIGHT, diverging

DEFAULT_SHOWN = 100

_PATTERN = """
for (const j of nodes.selected.indices) {
  const at = nodes.data.pattern[j], all = weights.data.all, n = size * size;
  if (at < 0) continue;
  image.data.image[0].set(new Float32Array(all.buffer, all.byteOffset + 4 * n * at, n));
  title.text = nodes.data.name[j] + " attends";
  image.change.emit();
}
"""


@runtime_checkable
class HasDrawing(Protocol):
    """A graph that says itself where its nodes stand: circuits of features."""

    def drawing(self) -> Drawing: ...


def plot_circuit_graph(
    circuit_or_heads: Circuit | HasDrawing | Sequence[tuple[int, int]],
    *,
    n_layers: int | None = None,
    n_heads: int | None = None,
    patterns: Mapping[tuple[int, int], Any] | None = None,
    tokens: Sequence[str] | None = None,
    title: str | None = None,
    max_edges: int = 500,
) -> Figure:
    """Draw a circuit from embed at the bottom to logits on top: heads across, MLPs in a column of their own.

    Width and colour are the signed score. A slider sets how many of the strongest edges (in a circuit of
    nodes, of the strongest nodes) are shown; a click on a node lights the paths that lead to it and away from
    it. An edge enters a head at its left for q, in the middle for k, at its right for v.

    Args:
        circuit_or_heads: a circuit, or (layer, head) of each head in it; or one of features, whose nodes stand in rows.
        n_layers, n_heads: of the model, so that a list of heads is drawn among all that it has; checked against a circuit.
        patterns: attention weights [query, key] by (layer, head), shown on a click on the head.
        tokens: labels of the patterns' positions; None: numbers.
        title: heading of the page; None: what the circuit says of itself.
        max_edges: the most edges to draw, the strongest ones.

    Raises:
        PlotError: what is neither a circuit nor a list of heads, sizes or patterns that do not fit.

    Examples:
        >>> interp.plot_circuit_graph([(20, 0), (23, 3)], n_layers=30, n_heads=9).save("circuit.html").name
        'circuit.html'
    """
    if isinstance(circuit_or_heads, HasDrawing):
        return plot_layered(circuit_or_heads.drawing(), title=title, max_edges=max_edges)
    circuit = _circuit(circuit_or_heads)
    none = patterns is None or (isinstance(patterns, Mapping) and not patterns)
    beside = None if none else Patterns.of(patterns, tokens, circuit)
    room = PAGE - 60 - (beside.cell * len(beside.labels) + 130 if beside else 0)
    layout = Layout.of(circuit, room, n_layers, n_heads)
    of_nodes, edges = circuit.level == "node", drawn_edges(circuit, max_edges)
    mapper = diverging(circuit.scores().values() if of_nodes else [edge.score for edge in edges])
    nodes = node_source(circuit, edges, layout, mapper, beside)
    rows = {name: i for i, name in enumerate(nodes.data["name"])}
    lines = edge_source(edges, layout, mapper, rows)
    total = circuit.n_nodes if of_nodes else len(edges)
    start = min(total, DEFAULT_SHOWN)
    first = IndexFilter(indices=[i for i, edge in enumerate(edges) if edge.rank < start])
    touched = {site.node for edge in edges if edge.rank < start for site in (edge.start, *edge.ends)}
    touched |= set(node_names(circuit)[:start]) if of_nodes else set()
    seen = IndexFilter(indices=[i for name, i in rows.items() if name in touched | {"embed", "logits"}])
    plot = _drawing(circuit, layout, (nodes, seen), (lines, first), len(edges))

    slider = None
    if total > 1:
        what = ("strongest " if circuit.scores() else "") + ("nodes" if of_nodes else "edges") + " shown"
        slider = Slider(title=what, start=1, end=total, value=start, step=1, width=320, margin=0)
    light = CustomJS(code=LIGHT, args={
        "slider": slider, "edges": lines, "nodes": nodes, "edge_filter": first, "node_filter": seen,
        "of_nodes": of_nodes,
    })  # fmt: skip
    nodes.selected.js_on_change("indices", light)
    controls: list[Any] = [color_scale(mapper, _quantity(circuit))] if circuit.scores() else []
    if slider:
        slider.js_on_change("value", light)
        controls = [slider, *controls]
    picture: Plot = plot
    if beside:
        attention, image = beside.panel(edges)
        arguments = {
            "nodes": nodes, "weights": ColumnDataSource({"all": beside.weights.reshape(-1)}), "image": image,
            "title": attention.title, "size": beside.weights.shape[-1],
        }  # fmt: skip
        nodes.selected.js_on_change("indices", CustomJS(args=arguments, code=_PATTERN))
        picture = row(plot, attention, spacing=24)
    page = column(*([row(*controls, spacing=44)] if controls else []), picture, spacing=4)
    return Figure(page, title or _title(circuit), _subtitle(circuit, edges, beside is not None))


def plot_circuit_matrix(circuit: Circuit, *, title: str | None = None) -> Figure:
    """Draw a circuit's edges as a matrix: senders down, receivers across, the signed score as colour.

    Only senders and receivers that have an edge get a row or a column. Grey: no edge of the model (where its
    facts are known); white: an edge that is not in the circuit; dark grey: one in it, without a score.

    Raises:
        PlotError: not a circuit, or one without edges.
    """
    circuit = _circuit(circuit)
    edges, scores = circuit.edges, circuit.scores()
    if not edges:
        raise PlotError(f"{circuit!r} has no edges to draw")
    rows, columns = ([n for n in circuit.nodes("edge") if n in {e[i] for e in edges}] for i in (0, 1))
    values = np.full((len(rows), len(columns)), np.nan, np.float32)
    kinds = np.zeros(values.shape, np.uint8)
    for i, j in np.ndindex(kinds.shape):
        edge = (rows[i], columns[j])
        values[i, j] = scores.get(edge, np.nan)
        kinds[i, j] = circuit.facts is not None and not circuit.facts.has_edge(node(edge[0]), node(edge[1]))
    for sender, receiver in edges:
        kinds[rows.index(sender), columns.index(receiver)] = 2
    size = [int(np.clip(room / n, 2, 24)) for room, n in ((PAGE - 150, len(columns)), (760, len(rows)))]
    x, y = (-0.5, len(columns) - 0.5), (len(rows) - 0.5, -0.5)
    plot: Plot = panel(x, y, size[0] * len(columns), size[1] * len(rows))
    mapper = diverging(scores.values())
    corner: dict[str, Any] = {"x": -0.5, "y": -0.5, "dw": len(columns), "dh": len(rows)}
    kind_colours = LinearColorMapper(palette=["#ffffff", "#ececec", "#8f8f8f"], low=-0.5, high=2.5)
    plot.image([kinds], **corner, color_mapper=kind_colours)
    cells = plot.image([values], **corner, color_mapper=mapper)
    names = [CustomJSHover(args={"names": n}, code="return names[Math.round(value)] ?? '';") for n in (columns, rows)]
    says = CustomJSHover(code="return isNaN(value) ? 'none' : value.toPrecision(4);")
    lines = [("sender", "$y{custom}"), ("receiver", "$x{custom}"), ("score", "<b>@image{custom}</b>")]
    formatters: Any = {"$x": names[0], "$y": names[1], "@image": says}
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tooltip("", lines), formatters=formatters))
    label_cells(plot, columns, rows, *size)
    plot.yaxis.axis_label, plot.xaxis.axis_label = "sender", "receiver"
    bar = [row(color_scale(mapper, _quantity(circuit)))] if scores else []
    known = " Grey: no edge of this model." if circuit.facts else ""
    text = f"{_about(circuit)}\n{len(rows)} senders that write, {len(columns)} receivers that read.{known}"
    return Figure(column(*bar, plot, spacing=12), title or _title(circuit), text)


def _drawing(
    circuit: Circuit,
    layout: Layout,
    nodes: tuple[ColumnDataSource, IndexFilter],
    lines: tuple[ColumnDataSource, IndexFilter],
    count: int,
) -> figure:
    """The figure: rows named by layer, curves under boxes under their labels, and what is shown of each."""
    (left, right), (low, high) = layout.x_range, layout.y_range
    width, height = int((right - left) * layout.across), int((high - low) * layout.up)
    plot: Plot = panel(layout.x_range, layout.y_range, width, height)
    plot.update(outline_line_color=None, name="circuit")
    plot.yaxis.ticker = FixedTicker(ticks=[layer + 1 for layer in range(layout.layers)])
    plot.yaxis.major_label_overrides = {layer + 1: f"L{layer}" for layer in range(layout.layers)}
    plot.yaxis.major_tick_line_color = None
    plot.xaxis.visible = False
    of_lines, of_nodes = ({"source": s, "view": CDSView(filter=shown)} for s, shown in (lines, nodes))
    curves = plot.multi_line(
        "xs", "ys", **of_lines, line_color="color", line_width="width",
        line_alpha="alpha", line_cap="round", hover_line_color=INK, hover_line_alpha=1.0,
    )  # fmt: skip
    boxes = plot.rect(
        "x", "y", "w", "h", **of_nodes, fill_color="fill", fill_alpha="alpha", line_color="line",
        line_alpha="alpha", line_width="border", border_radius=4, hover_line_color="#d6604d",
    )  # fmt: skip
    words = plot.text(
        "x", "y", "label", **of_nodes, text_color="ink", text_alpha="alpha", text_align="center",
        text_baseline="middle", text_font_size="size", text_font=value(FONT),
    )  # fmt: skip
    boxes.nonselection_glyph = words.nonselection_glyph = None  # the callback fades what is not lit
    scored = circuit.level == "edge" and circuit.scores()
    about = [("score", "<b>@says</b>"), ("rank", f"@place of {count}")] if scored else []
    plot.add_tools(
        TapTool(renderers=[boxes]),
        HoverTool(renderers=[curves], tooltips=tooltip("<b>@name</b>", about), line_policy="interp",
                  attachment="below"),
        HoverTool(renderers=[boxes], tooltips=_node_hover(circuit), attachment="right"),
    )  # fmt: skip
    return plot


def _node_hover(circuit: Circuit) -> str:
    score = [("score", "<b>@score</b>")] if circuit.level == "node" and circuit.scores() else []
    listing = [("reads", "@reads{safe}"), ("writes", "@writes{safe}")]
    return tooltip("<b>@name</b>", [*score, *listing])


def _circuit(given: Any) -> Circuit:
    if isinstance(given, Circuit):
        return given
    try:
        return Circuit.from_nodes([head_of("a head", head) for head in given])
    except (TypeError, PlotError, CircuitError) as error:
        raise PlotError(f"neither a Circuit nor a list of (layer, head): {type(given).__name__}: {error}") from error


def _quantity(circuit: Circuit) -> str:
    what = "node" if circuit.level == "node" else "edge"
    metric = circuit.meta.get("metric")
    return f"score of the {what}" + (f": change of {metric}" if metric else "")


def _title(circuit: Circuit) -> str:
    model, method = (str(circuit.meta[key]) if circuit.meta.get(key) else "" for key in ("model", "method"))
    return " · ".join(filter(None, [f"Circuit by {method}" if method else "Circuit", model]))


def _about(circuit: Circuit) -> str:
    said = [str(circuit.meta[key]) for key in ("metric", "ablation") if circuit.meta.get(key)]
    counts = [f"{circuit.n_nodes} heads and MLPs", f"{circuit.n_edges:,} edges"]
    if circuit.facts and circuit.level == "edge":
        counts[1] += f" of the model’s {circuit.facts.n_edges:,}"
    return " · ".join([*said, *counts])


def _subtitle(circuit: Circuit, edges: list[Drawn], patterns: bool) -> str:
    """What is drawn, and how to read it."""
    cut = ""
    if circuit.level == "edge" and len(edges) < circuit.n_edges:
        cut = f" · the {len(edges):,} strongest are drawn"
    how = "An edge enters a head at its left for q, in the middle for k, at its right for v. "
    how = how if circuit.level == "edge" else ""
    click = "Click a node to light its paths" + (
        ", and to see the pattern of a head with a bold frame." if patterns else "."
    )
    return f"{_about(circuit)}{cut}\n{how}{click}"
