"""Schedules: how the cells of a plan become forward passes. Every schedule is exact; they differ in what they do not run.

    naive    one forward per patch: the reference
    rows     patches as rows of one batch
    growing  a row joins at the layer of its patch; layers below are not run for it
    prefix   growing, on the cached keys and values of the positions before the first patch of a group

The last two also skip the layers below a chunk's first patch. "auto" takes `prefix` where the family's cache is plain,
else `growing`; `naive` where quantised activations make rows depend on one another. Cells whose edits cannot reach the
answer (causality) are known to equal the base run and are not run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..cells import Resolved
from ..models.model import Model
from .compile import GROW, Chunk, compile_chunk
from .context import Context
from .program import Program
from .rows import Row, make_rows

#: What one more forward pass costs beside its rows, in tokens: Python, nnsight, weights read from memory.
OVERHEAD = 60
#: Tokens of one forward pass on a server with GPUs; some GB of activations for a model of 70 billion weights.
SERVER_TOKENS = 4096
#: Quantisations of the weights alone, after which a forward pass is an ordinary one.
WEIGHTS_ONLY = ("gptq", "awq", "auto-round", "hqq", "aqlm", "quanto", "mxfp4", "higgs", "vptq", "eetq", "spqr", "gguf")


def token_budget(model: Model) -> int:
    """How many tokens one forward pass should hold: enough to saturate the device, not more than its memory.

    On a CPU a forward pass is saturated by a few hundred tokens of a model as wide as GPT-2 small, and by more of a
    narrower one. On a GPU, half of the free memory divided by what the activations of a token take; on a server, whose
    memory is not known here, half of what one request holds.
    """
    if model.device.type == "meta":
        return SERVER_TOKENS
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        d_mlp = model.d_mlp or 4 * model.d_model
        numbers = 8 * model.d_model + 3 * d_mlp + 4 * model.n_heads * model.d_head
        return int(min(65536, max(512, 0.5 * free / (numbers * model.dtype.itemsize))))
    return int(450 * max(1.0, 768 / model.d_model))


def gradient_budget(model: Model) -> int:
    """As `token_budget`, where the activations of every layer are kept for the backward pass."""
    budget = token_budget(model)
    return budget if model.device.type == "cpu" else max(256, budget // model.n_layers)


def rows_are_apart(model: Model) -> bool:
    """Whether a row's numbers do not depend on the rows beside it, as they do where activations are quantised too.

    LLM.int8 (bitsandbytes in 8 bits) picks its outlier columns over the whole batch; a method that is not known is
    taken to do the like.
    """
    config = getattr(model.hf.config, "quantization_config", None)
    if config is None:
        return True
    said = config if isinstance(config, dict) else vars(config)
    method = said.get("quant_method")
    method = str(getattr(method, "value", method))
    return (
        bool(said.get("load_in_4bit", said.get("_load_in_4bit")))
        if method == "bitsandbytes"
        else method in WEIGHTS_ONLY
    )


def choose_schedule(model: Model, schedule: str) -> str:
    """The schedule that runs: the one that is named, or the fastest that is exact on this family."""
    if schedule == "auto" and not rows_are_apart(model):
        return "naive"
    if schedule == "auto":
        return "growing" if model.family.alibi or model.family.moe else "prefix"
    return schedule


@dataclass
class Job:
    """Everything a backend needs, in order. `block` says which prepared run a chunk needs (or None)."""

    chunks: list[Chunk]
    prepare: dict[int, Program]
    block: list[int | None]
    untouched: list[tuple[int, int]]  # (cell, pair): known to equal the base run
    schedule: str
    context: Context
    digest: str = ""


def position_groups(rows: Sequence[Row], width: int, budget: int, streams: int) -> list[tuple[int, list[Row]]]:
    """Split rows by their first edited column so that fewest tokens are run: [(start column, rows), …].

    Dynamic programming over start columns; a group costs its rows and, for every forward pass it needs, the unpatched
    streams and a fixed overhead.
    """
    by_column: dict[int, list[Row]] = {}
    for row in rows:
        by_column.setdefault(width + min(row.first, -1), []).append(row)
    columns = sorted(by_column)
    counts = [len(by_column[column]) for column in columns]

    def cost(a: int, b: int) -> float:
        tokens = width - columns[a]
        n = sum(counts[a:b])
        passes = -(-n // max(1, budget // tokens - streams))
        return (n + passes * streams) * tokens + passes * OVERHEAD

    best: list[tuple[float, int]] = [(0.0, 0)]
    for b in range(1, len(columns) + 1):
        best.append(min((best[a][0] + cost(a, b), a) for a in range(b)))
    groups, end = [], len(columns)
    while end:
        start = best[end][1]
        members = [row for column in columns[start:end] for row in by_column[column]]
        groups.append((columns[start], members))
        end = start
    return groups[::-1]


def make_job(
    resolved: Resolved,
    context: Context,
    schedule: str,
    budget: int,
    identity: Mapping[str, object],
) -> Job:
    """Chunks of forward passes for every cell and pair. `identity` (model, metric, …) goes into the job's digest."""
    rows, untouched = make_rows(resolved, context, prune=schedule == "prefix")
    job = Job([], {}, [], untouched, schedule, context)
    runs, order = context.runs, context.runs.order
    by_pair: dict[int, list[Row]] = {}
    for row in rows:
        by_pair.setdefault(row.pair, []).append(row)
    if schedule == "naive":
        for pair in order:
            for row in by_pair.get(pair, ()):
                _append(job, compile_chunk([row], context, schedule), None)
            if pair not in by_pair:
                _append(job, compile_chunk([], context, schedule, pairs=[pair]), None)
    else:
        for number, block in enumerate(pack_pairs(order, runs.lengths, runs.streams, budget)):
            _add_block(job, number, block, [row for pair in block for row in by_pair.get(pair, ())], budget)
    parts = [json.dumps(identity, sort_keys=True), json.dumps(resolved.spec, sort_keys=True), runs.encoded.digest]
    parts += [runs.direction, schedule, *(str([(r.cell, r.pair) for r in chunk.rows]) for chunk in job.chunks)]
    job.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return job


