"""Discovery: scores for the edges or nodes of a model, by gradients or by patching each one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch

from ..attribution import RULED, adds_up, rule_of
from ..cells import EVERYWHERE, Cell, Resolved
from ..edits import Edge, Edit
from ..engine.context import Experiment, Runs, context_of
from ..engine.program import Place
from ..engine.run import prompts_said, run_cells
from ..engine.schedule import gradient_budget
from ..engine.slopes import FLAT, edge_estimates
from ..engine.trial import check_metric, name_of
from ..errors import CircuitError
from ..journal import experiment
from ..metrics import Metric, logit_diff
from ..models.model import EDGE_LAWS, GRADIENT_LAWS, Model
from ..models.steady import steady
from ..options import Options
from ..order import Order
from ..pairs import PromptPairs
from ..sites import Site
from .acdc import acdc
from .circuit import Circuit
from .feature_discovery import discover_features
from .neurons import discover_neurons
from .nodes import Facts
from .requests import OF_LEVEL, PATCHING, DiscoverOptions, check_request, points_of
from .runs import given_cells

#: The site that holds a sender's output where it is not of the sender's own kind: the embedding's is the stream into block 0.
ENTERING = Site("resid_pre", layer=0)


@experiment
def discover(
    model: Model,
    pairs: PromptPairs,
    method: str = "secant",
    level: str = "edge",
    metric: Metric = logit_diff,
    *,
    steps: int = 5,
    points: Sequence[float] | None = None,
    within: Circuit | None = None,
    threshold: float | None = None,
    **options: Unpack[DiscoverOptions],
) -> Any:
    """Score edges or nodes: the change of the metric, mean over pairs, when that one alone is corrupted.

    Args:
        method: "eap", Δ · gradient at the clean run (Syed et al. 2023); "eap-ig", gradients averaged over inputs
            between clean and corrupted (Hanna et al. 2024); "eap-ig-activations", averaged over the sender's own output
            between the two, the heads of a layer together; "secant" (default), slopes between the two runs in place of
            gradients, so that effects add up to the metric's change (docs/attribution.md); "relp" (Jafari et al. 2025);
            "exact", every edge or node patched by itself; "acdc", greedy removal (Conmy et al. 2023).
        level: "edge" or "node" (heads, MLPs and the embedding); "feature": features of the dictionaries `saes=` and what
            each does not explain, with the edges between neighbouring dictionaries (Marks et al. 2024), by "eap" or "eap-ig";
            "neuron": hidden units of MLPs and heads, by any method that takes gradients.
        steps, points: interpolation of the "ig" methods; midpoints (i + ½)/steps by default. "secant" takes the way in two
            parts, whose slopes are averaged; `points=[]` takes it in one, `[1/3, 2/3]` in three.
        within: exact and acdc: only these edges (at level "node" the nodes of these edges); the others of an exact
            circuit are absent.
        threshold: acdc: an edge whose removal changes the metric by less is removed; default 0.01·|clean − corrupted|.
        options: `max_tokens`, `progress`, and of exact and acdc `checkpoint`: a path; finished edges are kept and a later call
            continues. At level "feature" `saes`, dictionaries of the residual stream, and `top` (100): nodes that are kept. At
            level "neuron" `top` (200), and `patterns`: "moving", or "held" at the clean run's ("secant").

    Returns:
        Circuit with `scores()`; "acdc" has only the edges that stayed. At level "feature" a FeatureCircuit, at level "neuron"
        a NeuronCircuit.

    Raises:
        CircuitError, PairsError, MetricError: before the model runs. AuditError: edges do not add up on this model, or
            their gradients are not autograd's (docs/architecture.md, "The laws of edges").

    Warns:
        UserWarning: the metric's gradient vanishes at the base run; "exact" or "acdc" will take long; the two prompts of
            some pairs are the same (where those of all are, that is a CircuitError).

    Examples:
        >>> circuit = interp.discover(model, pairs, method="eap-ig", level="node", steps=3)
        >>> [name for name, score in circuit.ranking()[:3]]
        ['embed', 'L0.mlp', 'L23.H3']
    """
    how = Options.of(options, "saes", "top", "patterns", error=CircuitError)
    used = {"within": within, "threshold": threshold, "checkpoint": how.checkpoint}
    check_request(method, level, pairs, used, options)
    encoded = model.encode(pairs)
    encoded.require_aligned("a circuit")
    encoded.require_corrupted("discover", CircuitError)
    alphas = points_of(method, steps, points)
    if level == "feature":
        saes, top = options.get("saes", ()), options.get("top", 100)
        return discover_features(model, pairs, saes, method, metric, top=top, alphas=alphas, options=how)
    gradient = method not in PATCHING
    rounding = check_metric(metric, encoded, model.vocab_size, gradient=gradient, dtype=model.dtype)
    _rests(model, method, level)
    facts, runs = Facts.of(model), Runs(encoded)
    meta: dict[str, object] = {
        "model": model.name,
        "method": method,
        "metric": name_of(metric),
        "ablation": "counterfactual",
        "pairs": len(encoded),
        "prompts": prompts_said(encoded, pairs.name),
    }
    asked = Experiment(model, runs, Resolved((), (), {}), metric, method, rounding=rounding)
    if method == "acdc":
        kept = facts.mask if within is None else within.matrix(facts)
        warn_if_long(model, runs, [Cell((i,), cut=kept.T) for i in range(int(kept.sum()))], "acdc")
        return acdc(replace(asked, method="acdc"), within, threshold, meta, how)
    if method == "exact":
        return exact(replace(asked, method=f"discover:exact-{level}"), level, within, meta, how)
    meta["points"] = list(alphas or (0.0,))
    if level in OF_LEVEL["patterns"]:
        held = options.get("patterns", "moving") == "held"
        return discover_neurons(model, runs, metric, method, options.get("top", 200), held, alphas, how, meta)
    matrices, change = edge_attributions(model, runs, metric, method, alphas, how)
    if method in RULED:
        meta["completeness"] = adds_up(method, matrices[:, 0].sum(1), change)
    if level == "node":
        by_node = node_scores(matrices)
        return Circuit.from_nodes(dict(zip((s.node for s in facts.senders), by_node, strict=True)), facts, meta)
    return Circuit.from_matrix(matrices.mean(0), None, facts, meta)


def _rests(model: Model, method: str, level: str) -> None:
    """Refuse a method that rests on what the audit refused on this model."""
    said = f"discover(method={method!r}, level={level!r})"
    if method == "exact" and level == "node":
        for site in Facts.of(model).senders:
            model.require(patch_site(site))
        return
    model.rests_on(
        said, *EDGE_LAWS, *(() if method in PATCHING else GRADIENT_LAWS), *((method,) if method in RULED else ())
    )
    if method == "eap-ig-activations":
        model.rests_on(said, *dict.fromkeys(kind for _, kind in sender_groups(model)))


def node_scores(matrices: np.ndarray) -> np.ndarray:
    """Scores of nodes from those of edges: what a node writes times the gradient of all that read it, mean over pairs.

    The gradient at a node's output is the sum of its readers' gradients, so its attribution is the sum over its edges.
    """
    return matrices.mean(0).sum(1)


def edge_attributions(
    model: Model, runs: Runs, metric: Metric, method: str, alphas: tuple[float, ...], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Attributions of every edge on every pair, `[pair, sender, receiver]`, zero where there is none, and the change `[pair]`."""
    context = context_of(model, runs, Resolved((), (), {}), "growing")
    groups = sender_groups(model)
    if method != "eap-ig-activations":
        groups = {ENTERING.place: range(context.order.senders)}
    budget = options.max_tokens or gradient_budget(model)
    bar = (method, options.progress)
    scores, change = edge_estimates(model, context, metric, alphas, groups, budget, bar, rule_of(method))
    if float(np.abs(scores[..., -1]).max()) <= FLAT * float(
        np.abs(change).max()
    ):  # the edges into the logits: the metric's own gradient
        instead = "" if method.startswith("eap-ig") else "method='eap-ig', or "
        warnings.warn(
            f"the gradient of {name_of(metric)} vanishes where {method} takes it (KL's does at the "
            f"clean run), so that its scores mean nothing; use {instead}another metric",
            stacklevel=4,
        )
    return scores, change


