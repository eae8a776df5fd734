"""Compiling: rows on pairs become the program of one forward pass, plain tensors that can travel.

1. `Batch` says which row of the forward pass is what: the unpatched runs of its pairs first, then rows that run from the
   embedding on, then those that join later, by layer.
2. Tables name rows by these numbers and columns from the first position that is run; the last column is every prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..edits import FIELDS
from ..tokens import Tokens
from .context import Context
from .program import Inputs, NoiseTable, Place, Program
from .rows import HELPER, REPLACE, SOURCE, Row

#: Schedules whose rows join at their layer.
GROW = ("growing", "prefix")


@dataclass(frozen=True)
class Chunk:
    """One forward pass: the program that is shipped, and which (cell, pair) each patched row belongs to."""

    program: Program
    pairs: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass: `runs` (pair, whether the source run), then `ordered`, from column `start` of `width`."""

    context: Context
    runs: tuple[tuple[int, bool], ...]
    early: tuple[Row, ...]
    late: tuple[Row, ...]
    width: int
    start: int

    @classmethod
    def of(
        cls, rows: Sequence[Row], context: Context, grow: bool, start: int, pairs: Sequence[int], width: int | None
    ) -> Batch:
        """The order in which rows stand: helpers with those that they help, by the layer at which they join."""
        sides = (False, True) if context.runs.source is not None else (False,)
        runs = tuple((pair, side) for pair in pairs for side in sides)
        helpers = dict.fromkeys(row.helper for row in rows if row.helper is not None)
        every = sorted([*helpers, *rows], key=lambda row: row.stage)
        early = tuple(row for row in every if not grow or row.stage < 0)
        late = tuple(row for row in every if grow and row.stage >= 0)
        return cls(context, runs, early, late, width or max(len(context.runs.prompt(*run)) for run in runs), start)

    @cached_property
    def place(self) -> dict[tuple[int, bool], int]:
        """The row of each unpatched run."""
        return {run: index for index, run in enumerate(self.runs)}

    @cached_property
    def ordered(self) -> tuple[Row, ...]:
        """The rows behind the unpatched runs."""
        return self.early + self.late

    @cached_property
    def number(self) -> dict[Row, int]:
        """Where each row stands."""
        return {row: number for number, row in enumerate(self.ordered, start=len(self.runs))}

    @cached_property
    def patched(self) -> tuple[Row, ...]:
        """The rows that are a cell's."""
        return tuple(row for row in self.ordered if row.cell >= 0)

    @cached_property
    def prompts(self) -> list[Tokens]:
        """Token ids of the rows that run from the embedding on."""
        return [self.context.runs.prompt(*run) for run in (*self.runs, *((row.pair, False) for row in self.early))]

    def shift(self, pair: int, source: bool) -> int:
        """The column of a run's first token."""
        return self.width - len(self.context.runs.prompt(pair, source)) - self.start

    def copied(self, row: Row) -> int:
        """The row that this one is a copy of until its stage: its trunk, or the base run."""
        trunk = row.helper if row.cut >= 0 else None
        return self.place[row.pair, False] if trunk is None else self.number[trunk]


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
    batch = Batch.of(rows, context, schedule in GROW, start_column, pairs, width)
    program: Program = {
        "inputs": inputs_of(batch.prompts, batch.width, start_column, context.accepts),
        "origin": torch.tensor([batch.copied(row) for row in batch.late], dtype=torch.long),
        "stage": torch.tensor([row.stage for row in batch.late], dtype=torch.long),
        "edits": edit_table(batch),
        "values": context.values,
        "views": context.views,
        "reads": [],
        "last": None,
        "first": first_layer,
        "want_logits": context.want_logits,
    }
    program.update(scoring(batch))
    if context.runs.noise is not None:
        program["noise"] = noise_table(batch)
    cut = [row for row in batch.ordered if row.cut >= 0]
    changed = changed_reads(batch)
    if cut:
        program["edges"] = {
            "mode": "cut",
            "rows": torch.tensor([batch.number[row] for row in cut]),
            "origin": torch.tensor([batch.copied(row) for row in cut]),
            "source": torch.tensor([batch.place.get((row.pair, True), -1) for row in cut]),
            "mask": torch.stack([torch.as_tensor(context.masks[row.cut]) for row in cut]),
            "reference": context.reference,
        }
    elif changed:
        program["edges"] = {"mode": "patch", "table": torch.tensor(changed, dtype=torch.int32)}
    return Chunk(program, pairs, batch.patched)


