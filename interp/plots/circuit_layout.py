"""Where the parts of a circuit's picture stand, and the columns that Bokeh draws them from.

One unit across is a head, one unit up is a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, CustomJSHover, HoverTool, LinearColorMapper
from bokeh.palettes import Blues256
from bokeh.plotting import figure

from ..circuits import Circuit
from ..circuits.nodes import is_head, is_input
from ..errors import PlotError
from ..sites import LAYERLESS, Site
from .given import check_sizes, head_of, labels_of, numbers
from .labels import told_apart, visible
from .page import INK, MUTED, Plot, label_cells, panel, tooltip
from .scale import colour, dark, signed

MAX_WEIGHTS = 12_000_000  # of attention patterns in one page, four bytes each
BEND = 20  # points of a curve
SPREAD = 0.4  # of the width, over which edges leave embed and reach logits
WIDTHS = (0.7, 6.0)  # px of the weakest and the strongest edge


@dataclass(frozen=True)
class Drawn:
    """An edge as it is drawn: into one head, or into each head of a group; rank 0 is the strongest."""

    start: Site
    ends: tuple[Site, ...]
    slot: str
    name: str
    score: float | None
    rank: int


@dataclass(frozen=True)
class Layout:
    """The grid of heads and layers, and the px of one unit across and up."""

    heads: int
    layers: int
    across: float
    up: float

    @classmethod
    def of(cls, circuit: Circuit, width: float, n_layers: Any = None, n_heads: Any = None) -> Layout:
        """A grid for a circuit in a frame of at most `width` px, as large as the model where its sizes are known.

        Raises:
            PlotError: sizes that are not those of the circuit's model, or too small for it.
        """
        layers, heads = (max(getattr(s, name) or 0 for s in circuit.graph) + 1 for name in ("layer", "head"))
        given, facts = {"n_layers": n_layers, "n_heads": n_heads}, circuit.facts
        known = {name: getattr(facts, name, None) for name in given}
        check_sizes("the circuit", given, known, {"n_layers": layers, "n_heads": heads})
        layers, heads = known["n_layers"] or n_layers or layers, known["n_heads"] or n_heads or heads
        across = float(np.clip((width - 80) / heads, 15, 64))
        return cls(heads, layers, across, float(np.clip(680 / (layers + 1.5), 30, 74)))

    @property
    def x_range(self) -> tuple[float, float]:
        """From left of the first head to right of the MLPs."""
        return (-0.5 - 14 / self.across, self.heads - 0.5 + 76 / self.across)

    @property
    def y_range(self) -> tuple[float, float]:
        """From below embed to above logits."""
        return (-13 / self.up, self.layers + 1 + 13 / self.up)

    def place(self, site: Site) -> tuple[float, float]:
        """Centre of a component. An MLP stands half a layer above the heads that it reads."""
        if site.layer is None:
            return (self.heads - 1) / 2, (0.0 if site.facts.sends else self.layers + 1.0)
        if not site.axis:
            return self.heads - 0.5 + 40 / self.across, site.layer + 1.48
        return float(site.head or 0), site.layer + 1.0

    def box(self, site: Site) -> tuple[float, float]:
        """Width and height of a component's box."""
        ends = max(62.0, SPREAD * self.heads * self.across + 12)
        px = {"embed": ends, "logits": ends, "mlp_out": 38.0}.get(site.kind, min(34.0, 0.88 * self.across))
        return px / self.across, min(19.0, 0.42 * self.up) / self.up

    def along(self, site: Site, x: float) -> float:
        """Where on the box of embed or logits an edge to or from `x` has its end."""
        middle, half = self.place(site)[0], self.box(site)[0] / 2 - 5 / self.across
        return float(np.clip(middle + SPREAD * (x - middle), middle - half, middle + half))

    def curve(self, edge: Drawn) -> tuple[np.ndarray, np.ndarray]:
        """From the top of a box to the bottom of another, at its left (q), middle (k) or right (v).

        An edge into several heads is one line with a gap before each. One that climbs its own column over
        other layers bows out, so as not to run behind the boxes there.
        """
        t = 0.5 - 0.5 * np.cos(np.linspace(0, np.pi, BEND))  # close together at the ends, where it bends
        weights = [(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3]
        xs: list[Any] = []
        ys: list[Any] = []
        for end in edge.ends:
            (x0, y0), (x1, y1) = self.place(edge.start), self.place(end)
            y0, y1 = y0 + self.box(edge.start)[1] / 2, y1 - self.box(end)[1] / 2
            x1 += {"q": -0.3, "v": 0.3}.get(edge.slot, 0.0) * self.box(end)[0]
            leaves, enters = x0, x1
            if edge.start.layer is None:
                x0 = self.along(edge.start, enters)
            if end.layer is None:
                x1 = self.along(end, leaves)
            pull = 0.45 * (y1 - y0)
            climbs = abs(x1 - x0) < 0.5 and y1 - y0 > 1 and None not in (edge.start.layer, end.layer)
            bow = min(0.75, 34 / self.across) if climbs else 0.0
            for drawn, points in ((xs, (x0, x0 + bow, x1 + bow, x1)), (ys, (y0, y0 + pull, y1 - pull, y1))):
                drawn += [[np.nan], sum(w * p for w, p in zip(weights, points, strict=True))]
        return np.concatenate(xs[1:]), np.concatenate(ys[1:])


def drawn_edges(circuit: Circuit, limit: int) -> list[Drawn]:
    """The strongest edges, weakest first, so that the strongest are drawn on top.

    At level "node" there is one between two components, and its rank is that of the weaker end.
    """
    drawn: list[Drawn] = []
    if circuit.level == "edge":
        scores = circuit.scores()
        names = [name for name, _ in circuit.ranking()] + [e for e in circuit.edges if e not in scores]
        for rank, (start, end) in enumerate(names[:limit]):
            sender, receiver = Site.parse(start), Site.parse(end)
            slot = receiver.kind if is_input(receiver) else ""
            ends = tuple(circuit.graph.successors(receiver)) if slot else (receiver,)
            drawn.append(Drawn(sender, ends, slot, f"{start} → {end}", scores.get((start, end)), rank))
        return drawn[::-1]
    ranks, graph = {name: i for i, name in enumerate(node_names(circuit))}, circuit.graph
    pairs: dict[tuple[Site, Site], None] = {}
    for start, end, kind in graph.edges(data="kind"):
        if kind == "edge":
            ends = graph.successors(end) if is_input(end) else (end,)
            pairs |= dict.fromkeys((start, e) for e in ends)
    for start, end in pairs:
        rank = max(ranks.get(start.node, -1), ranks.get(end.node, -1))
        drawn.append(Drawn(start, (end,), "", f"{start.node} → {end.node}", None, rank))
    return sorted(drawn, key=lambda edge: edge.rank)[:limit][::-1]


def node_names(circuit: Circuit) -> list[str]:
    """Heads and MLPs by |score|, those without a score last, in forward order."""
    ranked = [name for name, _ in circuit.ranking()] if circuit.level == "node" else []
    return [name for name in dict.fromkeys([*ranked, *circuit.nodes()]) if name not in LAYERLESS]


def edge_source(
    edges: Sequence[Drawn], layout: Layout, mapper: LinearColorMapper, index: Mapping[str, int]
) -> ColumnDataSource:
    """Columns of the lines; `start` and `ends` are rows of the nodes."""
    curves = [layout.curve(edge) for edge in edges]
    size = np.array([abs(edge.score or 0.0) for edge in edges])
    share = np.sqrt(size / (size.max(initial=0.0) or 1.0))
    scored = np.array([edge.score is not None for edge in edges], dtype=bool)
    faint = float(np.clip(50 / max(len(edges), 1), 0.15, 0.8))  # where nothing tells edges apart
    alpha = np.where(scored, 0.35 + 0.6 * share, faint)
    return ColumnDataSource({
        "xs": [x for x, _ in curves], "ys": [y for _, y in curves],
        "width": np.where(scored, WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * share, 1.1),
        "color": [colour(edge.score, mapper) for edge in edges], "alpha": alpha, "plain": alpha.copy(),
        "rank": np.array([edge.rank for edge in edges], dtype=np.int32),
        "place": np.array([edge.rank + 1 for edge in edges], dtype=np.int32),
        "score": np.array([np.nan if edge.score is None else edge.score for edge in edges]),
        "says": ["" if edge.score is None else signed(edge.score) for edge in edges],
        "name": [edge.name for edge in edges], "start": [index[edge.start.node] for edge in edges],
        "ends": [[index[end.node] for end in edge.ends] for edge in edges],
    })  # fmt: skip


def node_source(
    circuit: Circuit,
    edges: Sequence[Drawn],
    layout: Layout,
    mapper: LinearColorMapper,
    patterns: Patterns | None,
) -> ColumnDataSource:
    """Columns of the boxes: only components that an edge touches, or at level "node" all of them."""
    touched = {site.node for edge in edges for site in (edge.start, *edge.ends)} | {"embed", "logits"}
    names = [n for n in circuit.nodes() if circuit.level == "node" or n in touched]
    sites, scores = [Site.parse(n) for n in names], circuit.scores()
    ranks = {name: i for i, name in enumerate(node_names(circuit))}
    fill = [colour(scores[n], mapper) if n in scores else "#ffffff" for n in names]
    labels = {"embed": "embed", "logits": "logits", "mlp_out": "MLP"}
    letter, size = ("" if layout.across < 30 else "H"), ("9px" if layout.across < 24 else "11px")
    index: dict[Any, int] = patterns.index if patterns else {}
    pattern = np.array([index.get((s.layer or 0, s.head), -1) for s in sites], dtype=np.int32)
    frame = pattern >= 0
    return ColumnDataSource({
        "name": names, "x": [layout.place(s)[0] for s in sites], "y": [layout.place(s)[1] for s in sites],
        "w": [layout.box(s)[0] for s in sites], "h": [layout.box(s)[1] for s in sites],
        "fill": fill, "ink": ["#ffffff" if dark(c) else INK for c in fill], "pattern": pattern,
        "line": np.where(frame, INK, MUTED), "border": np.where(frame, 2.0, 1.0),
        "alpha": np.ones(len(names)),
        "label": [labels.get(s.kind, f"{letter}{s.head}") for s in sites],
        "size": [size if is_head(s) else "11px" for s in sites],
        "rank": np.array([ranks.get(n, -1) for n in names], dtype=np.int32),
        "score": [signed(scores[n]) if n in scores else "none" for n in names],
        "reads": [_listing([e for e in edges if n in {end.node for end in e.ends}]) for n in names],
        "writes": [_listing([e for e in edges if n == e.start.node]) for n in names],
    })  # fmt: skip


@dataclass(frozen=True, eq=False)
class Patterns:
    """Attention patterns of heads, [head, query, key], and which head each is of."""

    index: dict[tuple[int, int], int]
    weights: np.ndarray
    labels: list[str]

    @classmethod
    def of(cls, patterns: Any, tokens: Any, circuit: Circuit) -> Patterns:
        """Checked patterns of heads of a circuit.

        Raises:
            PlotError: no mapping, a key that is no head of the circuit, weights that are not square, of different sizes, not as
                many as tokens, outside 0 to 1 or NaN, or too many; it names the head and the shape.
        """
        if not isinstance(patterns, Mapping):
            raise PlotError(f"patterns is a {type(patterns).__name__}; give {{(layer, head): weights [query, key], …}}")
        labels = None if tokens is None else labels_of(tokens)
        arrays: dict[tuple[int, int], np.ndarray] = {}
        for key, pattern in patterns.items():
            head = head_of("a key of patterns", key)
            if head not in circuit.heads:
                raise PlotError(f"patterns has head {head}, which is not in the circuit; its heads are {circuit.heads}")
            weights = numbers(f"the pattern of head {head}", pattern)
            n = len(labels) if labels else next(iter(arrays.values()), weights).shape[-1:][0] if weights.ndim else 0
            if weights.shape != (n, n) or not n:
                wanted = f"({n}, {n})" if n and weights.ndim else "(n, n)"
                raise PlotError(f"the pattern of head {head} has shape {weights.shape}, not [query, key] {wanted}")
            if not (weights.min() >= -1e-3 and weights.max() <= 1 + 1e-3):  # false of NaN too
                raise PlotError(
                    f"the pattern of head {head}, shape {weights.shape}, has weights between {weights.min():.3g} and "
                    f"{weights.max():.3g}, not 0 and 1: are these scores before softmax?"
                )
            arrays[head] = weights
        if sum(a.size for a in arrays.values()) > MAX_WEIGHTS:
            raise PlotError(f"{len(arrays)} patterns of {(n, n)} are too many for one page: give fewer heads")
        named = [str(i) for i in range(n)] if labels is None else [visible(label) for label in labels]
        return cls({head: i for i, head in enumerate(arrays)}, np.stack(list(arrays.values())), told_apart(named))

    @property
    def cell(self) -> float:
        """Px of one weight's side."""
        return float(np.clip(360 / len(self.labels), 4, 48))

    def panel(self, edges: Sequence[Drawn]) -> tuple[figure, ColumnDataSource]:
        """A figure of the pattern of the head that writes the strongest of the edges, and the source of its image."""
        writing = [(edge.start.layer, edge.start.head) for edge in reversed(edges)]  # edges come weakest first
        n, shown = len(self.labels), next(head for head in (*writing, *self.index) if head in self.index)
        layer, head = shown
        side = int(self.cell * n)
        plot: Plot = panel((-0.5, n - 0.5), (n - 0.5, -0.5), side, side, f"L{layer}.H{head} attends")
        source = ColumnDataSource({"image": [self.weights[self.index[shown]].copy()]})
        mapper = LinearColorMapper(palette=list(Blues256[::-1]), low=0, high=1)
        image = plot.image("image", -0.5, -0.5, n, n, source=source, color_mapper=mapper)
        names = CustomJSHover(args={"labels": self.labels}, code="return labels[Math.round(value)] ?? '';")
        lines = [("query", "$y{custom}"), ("key", "$x{custom}"), ("weight", "<b>@image{0.000}</b>")]
        plot.add_tools(HoverTool(
            renderers=[image], tooltips=tooltip("", lines), formatters={"$x": names, "$y": names},
        ))  # fmt: skip
        label_cells(plot, self.labels, self.labels, int(self.cell), int(self.cell))
        plot.yaxis.axis_label, plot.xaxis.axis_label = "query", "key"
        return plot, source


def _listing(edges: Sequence[Drawn], most: int = 4) -> str:
    """The strongest edges of a node as lines of its hover; edges come weakest first."""
    lines = [e.name + ("" if e.score is None else f" {signed(e.score)}") for e in edges[: -most - 1 : -1]]
    lines += [f"and {len(edges) - most} more"] if len(edges) > most else []
    return "<br>".join(lines) or "none"
