"""Greedy removal: one candidate after the other, tried in batches that assume what becomes of those before.

ACDC and pruning both go this way; what is removed, and how a row is run, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..engine.checkpoint import Checkpoint, read_identity
from ..engine.context import Experiment, context_of
from ..engine.identity import identify, text_digest
from ..engine.schedule import token_budget
from ..models.model import Model
from ..options import Options

#: How many candidates are tried ahead of the first whose fate is not known.
MOST_AHEAD = 64


#: A node, or an edge (sender, receiver) by number; and what is expected of each: a mapping, or an array.
Candidate = Any
Stays = Any


class Log:
    """The metric after each removal, in order: of an earlier run first, then of this one."""

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self._known = iter(checkpoint.finished if checkpoint else ())

    def next(self) -> float | None:
        """The next one that is known, or None."""
        logged = next(self._known, None)
        return None if logged is None else float(logged[0])

    def add(self, value: float) -> None:
        """Keep one more. CheckpointError: it cannot be written."""
        if self.checkpoint is not None:
            self.checkpoint.add(np.array([value], dtype=np.float32))


def settled(options: Options, model: Model) -> Options:
    """The options of a search with its tokens of a forward pass: as asked, as in the checkpoint that is continued, or as the
    device takes now."""
    begun = read_identity(options.checkpoint)
    return replace(options, max_tokens=int(options.max_tokens or begun.get("budget") or token_budget(model)))


@contextmanager
def kept_log(asked: Experiment, options: Options, most: int) -> Iterator[Log]:
    """A log in a file, of at most so many removals; without a path, one that is forgotten.

    Args:
        asked: its one cell has the edits or cut edges that removals are made of; with its details it tells one run from another.

    Raises:
        CheckpointError: the file is of another run (it names what differs), or cannot be written.
    """
    if options.checkpoint is None:
        yield Log()
        return
    context = context_of(asked.model, asked.runs, asked.resolved, "growing")
    identity = identify(asked, context, "growing", options.max_tokens or 0)
    digest = text_digest(repr(sorted(identity.items())))
    with Checkpoint(options.checkpoint, identity, digest, [1] * most) as checkpoint:
        yield Log(checkpoint)


@dataclass
class Search:
    """Greedy removal of candidates, one after the other: what is known of them, and how they are tried.

    Attributes:
        attempt: (the metric with each candidate of a batch removed, whether it was assumed to stay); a row has those before it
            removed that were assumed to go.
        stays: by candidate, what is expected of it; filled with what was found before a candidate is given out.
        threshold: a candidate stays where |change| is no less.
        most: the largest batch; 1 tries one at a time.
        bar: counts candidates. log: what is known from an earlier run.
    """

    attempt: Callable[[Sequence[Candidate]], tuple[list[float], list[bool]]]
    stays: Stays
    threshold: float
    most: int
    bar: tqdm
    log: Log

    def in_turn(self, candidates: Sequence[Candidate], current: float) -> Iterator[tuple[Candidate, float, float]]:
        """(candidate, change, metric) of each removal on top of all earlier ones; `current` is the metric before the first.

        A row of a batch has those before it removed that are expected to go. Behind the first of them whose fate was another,
        rows have answered a question that is not asked: they are thrown away and tried again. So what comes out is that of
        one at a time, whatever the batch.
        """
        done, size = 0, min(8, self.most)
        while done < len(candidates) and (known := self.log.next()) is not None:
            candidate, change = candidates[done], known - current
            self.stays[candidate] = abs(change) >= self.threshold
            current = current if self.stays[candidate] else known
            done += 1
            self.bar.update(1)
            yield candidate, change, known
        while done < len(candidates):
            batch = candidates[done : done + size]
            values, expected = self.attempt(batch)
            used, before, as_expected = 0, current, True
            for candidate, value, stay in zip(batch, values, expected, strict=True):
                change = value - before
                # also behind a wrong guess, where it is nearly what it will be: the next batch expects it
                self.stays[candidate] = abs(change) >= self.threshold
                before = before if stay else value
                if not as_expected:
                    continue
                used += 1
                current = current if self.stays[candidate] else value
                as_expected = bool(self.stays[candidate]) == stay
                self.log.add(value)
                yield candidate, change, value
            # grow while guesses hold; else about as many as were right, or as are left to try again
            size = min(self.most, 2 * size if used == len(batch) else max(4, 2 * used, len(batch) - used))
            done += used
            self.bar.update(used)
