"""Attribution: estimates of every patch from gradients, on the scale of `patch`, with exact verification of the largest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .edits import OPS
from .effects import Effects
from .engine.run import check_metric, choose_schedule, context_of, make_effects, provenance, run_plan, token_budget
from .engine.schedule import SOURCE, Context, Row, check_direction, compile_chunk, make_rows, pack_pairs, stage_of
from .engine.trace import execute_gradients
from .errors import PlanError
from .metrics import Metric, logit_diff
from .models.model import Model
from .pairs import PromptPairs
from .plan import Plan, Resolved
from .sites import TABLE_KINDS

METHODS = ("atp", "atp*", "ig", "ig-activations")
Site2 = tuple[int, str]


def midpoints(steps: int) -> tuple[float, ...]:
    """Interpolation points (i + ½)/steps: 0 is the base run, 1 the source run."""
    return tuple((index + 0.5) / steps for index in range(steps))


def attribute(
    model: Model,
    pairs: PromptPairs,
    plan: Plan,
    metric: Metric = logit_diff,
    method: str = "atp",
    direction: str = "noising",
    *,
    steps: int = 5,
    points: Sequence[float] | None = None,
    verify: int = 0,
    max_tokens: int | None = None,
) -> Effects:
    """Estimate the result of `patch` from gradients.

    Args:
        method: "atp", attribution patching, (source − base) · gradient at the base run (Nanda 2023; Syed et al. 2023);
            "atp*", with q and k through the exact softmax and GradDrop over layers (Kramár et al. 2024): magnitudes are
            means over dropped layers, signs those of the plain estimate; "ig", gradients averaged over inputs between base
            and source (Hanna et al. 2024); "ig-activations", averaged over each site's own activation between the two.
        steps: interpolation points of the two "ig" methods; `points` gives them outright (0 base, 1 source).
        verify: patch the `verify` cells of largest |estimate| exactly, and as many others drawn at random, in one call.
            Exact values replace estimates; `provenance["verification"]` reports both and what attribution missed.

    Returns:
        Effects on the scale of `patch`: base metric plus the estimated change.

    Raises:
        PlanError: unknown method, a plan with constants or edges, or a site without a gradient.
        SiteError, PairsError, MetricError: as `patch`.
    """
    if method not in METHODS:
        raise PlanError(f"unknown attribution method {method!r}; the methods are: {', '.join(METHODS)}")
    encoded = model.encode(pairs)
    check_direction(direction, encoded)
    resolved = plan.resolve(model, encoded)
    check_metric(metric, encoded, model.vocab_size)
    _check_plan(model, resolved, method)
    context = context_of(model, encoded, direction, resolved, choose_schedule(model, "growing"))
    alphas = tuple(points) if points is not None else midpoints(steps)
    budget = max_tokens or token_budget(model)
    rows, _ = make_rows(resolved, context, prune=False)
    sites = sorted({(entry[0], TABLE_KINDS[entry[1]]) for row in rows for entry in row.entries})
    found = _run(model, context, sites, metric, method, alphas, budget)
    estimates = np.full((len(resolved.cells), len(pairs)), np.nan, dtype=np.float32)
    for row in rows:
        change = sum(found.of(row.pair, entry) for entry in row.entries)
        estimates[row.cell, row.pair] = found.base[row.pair] + change
    if not any(np.abs(part).max() > 0 for parts in found.parts for part in parts.values()):
        warnings.warn(
            f"the gradient of {getattr(metric, '__name__', metric)} vanishes at the {direction} base run, so every estimate "
            "is zero (KL does this at the clean run); use method='ig', another metric or the other direction",
            stacklevel=2,
        )
    report = None
    if verify:
        estimates, report = _verify(model, pairs, plan, resolved, metric, direction, estimates, found.base, verify, budget)
    record = provenance(
        model,
        encoded,
        pairs,
        method=f"attribute:{method}",
        plan=resolved.spec,
        metric=getattr(metric, "__name__", repr(metric)),
        direction=direction,
        schedule="gradient",
        points=list(alphas) if method.startswith("ig") else None,
        verification=report,
    )
    return make_effects(resolved, estimates, found.base, found.source, direction, record)


def _check_plan(model: Model, resolved: Resolved, method: str) -> None:
    for cell in resolved.cells:
        if cell.edges or any(edit.op != "replace" for edit, _ in cell.edits):
            raise PlanError("attribution estimates patches from the source run; constants and edges have no estimate here")
        for edit, _ in cell.edits:
            kind = edit.site.kind
            if method == "ig-activations" and kind == "pattern":
                raise PlanError("'ig-activations' has no path between two attention patterns; use 'atp' or 'ig'")
            if method == "atp*" and kind in ("q", "k") and model.family.pattern != "interface":
                raise PlanError(
                    f"'atp*' needs the attention logits for q and k, which {model.family.name} models do not expose; use 'atp'"
                )


class _Found:
    """Products by site for each block of pairs, and the unpatched metrics."""

    def __init__(self, pairs: int, has_source: bool) -> None:
        self.base = np.full(pairs, np.nan, dtype=np.float32)
        self.source = np.full(pairs, np.nan, dtype=np.float32) if has_source else None
        self.parts: list[dict[Site2, np.ndarray]] = []
        self.where: dict[int, tuple[int, int, int]] = {}  # pair -> block, place in the block, columns of padding

    def of(self, pair: int, entry: tuple[int, ...]) -> float:
        """The estimated change of one edit."""
        layer, kind, _, column, _, head, unit, *_ = entry
        block, place, shift = self.where[pair]
        part = self.parts[block][layer, TABLE_KINDS[kind]][place]
        part = part[shift:] if column < 0 else part[shift + column]
        chosen = head if head >= 0 else unit
        return float(part[..., chosen].sum() if chosen >= 0 else part.sum())


def _run(
    model: Model, context: Context, sites: list[Site2], metric: Metric, method: str, alphas: tuple[float, ...], budget: int
) -> _Found:
    """Run the gradient programs: blocks of pairs, and for `ig-activations` groups of sites."""
    pairs = len(context.base)
    found = _Found(pairs, True)
    lengths = [max(len(context.base[pair]), len(context.source[pair])) for pair in range(pairs)]  # type: ignore[index]
    order = sorted(range(pairs), key=lambda pair: (lengths[pair], pair))
    streams = 2 + (len(alphas) if method == "ig" else 0)
    mixed = replace(context, values=_fractions(sites, alphas, method))
    for block in pack_pairs(order, lengths, streams, budget):
        width = max(lengths[pair] for pair in block)
        groups = [sites]
        if method == "ig-activations":
            size = max(1, budget // (width * len(block) * len(alphas)))
            groups = [sites[start : start + size] for start in range(0, len(sites), size)]
        parts: dict[Site2, np.ndarray] = {}
        for group in groups:
            moved = [(0, "resid_pre")] if method == "ig" else group
            rows = step_rows(context, block, moved, alphas, grow=method != "ig") if method.startswith("ig") else []
            chunk = compile_chunk(rows, mixed, "growing", pairs=block, width=width)
            program = gradient_program(chunk.program, len(block), group)
            steps = len(alphas)
            if method == "ig":
                first = 2 * len(block)
                program["gradient"] = first + torch.arange(len(block) * steps).reshape(len(block), steps)
            elif method == "ig-activations":
                program["steps"] = _rows_by_site(chunk.rows, block, group, steps, 2 * len(block))
            program["drop"] = list(range(model.n_layers)) if method == "atp*" and model.n_layers > 1 else []
            program["exact_qk"] = method == "atp*"
            result = model.backend.call(model, execute_gradients, model.taps, [program], metric)[0]
            scores = result["metric"].float().cpu().numpy()
            parts |= {tuple(site): part.float().cpu().numpy() for site, part in result["attributions"].items()}
        for place, pair in enumerate(block):
            found.base[pair], found.source[pair] = scores[2 * place], scores[2 * place + 1]  # type: ignore[index]
            found.where[pair] = (len(found.parts), place, width - len(context.base[pair]))
        found.parts.append(parts)
    return found


def gradient_program(program: dict[str, Any], pairs: int, sites: Sequence[Site2]) -> dict[str, Any]:
    """A program over (base, source) rows of some pairs, made a gradient program at the base rows."""
    base = 2 * torch.arange(pairs)
    more = {"columns": None, "steps": {}, "drop": [], "exact_qk": False}
    return {**program, **more, "tape": list(sites), "base": base, "from": base + 1, "gradient": base[:, None]}


def _fractions(sites: list[Site2], alphas: tuple[float, ...], method: str) -> dict[Site2, torch.Tensor]:
    values = torch.tensor(alphas)[:, None, None]
    return {(0, "resid_pre"): values} if method == "ig" else dict.fromkeys(sites, values)


def step_rows(
    context: Context, block: Sequence[int], sites: Sequence[Site2], alphas: tuple[float, ...], grow: bool = False
) -> list[Row]:
    """Rows that move each site from the base run's activation to the source run's: for each pair, site and fraction.

    They run from the first layer on, or join at their site's layer when they `grow`.
    """
    rows = []
    for pair in block:
        for layer, kind in sites:
            for step in range(len(alphas)):
                entry = (layer, TABLE_KINDS.index(kind), OPS.index("mix"), -1, -1, -1, -1, step, SOURCE)
                stage = stage_of(layer, kind) if grow else -1
                rows.append(Row(pair, len(rows), stage, -len(context.base[pair]), (entry,)))
    return rows


def _rows_by_site(
    rows: Sequence[Row], block: list[int], sites: list[Site2], steps: int, first: int
) -> dict[Site2, torch.Tensor]:
    """Which rows interpolate which site: {site: [pair, step]}."""
    number = {row.cell: first + place for place, row in enumerate(rows)}
    return {
        site: torch.tensor(
            [[number[(p * len(sites) + s) * steps + step] for step in range(steps)] for p in range(len(block))]
        )
        for s, site in enumerate(sites)
    }


def _verify(
    model: Model,
    pairs: PromptPairs,
    plan: Plan,
    resolved: Resolved,
    metric: Metric,
    direction: str,
    estimates: np.ndarray,
    base: np.ndarray,
    count: int,
    budget: int,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Patch the largest estimates and as many others exactly; values of both, and which effects were missed."""
    size = np.abs(np.nanmean(estimates - base, axis=1))
    order = np.argsort(-np.nan_to_num(size))
    top = order[:count]
    rest = order[count:]
    drawn = np.random.default_rng(0).choice(rest, size=min(count, len(rest)), replace=False) if len(rest) else rest
    chosen = [int(cell) for cell in (*top, *drawn)]
    subset = replace(resolved, cells=tuple(resolved.cells[cell] for cell in chosen))
    options: dict[str, Any] = {"method": "patch", "budget": budget, "rewrite": lambda _: subset}
    values = run_plan(model, pairs, plan, metric, direction, **options).values.values
    exact = np.stack([values[cell.index] for cell in subset.cells])
    weakest = float(np.abs(np.nanmean(exact[: len(top)] - base, axis=1)).min())
    cells = []
    for place, cell in enumerate(chosen):
        effect = float(np.nanmean(exact[place] - base))
        labels = {name: values[i] for (name, values), i in zip(resolved.dims, resolved.cells[cell].index, strict=True)}
        cells.append(
            {
                **labels,
                "estimated": float(np.nanmean(estimates[cell] - base)),
                "exact": effect,
                "top": place < len(top),
                "missed": place >= len(top) and abs(effect) > weakest,
            }
        )
    estimates = estimates.copy()
    estimates[chosen] = exact
    missed = sum(cell["missed"] for cell in cells)
    return estimates, {"cells": cells, "missed": missed, "sampled": len(drawn), "unverified": len(rest) - len(drawn)}
