"""Attribution: estimates of every patch from gradients, on the scale of `patch`, the largest verified exactly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .cells import Resolved
from .edits import OPS
from .effects import Effects
from .engine.compile import compile_chunk, gradient_program
from .engine.rows import SOURCE, Context, Row, check_direction, make_rows, stage_of
from .engine.run import check_cells, check_runs, context_of, make_effects, provenance, run_plan
from .engine.schedule import choose_schedule, gradient_budget, pack_pairs
from .engine.trace import execute_gradients
from .engine.trial import check_metric, name_of
from .errors import PlanError
from .metrics import Metric, logit_diff
from .models.model import Model
from .pairs import PromptPairs
from .plan import Plan
from .sites import TABLE_KINDS

METHODS = ("atp", "atp*", "ig", "ig-activations")
#: A gradient by the logits below this fraction of the metric's change from base to source is rounding.
FLAT = 1e-4
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
            "atp*", with q and k through the exact softmax and GradDrop over layers (Kramár et al. 2024): a cell's
            magnitude is a mean over dropped layers, its sign that of the plain estimate; "ig", gradients averaged over
            embeddings between base and source (Hanna et al. 2024); "ig-activations", averaged over each site's own
            activation between the two.
        steps: interpolation points of the two "ig" methods; `points` gives them outright (0 base, 1 source).
        verify: patch the `verify` cells of largest |estimate| exactly, and as many others drawn at random, in one call.
            Exact values replace estimates; `provenance["verification"]` reports both and what attribution missed.

    Returns:
        Effects on the scale of `patch`: base metric plus the estimated change.

    Raises:
        PlanError: unknown method, a plan with constants or edges, or a site without a gradient.
        PairsError: an "ig" method on prompts that differ in length, or prompts that are the same in every pair.
        MetricError: a metric without a gradient.
        SiteError, AnswerError: as `patch`.

    Warns:
        UserWarning: the metric's gradient vanishes at the base run, as KL's does at the clean run; the two prompts of some
            pairs are the same.
    """
    if method not in METHODS:
        raise PlanError(f"unknown attribution method {method!r}; the methods are: {', '.join(METHODS)}")
    for name, size, least in (("verify", verify, 0), ("max_tokens", max_tokens, 1)):
        if size is not None and size < least:
            raise PlanError(f"{name}={size}; it is {least} or more")
    encoded = model.encode(pairs)
    check_direction(direction, encoded)
    needs = {"atp*": ("attn_out", "mlp_out"), "ig": ("embed",)}.get(method, ())
    model.rests_on(f"attribute(method={method!r})", "backward", *needs)
    encoded.require_corrupted("attribute")
    resolved = plan.resolve(model, encoded)
    rounding = check_metric(metric, encoded, model.vocab_size, gradient=True, dtype=model.dtype)
    _check_plan(model, resolved, method)
    if method.startswith("ig"):
        encoded.require_aligned(f"method {method!r}")
    context = context_of(model, encoded, direction, resolved, choose_schedule(model, "growing"))
    alphas = tuple(points) if points is not None else midpoints(steps)
    if not alphas:
        raise PlanError(f"steps={steps}, points={points}: at least one interpolation point is needed")
    budget = max_tokens or gradient_budget(model)
    rows, _ = make_rows(resolved, context, prune=False)
    _check_places(rows, context, method)
    found = _run(model, context, rows, metric, method, alphas, budget, len(resolved.cells))
    check_runs(metric, model, found.base, found.source)
    check_cells(metric, model, found.changes, [(row.cell, row.pair) for row in rows])
    estimates = found.base + found.changes
    if found.slope <= FLAT * float(np.abs(found.source - found.base).max()):
        instead = "" if method.startswith("ig") else "method='ig', "
        warnings.warn(
            f"the gradient of {name_of(metric)} vanishes at the base run of {direction!r} (KL's "
            f"does at the clean run), so that estimates mean nothing; use {instead}another metric or direction",
            stacklevel=2,
        )
    report = None
    if verify:
        options = (metric, direction, estimates, found.base, verify, budget)
        estimates, report = _verify(model, pairs, plan, resolved, *options)
    record = provenance(
        model,
        encoded,
        pairs,
        method=f"attribute:{method}",
        plan=resolved.spec,
        metric=name_of(metric),
        metric_rounding=rounding,
        direction=direction,
        schedule="gradient",
        points=list(alphas) if method.startswith("ig") else None,
        verification=report,
    )
    return make_effects(resolved, estimates, found.base, found.source, direction, record)


def _check_plan(model: Model, resolved: Resolved, method: str) -> None:
    for cell in resolved.cells:
        if cell.edges or any(edit.op != "replace" for edit, _ in cell.edits):
            raise PlanError("attribution estimates patches from the source run; constants and edges have no estimate")
        for edit, _ in cell.edits:
            kind = edit.site.kind
            if method == "ig-activations" and kind == "pattern":
                raise PlanError("'ig-activations' has no path between two attention patterns; use 'atp' or 'ig'")
            if method == "atp*" and kind in ("q", "k"):
                model.rests_on(f"attribute(method={method!r}) at {kind}", "pattern", "z")
            if method == "atp*" and kind in ("q", "k") and model.family.pattern != "interface":
                raise PlanError(
                    f"'atp*' needs the attention logits for q and k, which {model.family.name} models do not expose; "
                    "use 'atp'"
                )