def first_layer(rows: Sequence[Row], context: Context) -> int:
    """The lowest layer that these rows need: that of their first edit, or of a sender whose contribution is used."""
    layers = [context.order.n_layers - 1]
    for row in rows:
        for part in (row, row.helper) if row.helper is not None else (row,):
            layers.append(max(0, part.stage))
            layers += [0] * (row.cut >= 0)
            layers += [context.order.layer_of(changed.sender) for changed in part.edges]
    return min(layers)


def pack_pairs(order: Sequence[int], lengths: Sequence[int], streams: int, budget: int) -> list[list[int]]:
    """Pairs of similar length whose unpatched runs fit one forward pass together."""
    blocks: list[list[int]] = []
    for pair in order:
        width = lengths[pair]
        if blocks and streams * (len(blocks[-1]) + 1) * width <= budget and lengths[blocks[-1][0]] == width:
            blocks[-1].append(pair)
        else:
            blocks.append([pair])
    return blocks


def _add_block(job: Job, number: int, block: list[int], rows: list[Row], budget: int) -> None:
    """Chunks of one block of pairs: groups by position, filled in order of pair and layer up to the token budget."""
    context, schedule = job.context, job.schedule
    width = max(context.runs.lengths[pair] for pair in block)
    streams = context.runs.streams
    prefix = schedule == "prefix" and context.cache_class is not None
    grown = [row for row in rows if row.stage >= 0]
    groups = position_groups(grown, width, budget, streams) if prefix and grown else [(0, grown)]
    groups = [(0, [row for row in rows if row.stage < 0]), *groups]
    plans: list[tuple[int, list[Row]]] = []
    for column, members in groups:
        members = sorted(members, key=lambda row: (row.pair, row.stage))
        tokens = width - column
        chunk: list[Row] = []
        for row in members:
            pairs = {member.pair for member in chunk} | {row.pair}
            if chunk and (len(chunk) + 1 + streams * len(pairs)) * tokens > budget:
                plans.append((column, chunk))
                chunk = []
            chunk.append(row)
        if chunk:
            plans.append((column, chunk))
    unpatched = [pair for pair in block if all(row.pair != pair for row in rows)]
    worth = schedule in GROW and (len(plans) > 1 or any(column for column, _ in plans))
    if not plans or unpatched or worth:
        needed = sorted({first_layer(part, context) for _, part in plans} - {0}) if worth else []
        alone = compile_chunk([], context, schedule, pairs=block, width=width)
        if worth:
            prepare: Program = {**alone.program, "keep": needed}
            prepare["cache"] = context.cache_class if any(column for column, _ in plans) else None
            job.prepare[number] = prepare
        if not worth or unpatched or not plans:
            _append(job, alone, None)
    for column, members in plans:
        first = first_layer(members, context) if worth else 0
        made = compile_chunk(members, context, schedule, column, width=width, first_layer=first)
        streams_of = [block.index(pair) * streams + side for pair in made.pairs for side in range(streams)]
        if first or column:
            made.program.update({"use": number, "pick": torch.tensor(streams_of), "column": column})
        _append(job, made, number if first or column else None)


def _append(job: Job, chunk: Chunk, block: int | None) -> None:
    job.chunks.append(chunk)
    job.block.append(block)
