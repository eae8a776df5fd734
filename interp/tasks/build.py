"""What every task shares: data files, templates, and the checks that a pair fits one tokenizer.

A task writes prompts from a template with named fields; this room renders it, finds the tokens of every
field in place, and refuses a pair whose two prompts do not line up. Imports the standard library, `pairs`,
`tokens` and `errors` only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Formatter
from typing import Any

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Text, Tokenizer, Tokens

#: Draws in a row that may bring no new fitting pair before a task says that there are no more.
PATIENCE = 2000


@dataclass(frozen=True)
class Row:
    """One pair that fits: prompts, answer and distractor sets, positions counted from the end."""

    clean: str | Tokens
    corrupted: str | Tokens
    answers: tuple[str | int, ...]
    distractors: tuple[str | int, ...]
    positions: Mapping[str, Tokens]


def load(name: str) -> dict[str, Any]:
    """The data file of a task, from the package."""
    text = resources.files(__package__).joinpath("data", f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def token_ids(tokenizer: Tokenizer, text: str) -> Tokens:
    """Ids of a text without any special tokens; TaskError if there is no tokenizer."""
    if not callable(tokenizer):
        raise TaskError(f"a task needs a HuggingFace tokenizer, got {tokenizer!r}; pass model.tokenizer")
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def next_token(tokenizer: Tokenizer, context: str, text: str) -> int | None:
    """The id that `text` is when it follows `context`; None if it is not exactly one known token there."""
    before, after = token_ids(tokenizer, context), token_ids(tokenizer, context + text)
    if len(after) != len(before) + 1 or after[:-1] != before:
        return None
    return None if after[-1] == getattr(tokenizer, "unk_token_id", None) else after[-1]


def as_answer(tokenizer: Tokenizer, context: str, text: str) -> str | int | None:
    """The answer as a string that alone is the same token, else as an id; None if it is not one token."""
    token = next_token(tokenizer, context, text)
    alone = (t for t in (text, text.strip()) if token is not None and Text(tokenizer).single(t) == token)
    return next(alone, token)


def fitting(tokenizer: Tokenizer, words: Iterable[str], context: str, needed: int, what: str) -> list[str]:
    """The words that are one token after `context`; TaskError if fewer than `needed` are."""
    listed = list(words)
    fits = [word for word in listed if next_token(tokenizer, context, f" {word}") is not None]
    if len(fits) < needed:
        raise TaskError(
            f"only {len(fits)} of {len(listed)} {what} are one token of this tokenizer after {context!r}, "
            f"and {needed} are needed: {fits}; use another task, or write PromptPairs with words it knows"
        )
    return fits


def pick(name: str, options: Sequence[Any], index: int | None) -> Sequence[Any]:
    """All options, or the one at `index`; TaskError if there is none."""
    if index is None:
        return options
    if not 0 <= index < len(options):
        raise TaskError(f"{name}={index} does not exist; there are {len(options)}: 0..{len(options) - 1}")
    return [options[index]]


def one_of(name: str, value: Any, options: Sequence[Any]) -> None:
    """TaskError unless `value` is among the options."""
    if value not in options:
        raise TaskError(f"{name}={value!r} is unknown; use one of {list(options)}")


def contrast(
    tokenizer: Tokenizer,
    template: str,
    clean: Mapping[str, str],
    corrupted: Mapping[str, str],
    answers: Sequence[str],
    distractors: Sequence[str],
    *,
    positions: Mapping[str, str],
    single: Iterable[str] = (),
) -> Row | None:
    """A pair of one template filled in two ways, or None where it does not fit this tokenizer.

    It fits if both prompts have equal token length with every field at the same tokens, the fields in
    `single` are one token each, and every answer and distractor is one token after the clean prompt.

    Args:
        positions: name of a position -> the template's field that it stands for; "end" is added.
    """
    text, spans = _render(tokenizer, template, clean)
    other, other_spans = _render(tokenizer, template, corrupted)
    if spans is None or spans != other_spans or any(len(spans[name]) != 1 for name in single):
        return None
    answer_set = [as_answer(tokenizer, text, answer) for answer in answers]
    distractor_set = [as_answer(tokenizer, text, distractor) for distractor in distractors]
    if text == other or None in answer_set or None in distractor_set:
        return None
    named = {name: spans[which] for name, which in positions.items()} | {"end": (-1,)}
    return Row(text, other, tuple(answer_set), tuple(distractor_set), named)  # type: ignore[arg-type]


def collect(n: int, draw: Callable[[int], Row | None], what: str) -> list[Row]:
    """`n` rows with distinct clean prompts from `draw(index)`; TaskError when it stops bringing new ones."""
    at_least_one(n)
    rows: dict[str | Tokens, Row] = {}
    misses = 0
    while len(rows) < n:
        row = draw(len(rows))
        misses = 0 if row and row.clean not in rows else misses + 1
        if row:
            rows.setdefault(row.clean, row)
        if misses > PATIENCE:
            raise too_few(what, len(rows), n)
    return list(rows.values())


def at_least_one(n: int) -> None:
    """TaskError unless `n` is a positive number of pairs."""
    if n < 1:
        raise TaskError(f"n={n} pairs cannot be built; ask for n=1 or more")


def too_few(what: str, fitting_words: int, n: int) -> TaskError:
    """The error for a task that ran out of distinct pairs."""
    remedy = (
        f"ask for n={fitting_words} or fewer" if fitting_words else "use another task, or write PromptPairs of your own"
    )
    return TaskError(f"{what} has {fitting_words} distinct aligned pairs for this tokenizer, not n={n}; {remedy}")


def to_pairs(name: str, rows: Sequence[Row]) -> PromptPairs:
    """The rows as PromptPairs."""
    return PromptPairs(
        [row.clean for row in rows],
        [row.corrupted for row in rows],
        [row.answers for row in rows],
        [row.distractors for row in rows],
        positions={key: [row.positions[key] for row in rows] for key in rows[0].positions},
        name=name,
    )


def _render(tokenizer: Tokenizer, template: str, words: Mapping[str, str]) -> tuple[str, dict[str, Tokens] | None]:
    """The filled template, and per field its tokens' positions from the end (with the space before the word).

    None instead of the positions if a field's edge falls inside a token.
    """
    text, places = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            places[field] = (len(text) - text.endswith(" "), len(text) + len(words[field]))
            text += words[field]
    ids = token_ids(tokenizer, text)
    spans = {}
    for field, (start, stop) in places.items():
        before, through = token_ids(tokenizer, text[:start]), token_ids(tokenizer, text[:stop])
        if ids[: len(through)] != through or through[: len(before)] != before:
            return text, None
        spans[field] = tuple(range(len(before) - len(ids), len(through) - len(ids)))
    return text, spans
