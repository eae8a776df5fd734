"""The one loop over patches: cells → schedule → door → labelled effects, with progress and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from ..effects import Effects
from ..encoded import EncodedPairs
from ..errors import MetricError
from ..metrics import Metric
from ..models.model import Model
from ..options import Options
from ..seeds import current_seed
from .checkpoint import Checkpoint, read_identity
from .context import Experiment, context_of
from .door import Work, do
from .identity import PACKAGES, identify
from .parts import Part
from .schedule import Job, choose_schedule, make_job, token_budget
from .trial import check_metric, name_of


def check_runs(metric: Metric, model: Model, base: np.ndarray, source: np.ndarray | None) -> None:
    """Refuse unpatched runs whose metric is no finite number: nothing can be measured against them. MetricError."""
    for runs in (base, source):
        if runs is None or np.isfinite(runs).all():
            continue
        pair = int(np.flatnonzero(~np.isfinite(runs))[0])
        number = "NaN" if np.isnan(runs[pair]) else f"{runs[pair]}"
        raise MetricError(
            f"metric {name_of(metric)!r} gave {number} on this model's logits (dtype {model.dtype}, pair {pair}); "
            "check the model for overflow, or the metric"
        )


def check_cells(metric: Metric, model: Model, values: np.ndarray, cells: Sequence[tuple[int, int]]) -> None:
    """Refuse cells (cell, pair) that are NaN, and warn once of infinite ones. MetricError."""
    numbers = values[tuple(np.array(cells, dtype=int).reshape(-1, 2).T)]
    if np.isnan(numbers).any():
        raise MetricError(
            f"metric {name_of(metric)!r} gave NaN on this model's logits (dtype {model.dtype}); "
            "check the model for overflow, or the metric"
        )
    if infinite := int(np.isinf(numbers).sum()):
        warnings.warn(
            f"metric {name_of(metric)!r} is infinite in {infinite} of {len(numbers)} patched runs: means over them are "
            "infinite too; use a metric that stays finite, such as log_prob in place of log(prob)",
            stacklevel=5,
        )


def provenance(model: Model, encoded: EncodedPairs, name: str, **more: object) -> dict[str, object]:
    """What a record needs to say where it came from."""
    labels = [list(row) for row in encoded.labels]
    return {
        **model.provenance,
        "versions": {name: version(name) for name in PACKAGES},
        "seed": current_seed(),
        "prompts": prompts_said(encoded, name),
        "tokens": labels,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def prompts_said(encoded: EncodedPairs, name: str) -> dict[str, object]:
    """Prompt pairs as a record has them: token ids, whatever they were written as."""
    said: dict[str, object] = {
        "name": name,
        "clean": [list(prompt) for prompt in encoded.clean],
        "corrupted": None if encoded.corrupted is None else [list(prompt) for prompt in encoded.corrupted],
        "answers": None if encoded.answers is None else [list(tokens) for tokens in encoded.answers],
        "distractors": None if encoded.distractors is None else [list(tokens) for tokens in encoded.distractors],
        "positions": {name: [list(clean) for clean, _ in at] for name, at in encoded.positions.items()},
    }
    places = [at - len(prompt) for at, prompt in zip(encoded.answer_positions, encoded.clean, strict=True)]
    if any(place != -1 for place in places):
        said["answer_positions"] = places
    return said


def run_cells(asked: Experiment, options: Options | None = None) -> Effects:
    """Every cell of an experiment on every pair, as `Effects`. All methods that patch come through here."""
    options = options or Options()
    model, runs, metric = asked.model, asked.runs, asked.metric
    begun = read_identity(options.checkpoint)  # what was begun goes on with the same chunks
    known = begun.get("schedule", options.schedule) if options.schedule == "auto" else options.schedule
    schedule = choose_schedule(model, str(known))
    rounding = asked.rounding
    if rounding is None:
        rounding = check_metric(metric, runs.encoded, model.vocab_size, dtype=model.dtype)
    context = context_of(model, runs, asked.resolved, schedule, asked.reference)
    budget = options.max_tokens or begun.get("budget") or token_budget(model)
    identity: dict[str, Any] = {}
    if options.checkpoint is not None:  # this reads every weight
        identity = identify(asked, context, schedule, budget)
    job = make_job(asked.resolved, context, schedule, budget, identity)
    checkpoint = None
    if options.checkpoint is not None:
        sizes = [len(chunk.program["scored"]) for chunk in job.chunks]
        checkpoint = Checkpoint(options.checkpoint, identity, job.digest, sizes)
    scored = run_job(asked, job, checkpoint, options.progress)
    record = provenance(
        model,
        runs.encoded,
        asked.name,
        method=asked.method,
        plan=asked.resolved.spec,
        metric=name_of(metric),
        metric_rounding=rounding,
        direction=runs.direction,
        schedule=schedule,
        budget=budget,
        forwards=len(job.chunks) + len(job.prepare),
    )
    record |= {**asked.details, **({"oom_backoff": True} if scored.divided else {})}
    return make_effects(asked, scored.values, scored.base, scored.source, record)


def make_effects(
    asked: Experiment, values: np.ndarray, base: np.ndarray, source: np.ndarray | None, record: dict[str, object]
) -> Effects:
    """Label raw values `[cell, pair]` with the dims of an experiment's cells."""
    resolved, pairs = asked.resolved, values.shape[1]
    shape = tuple(len(labels) for _, labels in resolved.dims)
    full = np.full((*shape, pairs), np.nan, dtype=np.float32)
    for number, cell in enumerate(resolved.cells):
        full[cell.index] = values[number]
    coords = {name: list(labels) for name, labels in resolved.dims} | {"pair": list(range(pairs))}
    array = xr.DataArray(full, dims=[name for name, _ in resolved.dims] + ["pair"], coords=coords, name="metric")

    def run(metric: np.ndarray) -> xr.DataArray:
        return xr.DataArray(metric, dims=["pair"], coords={"pair": np.arange(pairs)})

    if source is None:
        return Effects(values=array, clean=run(base), corrupted=None, provenance=record)
    clean, corrupted = (base, source) if asked.runs.noising else (source, base)
    return Effects(values=array, clean=run(clean), corrupted=run(corrupted), provenance=record)


