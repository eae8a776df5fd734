"""Circuit: a graph of nodes and scored edges of one model, and plain questions about it.

Imports networkx and numpy; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import networkx as nx
import numpy as np

from ..errors import CircuitError
from ..markup import table
from ..sites import Site
from .files import LEVELS, Item, Items, Meta, Parts, Place, read_parts, write_json
from .files import field as field_of
from .graph import (
    Array,
    Link,
    connected_edges,
    edge_graph,
    edge_name,
    guess_facts,
    matrix_edges,
    named_edges,
    named_nodes,
    node_graph,
    widest_paths,
)  # fmt: skip
from .nodes import EMBED, Described, Facts, is_head, is_input, node, order

#: What a union or an intersection of two circuits keeps of their meta where they agree.
SHARED = ("model", "method", "metric")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A part of a model, made of edges or of nodes, by `from_matrix`, `from_edges` or `from_nodes`.

    `graph` is a frozen `networkx.DiGraph` of Sites (`graph.copy()` can be changed). An edge from a sender to
    a receiver has kind="edge" and its `score`; one from a head's input to a head that it feeds has
    kind="inside" and no score. A key/value input leads to the heads of its group that are in the circuit (to
    all of them where none is). At level "node" the nodes carry the scores and the graph has all edges between
    kept nodes. `embed` and `logits` are part of every circuit and not counted as nodes.

    `meta` is JSON-able: level, facts, and what the method says of itself (model, method, metric, ablation,
    provenance, trajectory, selection).

    A circuit also reads as the sorted list of its heads, [(layer, head), ...].

    Examples:
        >>> circuit = interp.Circuit.from_nodes({"L20.H0": 2.0, "L23.H3": 3.0, "L0.mlp": 1.0})
        >>> circuit.top(n_nodes=2).heads
        [(20, 0), (23, 3)]
    """

    graph: nx.DiGraph
    meta: Meta = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.meta.get("level") not in LEVELS:
            raise CircuitError(f"meta: level must be one of {LEVELS}, not {self.meta.get('level')!r}")
        nx.freeze(self.graph)

    @classmethod
    def from_matrix(
        cls, scores: Array, mask: Array | None, facts: Described, meta: Mapping[str, object] | None = None
    ) -> Circuit:
        """The circuit of the edges in `mask` with their `scores`, both [sender, receiver] as in `facts`.

        Args:
            scores: numbers, numpy or torch.
            mask: which edges are in, bool; None: all that the model has.
            facts: `Facts`, or a `Model`.
            meta: what the method says of itself.

        Raises:
            CircuitError: shapes that are not the model's, an edge in the mask that it lacks, a score that is
                not finite.
        """
        facts = Facts.of(facts)
        edges = matrix_edges(scores, mask, facts)
        return cls(edge_graph(edges, facts), _meta(meta, "edge", facts))

    @classmethod
    def from_edges(
        cls,
        edges: Mapping[Item, float | None] | Iterable[tuple[Item, Item]],
        facts: Described = None,
        meta: Mapping[str, object] | None = None,
    ) -> Circuit:
        """The circuit of named edges: {("L1.H2", "L3.H1.q"): score}, or a list of them without scores.

        Where neither `facts` nor `meta["facts"]` is given, every head is taken to have k and v of its own.

        Raises:
            CircuitError: a name that is no node, an edge that the model lacks, a score that is not finite.
        """
        named = named_edges(edges)
        known = _known(facts, meta)
        graph = edge_graph(named, known or guess_facts(site for edge in named for site in edge))
        return cls(graph, _meta(meta, "edge", known))

    @classmethod
    def from_nodes(
        cls,
        nodes: Mapping[Item, float | None] | Iterable[Item],
        facts: Described = None,
        meta: Mapping[str, object] | None = None,
    ) -> Circuit:
        """The circuit of kept nodes, {"L3.H2": score}, or of nodes without scores; (3, 2) also names a head.

        Raises:
            CircuitError: a name that is no sender of the model, or a score that is not finite.
        """
        named = named_nodes(nodes)
        known = _known(facts, meta)
        return cls(node_graph(named, known or guess_facts(named)), _meta(meta, "node", known))

    @property
    def level(self) -> str:
        """`"edge"` or `"node"`: what carries the scores."""
        return self.meta["level"]

    @cached_property
    def facts(self) -> Facts | None:
        """The facts of the model, where they are known."""
        return _known(None, self.meta)

    @property
    def trajectory(self) -> list[Item]:
        """The steps of the pruning that led here, as its method recorded them."""
        return list(self.meta.get("trajectory") or ())

    @cached_property
    def _items(self) -> Items:
        """What carries scores, in forward order: edges, or at level "node" heads, MLPs, a scored embed."""
        if self.level == "edge":
            edges_in = [(e[:2], e[2].get("score")) for e in self.graph.edges(data=True) if e[2]["kind"] == "edge"]
            return dict(sorted(edges_in, key=lambda item: (order(item[0][0]), order(item[0][1]))))
        kept = [site for site in sorted(self.graph, key=order) if site.facts.sends]
        scored = {site: self.graph.nodes[site].get("score") for site in kept}
        return {site: score for site, score in scored.items() if site != EMBED or score is not None}

    @cached_property
    def _edges(self) -> list[Link]:
        if self.level == "edge":
            return list(self._items)
        edges_in = [(s, r) for s, r, kind in self.graph.edges(data="kind") if kind == "edge"]
        return sorted(edges_in, key=lambda edge: (order(edge[0]), order(edge[1])))

    @property
    def edges(self) -> list[tuple[str, str]]:
        """The edges (sender, receiver) by name, in forward order, without those inside heads."""
        return [(s.node, r.node) for s, r in self._edges]

    def nodes(self, level: str = "node") -> list[str]:
        """Names in forward order: embed, heads, MLPs, logits; at level "edge" also q, k and v."""
        if level not in LEVELS:
            raise CircuitError(f"level must be one of {LEVELS}, not {level!r}")
        sites = sorted(self.graph, key=order)
        return [site.node for site in sites if level == "edge" or not is_input(site)]

    @property
    def n_edges(self) -> int:
        """How many edges from a sender to a receiver there are."""
        return len(self._edges)

    @property
    def n_nodes(self) -> int:
        """How many heads and MLPs there are."""
        return len(self.nodes()) - 2

    def scores(self) -> dict[Item, float]:
        """{("L1.H2", "L3.H1.q"): score}, at level "node" {"L3.H2": score}, in the order of the forward pass.

        A score is the mean over pairs; edges and nodes without one are absent.
        """
        return {_name(item): score for item, score in self._items.items() if score is not None}

    def ranking(self) -> list[tuple[Item, float]]:
        """The items of `scores()`, largest |score| first, ties in the order of the forward pass."""
        return sorted(self.scores().items(), key=lambda item: -abs(item[1]))

    def top(
        self,
        n_edges: int | None = None,
        n_nodes: int | None = None,
        fraction: float | None = None,
        *,
        connected: bool = False,
    ) -> Circuit:
        """The part with the largest |score|: of edges, or at level "node" of heads and MLPs.

        Args:
            n_edges, n_nodes: how many edges, at level "node" how many heads and MLPs.
            fraction: of all that the model has if its facts are known, else of this circuit; rounded down.
            connected: then drop edges on no path from embed to logits, so that fewer than asked for may stay:
                `meta["selection"][-1]` has the counts `before` and `after` that.

        Raises:
            CircuitError: not exactly one of the three, one that is not of this level, a size out of range, or
                scores that are missing.
        """
        sizes = {"n_edges": n_edges, "n_nodes": n_nodes, "fraction": fraction}
        asked = {name: value for name, value in sizes.items() if value is not None}
        if len(asked) != 1:
            raise CircuitError(f"top() takes one of {list(sizes)}; {list(asked) or 'none'} given")
        (how, size), edges = next(iter(asked.items())), self.level == "edge"
        if how == ("n_nodes" if edges else "n_edges"):
            raise CircuitError(f"this circuit ranks {self.level}s: use n_{self.level}s= or fraction=")
        if not 0 <= size <= (1 if how == "fraction" else float("inf")):
            raise CircuitError(f"{how}={size} is out of range")
        ranked = self._ranked()
        if how == "fraction":
            total = len(ranked)
            if self.facts:
                total = self.facts.n_edges if edges else len(self.facts.senders) - 1
            size = int(round(size * total, 6))  # 0.29 · 100 is 28.999…
        return self._part(ranked[: int(size)], asked, connected)

    def threshold(self, t: float, *, connected: bool = False) -> Circuit:
        """The part with |score| ≥ t; `connected` as in `top`. CircuitError where scores are missing."""
        kept = [item for item in self._ranked() if abs(self._items[item] or 0.0) >= t]
        return self._part(kept, {"threshold": t}, connected)

    def _ranked(self) -> list[Item]:
        """All edges, or all heads and MLPs, largest |score| first. CircuitError: one has no score."""
        scores = {item: score for item, score in self._items.items() if item != EMBED}
        if missing := [item for item, score in scores.items() if score is None]:
            raise CircuitError(f"{len(missing)} {self.level}s have no score to rank by; first: {_name(missing[0])}")
        return sorted(scores, key=lambda item: -abs(scores[item] or 0.0))

    def _part(self, kept: list[Item], how: Meta, connected: bool) -> Circuit:
        part, before = self._made(kept), len(kept)
        if connected and self.level == "edge":  # at level "node" every node reads embed and is read by logits
            on_path = connected_edges(part.graph)
            part = self._made([edge for edge in kept if edge in on_path])
        after = part.n_edges if self.level == "edge" else part.n_nodes
        step = {**how, "connected": connected, "before": before, "after": after}
        return Circuit(part.graph, {**self.meta, "selection": [*self.meta.get("selection", ()), step]})

    def _made(self, kept: Iterable[Item], other: Circuit | None = None) -> Circuit:
        """A circuit of some of the items of this one, or of another where this one has no such item."""
        scores = {**(other._items if other else {}), **self._items}
        make: Any = Circuit.from_edges if self.level == "edge" else Circuit.from_nodes
        fixed = [EMBED] if self.level == "node" and EMBED in scores else []
        facts = self.facts or (other and other.facts)
        return make({item: scores[item] for item in [*fixed, *kept]}, facts)

    def matrix(self, facts: Described = None) -> np.ndarray:
        """Which edges are kept: bool [sender, receiver] in the order of `facts` (default: the circuit's own).

        Raises:
            CircuitError: no facts, or an edge that a model with these facts lacks.
        """
        return ~np.isnan(self._fill(facts, 0.0))

    def score_matrix(self, facts: Described = None) -> np.ndarray:
        """Scores of edges, float64 [sender, receiver]; NaN where an edge is absent or has no score.

        Raises:
            CircuitError: as `matrix`.
        """
        return self._fill(facts, None)

    def _fill(self, facts: Described, value: float | None) -> np.ndarray:
        known = self.facts if facts is None else Facts.of(facts)
        if known is None:
            raise CircuitError("this circuit does not know its model's facts: pass them, or the model")
        if self.facts is not None and self.facts != known:
            raise CircuitError(f"this circuit is of a model with {self.facts}; it does not fit one with {known}")
        filled = np.full(known.mask.shape, np.nan)
        for edge in self._edges:
            if not known.has_edge(*edge):
                raise CircuitError(f"there is no edge {edge_name(edge)} in a model with {known}")
            score = self.graph.edges[edge].get("score", np.nan) if value is None else value
            filled[known.sender_index[edge[0]], known.receiver_index[edge[1]]] = score
        return filled

    def paths(self, to: str | Site = "logits", k: int = 10) -> list[tuple[tuple[str, ...], float]]:
        """The k strongest paths from embed to a node, by name, each with the |score| of its weakest link.

        Raises:
            CircuitError: a node that is not in the circuit.
        """
        if (site := node(to)) not in self.graph:
            raise CircuitError(f"{site.node} is not in the circuit")
        return [(tuple(n.node for n in path), width) for path, width in widest_paths(self.graph, site, k)]

    def to_json(self, path: Place) -> None:
        """Write a JSON file of schema `interp.circuit`. CircuitError: a place that cannot be written."""
        write_json(self, path)

    @classmethod
    def from_json(cls, path: Place) -> Circuit:
        """Read a file of `to_json`.

        Raises:
            CircuitError: no such file, no JSON, another schema, a newer version, a field missing, unknown, wrong; it names
                the line or field at fault.
        """
        return cls.of(read_parts(path), path)

    @classmethod
    def of(cls, parts: Parts, path: Place) -> Circuit:
        """The circuit that a file tells of."""
        make: Any = cls.from_edges if parts.level == "edge" else cls.from_nodes
        with field_of(path, f"{parts.level}s"):
            return make(parts.items, parts.facts, parts.meta)

    @property
    def _kept(self) -> set[Item]:
        return set(self._items) - {EMBED}

    def __and__(self, other: Circuit) -> Circuit:
        """What is in both, with this circuit's scores. CircuitError: levels or facts differ."""
        return self._joined(other, self._kept & self._like(other)._kept)

    def __or__(self, other: Circuit) -> Circuit:
        """What is in either; this circuit's scores come first. CircuitError: levels or facts differ."""
        return self._joined(other, self._kept | self._like(other)._kept)

    def jaccard(self, other: Circuit) -> float:
        """Shared edges (at level "node" nodes) as a fraction of all that either has; 1 if both are empty."""
        mine, theirs = self._kept, self._like(other)._kept
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def _like(self, other: Circuit) -> Circuit:
        if not isinstance(other, Circuit) or other.level != self.level:
            edges_in = f"one of {other.level}s" if isinstance(other, Circuit) else type(other).__name__
            raise CircuitError(f"a circuit of {self.level}s can be combined with its like, not with {edges_in}")
        if self.facts and other.facts and self.facts != other.facts:
            raise CircuitError(f"circuits of two models: {self.facts}, and {other.facts}")
        return other

    def _joined(self, other: Circuit, kept: set[Item]) -> Circuit:
        part = self._made(kept, other)
        agreed = {k: self.meta[k] for k in SHARED if k in self.meta and self.meta[k] == other.meta.get(k)}
        return Circuit(part.graph, {**agreed, **part.meta})

    @cached_property
    def heads(self) -> list[tuple[int, int]]:
        """The heads as sorted (layer, head)."""
        return sorted((s.layer, s.head) for s in self.graph if is_head(s))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    @overload
    def __getitem__(self, i: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, i: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, i: Any) -> Any:
        return self.heads[i]

    def __bool__(self) -> bool:
        """Whether anything is kept: a circuit of MLPs alone is something, though it lists no heads."""
        return bool(self._kept)

    def __repr__(self) -> str:
        said = [str(self.meta[key]) for key in ("method", "model", "metric") if self.meta.get(key)]
        return f"Circuit({', '.join([*said, f'{self.n_nodes} heads and MLPs', f'{self.n_edges:,} edges'])})"

    def _repr_html_(self) -> str:
        rows = [(name if isinstance(name, str) else " → ".join(name), score) for name, score in self.ranking()[:10]]
        return table([self.level, "score"], rows, repr(self))


def _name(item: Site | Link) -> Item:
    return item.node if isinstance(item, Site) else (item[0].node, item[1].node)


def _known(facts: Described, meta: Mapping[str, object] | None) -> Facts | None:
    given = (meta or {}).get("facts") if facts is None else facts
    return None if given is None else Facts.of(given)


def _meta(meta: Mapping[str, object] | None, level: str, facts: Facts | None) -> Meta:
    return {**(meta or {}), "level": level, "facts": None if facts is None else facts.to_dict()}
