"""Circuits of features (Marks et al. 2024): nodes are features of dictionaries and what each dictionary leaves, edges say what
one does for another.

1. Every node gets its effect on the metric, by integrated gradients or at the clean run; the best become the circuit.
2. Edges between neighbouring dictionaries are scored by vector-Jacobian products.
3. A circuit is run with all other nodes cut: one part of each site, replaced, averaged or zeroed as any site is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ablation import ablate
from ..attribution import attribute
from ..cells import Resolved
from ..engine.context import Runs, context_of
from ..engine.schedule import gradient_budget
from ..engine.slopes import feature_estimates
from ..engine.trial import name_of
from ..errors import CircuitError
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
from .features import LOGITS, FeatureCircuit


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
