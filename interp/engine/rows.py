"""Rows: what each cell does on each pair, as numbers that one forward pass after another can be made of.

1. A cell's edits become `Entry`s, positions counted in the pair's own prompts; its edges `Changed` reads; its cut edges a mask.
2. Each row knows the layer at which it must exist (`stage`) and the first position that it changes (`first`).
3. What cannot reach the answer is known to equal the base run and is not run ("untouched").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..cells import EVERYWHERE, Cell, Place, Resolved
from ..edits import OPS, Edit
from ..order import LOGITS, Order
from ..sites import KIND, Site
from .context import Context
from .edges import RECEIVERS

REPLACE, MIX = OPS.index("replace"), OPS.index("mix")
#: The run that an entry takes its value from: HELPER is another patched run of the same forward pass.
SOURCE, BASE, HELPER = range(3)
#: Later than any layer: where nothing is edited.
NEVER = 10**9


class Entry(NamedTuple):
    """One edit of a row; -1 stands for "all" (column, part) or "none" (value)."""

    layer: int
    kind: int
    op: int
    column: int
    source_column: int
    part: int
    value: int
    origin: int


class Changed(NamedTuple):
    """One read of a row that is changed: a sender's contribution is the source run's; column -1 is everywhere."""

    sender: int
    layer: int
    reader: int
    head: int
    column: int


@dataclass(frozen=True)
class Row:
    """One patched run: a cell on a pair; -1 where a row only helps another."""

    pair: int
    cell: int
    stage: int
    first: int  # first position that must be run, counted from the END of the prompt (negative)
    entries: tuple[Entry, ...]
    edges: tuple[Changed, ...] = ()
    helper: Row | None = None
    #: which of the context's masks of cut edges applies, -1 for none; where there is one, `helper` is the run that this row
    #: is a copy of below its stage
    cut: int = -1


class Ends(NamedTuple):
    """One pair, for making its rows: where its prompts end, where the answer is read, where they first differ."""

    pair: int
    base: int
    source: int
    answer: int  # in the base run, from the end of its prompt
    other: int  # where the source run's answer is read, from the end of its prompt: no pass may begin behind it
    differs: int  # 0 where that is not known
    prune: bool  # whether what cannot reach the answer is left out
    known: bool  # whether the first difference is known, and may be used

    @classmethod
    def of(cls, context: Context, pair: int, prune: bool) -> Ends:
        """The ends of one pair."""
        runs, base = context.runs, len(context.runs.base[pair])
        source = base if runs.source is None else len(runs.source[pair])
        differs = runs.first_difference if prune else None
        return cls(
            pair,
            base,
            source,
            runs.answer_at(pair, source=False) - base,
            0 if runs.source is None else runs.answer_at(pair, source=True) - source,
            0 if differs is None else differs[pair],
            prune,
            differs is not None,
        )


def stage_of(site: Site) -> int:
    """The layer at whose input a row must exist for an edit at a site; -1: before the embedding."""
    return (site.layer or 0) + site.facts.stage


def make_rows(resolved: Resolved, context: Context, prune: bool) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows of every cell on every pair, and the (cell, pair) that are known to equal the base run."""
    rows, untouched = [], []
    for pair in range(len(context.runs)):
        ends = Ends.of(context, pair, prune)
        for number, cell in enumerate(resolved.cells):
            plain = edited_row(cell, number, ends, context)
            if plain is None:  # a position that this pair has not
                continue
            row: Row | None
            if cell.cut is not None:
                row = cut_row(cell, number, ends, context)
            elif cell.edges:
                row = edge_row(cell, ends, context, plain)
            else:
                row = None if ends.prune and not plain.entries else plain
            if row is None or (ends.prune and row.first > ends.answer):
                untouched.append((number, pair))
            elif cell.edges or cell.cut is not None:
                rows.append(row)
            else:
                rows.append(Row(pair, number, row.stage, min(row.first, ends.other), row.entries))
    return rows, untouched


def edited_row(cell: Cell, number: int, ends: Ends, context: Context) -> Row | None:
    """The row of a cell's edits; None where its pair has no such position."""
    entries: list[Entry] = []
    first, stage = 0, NEVER  # 0: touches nothing
    only_replaced = all(edit.op == "replace" for edit, _ in cell.edits)  # a constant may differ anywhere
    for edit, place in cell.edits:
        columns = columns_of(place, ends, ends.differs if only_replaced else 0, context)
        if columns is None:
            return None
        changed = [min(to - ends.base, of - ends.source) for to, of in columns if to >= 0]
        if place == EVERYWHERE:
            changed = [(ends.differs if only_replaced else 0) - ends.base]
        first = min([first, *changed])
        entries += edit_entries(edit, columns, context)
        stage = min(stage, stage_of(edit.site))
    return Row(ends.pair, number, stage, first, tuple(entries))


def columns_of(place: Place, ends: Ends, known: int, context: Context) -> list[tuple[int, int]] | None:
    """(base position, source position) of an edit, (-1, -1) for all of them; None where a pair has no such position."""
    if place == EVERYWHERE:
        return [(-1, -1)]
    columns = place.columns(context.runs.encoded, ends.pair)
    if columns is None:
        return None
    columns = columns if context.runs.noising else columns[::-1]
    # before the first difference both runs hold the same at one position, so that taking it over changes nothing; taken to
    # another position it does
    return [(to, of) for to, of in zip(*columns, strict=True) if to >= known or of != to]


def edit_entries(edit: Edit, columns: Iterable[tuple[int, int]], context: Context) -> list[Entry]:
    """One entry for each position of an edit."""
    layer, kind = edit.site.place
    common, value = (layer, context.kinds[kind], OPS.index(edit.op)), context.value_index(edit)
    return [Entry(*common, to, of, context.part(edit.site), value, SOURCE) for to, of in columns]


