"""Whether two runs are told apart by more than rounding: without that nothing can be measured on the way from one to the other.

Numpy only.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

#: What counts as rounding of a run in each float type, as a part of the number; `REST` in every other, and where none is known.
ROUNDING, REST = {"float16": 1e-2, "bfloat16": 6e-2}, 1e-5
NAMED = 5  # pairs that a warning names


def rounding_of(dtype: object) -> float:
    """What counts as rounding of a run in a float type (numpy's, torch's or its name), as a part of the number."""
    return ROUNDING.get(str(dtype).removeprefix("torch."), REST)


def same_runs(base: np.ndarray, source: np.ndarray, provenance: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs `[pair]` have two runs that differ by rounding only, and what was allowed.

    Allowed is the rounding of the run's float type, and of the metric where that is known (`metric_rounding`). Where the record
    says that the two prompts of a pair are the same, whatever lies between their runs is rounding.
    """
    floor = float(provenance.get("metric_rounding") or 0.0)
    allowed = np.maximum(rounding_of(provenance.get("dtype")) * np.maximum(np.abs(base), np.abs(source)), floor)
    same = np.abs(source - base) <= allowed
    prompts = provenance.get("prompts") or {}
    sides = [prompts.get(side) or () for side in ("clean", "corrupted")]
    if [*map(len, sides)] == [len(same)] * 2:
        same |= np.array([clean == corrupted for clean, corrupted in zip(*sides, strict=True)])
    return same, allowed


def warn_of_same(base: np.ndarray, source: np.ndarray, same: np.ndarray, allowed: np.ndarray, stacklevel: int) -> None:
    """Warn once of the pairs that have nothing between their two runs, with the numbers."""
    pairs = np.flatnonzero(same).tolist()
    if not pairs:
        return
    said = ", ".join(
        f"pair {i} (base {base[i]:.9g}, source {source[i]:.9g}, allowed {allowed[i]:.2g})" for i in pairs[:NAMED]
    )
    said += f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    warnings.warn(
        f"normalized is NaN for {len(pairs)} of {len(same)} pairs, whose two runs differ by rounding only: {said}; do their "
        "prompts differ before the answer is read?",
        stacklevel=stacklevel + 1,
    )
