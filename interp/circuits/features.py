"""Circuits of features (Marks et al. 2024): nodes are features of dictionaries and what each dictionary leaves, edges say what
one does for another.

1. Every node gets its effect on the metric, by integrated gradients or at the clean run; the best become the circuit.
2. Edges between neighbouring dictionaries are scored by vector-Jacobian products.
3. A circuit is run with all other nodes cut: one part of each site, replaced, averaged or zeroed as any site is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from ..ablation import ablate
from ..attribution import attribute
from ..cells import Resolved
from ..engine.context import Runs, context_of
from ..engine.schedule import gradient_budget
from ..engine.slopes import feature_estimates
from ..engine.trial import name_of
from ..errors import CircuitError
from ..files import path_of, write_atomically
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..options import Options
from ..pairs import PromptPairs
from ..plan import sets
from ..saes.library import Dictionary
from ..saes.splits import by_depth, cut_view
from ..saes.views import error_view, view_of
from ..sites import Site
from ..views import View
from .drawing import Box, Drawing

LOGITS = "logits"
SCHEMA = "interp.feature-circuit/1"


@dataclass(frozen=True, eq=False)
class FeatureCircuit:
    """Features, and errors of dictionaries, with what each does for the metric.

    `nodes`: {"L8.sae8[117]": effect, "L8.error8": effect}: the change of the metric, mean over pairs, if that node alone took the
    corrupted run's value. `edges`: {(upstream, downstream): the part of that effect which goes this way}; the edges into
    "logits" are the effects of the last dictionary's nodes. `saes` are not saved: give them again to run a loaded circuit.
    """

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
        data = {"schema": SCHEMA, "nodes": self.nodes, "edges": edges, "meta": self.meta}
        try:
            write_atomically(path_of(path, CircuitError), json.dumps(data, indent=1).encode())
        except OSError as error:
            raise CircuitError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def from_json(cls, path: str | Path, saes: Sequence[Dictionary] = ()) -> FeatureCircuit:
        """A circuit that `to_json` wrote. CircuitError: a file that is none."""
        try:
            data = json.loads(path_of(path, CircuitError).read_text())
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA!r}")
            edges = {(start, end): float(score) for start, end, score in data["edges"]}
            nodes = {str(name): float(score) for name, score in data["nodes"].items()}
        except OSError as error:
            raise CircuitError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CircuitError(f"{path} is no circuit of features: {error}") from error
        return cls(nodes, edges, data.get("meta", {}), tuple(saes))

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


@dataclass(frozen=True)
class Place:
    """One dictionary in a circuit: its site, and the views of its features and of what it leaves."""

    site: Site
    sae: Dictionary
    features: View
    error: View

    @classmethod
    def of(cls, model: Model, saes: Sequence[Dictionary]) -> list[Place]:
        """Dictionaries by depth, if the model has their sites. CircuitError: none given."""
        if not saes:
            raise CircuitError("a circuit of features needs dictionaries: give saes=[...]")
        made = []
        for site, sae in by_depth(saes):
            at = model.require(site)
            features = view_of(sae, at)
            model.require(features.site())
            made.append(cls(at, sae, features, error_view(sae, at)))
        return made

    @property
    def names(self) -> tuple[str, str]:
        """The names of the features' site and of what the dictionary leaves."""
        return str(self.features.site()), str(self.error.site())

    def node(self, part: int) -> str:
        """The name of a node by its number; the last is what the dictionary leaves."""
        return self.names[1] if part == self.features.parts else f"{self.names[0]}[{part}]"


def discover_features(
    model: Model,
    pairs: PromptPairs,
    saes: Sequence[Dictionary],
    method: str = "eap-ig",
    metric: Metric = logit_diff,
    *,
    top: int = 100,
    alphas: tuple[float, ...] = (),
    options: Options | None = None,
) -> FeatureCircuit:
    """Nodes by their effects, edges between the strongest `top` of them; see `interp.discover(level="feature")`.

    Raises:
        CircuitError: no dictionaries, pairs without a corrupted run. PlanError: dictionaries of other sites.
    """
    how = options or Options()
    places = Place.of(model, saes)
    runs = Runs(model.encode(pairs))
    runs.encoded.require_aligned("a circuit")
    runs.encoded.require_corrupted("discover", CircuitError)
    scores = node_effects(model, pairs, places, method, metric, alphas, how)
    order = np.argsort([-abs(score) for _, score in scores], kind="stable")
    chosen = {scores[i][0]: scores[i][1] for i in order[:top]}
    edges = edge_effects(model, runs, places, chosen, metric, how)
    last = places[-1]
    edges |= {(name, LOGITS): score for name, score in chosen.items() if name.split("[")[0] in last.names}
    meta = {
        "model": model.name,
        "method": method,
        "metric": name_of(metric),
        "pairs": len(pairs),
        "sites": [str(place.site) for place in places],
        "dictionaries": [place.features.parts for place in places],
        "points": list(alphas),
    }
    return FeatureCircuit(chosen, edges, meta, tuple(place.sae for place in places))


