"""Functions on a circuit's graph: building it from kept edges or nodes, connectivity, widest paths.

A graph is a `networkx.DiGraph` of Sites whose edges have kind "edge" (sender to receiver, with a score) or
"inside" (a head's input to the head).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import numpy as np

from ..errors import CircuitError
from ..order import READERS
from ..sites import Site
from .files import Item
from .nodes import EMBED, LOGITS, Facts, node, order

Link = tuple[Site, Site]
#: Numbers by sender and receiver, numpy or torch.
Array = Any
Scores = Mapping[Site, float | None]


def edge_name(edge: Link) -> str:
    """An edge as text, `L1.H2 -> L3.H1.q`."""
    return f"{edge[0].node} -> {edge[1].node}"


def matrix_edges(scores: Array, mask: Array | None, facts: Facts) -> dict[Link, float | None]:
    """The edges in `mask` (bool; None: all) with their scores; both [sender, receiver], numpy or torch.

    Raises:
        CircuitError: a shape or type that does not fit.
    """
    scores = np.asarray(scores.detach().double().cpu() if hasattr(scores, "detach") else scores)
    kept = facts.mask if mask is None else np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
    for name, array in (("scores", scores), ("the mask", kept)):
        if array.shape != facts.mask.shape:
            raise CircuitError(f"{name} must be [sender, receiver] = {facts.mask.shape} for {facts}, not {array.shape}")
    if kept.dtype != bool:
        raise CircuitError(f"the mask must be boolean, not {kept.dtype}")
    at = np.argwhere(kept).tolist()
    return {(facts.senders[s], facts.receivers[r]): scores[s, r].item() for s, r in at}


def named_edges(edges: Mapping[Item, float | None] | Iterable[tuple[Item, Item]]) -> dict[Link, float | None]:
    """Edges by Site from edges by name, with scores or without. CircuitError: no such nodes."""
    scored: Mapping[Item, float | None] = edges if isinstance(edges, Mapping) else dict.fromkeys(edges)
    named: dict[Link, float | None] = {}
    for edge, score in scored.items():
        if not isinstance(edge, tuple) or len(edge) != 2:
            raise CircuitError(f"an edge is a pair (sender, receiver), not {edge!r}")
        named[node(edge[0]), node(edge[1])] = score
    return named


def named_nodes(nodes: Mapping[Item, float | None] | Iterable[Item]) -> dict[Site, float | None]:
    """Nodes by Site from names or (layer, head), with scores or without. CircuitError: no such nodes."""
    scored: Mapping[Item, float | None] = nodes if isinstance(nodes, Mapping) else dict.fromkeys(nodes)
    named: dict[Site, float | None] = {}
    for name, score in scored.items():
        head = isinstance(name, tuple) and len(name) == 2
        named[node(f"L{name[0]}.H{name[1]}" if head else name)] = score
    return named


def edge_graph(edges: Mapping[Link, float | None], facts: Facts) -> nx.DiGraph:
    """The graph of kept edges with their scores (None: unscored).

    A key/value input leads to the heads of its group that write something or have a q edge of their own; to
    all of the group where there is none.

    Raises:
        CircuitError: an edge that the model lacks, or a score that is not finite.
    """
    for edge, score in edges.items():
        if not facts.has_edge(*edge):
            raise CircuitError(f"there is no edge {edge_name(edge)} in a model with {facts}")
        _check(score, edge)
    kept = {s for s, _ in edges} | {
        head for _, r in edges if r.facts.reads == READERS[0] for head in facts.heads_behind(r)
    }
    return _graph(edges, kept, facts)


def node_graph(nodes: Scores, facts: Facts) -> nx.DiGraph:
    """The graph of kept nodes, with their scores and all edges between them; embed and logits are always in.

    Raises:
        CircuitError: a node that the model lacks or that is no sender, or a score that is not finite.
    """
    for site, score in nodes.items():
        if site not in facts.sender_index:
            raise CircuitError(
                f"there is no sender {site.node} in a model with {facts}; senders are embed, heads and MLPs"
            )
        _check(score, site)
    senders = sorted({EMBED, *nodes}, key=order)
    receivers = sorted({LOGITS, *(r for sender in senders for r in facts.inputs_of(sender))}, key=order)
    edges = {(s, r): None for r in receivers for s in senders if facts.has_edge(s, r)}
    graph = _graph(edges, set(nodes), facts)
    for site, score in nodes.items():
        graph.nodes[site].update(_attributes(score))
    return graph


def guess_facts(sites: Iterable[Site]) -> Facts:
    """The smallest sequential model that has these nodes, with a key/value head to each head."""
    counts = [(site.layer or 0, site.head or 0) for site in sites]
    n_heads = max((head for _, head in counts), default=0) + 1
    return Facts(max((layer for layer, _ in counts), default=0) + 1, n_heads, n_heads)


def connected_edges(graph: nx.DiGraph) -> set[Link]:
    """The edges that lie on a path from embed to logits."""
    reached = nx.descendants(graph, EMBED) | {EMBED}
    reaching = nx.ancestors(graph, LOGITS) | {LOGITS}
    return {(a, b) for a, b in graph.edges if a in reached and b in reaching}


def widest_paths(graph: nx.DiGraph, to: Site, k: int) -> list[tuple[tuple[Site, ...], float]]:
    """The k paths from embed to a node whose weakest link is strongest, with the |score| of that link.

    A link is an edge's score, or a node's where nodes carry the scores; what has no score is no link.
    """
    best: dict[Site, list[tuple[float, tuple[Site, ...]]]] = {EMBED: [(math.inf, (EMBED,))]}
    for site in sorted(graph, key=order):
        if site == EMBED:
            continue
        own = abs(graph.nodes[site].get("score", math.inf))
        named = [
            (min(width, own, abs(data.get("score", math.inf))), (*path, site))
            for before, _, data in graph.in_edges(site, data=True)
            for width, path in best.get(before, ())
        ]
        best[site] = heapq.nlargest(k, named, key=lambda item: item[0])
    return [(path, width) for width, path in best.get(to, ())]


def _graph(edges: Mapping[Link, float | None], kept: set[Site], facts: Facts) -> nx.DiGraph:
    inside = []
    for receiver in dict.fromkeys(r for _, r in edges):
        heads = facts.heads_behind(receiver)
        inside += [(receiver, head) for head in [h for h in heads if h in kept] or heads]
    graph = nx.DiGraph()
    sites = {EMBED, LOGITS, *kept, *(site for edge in (*edges, *inside) for site in edge)}
    graph.add_nodes_from(sorted(sites, key=order))
    graph.add_edges_from((*edge, {"kind": "edge", **_attributes(score)}) for edge, score in edges.items())
    graph.add_edges_from(inside, kind="inside")
    return graph


def _attributes(score: float | None) -> dict[str, float]:
    return {} if score is None else {"score": float(score)}


def _check(score: float | None, where: Site | Link) -> None:
    number = isinstance(score, int | float | np.number) and not isinstance(score, bool)
    if score is not None and not (number and math.isfinite(score)):
        name = where.node if isinstance(where, Site) else edge_name(where)
        raise CircuitError(f"the score of {name} must be a finite number, not {score!r}")
