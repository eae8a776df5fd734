"""Attribution: estimates of every patch from gradients, on the scale of `patch`, the largest verified exactly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .cells import Resolved
from .effects import Effects
from .engine.context import Context, Experiment, Runs, context_of
from .engine.rows import Row, make_rows
from .engine.run import check_cells, check_runs, make_effects, provenance, run_cells
from .engine.schedule import choose_schedule, gradient_budget
from .engine.slopes import ENTRY, FLAT, GradientSpec, estimate, midpoints
from .engine.trial import check_metric, name_of
from .errors import PlanError
from .journal import experiment
from .metrics import Metric, logit_diff
from .models.model import Model
from .options import Options
from .pairs import PromptPairs
from .plan import Plan
from .sites import KIND

METHODS = ("atp", "atp*", "ig", "ig-activations", "secant", "relp")
#: Methods that look at both runs, step by step (`interp.engine.rules`).
RULED = ("secant", "relp")
#: Methods that move the input, or look at several inputs on the way.
ON_THE_WAY = ("ig", *RULED)
#: Estimates of the embeddings that are off the metric's change by more than this fraction of it are worth a warning.
ADDS_UP = 0.01
#: Kinds that AtP* puts through the exact softmax, which needs the attention's logits.
EXACT = ("q", "k")
#: What else a method rests on: AtP* drops what layers add, IG moves the input.
NEEDS = {
    "atp*": tuple(kind.name for kind in KIND.values() if kind.branch),
    "ig": ("embed",),
    "secant": ("embed", "secant"),
    "relp": ("embed", "relp"),
}


@experiment
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
            activation between the two; "secant", the slope of each step between the two runs in place of its derivative, so
            that estimates add up to the metric's change over any cut through the model (docs/attribution.md); "relp",
            relevance patching (Jafari et al. 2025).
        steps: interpolation points of the two "ig" methods; `points` gives them outright (0 base, 1 source). Of "secant"
            `points=[0.5]` parts the way in two, whose slopes are averaged.
        verify: patch the `verify` cells of largest |estimate| exactly, and as many others drawn at random, in one call.
            Exact values replace estimates; `provenance["verification"]` reports both and what attribution missed.

    Returns:
        Effects on the scale of `patch`, base metric plus the estimated change. Of "secant" and "relp"
        `provenance["completeness"]`: how far the embeddings' estimates, added up, are off the metric's change, relative to it.

    Raises:
        PlanError: unknown method, a plan with constants or edges, or a site without a gradient.
        PairsError: "ig", "secant" or "relp" on prompts that differ in length, or prompts that are the same in every pair.
        AuditError: "secant" or "relp" on a model with a step that has no rule, by the step's name, or whose sum is off.
        MetricError: a metric without a gradient.
        SiteError, AnswerError: as `patch`.

    Warns:
        UserWarning: the metric's gradient vanishes at the base run, as KL's does at the clean run; the two prompts of some
            pairs are the same; the embeddings' estimates are off by more than 1 %.

    Examples:
        >>> estimate = interp.attribute(model, pairs, interp.heads("z", layers=[20, 23]), method="ig", steps=3)
        >>> estimate.mean(normalized=True).to_series().nlargest(2).index.tolist()
        [('z', 23, 3), ('z', 20, 0)]
    """
    if method not in METHODS:
        raise PlanError(f"unknown attribution method {method!r}; the methods are: {', '.join(METHODS)}")
    if verify < 0:
        raise PlanError(f"verify={verify}; it is 0 or more")
    options = Options(max_tokens=max_tokens)
    encoded = model.encode(pairs)
    runs = Runs(encoded, direction).need_source()
    model.rests_on(f"attribute(method={method!r})", "backward", *NEEDS.get(method, ()))
    encoded.require_corrupted("attribute")
    resolved = plan.resolve(model, encoded)
    rounding = check_metric(metric, encoded, model.vocab_size, gradient=True, dtype=model.dtype)
    _check_cells(model, resolved, method)
    averaged = method.startswith("ig")
    if averaged or method in RULED:
        encoded.require_aligned(f"method {method!r}")
    alphas = between(points) if method in RULED else tuple(points) if points is not None else midpoints(steps)
    if not alphas and averaged:
        raise PlanError(f"steps={steps}, points={points}: at least one interpolation point is needed")
    asked = Experiment(model, runs, resolved, metric, f"attribute:{method}", pairs.name, rounding=rounding)
    context = context_of(model, runs, resolved, choose_schedule(model, "growing"))
    rows, _ = make_rows(resolved, context, prune=False)
    _check_places(rows, context, method)
    how = _how(model, context, rows, method, alphas)
    budget = options.max_tokens or gradient_budget(model)
    estimated = estimate(model, context, rows, metric, how, budget)
    changes = estimated.changes(len(resolved.cells))
    check_runs(metric, model, estimated.base, estimated.source)
    check_cells(metric, model, changes, [(row.cell, row.pair) for row in rows])
    if estimated.slope <= FLAT * float(np.abs(estimated.source - estimated.base).max()):
        instead = "" if averaged else "method='ig', "
        warnings.warn(
            f"the gradient of {name_of(metric)} vanishes at the base run of {direction!r} (KL's "
            f"does at the clean run), so that estimates mean nothing; use {instead}another metric or direction",
            stacklevel=3,
        )
    completeness = adds_up(method, estimated.reached, estimated.source - estimated.base) if method in RULED else None
    estimates, report = estimated.base + changes, None
    if verify:
        estimates, report = _verify(asked, estimates, estimated.base, verify, budget)
    record = provenance(
        model,
        encoded,
        pairs.name,
        method=asked.method,
        plan=resolved.spec,
        metric=name_of(metric),
        metric_rounding=rounding,
        direction=direction,
        schedule="gradient",
        points=list(alphas) if averaged or method in RULED else None,
        completeness=completeness,
        verification=report,
    )
    return make_effects(asked, estimates, estimated.base, estimated.source, record)


