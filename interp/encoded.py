"""Prompt pairs as tokens: what the engine runs, and what a method may ask of them before it does.

Standard library, `errors` and `tokens` only.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import zip_longest

from .errors import CircuitError, PairsError
from .tokens import Tokens


@dataclass(frozen=True, repr=False)
class EncodedPairs:
    """Prompt pairs as tokens, checked: what the engine runs.

    `clean`, `corrupted` (or None): ids [pair][position]. `answers`, `distractors` (or None): a non-empty set
    of ids per pair. `labels`: each token's text, `<id>` where the tokenizer knows none. `positions`: name ->
    per pair (clean positions, corrupted positions). All positions are ≥ 0 and count from the pair's own
    first token. Parts of the corrupted run are empty where there is none.
    """

    clean: tuple[Tokens, ...]
    corrupted: tuple[Tokens, ...] | None
    answers: tuple[Tokens, ...] | None
    distractors: tuple[Tokens, ...] | None
    labels: tuple[tuple[str, ...], ...]
    corrupted_labels: tuple[tuple[str, ...], ...]
    positions: dict[str, tuple[tuple[Tokens, Tokens], ...]]
    answer_positions: Tokens
    answer_positions_corrupted: Tokens

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        span = f"{min(map(len, self.clean))}..{max(map(len, self.clean))}"
        return f"EncodedPairs({len(self)} pairs, {span} tokens, {'' if self.aligned else 'not '}aligned)"

    def beside(self, others: Sequence[Tokens], labels: Sequence[tuple[str, ...]]) -> EncodedPairs:
        """The clean runs with these prompts of the same lengths as the second ones, positions as in the clean ones."""
        named = {name: tuple((clean, clean) for clean, _ in rows) for name, rows in self.positions.items()}
        return replace(
            self,
            corrupted=tuple(others),
            corrupted_labels=tuple(labels),
            positions=named,
            answer_positions_corrupted=self.answer_positions,
        )

    @property
    def aligned(self) -> bool:
        """Whether clean and corrupted have equal length in every pair (so too where none is corrupted)."""
        return [*map(len, self.clean)] == [*map(len, self.corrupted or self.clean)]

    @cached_property
    def first_difference(self) -> Tokens:
        """Per pair the first position at which the prompts differ: the shorter length if they never do.

        0 where there is no corrupted prompt: nothing is then known to be unchanged.
        """
        if self.corrupted is None:
            return (0,) * len(self)
        return tuple(
            next((p for p, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            for a, b in zip(self.clean, self.corrupted, strict=True)
        )

    @cached_property
    def unchanged(self) -> Tokens:
        """The pairs whose two prompts are the same up to where the answer is read: in them nothing is corrupted."""
        ends = zip(self.answer_positions, self.answer_positions_corrupted, strict=False)
        sides = zip(self.clean, self.corrupted or (), ends, strict=False)
        return tuple(i for i, (a, b, (at, other)) in enumerate(sides) if a[: at + 1] == b[: other + 1])

    def require_corrupted(self, what: str, error: type[PairsError | CircuitError] = PairsError) -> None:
        """Refuse `what`, which needs two different runs, where no pair has them; warn where some have not.

        Raises:
            `error`: the prompts are the same in every pair. Warns: UserWarning, naming the pairs in which they are.
        """
        same = self.unchanged
        if not same:
            return
        where = (
            "" if all(self.clean[i] == (self.corrupted or ())[i] for i in same) else " up to where the answer is read"
        )
        if len(same) == len(self):
            raise error(
                f"clean and corrupted prompts are the same in every pair{where}: nothing is corrupted, so {what} has "
                "nothing to find; give corrupted prompts that differ"
            )
        named = ", ".join(map(str, same[:8])) + (f" and {len(same) - 8} more" if len(same) > 8 else "")
        warnings.warn(
            f"clean and corrupted prompts are the same{where} in pair{'s' * (len(same) > 1)} {named}: nothing is "
            f"corrupted there, and {what} counts them as no effect",
            stacklevel=4,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of every field: equal for equal pairs, in any process."""
        return hashlib.sha256(json.dumps(astuple(self), sort_keys=True).encode()).hexdigest()

    def require_aligned(self, what: str) -> None:
        """Refuse `what`, which goes position by position, for pairs of unequal length.

        Raises:
            PairsError: it shows the two token lists of the first offending pair side by side.
        """
        if self.aligned:
            return
        pairs = zip(self.labels, self.corrupted_labels, strict=True)
        i, (left, right) = next((i, pair) for i, pair in enumerate(pairs) if len(pair[0]) != len(pair[1]))
        width = max(len("clean"), *(len(repr(label)) for label in left))
        lines = [f"{'':7}  {'clean':{width}}  corrupted"]
        for p, (a, b) in enumerate(zip_longest(map(repr, left), map(repr, right), fillvalue="-")):
            lines.append(f"{' ' if a == b else '*'} {p:5}  {a:{width}}  {b}")
        counts = f"{len(left)} clean and {len(right)} corrupted tokens"
        problem = f"{what} goes position by position, but pair {i} has {counts}:"
        remedy = 'Use prompts of equal token length, or named positions: positions={"subject": [...]}.'
        raise PairsError("\n".join((problem, *lines, remedy)))
