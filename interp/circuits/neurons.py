"""Graphs of neurons: hidden units of MLPs, heads and the embedding, with what they do for a metric and for each other.

No dictionary is needed: about a hundred neurons carry a behaviour of a small model (arXiv 2601.22594).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..attribution import RULED, adds_up, rule_of
from ..cells import Resolved
from ..engine.context import Runs, context_of
from ..engine.schedule import gradient_budget
from ..engine.slopes import ENTRY, GradientSpec, neuron_estimates
from ..errors import CircuitError
from ..metrics import Metric
from ..models.model import Model
from ..options import Options
from ..sites import Site
from .drawing import Box, Drawing
from .features import LOGITS, FeatureCircuit
from .files import write_text
from .tracer import of_neurons

EMBED = "embed"
READS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class NeuronCircuit(FeatureCircuit):
    """Neurons, heads and the embedding of one model, with their effects, and the direct edges between them.

    `nodes`: {"L5.neuron[117]": effect, "L8.H3": effect, "embed": effect}: the change of the metric, mean over pairs, if that
    node alone took the corrupted run's value at every position. `edges`: {(sender, receiver): the part of the receiver's effect
    that comes from the sender directly}; those into "logits" are direct effects. `reads`: {(sender, head, "q" | "k" | "v"): that
    part, by what the head reads}.
    """

    SCHEMA = "interp.neuron-circuit/1"
    WHAT = "neurons"
    reads: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def sites(self, n_nodes: int | None = None) -> list[Site]:
        """The strongest neurons and heads as sites, for `interp.sets` and `interp.patch`; without the embedding."""
        names = [name for name, _ in self.ranking() if name != EMBED][:n_nodes]
        return [site_of(name) for name in names]

    def why(self, head: str) -> pd.DataFrame:
        """Why a head attends: what each node does through its queries, keys and values, the strongest first.

        Columns `q`, `k`, `v`, by sender; rows sum to the edges into the head. CircuitError: a head that is not in the circuit.
        """
        if head not in self.nodes or ".H" not in head:
            heads = [name for name in self.nodes if ".H" in name]
            raise CircuitError(f"{head!r} is no head of this circuit; it has {', '.join(heads) or 'none'}")
        found: dict[str, dict[str, float]] = {}
        for (sender, receiver, read), score in self.reads.items():
            if receiver == head:
                found.setdefault(sender, dict.fromkeys(READS, 0.0))[read] = score
        frame = pd.DataFrame.from_dict(found, orient="index", columns=list(READS))
        return frame.loc[frame.abs().sum(axis=1).sort_values(ascending=False).index]

    def top(self, n_nodes: int) -> NeuronCircuit:
        """The circuit of the strongest nodes, and the edges between them. CircuitError: fewer than none."""
        kept = super().top(n_nodes)
        reads = {key: score for key, score in self.reads.items() if set(key[:2]) <= set(kept.nodes)}
        return NeuronCircuit(kept.nodes, kept.edges, kept.meta, (), reads)

    def to_tracer(self, path: str | Path, slug: str = "interp") -> None:
        """Write the graph JSON that circuit-tracer's viewer reads, all nodes at one position. CircuitError: no file."""
        write_text(path, json.dumps(of_neurons(self.nodes, self.edges, self.meta, slug), indent=1))

    def more(self) -> list[tuple[str, str, str, float]]:
        """What heads read."""
        return [(*key, score) for key, score in self.reads.items()]

    def from_rows(self, rows: Sequence[Sequence[str]]) -> NeuronCircuit:
        """The circuit with that."""
        reads = {(sender, head, read): float(score) for sender, head, read, score in rows}
        return replace(self, reads=reads)

    def drawing(self) -> Drawing:
        """A row for each layer that has nodes, the embedding below, the logits on top."""
        layers = sorted({layer_of(name) for name in self.nodes if name != EMBED})
        rows = [*([EMBED] if EMBED in self.nodes else []), *[f"L{layer}" for layer in layers], LOGITS]
        boxes = [
            Box(name, rows.index(EMBED if name == EMBED else f"L{layer_of(name)}"), label_of(name), score)
            for name, score in self.nodes.items()
        ]
        boxes.append(Box(LOGITS, len(rows) - 1, LOGITS))
        metric = self.meta.get("metric")
        about = f"{metric} · {len(self.nodes)} nodes, {len(self.edges):,} edges · H: heads, numbers: neurons"
        title = f"Neurons by {self.meta.get('method')} · {self.meta.get('model')}"
        return Drawing(boxes, self.edges, rows, title, about, f"change of {metric}")

    def __repr__(self) -> str:
        return f"NeuronCircuit({len(self.nodes)} nodes, {len(self.edges)} edges)"