def _check_places(rows: Sequence[Row], context: Context, method: str) -> None:
    """Refuse what has no estimate where base and source positions differ."""
    origin: dict[tuple[int, int], int] = {}
    for row in rows:
        for _, kind, _, column, of, *_ in row.entries:
            if column < 0:
                continue
            if origin.setdefault((row.pair, column), of) != of:
                raise PlanError(
                    f"position {column} of pair {row.pair} is patched from position {of} and from position "
                    f"{origin[row.pair, column]} of the other prompt; attribute them in two calls"
                )
            aligned = of == column and len(context.base[row.pair]) == len(context.source[row.pair])  # type: ignore[index]
            name = TABLE_KINDS[kind]
            if not aligned and (method == "ig-activations" or (method == "atp*" and name in ("q", "k"))):
                raise PlanError(
                    f"{method!r} at {name} needs prompts of one length and the same positions in both, but pair "
                    f"{row.pair} is patched at {column} from {of}; use 'atp'"
                )


class _Found:
    """Estimated changes `[cell, pair]` and the unpatched metrics `[pair]`, filled block by block."""

    def __init__(self, cells: int, pairs: int) -> None:
        self.changes = np.full((cells, pairs), np.nan, dtype=np.float32)
        self.base = np.full(pairs, np.nan, dtype=np.float32)
        self.source = np.full(pairs, np.nan, dtype=np.float32)
        self.slope = 0.0

    def add(self, row: Row, parts: dict[Site2, np.ndarray], shift: int) -> None:
        """The change of a row from each site's `[1 + dropped, position, …]`, `shift` columns of which are padding."""
        total = np.zeros(1)
        for layer, kind, _, column, _, head, unit, *_ in row.entries:
            part = parts[layer, TABLE_KINDS[kind]]
            part = part[:, shift:] if column < 0 else part[:, shift + column]
            chosen = head if head >= 0 else unit
            part = part[..., chosen] if chosen >= 0 else part
            total = total + part.reshape(len(part), -1).sum(1, dtype=np.float64)
        self.changes[row.cell, row.pair] = grad_drop(total)


def grad_drop(estimates: np.ndarray) -> float:
    """One number from the plain estimate and those with a layer dropped `[1 + dropped]` (GradDrop).

    Its size is their mean size, over one layer less because a node's own layer hides it; its sign is the plain one's.
    """
    plain, dropped = estimates[0], estimates[1:]
    if not len(dropped):
        return float(plain)
    return float((np.sign(plain) or np.sign(dropped.sum())) * np.abs(dropped).sum() / (len(dropped) - 1))


def _run(
    model: Model,
    context: Context,
    wanted: Sequence[Row],
    metric: Metric,
    method: str,
    alphas: tuple[float, ...],
    budget: int,
    cells: int,
) -> _Found:
    """Run the gradient programs: blocks of pairs, and for `ig-activations` groups of sites."""
    pairs = len(context.base)
    found = _Found(cells, pairs)
    sites = sorted({(entry[0], TABLE_KINDS[entry[1]]) for row in wanted for entry in row.entries})
    by_pair: dict[int, list[Row]] = {}
    for row in wanted:
        by_pair.setdefault(row.pair, []).append(row)
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
            moved = [(-1, "embed")] if method == "ig" else group
            rows = step_rows(context, block, moved, alphas, grow=method != "ig") if method.startswith("ig") else []
            chunk = compile_chunk(rows, mixed, "growing", pairs=block, width=width)
            program = gradient_program(chunk.program, len(block), group)
            program["columns"] = _columns(context, block, by_pair, width)
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
            found.slope = max(found.slope, result["slope"])
            parts |= {tuple(site): part.float().cpu().numpy() for site, part in result["attributions"].items()}
        for place, pair in enumerate(block):
            found.base[pair], found.source[pair] = scores[2 * place], scores[2 * place + 1]
            own = {site: part[:, place] for site, part in parts.items()}
            for row in by_pair.get(pair, ()):
                found.add(row, own, width - len(context.base[pair]))
    return found


def _fractions(sites: list[Site2], alphas: tuple[float, ...], method: str) -> dict[Site2, torch.Tensor]:
    values = torch.tensor(alphas)[:, None, None]
    return {(-1, "embed"): values} if method == "ig" else dict.fromkeys(sites, values)


def _columns(context: Context, block: list[int], by_pair: dict[int, list[Row]], width: int) -> torch.Tensor | None:
    """The source column that belongs to each base column `[pair, position]`; None where they are the same."""
    columns = torch.arange(width).repeat(len(block), 1)
    for place, pair in enumerate(block):
        shift, other = width - len(context.base[pair]), width - len(context.source[pair])  # type: ignore[index]
        for row in by_pair.get(pair, ()):
            for _, _, _, column, of, *_ in row.entries:
                if column >= 0:
                    columns[place, column + shift] = of + other
    return None if bool((columns == torch.arange(width)).all()) else columns


def step_rows(
    context: Context, block: Sequence[int], sites: Sequence[Site2], alphas: tuple[float, ...], grow: bool = False
) -> list[Row]:
    """Rows that move each site from the base run's activation to the source run's: for each pair, site and fraction.

    They run from the first layer on, or join at their site's layer when they `grow`.
    """
    rows: list[Row] = []
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
    options: dict[str, Any] = {"method": "patch", "max_tokens": budget, "rewrite": lambda _: subset}
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