def sender_groups(model: Model) -> dict[Place, Sequence[int]]:
    """The sites that "eap-ig-activations" moves, and the senders that each stands for, by their number: the stream into block
    0, each layer's z, each MLP's output."""
    order = Order.of(model.taps)
    groups: dict[Place, Sequence[int]] = {ENTERING.place: [0]}
    for layer in range(model.n_layers):
        mlp = order.sender(layer, None)
        groups |= {(layer, "z"): range(order.sender(layer, 0), mlp), (layer, "mlp_out"): [mlp]}
    return groups


def exact(asked: Experiment, level: str, within: Circuit | None, meta: dict[str, object], options: Options) -> Circuit:
    """Patch every edge or node by itself: scores are mean(patched − clean) over pairs."""
    facts = Facts.of(asked.model)
    if level == "node":
        names = [site for site in facts.senders if within is None or site.node in set(within.nodes())]
        cells = tuple(Cell((i,), edits=((Edit(patch_site(site)), EVERYWHERE),)) for i, site in enumerate(names))
        labels = tuple(site.node for site in names)
    else:
        kept = facts.mask if within is None else within.matrix(facts)
        chosen = [(facts.senders[s], facts.receivers[r]) for s, r in _by_receiver(kept, within is None)]
        cells = tuple(Cell((i,), edges=(Edge(*edge),)) for i, edge in enumerate(chosen))
        labels = tuple(f"{sender.node}->{receiver.node}" for sender, receiver in chosen)
    warn_if_long(asked.model, asked.runs, cells, f"exact {level}s")
    spec = {"exact": level, "count": len(cells)}
    resolved = given_cells(asked.runs.encoded, level, labels, cells, spec)
    effects = run_cells(replace(asked, resolved=resolved), options)
    scores = (effects.values - effects.clean).mean("pair").values
    if level == "node":
        return Circuit.from_nodes(dict(zip(labels, scores.tolist(), strict=True)), facts, meta)
    by_edge = {(s.node, r.node): float(score) for (s, r), score in zip(chosen, scores, strict=True)}
    return Circuit.from_edges(by_edge, facts, meta)


