"""`FeatureCircuit`: features of dictionaries, and what each leaves, with what they do for a metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import networkx as nx

from ..errors import CircuitError
from ..files import path_of, write_atomically
from ..saes.library import Dictionary
from .drawing import Box, Drawing

LOGITS = "logits"


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """Features, and errors of dictionaries, with what each does for the metric.

    `nodes`: {"L8.sae8[117]": effect, "L8.error8": effect}: the change of the metric, mean over pairs, if that node alone took the
    corrupted run's value. `edges`: {(upstream, downstream): the part of that effect which goes this way}; the edges into
    "logits" are the effects of the last dictionary's nodes. `saes` are not saved: give them again to run a loaded circuit.
    """

    SCHEMA = "interp.feature-circuit/1"
    WHAT = "features"
    nodes: dict[str, float]
    edges: dict[tuple[str, str], float]
    meta: dict[str, Any] = field(default_factory=dict)
    saes: tuple[Dictionary, ...] = ()

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The nodes with `score`, "logits" among them, and the edges with theirs."""
        graph = nx.DiGraph()
        for name, score in self.nodes.items():
            graph.add_node(name, score=score)
        graph.add_node(LOGITS)
        for (start, end), score in self.edges.items():
            graph.add_edge(start, end, score=score)
        return graph

    def ranking(self) -> list[tuple[str, float]]:
        """Nodes by |score|, the largest first."""
        return sorted(self.nodes.items(), key=lambda item: (-abs(item[1]), item[0]))

    def top(self, n_nodes: int) -> FeatureCircuit:
        """The circuit of the strongest nodes, and the edges between them. CircuitError: fewer than none."""
        if n_nodes < 0:
            raise CircuitError(f"n_nodes={n_nodes}: it is 0 or more")
        kept = dict(self.ranking()[:n_nodes])
        inside = {*kept, LOGITS}
        edges = {edge: score for edge, score in self.edges.items() if set(edge) <= inside}
        return replace(self, nodes=kept, edges=edges)

    def kept(self, view: str, error: str) -> tuple[set[int], bool]:
        """Which features of a dictionary's view are in the circuit, and whether what it leaves is."""
        units = {unit_of(name) for name in self.nodes if name.startswith(f"{view}[")}
        return units, error in self.nodes

    def to_json(self, path: str | Path) -> None:
        """Write nodes, edges and meta. CircuitError: it cannot be written."""
        edges = [[*edge, score] for edge, score in self.edges.items()]
        data = {"schema": self.SCHEMA, "nodes": self.nodes, "edges": edges, "meta": self.meta, "reads": self.more()}
        try:
            write_atomically(path_of(path, CircuitError), json.dumps(data, indent=1).encode())
        except OSError as error:
            raise CircuitError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def from_json(cls, path: str | Path, saes: Sequence[Dictionary] = ()) -> Self:
        """A circuit that `to_json` wrote. CircuitError: a file that is none."""
        try:
            data = json.loads(path_of(path, CircuitError).read_text())
            if data["schema"] != cls.SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {cls.SCHEMA!r}")
            edges = {(start, end): float(score) for start, end, score in data["edges"]}
            nodes = {str(name): float(score) for name, score in data["nodes"].items()}
        except OSError as error:
            raise CircuitError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitError(f"{path} is no circuit of {cls.WHAT}: {error}") from error
        return cls(nodes, edges, data.get("meta", {}), tuple(saes)).from_rows(data.get("reads", ()))

    def more(self) -> list[tuple[str, str, str, float]]:
        """What another kind of circuit knows besides, as `from_rows` takes it."""
        return []

    def from_rows(self, rows: Sequence[Sequence[str]]) -> Self:
        """The circuit with what `more` gave."""
        return self

    def drawing(self) -> Drawing:
        """Rows of the dictionaries, the logits on top; features by number."""
        sites = [str(site) for site in self.meta.get("sites", ())]
        rows = {
            site.split(".")[0] + ("" if site.endswith("resid_post") else "." + site.split(".")[1]): site
            for site in sites
        }
        names = list(rows)
        boxes = []
        for name, score in self.nodes.items():
            layer, kind = name.split("[")[0].split(".", 1)
            rest = kind.rsplit("_resid", 1)
            row = names.index(layer if len(rest) == 1 else f"{layer}.resid{rest[1]}")
            label = str(unit_of(name)) if "[" in name else "error"
            boxes.append(Box(name, row, label, score))
        boxes.append(Box(LOGITS, len(names), LOGITS))
        about = (
            f"{self.meta.get('metric')} · {len(self.nodes)} nodes, {len(self.edges):,} edges · features by their number"
        )
        title = f"Features by {self.meta.get('method')} · {self.meta.get('model')}"
        quantity = f"change of {self.meta.get('metric')}"
        return Drawing(boxes, self.edges, [*names, LOGITS], title, about, quantity)

    def __repr__(self) -> str:
        return f"FeatureCircuit({len(self.nodes)} nodes, {len(self.edges)} edges, {self.meta.get('sites')})"


def unit_of(name: str) -> int:
    """The number of a feature in its node's name."""
    return int(name.rsplit("[", 1)[1].rstrip("]"))
