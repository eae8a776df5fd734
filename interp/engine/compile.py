"""Compiling: rows on pairs become the program of one forward pass, plain tensors that can travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..edits import FIELDS
from .rows import BASE, HELPER, REPLACE, SOURCE, Context, Row


@dataclass(frozen=True)
class Chunk:
    """One forward pass: the program that is shipped, and which (cell, pair) each patched row belongs to."""

    program: dict[str, Any]
    pairs: tuple[int, ...]
    rows: tuple[Row, ...]


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
    copied = {  # the row that each is a copy of until its stage
        row: number_of[row.helper] if row.cut and row.helper is not None else place[row.pair, False] for row in ordered
    }
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
        "origin": torch.tensor([copied[row] for row in late], dtype=torch.long),
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
            "origin": torch.tensor([copied[row] for row in cut]),
            "source": torch.tensor([place.get((row.pair, True), -1) for row in cut]),
            "mask": torch.stack([torch.as_tensor(context.cuts[row.cell]) for row in cut]),
            "reference": context.reference,
        }
    elif changed:
        program["edges"] = {"mode": "patch", "table": torch.tensor(changed, dtype=torch.int32)}
    return Chunk(program, pairs, tuple(patched))


def gradient_program(program: dict[str, Any], pairs: int, sites: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """A program over (base, source) rows of some pairs, made a gradient program at the base rows."""
    base = 2 * torch.arange(pairs)
    more: dict[str, Any] = {"columns": None, "steps": {}, "drop": [], "exact_qk": False}
    return {**program, **more, "tape": list(sites), "base": base, "from": base + 1, "gradient": base[:, None]}


def inputs_of(
    prompts: Sequence[Sequence[int]], width: int, start_column: int, accepts: frozenset[str]
) -> dict[str, Any]:
    """Token ids `[row, position]` from a start column on, left-padded; a mask and positions only where there is padding.

    `accepts`: what the forward may and must be told besides, see `Model.accepts`.
    """
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    inputs: dict[str, Any] = {"input_ids": ids[:, start_column:]}
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
