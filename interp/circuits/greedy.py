"""Greedy removal: one candidate after the other, tried in batches that assume what becomes of those before.

ACDC and pruning both go this way; what is removed, and how a row is run, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..cells import Cell, Resolved
from ..engine.checkpoint import Checkpoint, read_identity
from ..engine.identity import identify, text_digest
from ..engine.run import context_of
from ..engine.schedule import token_budget
from ..metrics import Metric
from ..models.model import Model
from ..pairs import PromptPairs

#: How many candidates are tried ahead of the first whose fate is not known.
MOST_AHEAD = 64


class Log:
    """The metric after each removal, in order: of an earlier run first, then of this one."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self._known = iter(checkpoint.finished if checkpoint else ())

    def next(self) -> float | None:
        """The next one that is known, or None."""
        found = next(self._known, None)
        return None if found is None else float(found[0])

    def add(self, value: float) -> None:
        """Keep one more. CheckpointError: it cannot be written."""
        if self.checkpoint is not None:
            self.checkpoint.add(np.array([value], dtype=np.float32))


def budget_of(path: Any, model: Model, max_tokens: int | None) -> int:
    """Tokens of a forward pass: as asked, as in the checkpoint that is continued, or as the device takes now."""
    begun = {} if path is None else read_identity(path)
    return int(max_tokens or begun.get("budget") or token_budget(model))


@contextmanager
def kept_log(
    path: Any,
    model: Model,
    pairs: PromptPairs,
    metric: Metric,
    method: str,
    spec: Mapping[str, Any],
    cell: Cell,
    most: int,
    budget: int,
) -> Iterator[Log]:
    """A log in a file, of at most so many removals; without a path, one that is forgotten.

    Args:
        cell: the edits or cut edges that removals are made of; with `spec` it tells one run from another.

    Raises:
        CheckpointError: the file is of another run (it names what differs), or cannot be written.
    """
    if path is None:
        yield Log()
        return
    resolved = Resolved((), (cell,), {})
    context = context_of(model, model.encode(pairs), "noising", resolved, "growing")
    identity = identify(model, context, resolved, metric, method, "growing", budget, spec)
    with Checkpoint(path, identity, text_digest(repr(sorted(identity.items()))), [1] * most) as checkpoint:
        yield Log(checkpoint)


def in_turn(
    candidates: Sequence[Any],
    current: float,
    threshold: float,
    attempt: Callable[[Sequence[Any]], tuple[list[float], list[bool]]],
    stays: Any,
    most: int,
    bar: Any,
    log: Log,
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
        log: what is known from an earlier run comes first, without an attempt; what is found is added.
    """
    done, size = 0, min(8, most)
    while done < len(candidates) and (known := log.next()) is not None:
        candidate, change = candidates[done], known - current
        stays[candidate] = abs(change) >= threshold
        current = current if stays[candidate] else known
        done += 1
        bar.update(1)
        yield candidate, change, known
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
            log.add(value)
            yield candidate, change, value
        size = min(most, 2 * size if used == len(batch) else max(4, 2 * used, len(batch) - used))
        done += used
        bar.update(used)
