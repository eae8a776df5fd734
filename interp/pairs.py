"""Prompt pairs: clean and corrupted prompts, answers, named positions, and what they are as tokens.

Standard library, `errors` and `tokens` only: a tokenizer is any object that is called as HuggingFace's are.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from .errors import AnswerError, PairsError
from .tokens import Text, Tokens

#: One pair's positions of one name, by side ("clean", "corrupted"): a substring, or positions.
Sides = dict[str, "str | Tokens"]


@dataclass(frozen=True, init=False, repr=False)
class PromptPairs:
    """Clean and corrupted prompts, and the answers that tell their runs apart, as the user wrote them.

    Args:
        clean, corrupted: one prompt per pair, a string or a sequence of token ids; `corrupted` may be None.
        answers, distractors: per pair a string, a token id, or a sequence of those (a set of tokens).
        positions: `{name: one entry per pair}`; an entry is an int, ints, a substring of the prompt, or
            `{"clean": ..., "corrupted": ...}`; one bare int or string stands for every pair. Positions count
            from the pair's own first token, prefix included; negative ones count from the end.
        answer_positions: the position whose logits are read, per pair or one for all; by default the last.
        name: what records and plots call the set.

    Raises:
        PairsError: no pairs, different counts, an empty prompt, an entry of the wrong type.
    """

    clean: tuple[str | Tokens, ...]
    corrupted: tuple[str | Tokens, ...] | None
    answers: tuple[tuple[str | int, ...], ...] | None
    distractors: tuple[tuple[str | int, ...], ...] | None
    positions: dict[str, tuple[Sides, ...]]
    answer_positions: Tokens
    name: str

    def __init__(
        self,
        clean: Sequence[str | Sequence[int]],
        corrupted: Sequence[str | Sequence[int]] | None = None,
        answers: Sequence[Any] | None = None,
        distractors: Sequence[Any] | None = None,
        *,
        positions: Mapping[str, Any] | None = None,
        answer_positions: Sequence[int] | int | None = None,
        name: str = "",
    ) -> None:
        n = len(_listed("clean", clean))
        if n == 0:
            raise PairsError("no prompt pairs: clean is empty, shape [0]; give at least one prompt")
        parts: dict[str, Any] = {}
        for part, given, check in (
            ("clean", clean, _prompt), ("corrupted", corrupted, _prompt),
            ("answers", answers, _answer_set), ("distractors", distractors, _answer_set),
        ):  # fmt: skip
            rows = None if given is None else _listed(part, given)
            parts[part] = rows if rows is None else tuple(check(part, i, row) for i, row in enumerate(rows))
        named: dict[str, tuple[Sides, ...]] = {}
        for key, given in (positions or {}).items():
            rows = [given] * n if isinstance(given, int | str) else _listed(f"positions[{key!r}]", given)
            named[key] = tuple(_sides(key, i, row, corrupted is not None) for i, row in enumerate(rows))
        at = -1 if answer_positions is None else answer_positions
        rows = [at] * n if isinstance(at, int) else _listed("answer_positions", at)
        ats = tuple(_integer("answer_positions", i, row) for i, row in enumerate(rows))
        counts = {part: len(rows) for part, rows in parts.items() if rows is not None}
        counts |= {f"positions[{key!r}]": len(rows) for key, rows in named.items()}
        counts["answer_positions"] = len(ats)
        if set(counts.values()) != {n}:
            listing = ", ".join(f"{part} [{count}]" for part, count in counts.items())
            raise PairsError(
                f"the counts differ: {listing}; pair {min(counts.values())} is the first without one. "
                "Give every part one entry per pair"
            )
        for field, value in (parts | {"positions": named, "answer_positions": ats, "name": name}).items():
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator[PromptPairs]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        named = f", positions={list(self.positions)}" if self.positions else ""
        return f"PromptPairs({self.name or 'unnamed'}, {len(self)} pairs{named}, clean[0]={self.clean[0]!r})"

    def __getitem__(self, which: int | slice | Sequence[int] | Sequence[bool]) -> PromptPairs:
        """The chosen pairs, by number or by a mask; an index out of range, or a choice of none, is a PairsError."""
        which = which.tolist() if hasattr(which, "tolist") else which
        which = range(len(self))[which] if isinstance(which, slice) else which
        chosen = [which] if isinstance(which, int) else list(which)
        if not isinstance(which, int) and chosen and all(isinstance(i, bool) for i in chosen):
            if len(chosen) != len(self):
                raise PairsError(f"a mask of {len(chosen)} for {len(self)} pairs; give one entry for each")
            chosen = [i for i, keep in enumerate(chosen) if keep]
        for i in chosen:
            if not -len(self) <= i < len(self):
                raise PairsError(f"there is no pair {i} among {len(self)} pairs; use 0..{len(self) - 1}")
        whole: Any = (self.clean, self.corrupted, self.answers, self.distractors)
        parts = [part and [part[i] for i in chosen] for part in whole]
        named = {key: [rows[i] for i in chosen] for key, rows in self.positions.items()}
        ats = [self.answer_positions[i] for i in chosen]
        return PromptPairs(*parts, positions=named, answer_positions=ats, name=self.name)

    def __add__(self, other: PromptPairs) -> PromptPairs:
        """The pairs of both. PairsError where only one has a part, or the named positions differ."""
        parts = []
        for part in ("clean", "corrupted", "answers", "distractors"):
            mine, yours = getattr(self, part), getattr(other, part)
            if (mine is None) != (yours is None):
                raise PairsError(f"cannot join {self!r} and {other!r}: only one of them has {part}")
            parts.append(mine and mine + yours)
        if set(self.positions) != set(other.positions):
            raise PairsError(
                f"cannot join pairs whose named positions differ: {list(self.positions)} and "
                f"{list(other.positions)}; name the same positions in both"
            )
        named = {key: rows + other.positions[key] for key, rows in self.positions.items()}
        ats = self.answer_positions + other.answer_positions
        name = self.name if self.name == other.name else "+".join(filter(None, (self.name, other.name)))
        return PromptPairs(*parts, positions=named, answer_positions=ats, name=name)

    def swap(self) -> PromptPairs:
        """Clean and corrupted exchanged, answers and distractors too; PairsError if none is corrupted."""
        if self.corrupted is None:
            raise PairsError(f"{self!r} has no corrupted prompts to swap; give corrupted=[...]")
        other = {"clean": "corrupted", "corrupted": "clean"}
        sides = {key: [row.items() for row in rows] for key, rows in self.positions.items()}
        named = {key: [{other[side]: at for side, at in row} for row in rows] for key, rows in sides.items()}
        parts: Any = (self.corrupted, self.clean, self.distractors, self.answers)
        return PromptPairs(*parts, positions=named, answer_positions=self.answer_positions, name=self.name)

    def encode(self, tokenizer: Any, prefix_ids: Sequence[int] = (), vocab_size: int | None = None) -> EncodedPairs:
        """Tokens of every prompt and answer, and every position as an index from the pair's first token.

        Strings become tokens as `tokenizer` makes them by default; `prefix_ids` go before those that do not
        already begin with them. Token ids are taken as they are. `tokenizer` may be None if all are ids.

        Raises:
            PairsError: an id outside `0..vocab_size - 1`, a position out of range, a substring not found or
                found twice, a prompt without tokens.
            AnswerError: an answer or distractor string that is not exactly one token.
        """
        text = Text(tokenizer, tuple(prefix_ids), vocab_size)
        prompts = {"clean": self.clean} | ({} if self.corrupted is None else {"corrupted": self.corrupted})
        ids = {s: tuple(text.prompt(s, i, prompt) for i, prompt in enumerate(prompts[s])) for s in prompts}
        labels = {side: tuple(tuple(map(text.label, row)) for row in ids[side]) for side in ids}

        def resolve(what: str, i: int, side: str, at: str | Tokens) -> Tokens:
            if side not in ids:
                return ()
            if isinstance(at, str):
                return text.locate(what, i, side, prompts[side][i], ids[side][i], at)
            return text.index(what, i, side, ids[side][i], at)

        named = {
            key: tuple(
                (resolve(f"positions[{key!r}]", i, "clean", row["clean"]),
                 resolve(f"positions[{key!r}]", i, "corrupted", row.get("corrupted", ())))
                for i, row in enumerate(rows)
            )
            for key, rows in self.positions.items()
        }  # fmt: skip
        ats = [(i, (at,)) for i, at in enumerate(self.answer_positions)]
        ends = {side: [resolve("answer_positions", i, side, at)[0] for i, at in ats] for side in ids}
        sets: dict[str, tuple[Tokens, ...] | None] = {
            part: None if entries is None else tuple(text.answer_set(part, i, e) for i, e in enumerate(entries))
            for part, entries in (("answers", self.answers), ("distractors", self.distractors))
        }
        return EncodedPairs(
            ids["clean"], ids.get("corrupted"), sets["answers"], sets["distractors"],
            labels["clean"], labels.get("corrupted", ()), named,
            tuple(ends["clean"]), tuple(ends.get("corrupted", ())),
        )  # fmt: skip


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


def _listed(part: str, given: Any) -> Any:
    if isinstance(given, str) or not hasattr(given, "__len__"):
        raise PairsError(f"{part} needs a list with one entry per pair, but is {given!r}; write [{given!r}]")
    return given


def _integer(part: str, i: int, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise PairsError(f"{part} of pair {i} holds {value!r}: neither text nor a whole number") from None


def _ints(part: str, i: int, values: Any) -> Tokens:
    values = values.tolist() if hasattr(values, "tolist") else values  # a tensor or an array
    values = values if isinstance(values, Sequence) else [values]
    if not values:
        raise PairsError(f"{part} of pair {i} is empty, shape [0]; give at least one entry")
    return tuple(_integer(part, i, value) for value in values)


def _prompt(part: str, i: int, prompt: Any) -> str | Tokens:
    if isinstance(prompt, int):
        raise PairsError(f"{part} of pair {i} is the one id {prompt}; a prompt is a string or a list of ids")
    return prompt if isinstance(prompt, str) and prompt else _ints(part, i, prompt)


def _answer_set(part: str, i: int, entry: Any) -> tuple[str | int, ...]:
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    entry = sorted(entry, key=str) if isinstance(entry, Set) else entry  # in the same order in every process
    entries = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
    if not entries:
        raise AnswerError(f"{part} of pair {i} is an empty set, shape [0]; give at least one token")
    return tuple(e if isinstance(e, str) else _integer(part, i, e) for e in entries)


def _sides(key: str, i: int, entry: Any, has_corrupted: bool) -> Sides:
    needed = ("clean", "corrupted") if has_corrupted else ("clean",)
    entry = entry if isinstance(entry, Mapping) else dict.fromkeys(needed, entry)
    if not set(needed) <= set(entry) <= {"clean", "corrupted"}:
        raise PairsError(f"positions[{key!r}] of pair {i} has the sides {list(entry)}; give {list(needed)}")
    return {s: at if isinstance(at := entry[s], str) else _ints(f"positions[{key!r}]", i, at) for s in needed}