def _by_receiver(kept: np.ndarray, every: bool) -> list[tuple[int, int]]:
    """(sender, receiver) of the kept edges; of all edges receiver by receiver, as a forward pass reaches them."""
    return (
        [(int(s), int(r)) for r, s in np.argwhere(kept.T)]
        if every
        else [(int(s), int(r)) for s, r in np.argwhere(kept)]
    )


def patch_site(site: Site) -> Site:
    """The site that holds a sender's output."""
    return ENTERING if site.layer is None else site


def warn_if_long(model: Model, runs: Runs, cells: Sequence[Cell], what: str) -> None:
    """Say beforehand how long patching every cell will take, where that is more than ten minutes."""
    expected = expected_seconds(model, runs, cells)
    if expected > 600:
        warnings.warn(
            f"{what}: {len(cells)} × {len(runs)} pairs will take about {expected / 60:.0f} minutes; "
            "within=circuit limits them, checkpoint=path makes them resumable",
            stacklevel=5 if what != "acdc" else 4,
        )


def expected_seconds(model: Model, runs: Runs, cells: Sequence[Cell]) -> float:
    """How long exact patching will take, from one timed forward pass and the layers that each cell needs."""
    tokens = sum(len(prompt) for prompt in runs.encoded.clean)
    probe = torch.tensor([list(runs.encoded.clean[0])] * 8, device=model.device)
    if probe.is_meta or model.device.type == "meta":
        return 0.0
    with steady(model), torch.no_grad():  # steady turns gradients on
        model.hf(input_ids=probe[:, :2])
        if probe.is_cuda:
            torch.cuda.synchronize(probe.device)
        start = time.perf_counter()
        model.hf(input_ids=probe).logits[0, -1].sum().item()  # waits for a GPU
        per_token = (time.perf_counter() - start) / probe.numel()
    depth = np.mean([_depth(cell, model.n_layers) for cell in cells]) if cells else 0.0
    return float(per_token * tokens * len(cells) * depth)


def _depth(cell: Cell, layers: int) -> float:
    """The part of the layers that a cell's row runs through: a circuit with cut edges runs through all."""
    if cell.cut is not None:
        return 1.0
    sites = [edge.receiver for edge in cell.edges] + [edit.site for edit, _ in cell.edits]
    first = min(layers if site.layer is None else site.layer for site in sites)  # only the logits have none here
    return 1 - first / layers