def edit_table(batch: Batch) -> torch.Tensor:
    """The entries of all rows as the table of `interp.edits`."""
    table = []
    for row in batch.ordered:
        shift = batch.shift(row.pair, False)
        other = batch.shift(row.pair, True)
        streams = (batch.place.get((row.pair, True), -1), batch.place[row.pair, False])
        for layer, kind, op, column, from_column, part, value, origin in row.entries:
            taken = batch.number[row.helper or row] if origin == HELPER else streams[origin]
            columns = (-1, -1) if column < 0 else (column + shift, from_column + (other if origin == SOURCE else shift))
            if op != REPLACE:  # constants by position are looked up by the pair's own positions
                columns = (columns[0], column if column >= 0 else -shift)
            table.append((layer, kind, op, batch.number[row], taken, *columns, part, value))
    return torch.tensor(table, dtype=torch.int32).reshape(-1, len(FIELDS))


def changed_reads(batch: Batch) -> list[tuple[int, ...]]:
    """The changed reads of all rows, as `interp.engine.edges` has them."""
    table: list[tuple[int, ...]] = []
    for row in batch.ordered:
        streams = (batch.place[row.pair, False], batch.place.get((row.pair, True), -1))
        for sender, layer, kind, head, column in row.edges:
            at = column + batch.shift(row.pair, False) if column >= 0 else -1
            table.append((batch.number[row], *streams, sender, layer, kind, head, at))
    return table


def scoring(batch: Batch) -> Program:
    """Which rows are scored where, and what the metric is told of each."""
    runs, context = [*batch.runs, *((row.pair, False) for row in batch.patched)], batch.context
    owners = [pair for pair, _ in runs]
    numbers = [*range(len(batch.runs)), *(batch.number[row] for row in batch.patched)]
    noising, both = context.runs.noising, context.runs.source is not None
    clean, corrupted = ([batch.place.get((pair, side), -1) for pair in owners] for side in (not noising, noising))
    return {
        "scored": torch.tensor(numbers),
        "at": torch.tensor([batch.shift(*run) + context.runs.answer_at(*run) for run in runs]),
        "clean": torch.tensor(clean),
        "corrupted": torch.tensor(corrupted) if both else None,
        "answers": token_sets(context.runs.encoded.answers, owners),
        "distractors": token_sets(context.runs.encoded.distractors, owners),
    }


def noise_table(batch: Batch) -> NoiseTable:
    """Noise on the base runs, and on copies of them that start with the embedding."""
    noise = batch.context.runs.noise
    assert noise is not None
    noised = [(batch.place[run], run[0]) for run in batch.runs if not run[1]]
    noised += [(batch.number[row], row.pair) for row in batch.early]
    table = [
        (number, position + batch.shift(pair, False), seed)
        for number, pair in noised
        for position, seed in noise.at[pair]
        if position + batch.shift(pair, False) >= 0
    ]
    return {"std": noise.std, "table": torch.tensor(table).reshape(-1, 3)}


def gradient_program(program: Program, pairs: int, sites: Sequence[Place], by_edge: bool = False) -> Program:
    """A program over (base, source) rows of some pairs, made a gradient program at the base rows."""
    base = 2 * torch.arange(pairs)
    more: Program = {
        "columns": None,
        "steps": {},
        "drop": [],
        "exact_qk": False,
        "by_edge": by_edge,
        "rule": "gradient",
    }
    ends: Program = {"base": base, "source": base + 1, "gradient": base[:, None], "until": base[:, None] + 1}
    return {**program, **more, **ends, "tape": list(sites)}


def inputs_of(prompts: Sequence[Sequence[int]], width: int, start_column: int, accepts: frozenset[str]) -> Inputs:
    """Token ids `[row, position]` from a start column on, left-padded; a mask and positions only where there is padding.

    `accepts`: what the forward may and must be told besides, see `Model.accepts`.
    """
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    inputs: Inputs = {"input_ids": ids[:, start_column:]}
    if "output_router_logits" in accepts:
        inputs["output_router_logits"] = False
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