def _how(model: Model, context: Context, rows: Sequence[Row], method: str, alphas: tuple[float, ...]) -> GradientSpec:
    """How a method takes gradients."""
    return {
        "tape": sorted({(entry.layer, context.names[entry.kind]) for row in rows for entry in row.entries}),
        "fractions": alphas if method.startswith("ig") or method in RULED else (),
        "moved": [ENTRY] if method in ON_THE_WAY else [],
        "drop": list(range(model.n_layers)) if method == "atp*" and model.n_layers > 1 else [],
        "exact_qk": method == "atp*",
        "by_edge": False,
        "rule": rule_of(method),
    }


def rule_of(method: str) -> str:
    """The backward rules that a method goes by."""
    return method if method in RULED else "gradient"


def between(points: Sequence[float] | None) -> tuple[float, ...]:
    """The inputs at which a segment of the way ends and the next begins. PlanError: they do not part it evenly."""
    inner = tuple(points or ())
    if not np.allclose(inner, [(number + 1) / (len(inner) + 1) for number in range(len(inner))]):
        raise PlanError(f"points={list(inner)}: for secants they part the way evenly, as [0.5] or [1/3, 2/3] do")
    return inner


def adds_up(method: str, reached: np.ndarray, change: np.ndarray) -> float:
    """How far the estimates of the embeddings `[pair]`, added up, are off the metric's change, as a fraction of that."""
    off = float(np.abs(reached - change).sum() / max(float(np.abs(change).sum()), 1e-30))
    if off > ADDS_UP:
        warnings.warn(
            f"the effects of the embeddings by {method!r} add up to {float(reached.mean()):.4g} where the metric changes by "
            f"{float(change.mean()):.4g} (means over pairs; off by {off:.1%} in all): they are estimates, as a gradient's are, "
            "not parts of the change",
            stacklevel=4,
        )
    return off


def _check_cells(model: Model, resolved: Resolved, method: str) -> None:
    """Refuse what a method has no estimate for."""
    if any(cell.edges or any(edit.op != "replace" for edit, _ in cell.edits) for cell in resolved.cells):
        raise PlanError("attribution estimates patches from the source run; constants and edges have no estimate")
    for kind in dict.fromkeys(edit.site.kind for cell in resolved.cells for edit, _ in cell.edits):
        if method == "ig-activations" and kind in KIND and KIND[kind].view == "mixture":
            raise PlanError("'ig-activations' has no path between two attention patterns; use 'atp' or 'ig'")
        if method == "atp*" and kind in EXACT:
            model.rests_on(f"attribute(method={method!r}) at {kind}", "pattern", "z")
            if model.family.pattern != "interface":
                raise PlanError(
                    f"'atp*' needs the attention logits for q and k, which {model.family.name} models do not expose; "
                    "use 'atp'"
                )


def _check_places(rows: Sequence[Row], context: Context, method: str) -> None:
    """Refuse what has no estimate where base and source positions differ."""
    origin: dict[tuple[int, int], int] = {}
    runs = context.runs
    assert runs.source is not None
    for row in rows:
        for entry in row.entries:
            column, of = entry.column, entry.source_column
            if column < 0:
                continue
            if origin.setdefault((row.pair, column), of) != of:
                raise PlanError(
                    f"position {column} of pair {row.pair} is patched from position {of} and from position "
                    f"{origin[row.pair, column]} of the other prompt; attribute them in two calls"
                )
            aligned = of == column and len(runs.base[row.pair]) == len(runs.source[row.pair])
            name = context.names[entry.kind]
            if not aligned and (method == "ig-activations" or (method == "atp*" and name in EXACT)):
                raise PlanError(
                    f"{method!r} at {name} needs prompts of one length and the same positions in both, but pair "
                    f"{row.pair} is patched at {column} from {of}; use 'atp'"
                )


def _verify(
    asked: Experiment, estimates: np.ndarray, base: np.ndarray, count: int, budget: int
) -> tuple[np.ndarray, dict[str, object]]:
    """Patch the largest estimates and as many others exactly; values of both, and which effects were missed."""
    resolved = asked.resolved
    size = np.abs(np.nanmean(estimates - base, axis=1))
    order = np.argsort(-np.nan_to_num(size))
    top, rest = order[:count], order[count:]
    drawn = np.random.default_rng(0).choice(rest, size=min(count, len(rest)), replace=False) if len(rest) else rest
    chosen = [int(cell) for cell in (*top, *drawn)]
    subset = replace(resolved, cells=tuple(resolved.cells[cell] for cell in chosen))
    patched = replace(asked, resolved=subset, method="patch")
    values = run_cells(patched, Options(max_tokens=budget)).values.values
    exact = np.stack([values[cell.index] for cell in subset.cells])
    weakest = float(np.abs(np.nanmean(exact[: len(top)] - base, axis=1)).min())
    cells = []
    for place, cell in enumerate(chosen):
        effect = float(np.nanmean(exact[place] - base))
        index = resolved.cells[cell].index
        labels = {name: values[at] for (name, values), at in zip(resolved.dims, index, strict=True)}
        judged = {
            "estimated": float(np.nanmean(estimates[cell] - base)),
            "exact": effect,
            "top": place < len(top),
            "missed": place >= len(top) and abs(effect) > weakest,
        }
        cells.append({**labels, **judged})
    estimates = estimates.copy()
    estimates[chosen] = exact
    missed = sum(cell["missed"] for cell in cells)
    return estimates, {"cells": cells, "missed": missed, "sampled": len(drawn), "unverified": len(rest) - len(drawn)}