class Scored:
    """The scores of a job as they come: base metric `[pair]`, source metric `[pair]` (or None), patched `[cell, pair]`."""

    def __init__(self, job: Job, cells: int, checkpoint: Checkpoint | None) -> None:
        self.job, self.checkpoint = job, checkpoint
        pairs, self.streams = len(job.context.runs), job.context.runs.streams
        self.base = np.full(pairs, np.nan, dtype=np.float32)
        self.source = np.full(pairs, np.nan, dtype=np.float32) if self.streams == 2 else None
        self.values = np.full((cells, pairs), np.nan, dtype=np.float32)
        #: whether chunks ran in parts, so that numbers equal those of an undisturbed run to tolerance only
        self.divided = False
        self._gathered: np.ndarray | None = None
        self._missing: set[int] = set()  # scores of the chunk that is run in parts

    def add(self, part: Part, result: Tensor) -> int:
        """Put the scores of one part; a chunk in parts counts when its last one is there."""
        scores = result.float().cpu().numpy()
        if part.divided:
            size = len(self.job.chunks[part.index].program["scored"])
            if self._gathered is None:
                self._gathered, self._missing = np.full(size, np.nan, dtype=np.float32), set(range(size))
            places = part.places()
            self._gathered[places] = scores
            self._missing -= set(places)
            if self._missing:
                return 0
            scores, self._gathered = self._gathered, None
        self.divided |= part.divided
        if self.checkpoint is not None:
            self.checkpoint.add(scores, part.divided)
        return self.put(part.index, scores)

    def put(self, index: int, scores: np.ndarray) -> int:
        """Put the scores `[scored]` of one chunk where they belong; how many patches that were."""
        chunk = self.job.chunks[index]
        for number, pair in enumerate(chunk.pairs):
            self.base[pair] = scores[number * self.streams]
            if self.source is not None:
                self.source[pair] = scores[number * self.streams + 1]
        offset = len(chunk.pairs) * self.streams
        for number, row in enumerate(chunk.rows):
            self.values[row.cell, row.pair] = scores[offset + number]
        return len(chunk.rows)


def layer_of(part: Part) -> str:
    """What a bar says of a part: the layer that patching has come to."""
    rows = part.job.chunks[part.index].rows
    return f"layer {max(0, rows[-1].stage)}" if rows else ""


def run_job(asked: Experiment, job: Job, checkpoint: Checkpoint | None, progress: bool | None) -> Scored:
    """Run the chunks that are not finished yet, and check what came out."""
    scored = Scored(job, len(asked.resolved.cells), checkpoint)
    with checkpoint or nullcontext():
        finished = checkpoint.finished if checkpoint is not None else []
        done = sum(scored.put(index, scores) for index, scores in enumerate(finished))
        parts = [Part.of(job, index) for index in range(len(finished), len(job.chunks))]
        total = sum(len(chunk.rows) for chunk in job.chunks)
        work = Work(parts, scored.add, metric=asked.metric, total=total, unit="patch", name="patching", note=layer_of)
        do(asked.model, work, progress, done)
        scored.divided |= checkpoint is not None and checkpoint.divided
    for number, pair in job.untouched:
        scored.values[number, pair] = scored.base[pair]
    check_runs(asked.metric, asked.model, scored.base, scored.source)
    cells = [(row.cell, row.pair) for chunk in job.chunks for row in chunk.rows]
    check_cells(asked.metric, asked.model, scored.values, cells)
    return scored
