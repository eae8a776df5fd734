"""The one loop over patches: plan → schedule → backend → labelled effects, with progress and checkpoints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from ..cells import Resolved
from ..effects import Effects
from ..errors import MetricError, PlanError
from ..metrics import Metric
from ..models.model import Model
from ..pairs import EncodedPairs, PromptPairs
from ..plan import Plan
from ..seeds import current_seed
from .backoff import run_parts
from .checkpoint import Checkpoint, read_identity
from .identity import PACKAGES, identify
from .rows import Context, Noise, check_direction, constants
from .schedule import Job, choose_schedule, make_job, token_budget
from .trial import check_metric, name_of


def check_runs(metric: Metric, model: Model, base: np.ndarray, source: np.ndarray | None) -> None:
    """Refuse unpatched runs whose metric is no finite number: nothing can be measured against them. MetricError."""
    for runs in (base, source):
        if runs is None or np.isfinite(runs).all():
            continue
        pair = int(np.flatnonzero(~np.isfinite(runs))[0])
        found = "NaN" if np.isnan(runs[pair]) else f"{runs[pair]}"
        raise MetricError(
            f"metric {name_of(metric)!r} gave {found} on this model's logits (dtype {model.dtype}, pair {pair}); "
            "check the model for overflow, or the metric"
        )


def check_cells(metric: Metric, model: Model, values: np.ndarray, cells: Sequence[tuple[int, int]]) -> None:
    """Refuse cells (cell, pair) that are NaN, and warn once of infinite ones. MetricError."""
    found = values[tuple(np.array(cells, dtype=int).reshape(-1, 2).T)]
    if np.isnan(found).any():
        raise MetricError(
            f"metric {name_of(metric)!r} gave NaN on this model's logits (dtype {model.dtype}); "
            "check the model for overflow, or the metric"
        )
    if infinite := int(np.isinf(found).sum()):
        warnings.warn(
            f"metric {name_of(metric)!r} is infinite in {infinite} of {len(found)} patched runs: means over them are infinite "
            "too; use a metric that stays finite, such as log_prob in place of log(prob)",
            stacklevel=4,
        )


def provenance(model: Model, encoded: EncodedPairs, pairs: PromptPairs | None, **more: Any) -> dict[str, Any]:
    """What a record needs to say where it came from."""
    labels = [list(row) for row in encoded.labels]
    return {
        "model": model.name,
        "revision": model.revision,
        "note": model.note,
        "family": model.family.name,
        "n_layers": model.n_layers,
        "prefix": model.prefix,
        "versions": {name: version(name) for name in PACKAGES},
        "seed": current_seed(),
        "prompts": {
            "name": pairs.name if pairs is not None else "",
            "clean": [list(prompt) for prompt in encoded.clean],
            "corrupted": None if encoded.corrupted is None else [list(prompt) for prompt in encoded.corrupted],
            "answers": None if encoded.answers is None else [list(tokens) for tokens in encoded.answers],
            "distractors": None if encoded.distractors is None else [list(tokens) for tokens in encoded.distractors],
            "positions": {name: [list(clean) for clean, _ in at] for name, at in encoded.positions.items()},
        },
        "tokens": labels,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def context_of(model: Model, encoded: EncodedPairs, direction: str, resolved: Resolved, schedule: str) -> Context:
    """What compiling needs to know about this model and these pairs."""
    from transformers import DynamicCache

    base = encoded.clean if direction == "noising" or encoded.corrupted is None else encoded.corrupted
    values, indices = constants(resolved, model.taps, max(map(len, base)))
    cache = DynamicCache if schedule == "prefix" else None
    cuts = {number: cell.cut for number, cell in enumerate(resolved.cells) if cell.cut is not None}
    cuts |= {~number: cell.trunk for number, cell in enumerate(resolved.cells) if cell.trunk is not None}
    return Context(encoded, direction, model.taps, model.accepts, cache, values, indices, cuts=cuts)


def run_plan(
    model: Model,
    pairs: PromptPairs,
    plan: Plan,
    metric: Metric,
    direction: str,
    *,
    method: str,
    schedule: str = "auto",
    max_tokens: int | None = None,
    progress: bool | None = None,
    checkpoint: Any = None,
    needs_source: bool = True,
    rewrite: Callable[[Resolved], Resolved] | None = None,
    noise: Noise | None = None,
    reference: Any = "source",
    details: Mapping[str, Any] | None = None,
    rounding: float | None = None,
) -> Effects:
    """Every cell of a plan on every pair, as `Effects`. All methods that patch come through here.

    Args:
        rewrite: what a method makes of the plan's cells (constants in place of sources, windows of layers).
        noise: on the base run's embeddings.
        reference: what stands in for cut edges, see `interp.engine.edges`.
        details: facts of the method, for provenance and for the identity of a checkpoint.
        rounding: what `check_metric` said of this metric, where the caller has asked already.
    """
    encoded = model.encode(pairs)
    check_direction(direction, encoded, needs_source)
    resolved = plan.resolve(model, encoded)
    resolved = resolved if rewrite is None else rewrite(resolved)
    if max_tokens is not None and max_tokens < 1:
        raise PlanError(
            f"max_tokens={max_tokens}: a forward pass holds at least one token; leave it out for the default"
        )
    begun = read_identity(checkpoint)  # what was begun goes on with the same chunks
    schedule = choose_schedule(model, begun.get("schedule", schedule) if schedule == "auto" else schedule)
    if rounding is None:
        rounding = check_metric(metric, encoded, model.vocab_size, dtype=model.dtype)
    context = replace(context_of(model, encoded, direction, resolved, schedule), noise=noise, reference=reference)
    details = dict(details or {})
    budget = max_tokens or begun.get("budget") or token_budget(model)
    identity = {}
    if checkpoint is not None:  # this reads every weight
        identity = identify(model, context, resolved, metric, method, schedule, budget, details)
    job = make_job(resolved, context, schedule, budget, identity)
    if checkpoint is not None:
        sizes = [len(chunk.program["scored"]) for chunk in job.chunks]
        checkpoint = Checkpoint(checkpoint, identity, job.digest, sizes)
    base, source, values, notes = run_job(model, job, metric, resolved, progress=progress, checkpoint=checkpoint)
    facts = {
        "method": method,
        "plan": resolved.spec,
        "metric": name_of(metric),
        "metric_rounding": rounding,
        "direction": direction,
        "schedule": schedule,
        "budget": budget,
        "forwards": len(job.chunks) + len(job.prepare),
        **details,
        **notes,
    }
    record = provenance(model, encoded, pairs, **facts)
    return make_effects(resolved, values, base, source, direction, record)


def make_effects(
    resolved: Resolved,
    values: np.ndarray,
    base: np.ndarray,
    source: np.ndarray | None,
    direction: str,
    record: dict[str, Any],
) -> Effects:
    """Label raw values `[cell, pair]` with the plan's dims."""
    pairs = values.shape[1]
    shape = tuple(len(labels) for _, labels in resolved.dims)
    full = np.full((*shape, pairs), np.nan, dtype=np.float32)
    for number, cell in enumerate(resolved.cells):
        full[cell.index] = values[number]
    coords = {name: list(labels) for name, labels in resolved.dims} | {"pair": np.arange(pairs)}
    array = xr.DataArray(full, dims=[name for name, _ in resolved.dims] + ["pair"], coords=coords, name="metric")

    def run(metric: np.ndarray) -> xr.DataArray:
        return xr.DataArray(metric, dims=["pair"], coords={"pair": np.arange(pairs)})

    if source is None:
        return Effects(values=array, clean=run(base), corrupted=None, provenance=record)
    clean, corrupted = (base, source) if direction == "noising" else (source, base)
    return Effects(values=array, clean=run(clean), corrupted=run(corrupted), provenance=record)


