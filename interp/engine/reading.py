"""Forward passes that read sites: the same traces as patching, without a metric; by hand for the audit, through the door
for methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..edits import FIELDS, OPS
from ..encoded import EncodedPairs
from ..metrics import Metric
from ..models.model import Model
from ..models.steady import steady
from ..pairs import PromptPairs
from ..prompts import prompts_of
from ..sites import KIND, KINDS
from ..views import Seen
from .compile import inputs_of
from .door import Work, do
from .program import Place, Program
from .schedule import rows_are_apart, token_budget
from .trace import Found, Function, execute


def entry(layer: int, kind: str, op: str, row: int, views: Sequence[str] = (), **where: int) -> tuple[int, ...]:
    """One row of the table of edits; `where` fills source, column, source_column, part, value (-1 = all or none).

    `views`: names of the views that stand behind the kinds of sites, where the program has any.
    """
    return (
        layer,
        (*KINDS, *views).index(kind),
        OPS.index(op),
        row,
        *(where.get(name, -1) for name in FIELDS[4:]),
    )


def read_program(
    model: Model,
    prompts: Sequence[Sequence[int]],
    reads: Iterable[Place] = (),
    *,
    edits: Sequence[tuple[int, ...]] = (),
    values: Mapping[Place, Tensor] | None = None,
    origin: Sequence[int] = (),
    stage: Sequence[int] = (),
    last: int | None = None,
    views: Mapping[str, Seen] | None = None,
) -> Program:
    """A program over prompts of token ids whose activations are returned; logits are those of each row's last token."""
    width = max(len(prompt) for prompt in prompts)
    rows = len(prompts) + len(origin)
    return {
        "inputs": inputs_of(prompts, width, 0, model.accepts),
        "origin": torch.tensor(list(origin), dtype=torch.long),
        "stage": torch.tensor(list(stage), dtype=torch.long),
        "edits": torch.tensor(list(edits), dtype=torch.int32).reshape(-1, len(FIELDS)),
        "values": dict(values or {}),
        "views": dict(views or {}),
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


def read(model: Model, prompts: Sequence[Sequence[int]], reads: Iterable[Place] = (), **more: Any) -> Found:
    """Run one such program here: {"reads": {(layer, kind): activation}, "logits": [row, d_vocab]}.

    Activations are `[row, position, feature]`; q, k, v, z, q_rot, k_rot and head_out `[row, position, head, feature]`;
    pattern `[row, head, query, key]`; parts of a view `[row, position, part]`. Rows are left-padded to the longest prompt.
    """
    with steady(model):
        return execute(model.nn, model.taps, [read_program(model, prompts, reads, **more)], None)[0]


@dataclass(frozen=True)
class Reading:
    """A forward pass over some prompts or pairs, given by number; `make` is the program over them, `key` the asker's own."""

    asked: tuple[int, ...]
    make: Callable[[Sequence[int]], Program]
    program: Program
    key: Any = None
    prepared: None = None
    what: str = "one prompt"

    @classmethod
    def of(cls, asked: Sequence[int], make: Callable[[Sequence[int]], Program], key: Any = None) -> Reading:
        """A reading of these prompts."""
        return cls(tuple(asked), make, make(asked), key)

    def halves(self) -> list[Reading]:
        """The same prompts in two passes; none of one prompt."""
        middle = len(self.asked) // 2
        parts = (self.asked[:middle], self.asked[middle:]) if middle else ()
        return [replace(self, asked=part, program=self.make(part)) for part in parts]

    def alone(self) -> Reading:
        """It needs no prepared run."""
        return self


def readings(
    model: Model, lengths: Sequence[int], make: Callable[[Sequence[int]], Program], max_tokens: int | None = None
) -> list[Reading]:
    """Readings of prompts of these lengths, similar ones together, as many as fit a forward pass."""
    return [Reading.of(group, make) for group in packed(lengths, max_tokens or token_budget(model))]


def run_readings(
    model: Model,
    pieces: Sequence[Reading],
    place: Callable[[Reading, Any], None],
    function: Function = execute,
    metric: Metric | None = None,
    options: tuple[str, bool | None] = ("reading", False),
) -> None:
    """Run readings through the door; `place(piece, result)` after each. `options`: what a bar says, and whether there is one."""

    def put(piece: Reading, result: Any) -> int:
        place(piece, result)
        return len(piece.asked)

    total = sum(len(piece.asked) for piece in pieces)
    do(model, Work(pieces, put, function, metric, total, "prompt", options[0]), options[1])


def contribution_program(model: Model, prompt: Sequence[int]) -> Program:
    """A program over one prompt for `engine.trace.contributions`: edges are recorded, none is cut."""
    none = torch.zeros(0, dtype=torch.long)
    edges = {"mode": "cut", "rows": none, "origin": none, "mask": torch.zeros(0, 1, 1, dtype=torch.bool)}
    program = read_program(model, [prompt])
    program["edges"] = {**edges, "reference": "zero"}
    return program


def encode_prompts(model: Model, prompts: Any) -> EncodedPairs:
    """Prompts (strings, token ids, or the clean ones of `PromptPairs`) as tokens, without a second run or answers."""
    if isinstance(prompts, PromptPairs):
        prompts = prompts.clean
    given = [prompts] if isinstance(prompts, str) else tuple(prompts_of("prompt", prompts))
    return model.encode(
        PromptPairs(given, answer_positions=-1)
    )  # no answer is read: what stands last may be a special token


def last_layer(sites: Iterable[Place], views: Mapping[str, Seen]) -> int:
    """The last layer that must run for these sites; what stands behind a block is read as the next one begins."""
    taps = [(layer, views[kind].tap if kind in views else kind) for layer, kind in sites]
    return max(max(0, layer) + max(0, KIND[kind].stage) for layer, kind in taps)


def grouped(model: Model, lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompts as `packed` puts them together; each alone where a row's numbers depend on the rows beside it."""
    return packed(lengths, budget) if rows_are_apart(model) else [[number] for number in range(len(lengths))]


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompts in groups of similar length, longest first, whose padded tokens fit the budget: indices of each group."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
