"""Rows: what each cell of a plan does on each pair, and the facts that compiling them into forward passes needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..cells import EVERYWHERE, Cell, Resolved
from ..edits import OPS, Edit
from ..errors import PlanError
from ..models.views import features
from ..pairs import EncodedPairs
from ..sites import TABLE_KINDS, Site
from . import edges

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
    cut: bool = False  # its cell names edges that are cut; its helper is then the run that it branches off from


SOURCE, BASE, HELPER = range(3)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the base run's embeddings: standard deviation, and per pair ((position, seed), …)."""

    std: float
    at: tuple[tuple[tuple[int, int], ...], ...]


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
    trunks: dict[int, int] = {}  # number of the first cell with each trunk: that run is known as ~number
    swap = context.direction == "denoising"
    encoded = context.encoded
    differs = context.first_difference if prune else None
    for pair in range(len(encoded.clean)):
        base = len(context.base[pair])
        source = base if context.source is None else len(context.source[pair])
        answer = context.answer_at(pair, source=False) - base
        other = 0 if context.source is None else context.answer_at(pair, source=True) - source  # it must run as well
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
                    # below the first difference a position is the same in both runs, but not as another one
                    columns = [(to, of) for to, of in zip(*columns, strict=True) if to >= known or of != to]
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
                    continue
                stage, trunk = cut_stage(cell.cut, context.taps), None
                if cell.trunk is not None and (branch := cut_stage(cell.cut != cell.trunk, context.taps)) > 0:
                    trunk = Row(pair, ~trunks.setdefault(id(cell.trunk), number), 0, start, (), cut=True)
                    stage = branch
                rows.append(Row(pair, number, stage, start, (), helper=trunk, cut=True))
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
                rows.append(Row(pair, number, stage, min(first, other), tuple(entries)))
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
    still = (TABLE_KINDS.index("z"), REPLACE, -1, -1, -1, -1, -1, BASE)  # all heads as in the base run
    frozen = (*dict.fromkeys(held), *((layer, *still) for layer in range(lowest + 1, taps["n_layers"])))
    helper = Row(pair, -1, max(0, lowest), first, frozen, tuple(sent.values()))
    if all(edge.receiver == Site("logits") for edge in cell.edges):
        return Row(pair, number, helper.stage, first, (*plain.entries, *frozen), helper.edges)
    return Row(pair, number, min(stages), first, tuple(entries), helper=helper)
