"""Schedules: how the cells of a plan become forward passes. Every schedule is exact; they differ in what they do not run.

    naive    one forward per patch: the reference
    rows     patches as rows of one batch
    growing  a row joins at the layer of its patch; layers below are not run for it
    prefix   growing, on the cached keys and values of the positions before the first patch of a group

The last two also skip the layers below a chunk's first patch. "auto" takes `prefix` where the family's cache is plain,
else `growing`. Cells whose edits cannot reach the answer (causality) are known to equal the base run and are not run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..edits import FIELDS, OPS, Edit
from ..errors import PlanError
from ..models.views import features
from ..pairs import EncodedPairs
from ..plan import EVERYWHERE, Cell, Resolved
from ..sites import TABLE_KINDS, Site
from . import edges

SCHEDULES = ("naive", "rows", "growing", "prefix")
#: What one more forward pass costs beside its rows, in tokens: Python, nnsight, weights read from memory.
OVERHEAD = 60
REPLACE = OPS.index("replace")
#: Kinds whose features are a part of a module's tensor.
PARTS = ("q", "k", "v", "z", "q_rot", "k_rot", "head_out", "mlp_pre")


@dataclass(frozen=True)
class Row:
    """One patched run: a cell on a pair.

    `entries` are its edits (layer, kind, op, column, source column, head, unit, value, origin), positions counted in
    the pair's own prompts; `edges` its changed reads (sender, layer, kind, head, column). An entry's origin is the run
    that it takes its value from: SOURCE, BASE, or HELPER, another patched run of the same forward pass.
    """

    pair: int
    cell: int
    stage: int
    first: int  # first position that must be run, counted from the END of the prompt (negative)
    entries: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, ...], ...] = ()
    helper: Row | None = None
    cut: bool = False  # its cell names edges that are cut


SOURCE, BASE, HELPER = range(3)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the base run's embeddings: standard deviation, and per pair ((position, seed), …)."""

    std: float
    at: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Chunk:
    """One forward pass: the program that is shipped, and which (cell, pair) each patched row belongs to."""

    program: dict[str, Any]
    pairs: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass
class Job:
    """Everything a backend needs, in order. `block` says which prepared run a chunk needs (or None)."""

    chunks: list[Chunk]
    prepare: dict[int, dict[str, Any]]
    block: list[int | None]
    untouched: list[tuple[int, int]]  # (cell, pair): known to equal the base run
    schedule: str
    context: Context
    digest: str = ""


