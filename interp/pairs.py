"""Prompt pairs: clean and corrupted prompts, answers, named positions, as the user wrote them.

Standard library and rooms above only: a tokenizer is any object that is called as HuggingFace's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .encoded import EncodedPairs
from .errors import AnswerError, PairsError
from .markup import table
from .prompts import Sides, answer_set, integer, listed, one_prompt, prompts_of, sides
from .tokens import Text, Tokenizer, Tokens


@dataclass(frozen=True, init=False, repr=False)
class PromptPairs:
    """Clean and corrupted prompts, and the answers that tell their runs apart, as the user wrote them.

    Args:
        clean, corrupted: one prompt per pair, a string or token ids, in any form of `prompts_of`; `corrupted` may be None.
        answers, distractors: per pair a string, a token id, or a sequence of those (a set of tokens).
        positions: `{name: one entry per pair}`; an entry is an int, ints, a substring of the prompt, or
            `{"clean": ..., "corrupted": ...}`; one bare int or string stands for every pair. Positions count
            from the pair's own first token, prefix included; negative ones count from the end.
        answer_positions: the position whose logits are read, per pair or one for all; None, the default, is the last.
        name: what records and plots call the set.

    Raises:
        PairsError: no pairs, different counts, an empty prompt, an entry of the wrong type.

    Examples:
        >>> pairs = interp.PromptPairs(
        ...     ["The Eiffel Tower is in the city of"], ["The Colosseum is in the city of"], [" Paris"], [" Rome"],
        ...     positions={"end": -1},
        ... )
        >>> effects = interp.patch(model, pairs, interp.grid("resid_post", layers=[29], positions=["end"]))
        >>> effects.normalized.values.round(1).ravel()  # the logits are read from there
        array([1.], dtype=float32)
    """

    clean: tuple[str | Tokens, ...]
    corrupted: tuple[str | Tokens, ...] | None
    answers: tuple[tuple[str | int, ...], ...] | None
    distractors: tuple[tuple[str | int, ...], ...] | None
    positions: dict[str, tuple[Sides, ...]]
    answer_positions: tuple[int | None, ...]
    name: str

    def __init__(
        self,
        clean: Sequence[str | Sequence[int]],
        corrupted: Sequence[str | Sequence[int]] | None = None,
        answers: Sequence[Any] | None = None,
        distractors: Sequence[Any] | None = None,
        *,
        positions: Mapping[str, Any] | None = None,
        answer_positions: Sequence[int | None] | int | None = None,
        name: str = "",
    ) -> None:
        parts: dict[str, Any] = {}
        for part, given in (("clean", clean), ("corrupted", corrupted)):
            parts[part] = None if part == "corrupted" and given is None else tuple(prompts_of(f"{part} of pair", given))
            for i, prompt in enumerate(parts[part] or ()):
                if not prompt:
                    raise PairsError(f"{part} of pair {i} is empty, shape [0]; give a prompt")
        if not (n := len(parts["clean"])):
            raise PairsError("no prompt pairs: clean is empty, shape [0]; give at least one prompt")
        for part, given in (("answers", answers), ("distractors", distractors)):
            rows = None if given is None else listed(part, given)
            parts[part] = rows if rows is None else tuple(answer_set(part, i, row) for i, row in enumerate(rows))
        named: dict[str, tuple[Sides, ...]] = {}
        for key, given in (positions or {}).items():
            rows = [given] * n if isinstance(given, int | str) else listed(f"positions[{key!r}]", given)
            named[key] = tuple(sides(key, i, row, corrupted is not None) for i, row in enumerate(rows))
        at = answer_positions
        rows = [at] * n if at is None or isinstance(at, int) else listed("answer_positions", at)
        ats = tuple(
            None if row is None else integer(f"answer_positions of pair {i}", row) for i, row in enumerate(rows)
        )
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

    @classmethod
    def one(cls, prompts: Mapping[str, Any], answer_tokens: Any) -> PromptPairs:
        """One pair of a clean and perhaps a corrupted prompt, by the names that messages give them, and [right, wrong].

        Raises:
            PairsError: several prompts in place of one. AnswerError: not one or two answers.
        """
        given = answer_tokens.tolist() if hasattr(answer_tokens, "tolist") else answer_tokens
        if isinstance(given, str) or not isinstance(given, Sequence) or not 1 <= len(given) <= 2:
            raise AnswerError(f"answer_tokens={answer_tokens!r}; give [right, wrong], each a string or a token id")
        clean, *corrupted = [one_prompt(name, prompt) for name, prompt in prompts.items()]
        right, *wrong = given
        return cls([clean], corrupted or None, [right], wrong or None)

    def __len__(self) -> int:
        return len(self.clean)

    def __iter__(self) -> Iterator[PromptPairs]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        named = f", positions={list(self.positions)}" if self.positions else ""
        return f"PromptPairs({self.name or 'unnamed'}, {len(self)} pairs{named}, clean[0]={self.clean[0]!r})"

    def _repr_html_(self) -> str:
        parts = {
            "clean": self.clean,
            "corrupted": self.corrupted,
            "answers": self.answers,
            "distractors": self.distractors,
        }
        given = {name: part for name, part in parts.items() if part is not None}
        rows = [[str(part[pair]) for part in given.values()] for pair in range(min(len(self), 10))]
        return table(
            list(given), rows, f"{self.name or 'prompt pairs'}: {len(self)}" + ", the first 10" * (len(self) > 10)
        )

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
        named = {
            key: [{other[side]: at for side, at in row.items()} for row in rows] for key, rows in self.positions.items()
        }
        parts: Any = (self.corrupted, self.clean, self.distractors, self.answers)
        return PromptPairs(*parts, positions=named, answer_positions=self.answer_positions, name=self.name)

    def alone(self) -> PromptPairs:
        """The clean prompts alone, with their answers and named positions."""
        named = {name: [{"clean": row["clean"]} for row in rows] for name, rows in self.positions.items()}
        sets = (self.answers, self.distractors)
        return PromptPairs(
            self.clean, None, *sets, positions=named, answer_positions=self.answer_positions, name=self.name
        )

    def encode(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int] = (), vocab_size: int | None = None
    ) -> EncodedPairs:
        """Tokens of every prompt and answer, and every position as an index from the pair's first token.

        Strings become tokens as `tokenizer` makes them by default; `prefix_ids` go before those that do not
        already begin with them. Token ids are taken as they are. `tokenizer` may be None if all are ids.

        Raises:
            PairsError: an id outside `0..vocab_size - 1`, a position out of range, a substring not found or
                found twice, a prompt without tokens, or one behind whose text the tokenizer puts more, where no
                answer position is given.
            AnswerError: an answer or distractor string that is not exactly one token, or one that is both.

        Warns:
            UserWarning: prompts of ids that begin or end with the padding token.
        """
        text = Text(tokenizer, tuple(prefix_ids), vocab_size)
        prompts = {"clean": self.clean} | ({} if self.corrupted is None else {"corrupted": self.corrupted})
        ids = {s: tuple(text.prompt(s, i, prompt) for i, prompt in enumerate(prompts[s])) for s in prompts}
        text.warn_of_padding(
            [f"{s} of pair {i}" for s in ids for i, p in enumerate(prompts[s]) if text.looks_padded(p)]
        )
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
        for i, at in enumerate(self.answer_positions):
            for side in ids if at is None else ():
                text.check_end(side, i, prompts[side][i], ids[side][i])
        ats = [(i, (-1 if at is None else at,)) for i, at in enumerate(self.answer_positions)]
        ends = {side: [resolve("answer_positions", i, side, at)[0] for i, at in ats] for side in ids}
        sets: dict[str, tuple[Tokens, ...] | None] = {
            part: None if entries is None else tuple(text.answer_set(part, i, e) for i, e in enumerate(entries))
            for part, entries in (("answers", self.answers), ("distractors", self.distractors))
        }
        for i, (right, wrong) in enumerate(zip(sets["answers"] or (), sets["distractors"] or (), strict=False)):
            if both := [token for token in right if token in wrong]:
                raise AnswerError(
                    f"answers and distractors of pair {i} share {[text.label(token) for token in both]} (ids {both}): what "
                    "counts for both counts for nothing; give other tokens"
                )
        return EncodedPairs(
            ids["clean"], ids.get("corrupted"), sets["answers"], sets["distractors"],
            labels["clean"], labels.get("corrupted", ()), named,
            tuple(ends["clean"]), tuple(ends.get("corrupted", ())),
        )  # fmt: skip
