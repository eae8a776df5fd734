"""Greedy removal: one candidate after the other, tried in batches that assume what becomes of those before.

ACDC and pruning both go this way; what is removed, and how a row is run, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: How many candidates are tried ahead of the first whose fate is not known.
MOST_AHEAD = 64


def in_turn(
    candidates: Sequence[Any],
    current: float,
    threshold: float,
    attempt: Callable[[Sequence[Any]], tuple[list[float], list[bool]]],
    stays: Any,
    most: int,
    bar: Any,
) -> Iterator[tuple[Any, float, float]]:
    """(candidate, change, metric) of each removal on top of all earlier ones; it stays where |change| ≥ threshold.

    A batch holds up to the first candidate whose fate was another than its rows assumed; those behind it are tried
    again, so what comes out is that of one at a time whatever the batch.

    Args:
        current: the metric before the first removal.
        attempt: (the metric with each candidate of a batch removed, whether it was assumed to stay); a row has those before it
            removed that were assumed to go.
        stays: by candidate, what is expected of it; filled with what was found before a candidate is given out.
        most: the largest batch; 1 tries one at a time.
        bar: counts candidates.
    """
    done, size = 0, min(8, most)
    while done < len(candidates):
        batch = candidates[done : done + size]
        values, expected = attempt(batch)
        used, before, as_expected = 0, current, True
        for candidate, value, stay in zip(batch, values, expected, strict=True):
            change = value - before
            stays[candidate] = abs(change) >= threshold  # behind a wrong guess: nearly what it will be
            before = before if stay else value
            if not as_expected:
                continue
            used += 1
            current = current if stays[candidate] else value
            as_expected = bool(stays[candidate]) == stay
            yield candidate, change, value
        size = min(most, 2 * size if used == len(batch) else max(4, 2 * used, len(batch) - used))
        done += used
        bar.update(used)
