"""One forward pass that reads (and, for the audit, edits) sites by hand: the same traces as patching, no metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..edits import FIELDS, OPS
from ..models.model import Model
from ..models.steady import steady
from ..pairs import EncodedPairs, PromptPairs
from ..prompts import prompts_of
from ..sites import TABLE_KINDS
from .compile import inputs_of
from .trace import execute


def entry(layer: int, kind: str, op: str, row: int, **where: int) -> tuple[int, ...]:
    """One row of the table of edits; `where` fills source, column, source_column, head, unit, value (-1 = all or none)."""
    return (layer, TABLE_KINDS.index(kind), OPS.index(op), row, *(where.get(name, -1) for name in FIELDS[4:]))


def read_program(
    model: Model,
    prompts: Sequence[Sequence[int]],
    reads: Iterable[tuple[int, str]] = (),
    *,
    edits: Sequence[tuple[int, ...]] = (),
    values: Mapping[tuple[int, str], Tensor] | None = None,
    origin: Sequence[int] = (),
    stage: Sequence[int] = (),
    last: int | None = None,
) -> dict[str, Any]:
    """A program over prompts of token ids whose activations are returned; logits are those of each row's last token."""
    width = max(len(prompt) for prompt in prompts)
    rows = len(prompts) + len(origin)
    return {
        "inputs": inputs_of(prompts, width, 0, model.accepts),
        "origin": torch.tensor(list(origin), dtype=torch.long),
        "stage": torch.tensor(list(stage), dtype=torch.long),
        "edits": torch.tensor(list(edits), dtype=torch.int32).reshape(-1, len(FIELDS)),
        "values": dict(values or {}),
        "reads": list(reads),
        "last": last,
        "first": 0,
        "want_logits": True,
        "scored": torch.arange(rows),
        "at": torch.full((rows,), width - 1),
        "clean": None,
        "corrupted": None,
        "answers": None,
        "distractors": None,
    }


def read(model: Model, prompts: Sequence[Sequence[int]], reads: Iterable[tuple[int, str]] = (), **more: Any) -> dict:
    """Run one such program here: {"reads": {(layer, kind): activation}, "logits": [row, d_vocab]}.

    Activations are `[row, position, feature]`; q, k, v, z, q_rot, k_rot and head_out `[row, position, head, feature]`;
    pattern `[row, head, query, key]`. Rows are left-padded to the longest prompt.
    """
    with steady(model):
        return execute(model.nn, model.taps, [read_program(model, prompts, reads, **more)], None)[0]


def contribution_program(model: Model, prompt: Sequence[int]) -> dict[str, Any]:
    """A program over one prompt for `engine.trace.contributions`: edges are recorded, none is cut."""
    none = torch.zeros(0, dtype=torch.long)
    edges = {"mode": "cut", "rows": none, "origin": none, "mask": torch.zeros(0, 1, 1, dtype=torch.bool)}
    return {**read_program(model, [prompt]), "edges": {**edges, "reference": "zero"}}


def encode_prompts(model: Model, prompts: Any) -> EncodedPairs:
    """Prompts (strings, token ids, or the clean ones of `PromptPairs`) as tokens, without a second run or answers."""
    if isinstance(prompts, PromptPairs):
        prompts = prompts.clean
    given = [prompts] if isinstance(prompts, str) else tuple(prompts_of("prompt", prompts))
    return model.encode(
        PromptPairs(given, answer_positions=-1)
    )  # no answer is read: what stands last may be a special token


def last_layer(model: Model, sites: Iterable[tuple[int, str]]) -> int:
    """The last layer that must run for these sites; what stands behind a block is read as the next one begins."""
    return max(max(0, layer) + (kind == "resid_post") for layer, kind in sites)


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompts in groups of similar length, longest first, whose padded tokens fit the budget: indices of each group."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
