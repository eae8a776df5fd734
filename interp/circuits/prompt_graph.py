"""`AttributionGraph`: what every active feature and every logit of one prompt is made of, to prune, draw and keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from ..errors import CircuitError
from ..files import path_of, write_atomically
from .drawing import Box, Drawing
from .influence import Influence
from .tracer import as_tracer, parsed

SCHEMA = "interp.attribution-graph/1"


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes of one prompt, and what each adds to what others read.

    `nodes`: names in the order of `adjacency`: "emb@3", "L2.error@4", "L2.f117@4", "logit:Paris". `adjacency [target, source]`:
    what a source adds to a target: to a feature's reading before its activation function, to a logit less the mean of all.
    Rows of embeddings and errors are zero, and of features that were not reached. `activations`: of features; of others 0.
    """

    nodes: tuple[str, ...]
    adjacency: Tensor
    activations: Tensor
    tokens: tuple[str, ...]
    prompt: tuple[int, ...]
    logits: dict[str, float]  # the probability of each logit node
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The same as networkx has it: edges carry `weight`."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        for target, source in self.adjacency.nonzero().tolist():
            graph.add_edge(self.nodes[source], self.nodes[target], weight=float(self.adjacency[target, source]))
        return graph

    @cached_property
    def influence(self) -> Tensor:
        """How much each node influences the logits, along all paths `[node]`, shares of what comes in (the paper's, by their
        probabilities)."""
        weights = torch.tensor([self.logits.get(name, 0.0) for name in self.nodes])
        return Influence(self.adjacency).of(weights)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The nodes that hold so much of all influence on the logits, and of the edges between them those that do.

        Embeddings and logits stay.

        Raises:
            CircuitError: a threshold that is no share.
        """
        for name, share in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 < share <= 1:
                raise CircuitError(f"{name}={share}: it is a share of all influence, above 0 and at most 1")
        stays = torch.tensor([name.startswith(("emb@", "logit:")) for name in self.nodes])
        kept = (stays | most(self.influence * ~stays, node_threshold)).nonzero()[:, 0]
        inner = self.adjacency[kept][:, kept]
        weights = torch.tensor([self.logits.get(self.nodes[i], 0.0) for i in kept.tolist()])
        score = Influence(inner).edges(weights)
        inner = inner * most(score.flatten(), edge_threshold).view_as(score)
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in kept.tolist()),
            adjacency=inner,
            activations=self.activations[kept],
        )

    def save(self, path: str | Path) -> None:
        """Write everything. CircuitError: it cannot be written."""
        edges = [[*pair, float(self.adjacency[tuple(pair)])] for pair in self.adjacency.nonzero().tolist()]
        data = {
            "schema": SCHEMA, "nodes": self.nodes, "edges": edges, "activations": self.activations.tolist(),
            "tokens": self.tokens, "prompt": self.prompt, "logits": self.logits, "meta": self.meta,
        }  # fmt: skip
        write(path, data)

    @classmethod
    def load(cls, path: str | Path) -> AttributionGraph:
        """A graph that `save` wrote. CircuitError: a file that is none."""
        try:
            data = json.loads(path_of(path, CircuitError).read_text())
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
            adjacency = torch.zeros(len(data["nodes"]), len(data["nodes"]))
            for target, source, weight in data["edges"]:
                adjacency[target, source] = weight
            return cls(
                tuple(data["nodes"]),
                adjacency,
                torch.tensor(data["activations"]),
                tuple(data["tokens"]),
                tuple(data["prompt"]),
                dict(data["logits"]),
                dict(data["meta"]),
            )
        except OSError as error:
            raise CircuitError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise CircuitError(f"{path} is no attribution graph: {error}") from error

    def to_json(self, path: str | Path, slug: str = "graph") -> None:
        """Write it as circuit-tracer's viewer reads it. CircuitError: it cannot be written."""
        write(path, as_tracer(self, slug))

    def drawing(self) -> Drawing:
        """Positions across, layers up; the embeddings at the bottom and the logits on top."""
        layers = sorted({parsed(name)[0] for name in self.nodes if name.startswith("L")})
        rows = ["embed", *(f"L{layer}" for layer in layers), "logits"]
        boxes = []
        share = self.influence / max(float(self.influence.max()), 1e-12)
        for number, name in enumerate(self.nodes):
            says = {"influence": f"{float(self.influence[number]):.3f}"}
            if name.startswith("logit:"):
                says = {"probability": f"{self.logits[name]:.3f}"}
                boxes.append(Box(name, len(rows) - 1, name[6:], None, float(len(self.tokens) - 1), says))
                continue
            layer, label, position = parsed(name)
            if self.activations[number]:
                says["activation"] = f"{float(self.activations[number]):.3f}"
            row = 0 if layer < 0 else 1 + layers.index(layer)
            boxes.append(Box(name, row, label, float(share[number]) if layer >= 0 else None, float(position), says))
        index = {name: number for number, name in enumerate(self.nodes)}
        edges = {(a, b): float(self.adjacency[index[b], index[a]]) for a, b in self.graph.edges}
        largest = max(map(abs, edges.values()), default=1.0) or 1.0
        about = (
            f"{len(self.nodes)} nodes, {len(edges):,} edges · boxes: influence on the logits, features by their number"
        )
        scaled = {edge: weight / largest for edge, weight in edges.items()}
        title = f"Attribution graph · {self.meta.get('model')}"
        return Drawing(boxes, scaled, rows, title, about, "share of the largest edge, or influence", self.tokens)

    def __repr__(self) -> str:
        return f"AttributionGraph({len(self.nodes)} nodes, {int((self.adjacency != 0).sum())} edges, {''.join(self.tokens)!r})"


def write(path: str | Path, data: Mapping[str, Any]) -> None:
    """Plain data as JSON. CircuitError: it cannot be written."""
    try:
        write_atomically(path_of(path, CircuitError), json.dumps(data).encode())
    except OSError as error:
        raise CircuitError(f"cannot write {path}: {error.strerror or error}") from error


def most(values: Tensor, share: float) -> Tensor:
    """Which values hold this share of their sum, the largest first: bool."""
    order = values.argsort(descending=True)
    total = values[order].cumsum(0)
    needed = int((total < share * total[-1]).sum()) + 1
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order[:needed]] = values[order[:needed]] > 0
    return kept
