"""A small sweep that the tests of checkpoints break off, and what they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import interp
from interp import Effects, PromptPairs
from tests.families import loaded, words

PLAN = interp.grid(["resid_pre", "attn_out", "mlp_out"])


def pairs_of(n: int, length: int = 8) -> PromptPairs:
    """Pairs of equal length that differ at one position each."""
    clean = words(*[length] * n)
    corrupted = [list(prompt) for prompt in clean]
    for number, prompt in enumerate(corrupted):
        prompt[number % 3] = words(1, seed=number + 1)[0][0]
    return PromptPairs(clean, corrupted, [20 + n % 9 for n in range(n)], [41 + n % 9 for n in range(n)])


PAIRS = pairs_of(2)


def run(path: Any, **changes: Any) -> Effects:
    """The sweep of most tests here: some dozen chunks."""
    options = {"model": loaded("gpt2"), "pairs": PAIRS, "plan": PLAN, "max_tokens": 48, **changes}
    return interp.patch(**options, checkpoint=path)


def same(one: Effects, other: Effects) -> bool:
    """Whether two records hold the same bits."""
    parts = ((getattr(one, name), getattr(other, name)) for name in ("values", "clean", "corrupted"))
    return all(np.array_equal(a, b, equal_nan=True) and a.dims == b.dims for a, b in parts)


def chunks_in(path: Path) -> int:
    """How many whole records a file holds, by its markers."""
    return path.read_bytes().count(b"done")