@dataclass(frozen=True)
class Context:
    """What compiling a chunk needs: the pairs, which run is the base, the model's taps and its forward's arguments."""

    encoded: EncodedPairs
    direction: str
    taps: dict[str, Any]
    accepts: frozenset[str]
    cache_class: type | None
    values: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    indices: dict[tuple[int, str, Any], int] = field(default_factory=dict)
    #: what stands in for cut edges: "source", "zero", or constants [sender, position or 1, d_model]
    reference: Any = "source"
    cuts: dict[int, Any] = field(default_factory=dict)
    want_logits: bool = False
    noise: Noise | None = None

    @property
    def first_difference(self) -> tuple[int, ...] | None:
        """Per pair the first position at which base and source differ; None where that is not known."""
        if self.noise is not None:
            return tuple(min(position for position, _ in at) for at in self.noise.at)
        known = self.encoded.corrupted is not None and self.encoded.aligned
        return self.encoded.first_difference if known else None

    def value_index(self, edit: Edit) -> int:
        """Where the constant of an edit stands in the values of its site; -1 for none."""
        layer = -1 if edit.site.layer is None else edit.site.layer
        return self.indices.get((layer, edit.site.kind, value_key(edit.value)), -1)

    @property
    def base(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the base run of every pair."""
        noising = self.direction == "noising" or self.encoded.corrupted is None
        return self.encoded.clean if noising else self.encoded.corrupted  # type: ignore[return-value]

    @property
    def source(self) -> tuple[tuple[int, ...], ...] | None:
        """Token ids of the source run of every pair, or None."""
        if self.encoded.corrupted is None:
            return None
        return self.encoded.corrupted if self.direction == "noising" else self.encoded.clean

    def answer_at(self, pair: int, source: bool) -> int:
        """The position in the base (or source) prompt whose logits are read."""
        clean = source != (self.direction == "noising" or self.encoded.corrupted is None)
        return (self.encoded.answer_positions if clean else self.encoded.answer_positions_corrupted)[pair]


def value_key(value: Any) -> Any:
    """Equal constants share one entry: numbers by value, tensors by identity."""
    return id(value) if isinstance(value, torch.Tensor) else value


def constants(
    resolved: Resolved, taps: dict[str, Any], length: int
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[tuple[int, str, Any], int]]:
    """The constants of a plan by site: `[value, position or 1, feature or 1]`, and where each edit's constant stands.

    Raises:
        PlanError: a constant that is no finite number or tensor, or does not fit its site or prompts of this length.
    """
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    indices: dict[tuple[int, str, Any], int] = {}
    for cell in resolved.cells:
        for edit, _ in cell.edits:
            if edit.value is None:
                continue
            site = (-1 if edit.site.layer is None else edit.site.layer, edit.site.kind)
            key = (*site, value_key(edit.value))
            if key not in indices:
                indices[key] = len(found.setdefault(site, []))
                found[site].append(constant(edit, taps, length))
    stacked = {}
    for site, values in found.items():
        shape = [max(value.shape[dim] for value in values) for dim in (0, 1)]
        stacked[site] = torch.stack([value.expand(*shape) for value in values])
    return stacked, indices


def constant(edit: Edit, taps: dict[str, Any], length: int) -> torch.Tensor:
    """An edit's constant as `[position or 1, feature or 1]`, checked against its site."""
    kind = edit.site.kind
    try:
        value = torch.as_tensor(edit.value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"the value of {edit.op!r} at {edit.site} is {edit.value!r}, no number or tensor") from error
    part = features(taps, kind) if kind in PARTS else None
    width = taps["d_model"] if part is None else int(part.max()) + 1
    width = 1 if kind == "pattern" else taps["d_mlp"] if kind == "neuron" else width
    shape = (1,) * (2 - value.ndim) + tuple(value.shape)
    fits = len(shape) == 2 and (shape[1] == 1 or shape[1] >= width) and (shape[0] == 1 or shape[0] >= length)
    if not fits:
        raise PlanError(
            f"the value of {edit.op!r} at {edit.site} has shape {list(value.shape)}; it is a number, [{width}] features, "
            f"or [{length}, {width}] by position, as the site's module has them"
        )
    if not value.isfinite().all():
        raise PlanError(f"the value of {edit.op!r} at {edit.site}, shape {list(value.shape)}, holds NaN or infinity")
    return value.reshape(shape)


def check_direction(direction: str, encoded: EncodedPairs, needs_source: bool = True) -> None:
    """Raises PlanError for an unknown direction, or where a source run is needed and there is none."""
    if direction not in ("noising", "denoising"):
        raise PlanError(f"direction {direction!r}; it is 'noising' (clean run, corrupted patches) or 'denoising'")
    if needs_source and encoded.corrupted is None:
        raise PlanError("these pairs have no corrupted prompts to patch from; give PromptPairs(corrupted=[...])")


def stage_of(layer: int, kind: str) -> int:
    """The layer at whose input a row must exist for this edit; -1: before the embedding."""
    return -1 if kind == "embed" else layer + 1 if kind == "resid_post" else layer


def make_rows(resolved: Resolved, context: Context, prune: bool) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows of every cell on every pair, and the (cell, pair) that are known to equal the base run."""
    rows, untouched = [], []
    swap = context.direction == "denoising"
    encoded = context.encoded
    differs = context.first_difference if prune else None
    for pair in range(len(encoded.clean)):
        base = len(context.base[pair])
        source = base if context.source is None else len(context.source[pair])
        answer = context.answer_at(pair, source=False) - base
        for number, cell in enumerate(resolved.cells):
            entries: list[tuple[Any, ...]] = []
            first, stage, exists = 0, 10**9, True  # first: counted from the end, 0 = touches nothing
            only_replaced = all(edit.op == "replace" for edit, _ in cell.edits)  # a constant may differ anywhere
            for edit, place in cell.edits:
                site = edit.site
                layer = -1 if site.layer is None else site.layer
                columns: Any = None
                if place != EVERYWHERE:
                    columns = place.columns(encoded, pair)
                    exists = columns is not None
                    if not exists:
                        break
                    columns = columns[::-1] if swap else columns
                known = differs[pair] if differs is not None and only_replaced else 0
                if columns is None:
                    first = min(first, known - base)
                    columns = ((-1,), (-1,))
                else:
                    columns = [(to, of) for to, of in zip(*columns, strict=True) if to >= known]
                    first = min([first, *(min(to - base, of - source) for to, of in columns)])
                    columns = tuple(zip(*columns, strict=True)) or ((), ())
                common = (layer, TABLE_KINDS.index(site.kind), OPS.index(edit.op))
                tail = (-1 if site.head is None else site.head, -1 if site.unit is None else site.unit)
                value = context.value_index(edit)
                entries += [(*common, to, of, *tail, value, SOURCE) for to, of in zip(*columns, strict=True)]
                stage = min(stage, stage_of(layer, site.kind))
            if not exists:
                continue
            if cell.cut is not None:
                counterfactual = context.reference == "source" and differs is not None
                start = (differs[pair] if counterfactual and differs is not None else 0) - base
                if prune and start > answer:
                    untouched.append((number, pair))
                else:
                    rows.append(Row(pair, number, cut_stage(cell.cut, context.taps), start, (), cut=True))
            elif cell.edges:
                start = (differs[pair] if differs is not None else 0) - base
                plain = Row(pair, number, stage, first, tuple(entries))
                row = edge_row(cell, number, pair, start, base, context.taps, plain)
                if (row.entries or row.edges) and (not prune or row.first <= answer):
                    rows.append(row)
                else:
                    untouched.append((number, pair))
            elif prune and (first > answer or not entries):
                untouched.append((number, pair))
            else:
                rows.append(Row(pair, number, stage, first, tuple(entries)))
    return rows, untouched


def cut_stage(cut: Any, taps: dict[str, Any]) -> int:
    """The lowest layer at which any edge is cut; the number of layers where only the logits' edges are."""
    cut_rows = cut.any(1).nonzero()[0]
    per_layer = taps["n_heads"] + 2 * taps["n_kv_heads"] + 1
    return int(cut_rows[0]) // per_layer if len(cut_rows) else int(taps["n_layers"])


def edge_row(cell: Cell, number: int, pair: int, start: int, length: int, taps: dict[str, Any], plain: Row) -> Row:
    """The row of a cell with edges (beside its plain edits): changed reads, or a helper run that MLPs pass changes through.

    With `through_mlps`, the helper carries the senders' differences in its stream while all attention is held at the base
    run's; receivers take what they read from the helper (Wang et al. 2022).
    """
    changed, entries, stages = [], list(plain.entries), [plain.stage]
    sent: dict[Site, tuple[int, ...]] = {}
    held: list[tuple[int, ...]] = []
    lowest: int = taps["n_layers"]
    for edge in cell.edges:
        sender, receiver = edge.sender, edge.receiver
        layer = -1 if sender.layer is None else sender.layer
        index = edges.sender_index(taps, layer, sender.head)
        columns = [None if site.position is None else site.position % length for site in (sender, receiver)]
        places = {column for column in columns if column is not None}
        if any(column < length + start for column in places):
            continue  # both runs are alike there
        end = taps["n_layers"] if receiver.kind == "logits" else receiver.layer or 0
        if not cell.through_mlps:
            if len(places) == 2:
                continue  # a sender at one position writes nothing that another position reads directly
            kind = edges.RECEIVERS.index("mlp" if receiver.kind == "mlp_out" else receiver.kind)
            changed.append((index, end, kind, receiver.head or 0, places.pop() if places else -1))
            stages.append(end)
            continue
        at = -1 if columns[0] is None else columns[0]
        lowest = min(lowest, layer)
        if sender.kind == "mlp_out":  # its output is the source run's, whatever reaches it
            held.append((layer, TABLE_KINDS.index("mlp_out"), REPLACE, at, at, -1, -1, -1, SOURCE))
        else:
            how = edges.RECEIVERS.index("embed" if sender.kind == "embed" else "attn_out")
            sent[sender] = (index, layer, how, 0, at)
        name = {"mlp_out": "mlp_in", "logits": "resid_post"}.get(receiver.kind, receiver.kind)
        column = -1 if columns[1] is None else columns[1]
        head = -1 if receiver.head is None else receiver.head
        level = end - 1 if receiver.kind == "logits" else end
        read = (level, TABLE_KINDS.index(name), REPLACE, column, column, head, -1, -1, HELPER)
        if read not in entries:
            entries.append(read)
        stages.append(end)
    first = min(start, plain.first)
    if not cell.through_mlps:
        return Row(pair, number, min(stages), first, tuple(entries), tuple(changed))
    if not held and not sent:
        return Row(pair, number, plain.stage, plain.first, plain.entries)
    frozen = (*dict.fromkeys(held),) + tuple(
        (layer, TABLE_KINDS.index("z"), REPLACE, -1, -1, -1, -1, -1, BASE)
        for layer in range(lowest + 1, taps["n_layers"])
    )
    helper = Row(pair, -1, max(0, lowest), first, frozen, tuple(sent.values()))
    if all(edge.receiver == Site("logits") for edge in cell.edges):
        return Row(pair, number, helper.stage, first, (*plain.entries, *frozen), helper.edges)
    return Row(pair, number, min(stages), first, tuple(entries), helper=helper)


def compile_chunk(
    rows: Sequence[Row],
    context: Context,
    schedule: str,
    start_column: int = 0,
    pairs: Sequence[int] | None = None,
    width: int | None = None,
    first_layer: int = 0,
) -> Chunk:
    """The program of one forward pass. Columns are right-aligned: the last column is every prompt's last token."""
    pairs = tuple(sorted({row.pair for row in rows})) if pairs is None else tuple(pairs)
    base, source = context.base, context.source
    runs = [(pair, side) for pair in pairs for side in ((False, True) if source is not None else (False,))]
    prompts = [source[pair] if side and source is not None else base[pair] for pair, side in runs]
    place = {run: index for index, run in enumerate(runs)}
    helpers = list(dict.fromkeys(row.helper for row in rows if row.helper is not None))
    every = sorted([*helpers, *rows], key=lambda row: row.stage)
    grow = schedule in ("growing", "prefix")
    early = [row for row in every if not grow or row.stage < 0]
    late = [row for row in every if grow and row.stage >= 0]
    width = width or max(len(prompt) for prompt in prompts)
    prompts = prompts + [base[row.pair] for row in early]
    table, changed = [], []
    ordered = early + late
    number_of = {row: number for number, row in enumerate(ordered, start=len(runs))}
    for row in ordered:
        number = number_of[row]
        shift = width - len(base[row.pair]) - start_column
        other = width - len(source[row.pair]) - start_column if source is not None else shift
        streams = (place.get((row.pair, True), -1), place[row.pair, False])
        for layer, kind, op, column, from_column, head, unit, value, origin in row.entries:
            taken = number_of[row.helper or row] if origin == HELPER else streams[origin]
            columns = (-1, -1) if column < 0 else (column + shift, from_column + (other if origin == SOURCE else shift))
            if op != REPLACE:  # constants by position are looked up by the pair's own positions
                columns = (columns[0], column if column >= 0 else -shift)
            table.append((layer, kind, op, number, taken, *columns, head, unit, value))
        for sender, layer, kind, head, column in row.edges:
            at_column = column + shift if column >= 0 else -1
            changed.append((number, streams[BASE], streams[SOURCE], sender, layer, kind, head, at_column))
    patched = [row for row in ordered if row.cell >= 0]
    scored = [*range(len(runs)), *(number_of[row] for row in patched)]
    owners = [pair for pair, _ in runs] + [row.pair for row in patched]
    at = [
        width - len(prompt) + context.answer_at(pair, side) - start_column
        for prompt, (pair, side) in zip(prompts, runs, strict=False)
    ] + [width - len(base[row.pair]) + context.answer_at(row.pair, False) - start_column for row in patched]
    noising = context.direction == "noising" or source is None
    clean = [place[pair, False] if noising else place[pair, True] for pair in owners]
    corrupted = (
        [place[pair, True] if noising else place[pair, False] for pair in owners] if source is not None else None
    )
    program: dict[str, Any] = {
        "inputs": inputs_of(prompts, width, start_column, context.accepts),
        "origin": torch.tensor([place[row.pair, False] for row in late], dtype=torch.long),
        "stage": torch.tensor([row.stage for row in late], dtype=torch.long),
        "edits": torch.tensor(table, dtype=torch.int32).reshape(-1, len(FIELDS)),
        "values": context.values,
        "reads": [],
        "last": None,
        "first": first_layer,
        "want_logits": context.want_logits,
        "scored": torch.tensor(scored),
        "at": torch.tensor(at),
        "clean": torch.tensor(clean),
        "corrupted": None if corrupted is None else torch.tensor(corrupted),
        "answers": token_sets(context.encoded.answers, owners),
        "distractors": token_sets(context.encoded.distractors, owners),
    }
    if context.noise is not None:  # on the base runs, and on copies of them that start with the embedding
        program["noise"] = {
            "std": context.noise.std,
            "table": torch.tensor(
                [
                    (number, position + width - len(base[pair]) - start_column, seed)
                    for number, pair in [(place[pair, False], pair) for pair in pairs]
                    + [(number_of[row], row.pair) for row in early]
                    for position, seed in context.noise.at[pair]
                    if position + width - len(base[pair]) >= start_column
                ]
            ).reshape(-1, 3),
        }
    cut = [row for row in ordered if row.cut]
    if cut:
        program["edges"] = {
            "mode": "cut",
            "rows": torch.tensor([number_of[row] for row in cut]),
            "origin": torch.tensor([place[row.pair, False] for row in cut]),
            "source": torch.tensor([place.get((row.pair, True), -1) for row in cut]),
            "mask": torch.stack([torch.as_tensor(context.cuts[row.cell]) for row in cut]),
            "reference": context.reference,
        }
    elif changed:
        program["edges"] = {"mode": "patch", "table": torch.tensor(changed, dtype=torch.int32)}
    return Chunk(program, pairs, tuple(patched))


def inputs_of(
    prompts: Sequence[Sequence[int]], width: int, start_column: int, accepts: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Token ids `[row, position]` from a start column on, left-padded; a mask and positions only where there is padding."""
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    inputs = {"input_ids": ids[:, start_column:]}
    if any(len(prompt) < width for prompt in prompts):
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs["attention_mask"] = mask
        if "position_ids" in accepts:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start_column:]
    return inputs


def token_sets(sets: Sequence[Sequence[int]] | None, owners: Sequence[int]) -> torch.Tensor | None:
    """Answers of each scored row: `[row]` where each is one token, else `[row, set]` padded with -1."""
    if sets is None:
        return None
    widest = max(len(tokens) for tokens in sets)
    if widest == 1:
        return torch.tensor([sets[pair][0] for pair in owners])
    return torch.tensor([[*sets[pair], *[-1] * (widest - len(sets[pair]))] for pair in owners])


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
    identity: dict[str, Any],
) -> Job:
    """Chunks of forward passes for every cell and pair. `identity` (model, metric, …) goes into the job's digest."""
    rows, untouched = make_rows(resolved, context, prune=schedule == "prefix")
    job = Job([], {}, [], untouched, schedule, context)
    streams = 2 if context.source is not None else 1
    lengths = [
        max(len(context.base[pair]), len(context.source[pair]) if context.source is not None else 0)
        for pair in range(len(context.base))
    ]
    order = sorted(range(len(lengths)), key=lambda pair: (lengths[pair], pair))
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
        for number, block in enumerate(pack_pairs(order, lengths, streams, budget)):
            _add_block(job, number, block, [row for pair in block for row in by_pair.get(pair, ())], lengths, budget)
    parts = [json.dumps(identity, sort_keys=True), json.dumps(resolved.spec, sort_keys=True), context.encoded.digest]
    parts += [context.direction, schedule, *(str([(r.cell, r.pair) for r in chunk.rows]) for chunk in job.chunks)]
    job.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return job


def first_layer(rows: Sequence[Row], taps: dict[str, Any]) -> int:
    """The lowest layer that these rows need: that of their first edit, or of a sender whose contribution is used."""
    layers = [taps["n_layers"] - 1]
    for row in rows:
        for part in (row, row.helper) if row.helper is not None else (row,):
            layers.append(max(0, part.stage))
            layers += [0] * row.cut
            layers += [max(0, (sender - 1) // (taps["n_heads"] + 1)) for sender, *_ in part.edges]
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


def _add_block(job: Job, number: int, block: list[int], rows: list[Row], lengths: list[int], budget: int) -> None:
    """Chunks of one block of pairs: groups by position, filled in order of pair and layer up to the token budget."""
    context, schedule = job.context, job.schedule
    width = max(lengths[pair] for pair in block)
    streams = 2 if context.source is not None else 1
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
    worth = schedule in ("growing", "prefix") and (len(plans) > 1 or any(column for column, _ in plans))
    if not plans or unpatched or worth:
        needed = sorted({first_layer(part, context.taps) for _, part in plans} - {0}) if worth else []
        alone = compile_chunk([], context, schedule, pairs=block, width=width)
        if worth:
            prepare = {**alone.program, "keep": needed}
            prepare["cache"] = context.cache_class if any(column for column, _ in plans) else None
            job.prepare[number] = prepare
        if not worth or unpatched or not plans:
            _append(job, alone, None)
    for column, members in plans:
        first = first_layer(members, context.taps) if worth else 0
        made = compile_chunk(members, context, schedule, column, width=width, first_layer=first)
        streams_of = [block.index(pair) * streams + side for pair in made.pairs for side in range(streams)]
        if first or column:
            made.program.update(use=number, pick=torch.tensor(streams_of), column=column)
        _append(job, made, number if first or column else None)


def _append(job: Job, chunk: Chunk, block: int | None) -> None:
    job.chunks.append(chunk)
    job.block.append(block)


Report = Callable[[int, dict[str, Any]], None]