def run_job(
    model: Model,
    job: Job,
    metric: Metric,
    resolved: Resolved,
    *,
    progress: bool | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, dict[str, Any]]:
    """Base metric `[pair]`, source metric `[pair]` (or None), patched metric `[cell, pair]`, notes for provenance."""
    n_pairs = len(job.context.base)
    streams = 2 if job.context.source is not None else 1
    base = np.full(n_pairs, np.nan, dtype=np.float32)
    source = np.full(n_pairs, np.nan, dtype=np.float32) if streams == 2 else None
    values = np.full((len(resolved.cells), n_pairs), np.nan, dtype=np.float32)
    total = sum(len(chunk.rows) for chunk in job.chunks)
    shown = total > 200 and sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=total, disable=not shown, unit="patch", desc="patching")

    def place(index: int, scores: np.ndarray) -> None:
        chunk = job.chunks[index]
        for number, pair in enumerate(chunk.pairs):
            base[pair] = scores[number * streams]
            if source is not None:
                source[pair] = scores[number * streams + 1]
        offset = len(chunk.pairs) * streams
        for number, row in enumerate(chunk.rows):
            values[row.cell, row.pair] = scores[offset + number]
        bar.update(len(chunk.rows))
        if chunk.rows:
            bar.set_postfix_str(f"layer {max(0, chunk.rows[-1].stage)}")

    with bar:
        notes = run_chunks(model, job, metric, place, checkpoint)
    for number, pair in job.untouched:
        values[number, pair] = base[pair]
    check_runs(metric, model, base, source)
    check_cells(metric, model, values, [(row.cell, row.pair) for chunk in job.chunks for row in chunk.rows])
    return base, source, values, notes


def run_chunks(
    model: Model, job: Job, metric: Metric, place: Callable[[int, np.ndarray], None], checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """Run the chunks that are not finished yet; `place(chunk, scores [scored])` for every one, in order.

    Returns what the provenance must say: `oom_backoff` where chunks ran in parts, so that their numbers equal those of
    an undisturbed run to tolerance only.
    """
    divided = False

    def finish(index: int, scores: np.ndarray, in_parts: bool) -> None:
        nonlocal divided
        divided |= in_parts
        if checkpoint is not None:
            checkpoint.add(scores, in_parts)
        place(index, scores)

    with checkpoint or nullcontext():
        finished = checkpoint.finished if checkpoint is not None else []
        for index, scores in enumerate(finished):
            place(index, scores)
        run_parts(model, job, metric, range(len(finished), len(job.chunks)), finish)
    return {"oom_backoff": True} if divided or (checkpoint is not None and checkpoint.divided) else {}