def site_of(name: str) -> Site:
    """The site of a node: a hidden unit, or a head's z."""
    layer = layer_of(name)
    if ".H" in name:
        return Site("z", layer=layer, head=int(name.split(".H")[1]))
    return Site("neuron", layer=layer, unit=int(name.split("[")[1].rstrip("]")))


def layer_of(name: str) -> int:
    """The layer in a node's name."""
    return int(name[1:].split(".")[0])


def label_of(name: str) -> str:
    """What stands in a node's box."""
    return name if name == EMBED else name.split(".")[1] if ".H" in name else name.split("[")[1].rstrip("]")


def discover_neurons(
    model: Model, runs: Runs, metric: Metric, method: str, top: int, held: bool, alphas: tuple[float, ...], options: Options,
    about: dict[str, object],
) -> NeuronCircuit:  # fmt: skip
    """The `top` neurons and heads by their effects, and the edges between them; see `interp.discover(level="neuron")`."""
    if top < 1:
        raise CircuitError(f"top={top}: a graph has 1 node or more")
    if held and method != "secant":
        raise CircuitError(
            f"patterns='held' goes with method='secant', not with {method!r} ('relp' holds them in any case)"
        )
    for layer in range(model.n_layers):
        model.require(Site("neuron", layer=layer))
    context = context_of(model, runs, Resolved((), (), {}), "growing")
    budget = options.max_tokens or gradient_budget(model)
    how: GradientSpec = {
        "tape": [], "fractions": alphas, "moved": [ENTRY] if alphas else [], "drop": [], "exact_qk": False, "by_edge": False,
        "rule": "secant held" if held else rule_of(method),
    }  # fmt: skip
    found = neuron_estimates(model, context, metric, [], how, budget, (f"{method} neurons", options.progress))
    names = [
        *((layer, 1, unit) for layer in range(model.n_layers) for unit in range(found["neurons"].shape[2])),
        *((layer, 0, head) for layer in range(model.n_layers) for head in range(model.n_heads)),
    ]
    scores = np.concatenate([found["neurons"].mean(0).ravel(), found["heads"].mean(0).ravel()])
    chosen = sorted(names[i] for i in np.argsort(-np.abs(scores), kind="stable")[:top])
    effect = dict(zip(names, scores.tolist(), strict=True))
    edges = neuron_estimates(model, context, metric, chosen, how, budget, (f"{method} edges", options.progress))[
        "edges"
    ].mean(0)
    nodes = {EMBED: float(found["embed"].mean()), **{name_of_node(node): effect[node] for node in chosen}}
    meta = {
        **about, "points": list(alphas), "patterns": "held" if held or method == "relp" else "moving",
        "n_layers": model.n_layers,
    }  # fmt: skip
    if method in RULED and not held:
        meta["completeness"] = adds_up(method, found["embed"], found["change"])
    by_edge, by_read = _by_name(edges, chosen)
    return NeuronCircuit(nodes, by_edge, meta, (), by_read)


def _by_name(
    edges: np.ndarray, chosen: Sequence[tuple[int, int, int]]
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str, str], float]]:
    """Edges between nodes, and those into heads by what they read, from `[read, sender]`; what is 0 is left out."""
    senders = [EMBED, *map(name_of_node, chosen)]
    receivers = [(node, read) for node in chosen for read in ((None,) if node[1] else READS)]
    by_edge: dict[tuple[str, str], float] = {}
    by_read: dict[tuple[str, str, str], float] = {}
    for row, (node, read) in zip(edges, [*receivers, (None, None)], strict=True):
        name = LOGITS if node is None else name_of_node(node)
        for place in np.flatnonzero(row):
            edge, score = (senders[place], name), float(row[place])
            by_edge[edge] = by_edge.get(edge, 0.0) + score
            if read is not None:
                by_read[(*edge, read)] = score
    return by_edge, by_read


def name_of_node(node: tuple[int, int, int]) -> str:
    """ "L5.H3" or "L5.neuron[117]"."""
    layer, kind, number = node
    return f"L{layer}.neuron[{number}]" if kind else f"L{layer}.H{number}"
