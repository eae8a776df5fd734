"""Making tokens one after another inside a request: what each forward pass is given, and what comes of it.

With a cache every pass but the first runs one token of each row, over the keys and values of those before it; without one all
tokens are run again. Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..edits import FIELDS

if TYPE_CHECKING:
    from .program import Program

COLUMN = FIELDS.index("column")


def over(table: Tensor, start: int, end: int) -> Tensor:
    """A table of edits whose rows for every column are now for each of these alone."""
    everywhere = table[:, COLUMN] < 0
    rows = table[everywhere].repeat_interleave(max(0, end - start), dim=0)
    rows[:, COLUMN] = torch.arange(start, end, dtype=table.dtype).repeat(int(everywhere.sum()))
    return torch.cat([table[~everywhere], rows])


class Generating:
    """Rows of tokens that grow, greedily. A program's `generation`: `steps`, `end` (tokens that end a row), `later` (the table of
    edits at tokens that are made), `cache` (the class of an empty cache, or None), `keep` (whether logits come back)."""

    def __init__(self, program: Program) -> None:
        self.program, self.spec = program, program["generation"]
        self.inputs = program["inputs"]
        self.ids: Tensor = self.inputs["input_ids"]
        self.width = self.ids.shape[1]
        self.cache: Any = self.spec["cache"]() if self.spec["cache"] is not None else None
        self.finished = torch.zeros(len(self.ids), dtype=torch.bool)
        self.kept: list[Tensor] = []

    @property
    def goes_on(self) -> bool:
        """Whether another token is to be made."""
        return self.ids.shape[1] - self.width < self.spec["steps"] and not bool(self.finished.all())

    def step(self) -> Program:
        """The program of the next forward pass."""
        length = self.ids.shape[1]
        later = length > self.width
        first = length - 1 if later and self.cache is not None else 0
        inputs = {**self.inputs, "input_ids": self.ids[:, first:]}
        mask = self.inputs.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), length - self.width)], dim=1)
            inputs["attention_mask"] = mask
            if "position_ids" in inputs:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, first:]
        edits = self.program["edits"]
        if first:
            edits = self.spec["later"]
        elif later:
            edits = torch.cat([over(edits, 0, self.width), over(self.spec["later"], self.width, length)])
        at = torch.full((len(self.ids),), length - first - 1)
        return {**self.program, "inputs": inputs, "edits": edits, "at": at}

    def take(self, logits: Tensor) -> None:
        """The next token of every row, from its logits `[row, d_vocab]`."""
        logits = logits.float().cpu()
        if self.spec["keep"]:
            self.kept.append(logits)
        chosen = logits.argmax(-1)
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
        self.finished |= torch.isin(chosen, torch.tensor(self.spec["end"], dtype=chosen.dtype))

    def result(self) -> dict[str, Any]:
        """{"tokens": [row, step], "logits": [row, step, d_vocab] or None}."""
        logits = torch.stack(self.kept, dim=1) if self.kept else None
        return {"tokens": self.ids[:, self.width :], "logits": logits}
