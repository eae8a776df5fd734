"""Discovery: scores for the edges or nodes of a model, by gradients or by patching each one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..attribution import FLAT, midpoints, step_rows
from ..cells import EVERYWHERE, Cell, Resolved
from ..edits import Edge, Edit
from ..engine.compile import compile_chunk, gradient_program
from ..engine.run import context_of, run_plan
from ..engine.schedule import gradient_budget, pack_pairs
from ..engine.trace import execute_gradients
from ..engine.trial import check_metric, name_of
from ..errors import CircuitError
from ..metrics import Metric, logit_diff
from ..models.model import EDGE_LAWS, GRADIENT_LAWS, Model
from ..models.steady import steady
from ..pairs import PromptPairs
from .acdc import acdc
from .circuit import Circuit
from .nodes import Facts
from .runs import Cells

METHODS = ("eap", "eap-ig", "eap-ig-activations", "exact", "acdc")
#: What only some methods use; elsewhere it is refused rather than left aside.
OPTIONS = {"within": ("exact", "acdc"), "threshold": ("acdc",), "checkpoint": ("exact", "acdc")}


def discover(
    model: Model,
    pairs: PromptPairs,
    method: str = "eap-ig",
    level: str = "edge",
    metric: Metric = logit_diff,
    *,
    steps: int = 5,
    points: Sequence[float] | None = None,
    within: Circuit | None = None,
    threshold: float | None = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
    checkpoint: Any = None,
) -> Circuit:
    """Score edges or nodes: the change of the metric, mean over pairs, when that one alone is corrupted.

    Args:
        method: "eap", Δ · gradient at the clean run (Syed et al. 2023); "eap-ig", gradients averaged over inputs
            between clean and corrupted (Hanna et al. 2024); "eap-ig-activations", averaged over the sender's own output
            between the two, the heads of a layer together; "exact", every edge or node patched by itself; "acdc",
            greedy removal (Conmy et al. 2023).
        level: "edge" or "node" (heads, MLPs and the embedding).
        steps, points: interpolation of the "ig" methods; midpoints (i + ½)/steps by default.
        within: exact and acdc: only these edges (at level "node" the nodes of these edges); the others of an exact
            circuit are absent.
        threshold: acdc: an edge whose removal changes the metric by less is removed; default 0.01·|clean − corrupted|.
        checkpoint: exact and acdc: a path; finished edges are kept and a later call continues.

    Returns:
        Circuit with `scores()`; "acdc" has only the edges that stayed.

    Raises:
        CircuitError, PairsError, MetricError: before the model runs.

    Warns:
        UserWarning: the metric's gradient vanishes at the base run; "exact" or "acdc" will take long; the two prompts of
            some pairs are the same (where those of all are, that is a CircuitError).
    """
    if method not in METHODS:
        raise CircuitError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}")
    if level not in ("edge", "node"):
        raise CircuitError(f"unknown level {level!r}; it is 'edge' or 'node'")
    if method == "acdc" and level == "node":
        raise CircuitError("acdc removes edges; for nodes use iterative_pruning, or method='exact'")
    if pairs.corrupted is None:
        raise CircuitError("discover corrupts edges: give PromptPairs(corrupted=[...])")
    encoded = model.encode(pairs)
    encoded.require_aligned("a circuit")
    encoded.require_corrupted("discover", CircuitError)
    alphas = (0.0,) if method == "eap" else tuple(points) if points is not None else midpoints(max(0, steps))
    if not alphas:
        raise CircuitError(f"{method} needs interpolation points: steps={steps}, points={points}; give 1 or more")
    given = {"within": within, "threshold": threshold, "checkpoint": checkpoint}
    for name, methods in OPTIONS.items():
        if given[name] is not None and method not in methods:
            raise CircuitError(f"{name}= is of no use to method={method!r}; it goes with {' and '.join(methods)}")
    if max_tokens is not None and max_tokens < 1:
        raise CircuitError(f"max_tokens={max_tokens}; a batch holds 1 token or more")
    check_metric(metric, encoded, model.vocab_size, gradient=method not in ("exact", "acdc"))
    facts = Facts.of(model)
    said = f"discover(method={method!r}, level={level!r})"
    if method == "exact" and level == "node":
        for site in facts.senders:
            model.require(patch_site(site))
    else:
        model.rests_on(said, *EDGE_LAWS, *(() if method in ("exact", "acdc") else GRADIENT_LAWS))
    if method == "eap-ig-activations":
        model.rests_on(said, "z", "mlp_out", "resid_pre")
    meta: dict[str, Any] = {
        "model": model.name,
        "method": method,
        "metric": name_of(metric),
        "ablation": "counterfactual",
        "pairs": len(pairs),
    }
    if method == "acdc":
        kept = facts.mask if within is None else within.matrix(facts)
        warn_if_long(model, pairs, [Cell((i,), cut=kept.T) for i in range(int(kept.sum()))], "acdc")
        options = {"max_tokens": max_tokens, "progress": progress, "checkpoint": checkpoint}
        return acdc(model, pairs, metric, within, threshold, meta, **options)
    if method == "exact":
        options = {"max_tokens": max_tokens, "progress": progress, "checkpoint": checkpoint}
        return exact(model, pairs, level, metric, within, meta, facts, **options)
    meta["points"] = list(alphas)
    matrices = edge_attributions(model, pairs, metric, method, alphas, max_tokens or gradient_budget(model), progress)
    if level == "node":
        by_node = node_scores(matrices, facts)
        return Circuit.from_nodes(dict(zip((s.node for s in facts.senders), by_node, strict=True)), facts, meta)
    return Circuit.from_matrix(matrices.mean(0), None, facts, meta)


def node_scores(matrices: np.ndarray, facts: Facts) -> np.ndarray:
    """Scores of nodes from those of edges: what a node writes times the gradient of all that read it, mean over pairs.

    The gradient at a node's output is the sum of its readers' gradients, so its attribution is the sum over its edges.
    """
    return matrices.mean(0).sum(1)


def edge_attributions(
    model: Model,
    pairs: PromptPairs,
    metric: Metric,
    method: str,
    alphas: tuple[float, ...],
    budget: int,
    progress: bool | None = None,
) -> np.ndarray:
    """Attributions of every edge on every pair, `[pair, sender, receiver]`; zero where there is no edge."""
    facts = Facts.of(model)
    encoded = model.encode(pairs)
    empty = Resolved((), (), {})
    context = context_of(model, encoded, "noising", empty, "growing")
    mixed = replace(context, values={(0, "resid_pre"): torch.tensor(alphas)[:, None, None]})
    out = np.zeros((len(pairs), len(facts.senders), len(facts.receivers)), dtype=np.float32)
    lengths = [max(len(a), len(b)) for a, b in zip(context.base, context.source or context.base, strict=True)]
    order = sorted(range(len(pairs)), key=lambda pair: (lengths[pair], pair))
    steps = 0 if method == "eap" else len(alphas)
    groups = sender_groups(model) if method == "eap-ig-activations" else [None]
    blocks = pack_pairs(order, lengths, 2 + steps, budget)
    moved = 0.0
    shown = progress if progress is not None else None
    for block in tqdm(blocks, disable=None if shown is None else not shown, desc=method, unit="block"):
        width = max(lengths[pair] for pair in block)
        for group in groups:
            rows = step_rows(context, block, [(0, "resid_pre")] if group is None else [group], alphas) if steps else []
            values = mixed if group is None else replace(mixed, values={group: torch.tensor(alphas)[:, None, None]})
            chunk = compile_chunk(rows, values, "rows", pairs=block, width=width)
            program = gradient_program(chunk.program, len(block), [])
            program["by_edge"] = True
            if steps:
                first = 2 * len(block)
                program["gradient"] = first + torch.arange(len(block) * steps).reshape(len(block), steps)
            found = model.backend.call(model, execute_gradients, model.taps, [program], metric)[0]
            ends = found["metric"][: 2 * len(block)].float().cpu()
            moved = max(moved, float((ends[1::2] - ends[::2]).abs().max()))
            scores = found["edges"].float().cpu().numpy().transpose(0, 2, 1)
            if group is None:
                out[block] = scores
            else:
                chosen = group_senders(model, group)
                out[np.ix_(block, chosen)] = scores[:, chosen]
    if float(np.abs(out[..., -1]).max()) <= FLAT * moved:  # the edges into the logits: the metric's own gradient
        instead = "" if method.startswith("eap-ig") else "method='eap-ig', or "
        warnings.warn(
            f"the gradient of {name_of(metric)} vanishes where {method} takes it (KL's does at the "
            f"clean run), so that its scores mean nothing; use {instead}another metric",
            stacklevel=3,
        )
    return out


def sender_groups(model: Model) -> list[tuple[int, str]]:
    """The sites that "eap-ig-activations" moves: the stream into block 0, each layer's z, each MLP's output."""
    layers = range(model.n_layers)
    return [(0, "resid_pre"), *((layer, kind) for layer in layers for kind in ("z", "mlp_out"))]


def group_senders(model: Model, group: tuple[int, str]) -> list[int]:
    """Which senders a group stands for, by their place in the order of senders."""
    layer, kind = group
    first = 1 + layer * (model.n_heads + 1)
    if kind == "resid_pre":
        return [0]
    return list(range(first, first + model.n_heads)) if kind == "z" else [first + model.n_heads]


def exact(
    model: Model,
    pairs: PromptPairs,
    level: str,
    metric: Metric,
    within: Circuit | None,
    meta: dict[str, Any],
    facts: Facts,
    **options: Any,
) -> Circuit:
    """Patch every edge or node by itself: scores are mean(patched − clean) over pairs."""
    if level == "node":
        names = [site for site in facts.senders if within is None or site.node in set(within.nodes())]
        cells = tuple(Cell((i,), edits=((Edit(patch_site(site)), EVERYWHERE),)) for i, site in enumerate(names))
        labels = tuple(site.node for site in names)
    else:
        if within is None:
            counts = [facts.upstream_count(receiver) for receiver in facts.receivers]
            index = [(s, r) for r, count in enumerate(counts) for s in range(count)]
        else:
            index = [(int(s), int(r)) for s, r in np.argwhere(within.matrix(facts))]
        chosen = [(facts.senders[s], facts.receivers[r]) for s, r in index]
        cells = tuple(Cell((i,), edges=(Edge(*edge),)) for i, edge in enumerate(chosen))
        labels = tuple(f"{sender.node}->{receiver.node}" for sender, receiver in chosen)
    warn_if_long(model, pairs, cells, f"exact {level}s")
    plan: Any = Cells(level, labels, cells, {"exact": level, "count": len(cells)})
    effects = run_plan(model, pairs, plan, metric, "noising", method=f"discover:exact-{level}", **options)
    scores = (effects.values - effects.clean).mean("pair").values
    if level == "node":
        return Circuit.from_nodes(dict(zip(labels, scores.tolist(), strict=True)), facts, meta)
    found = {(s.node, r.node): float(score) for (s, r), score in zip(chosen, scores, strict=True)}
    return Circuit.from_edges(found, facts, meta)


def patch_site(site: Any) -> Any:
    """The site that holds a sender's output: the embedding's is the stream into block 0."""
    return site if site.kind != "embed" else type(site)("resid_pre", layer=0)


def warn_if_long(model: Model, pairs: PromptPairs, cells: Sequence[Cell], what: str) -> None:
    """Say beforehand how long patching every cell will take, where that is more than ten minutes."""
    expected = expected_seconds(model, pairs, cells)
    if expected > 600:
        warnings.warn(
            f"{what}: {len(cells)} × {len(pairs)} pairs will take about {expected / 60:.0f} minutes; "
            "within=circuit limits them, checkpoint=path makes them resumable",
            stacklevel=4 if what != "acdc" else 3,
        )


def expected_seconds(model: Model, pairs: PromptPairs, cells: Sequence[Cell]) -> float:
    """How long exact patching will take, from one timed forward pass and the layers that each cell needs."""
    encoded = model.encode(pairs)
    tokens = sum(len(prompt) for prompt in encoded.clean)
    probe = torch.tensor([list(encoded.clean[0])] * 8, device=model.device)
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
    first = min(site.layer if site.layer is not None else layers * (site.kind == "logits") for site in sites)
    return 1 - first / layers