def cut_row(cell: Cell, number: int, ends: Ends, context: Context) -> Row:
    """The row of a cell whose edges are cut; it branches off from the run of the edges that others share, where it has one."""
    assert cell.cut is not None
    counterfactual = isinstance(context.reference, str) and context.reference == "source" and ends.known
    start = (ends.differs if counterfactual else 0) - ends.base
    stage, trunk = cut_stage(cell.cut, context.order), None
    mask = context.mask_of[id(cell.cut)]
    if cell.trunk is not None and (branch := cut_stage(np.not_equal(cell.cut, cell.trunk), context.order)) > 0:
        trunk = Row(ends.pair, -1, 0, start, (), cut=context.mask_of[id(cell.trunk)])
        stage = branch
    return Row(ends.pair, number, stage, start, (), helper=trunk, cut=mask)


def cut_stage(cut: np.ndarray, order: Order) -> int:
    """The lowest layer at which any edge is cut; the number of layers where only the logits' edges are."""
    receivers = np.flatnonzero(cut.any(1))
    return order.layer_read(int(receivers[0])) if len(receivers) else order.n_layers


def edge_row(cell: Cell, ends: Ends, context: Context, plain: Row) -> Row | None:
    """The row of a cell with edges (beside its plain edits): changed reads, each at its receiver's layer; None for none."""
    if cell.through_mlps:
        return helped_row(cell, ends, context, plain)
    order, changed, stages = context.order, [], [plain.stage]
    start = ends.differs - ends.base
    for edge in cell.edges:
        sender, receiver = edge.sender, edge.receiver
        places = {site.position % ends.base for site in (sender, receiver) if site.position is not None}
        if any(column < ends.base + start for column in places):
            continue  # both runs are alike there
        if len(places) == 2:
            continue  # a sender at one position writes nothing that another position reads directly
        end = order.n_layers if receiver.layer is None else receiver.layer
        index = order.sender(sender.place[0], sender.head)
        reader = RECEIVERS.index(KIND[receiver.kind].reads)
        changed.append(Changed(index, end, reader, receiver.head or 0, places.pop() if places else -1))
        stages.append(end)
    if not changed and not plain.entries:
        return None
    return Row(ends.pair, plain.cell, min(stages), min(start, plain.first), plain.entries, tuple(changed))


def helped_row(cell: Cell, ends: Ends, context: Context, plain: Row) -> Row | None:
    """The row of a cell whose MLPs pass changes on (Wang et al. 2022): receivers take what they read from a helper run.

    The helper carries the senders' differences in its stream while all attention is held at the base run's.
    """
    order, kinds, start = context.order, context.kinds, ends.differs - ends.base
    entries, stages, lowest = list(plain.entries), [plain.stage], order.n_layers
    sent: dict[Site, Changed] = {}
    held: list[Entry] = []
    for edge in cell.edges:
        sender, receiver = edge.sender, edge.receiver
        at, column = (-1 if site.position is None else site.position % ends.base for site in (sender, receiver))
        if any(-1 < place < ends.base + start for place in (at, column)):
            continue  # both runs are alike there
        layer = sender.place[0]
        lowest = min(lowest, layer)
        facts = KIND[sender.kind]
        if facts.reads:  # an MLP: its output is the source run's, whatever reaches it
            held.append(Entry(layer, kinds[sender.kind], REPLACE, at, at, -1, -1, SOURCE))
        else:  # a head's part of what attention adds, or the embedding
            added = RECEIVERS.index("attn_out" if facts.axis else sender.kind)
            sent[sender] = Changed(order.sender(layer, sender.head), layer, added, 0, at)
        end = order.n_layers if receiver.layer is None else receiver.layer
        level, name = (end - 1, "resid_post") if receiver.layer is None else (end, receiver.kind)
        name = "mlp_in" if KIND[name].sends else name
        head = -1 if receiver.head is None else receiver.head
        read = Entry(level, kinds[name], REPLACE, column, column, head, -1, HELPER)
        if read not in entries:
            entries.append(read)
        stages.append(end)
    if not held and not sent:
        return plain if plain.entries else None
    still = Entry(0, kinds["z"], REPLACE, -1, -1, -1, -1, BASE)  # all heads as in the base run
    frozen = (*dict.fromkeys(held), *(still._replace(layer=layer) for layer in range(lowest + 1, order.n_layers)))
    first = min(start, plain.first)
    helper = Row(ends.pair, -1, max(0, lowest), first, frozen, tuple(sent.values()))
    if all(edge.receiver == Site(LOGITS) for edge in cell.edges):
        return Row(ends.pair, plain.cell, helper.stage, first, (*plain.entries, *frozen), helper.edges)
    return Row(ends.pair, plain.cell, min(stages), first, tuple(entries), helper=helper)


def step_rows(
    context: Context, block: Iterable[int], sites: Iterable[tuple[int, str]], steps: int, grow: bool = False
) -> list[Row]:
    """Rows that move each site from the base run's activation to the source run's: for each pair, site and fraction.

    They run from the first layer on, or join at their site's layer when they `grow`.
    """
    rows: list[Row] = []
    sites = list(sites)
    for pair in block:
        for layer, kind in sites:
            tap = kind if kind in KIND else context.views[kind].tap
            stage = max(layer, 0) + KIND[tap].stage if grow else -1
            for step in range(steps):
                entry = Entry(layer, context.kinds[kind], MIX, -1, -1, -1, step, SOURCE)
                rows.append(Row(pair, len(rows), stage, -len(context.runs.base[pair]), (entry,)))
    return rows
