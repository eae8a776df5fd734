"""Induction: a random sequence that repeats."""

from __future__ import annotations

from random import Random

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Tokenizer, Tokens
from .build import Row, as_answer, collect, next_token, one_of, to_pairs, token_ids

CORRUPTIONS = ("answer", "all")


def induction(
    tokenizer: Tokenizer,
    n: int = 32,
    seed: int = 0,
    *,
    length: int = 12,
    corruption: str = "answer",
    ids: bool = False,
) -> PromptPairs:
    """Induction: `length` random words, then the same again but for the last: ... A B ... A -> B.

    The prompt has `2 * length - 1` tokens (before any prefix): words of the vocabulary, one token each. The
    corrupted prompt breaks the first occurrence; the distractor is a word that the clean prompt does not
    have. Named positions: "first" (A at its first occurrence), "copied" (B after it), "end" (A again).

    Args:
        length: tokens before the repetition, at least 2.
        corruption: "answer" puts the distractor in the place of the first B, so that it becomes the right
            answer; "all" replaces the whole first copy by other words, so that nothing repeats.
        ids: give token ids instead of text; the model's prefix is then not added.

    Raises:
        TaskError: fewer single-token words in the vocabulary than one pair needs, or a length below 2.

    Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    one_of("corruption", corruption, CORRUPTIONS)
    if length < 2:
        raise TaskError(f"length={length} leaves nothing to copy; use length=2 or more")
    rng = Random(seed)
    token_ids(tokenizer, "")  # refuses what is not a tokenizer before its length is asked for
    needed = 2 * length + 1
    words = _words(tokenizer, rng, needed * 20)
    if len(words) < needed:
        raise TaskError(
            f"only {len(words)} single-token words in this tokenizer's vocabulary of {len(tokenizer)}, and "
            f"{needed} are needed for length={length}; use a shorter length"
        )

    def prompt(tokens: list[int]) -> str | Tokens | None:
        if ids:
            return tuple(tokens)
        spaced = "".join(f" {words[token]}" for token in tokens)
        return next((t for t in (spaced, spaced[1:]) if token_ids(tokenizer, t) == tuple(tokens)), None)

    def named(token: int) -> str | int:
        shown = None if ids else as_answer(tokenizer, "The", f" {words[token]}")
        return token if shown is None else shown

    def draw(index: int) -> Row | None:
        sample = rng.sample(list(words), needed)
        sequence, others, distractor = sample[:length], sample[length : 2 * length], sample[-1]
        broken = [*sequence[:-1], distractor] if corruption == "answer" else others
        clean, corrupted = prompt(sequence + sequence[:-1]), prompt(broken + sequence[:-1])
        if clean is None or corrupted is None:
            return None
        places = {"first": (-length - 1,), "copied": (-length,), "end": (-1,)}
        return Row(clean, corrupted, (named(sequence[-1]),), (named(distractor),), places)

    return to_pairs("induction", collect(n, draw, "induction"))


def _words(tokenizer: Tokenizer, rng: Random, enough: int) -> dict[int, str]:
    """Random ids of the vocabulary whose text is a plain word that becomes that one id again: id -> word."""
    words: dict[int, str] = {}
    for token in rng.sample(range(len(tokenizer)), len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        plain = word.isascii() and word.isalpha() and len(word) > 2
        if plain and next_token(tokenizer, "The", f" {word}") == token:
            words[token] = word
            if len(words) == enough:
                break
    return words