def node_effects(
    model: Model,
    pairs: PromptPairs,
    places: Sequence[Place],
    method: str,
    metric: Metric,
    alphas: tuple[float, ...],
    how: Options,
) -> list[tuple[str, float]]:
    """The effect of every node, mean over pairs; all of one call."""
    members = {
        place.node(part): [place.error.site() if part == place.features.parts else place.features.site(unit=part)]
        for place in places
        for part in range(place.features.parts + 1)
    }
    more: dict[str, Any] = {"points": alphas} if alphas else {}
    name = "ig" if alphas else "atp"
    found = attribute(model, pairs, sets(members), metric, name, max_tokens=how.max_tokens, **more)
    change = (found.values - found.clean).mean("pair").values
    return list(zip(members, change.tolist(), strict=True))


def edge_effects(
    model: Model, runs: Runs, places: Sequence[Place], chosen: Mapping[str, float], metric: Metric, how: Options
) -> dict[tuple[str, str], float]:
    """What each chosen node does for each chosen node of the next dictionary, mean over pairs."""
    if len(places) < 2:
        return {}
    parts = [[int(part) for part in range(place.features.parts) if place.node(part) in chosen] for place in places]
    views = {}
    for place, units in zip(places, parts, strict=True):
        views[place.features.name] = place.features.seen(units)
        views[place.error.name] = place.error.seen()
    ends = [(place.site.layer or 0, place.features.name, place.error.name) for place in places]
    context = context_of(model, runs, Resolved((), (), {}), "growing")
    budget = how.max_tokens or gradient_budget(model)
    _, found = feature_estimates(model, context, metric, views, ends, budget, ("feature edges", how.progress))
    edges = {}
    for number, matrix in enumerate(found):
        names = [
            [place.node(part) for part in (*units, place.features.parts)]
            for place, units in zip(places[number : number + 2], parts[number : number + 2], strict=True)
        ]
        mean = matrix.mean(0)
        for down, end in enumerate(names[1]):
            for up, start in enumerate(names[0]):
                if start in chosen and end in chosen:
                    edges[start, end] = float(mean[down, up])
    return edges


def feature_values(
    model: Model,
    pairs: PromptPairs,
    circuits: Mapping[str, FeatureCircuit],
    saes: Sequence[Dictionary],
    cut: tuple[str, bool],
    metric: Metric,
    how: Options,
) -> tuple[np.ndarray, np.ndarray]:
    """The metric of circuits with all other nodes cut, `[circuit, pair]`, and of the model as it is, `[pair]`.

    `cut`: what takes the place of what is cut, as in `run_circuit`, and whether what dictionaries leave stays in every circuit.
    """
    ablation, errors = cut
    places = Place.of(model, saes)
    plan, whole = {}, []
    for number, (name, circuit) in enumerate(circuits.items()):
        sites = []
        for place in places:
            units, error = circuit.kept(*place.names)
            others = [unit for unit in range(place.features.parts) if unit not in units]
            view = cut_view(place.sae, others, not (error or errors), f"cut{number}_{place.features.name}", place.site)
            sites += [] if view is None else [view.site()]
        if sites:
            plan[name] = sites
        else:
            whole.append(name)
    options: dict[str, Any] = {"max_tokens": how.max_tokens, "progress": how.progress, "checkpoint": how.checkpoint}
    options["schedule"] = how.schedule
    if not plan:
        raise CircuitError("nothing is cut: every circuit has all nodes of its dictionaries")
    found = ablate(model, pairs, sets(plan), ablation, metric=metric, **options)
    by_name = dict(zip(plan, found.values.values, strict=True))
    clean = found.clean.values
    return np.stack([by_name.get(name, clean) for name in circuits]), clean
