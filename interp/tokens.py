"""Strings as checked token ids: prompts, answers and places in a prompt, with one tokenizer.

Standard library and `errors` only: a tokenizer is any object that is called as HuggingFace's are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import AnswerError, PairsError

Tokens = tuple[int, ...]


class Tokenizer(Protocol):
    """Any object that is called as HuggingFace's tokenizers are; what else it has is asked of it."""

    def __call__(self, text: str, **options: object) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Text:
    """One tokenizer with the prefix it needs and the vocabulary its ids must lie in.

    In every method `what` (or `side`: "clean", "corrupted") and `i` name the part and the pair for the error.
    """

    tokenizer: Tokenizer
    prefix: Tokens = ()
    vocab_size: int | None = None

    def prompt(self, side: str, i: int, prompt: str | Tokens) -> Tokens:
        """Ids of a prompt: a string as the tokenizer makes it, behind the prefix; ids as they are."""
        ids = prompt if isinstance(prompt, tuple) else tuple(self._ids(side, i, prompt))
        if isinstance(prompt, str) and ids[: len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        if not ids:
            raise PairsError(f"{side} of pair {i} has no tokens, shape [0]: its text is {prompt!r}; give a prompt")
        return self.known(side, i, ids)

    def known(self, what: str, i: int, ids: Tokens) -> Tokens:
        """The same ids; PairsError if one is not in the vocabulary."""
        end = self.vocab_size
        for p, token in enumerate(ids):
            if token < 0 or (end is not None and token >= end):
                inside = "negative" if end is None else f"outside the vocabulary 0..{end - 1}"
                raise PairsError(
                    f"{what} of pair {i}, shape [{len(ids)}]: token id {token} at position {p} is {inside}; "
                    "use ids of this model's own tokenizer"
                )
        return ids

    def answer_set(self, part: str, i: int, entries: tuple[str | int, ...]) -> Tokens:
        """Distinct ids of one pair's answers; AnswerError for a string that is not exactly one token."""
        ids = [self._answer(part, i, entry) if isinstance(entry, str) else entry for entry in entries]
        return self.known(part, i, tuple(dict.fromkeys(ids)))

    def single(self, text: str) -> int | None:
        """The id of a text that is exactly one token, None for any other; an unknown word is none."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if len(ids) != 1 or (ids[0] == unknown and text != self.tokenizer.unk_token):
            return None
        return int(ids[0])

    def index(self, what: str, i: int, side: str, ids: Tokens, at: Tokens) -> Tokens:
        """Positions from the start for positions that may count from the end; PairsError if out of range."""
        n = len(ids)
        for p in at:
            if not -n <= p < n:
                raise PairsError(
                    f"{what} of pair {i}: position {p} is out of range for the {side} prompt, shape [{n}]; "
                    f"use 0..{n - 1}, or -{n}..-1 from its end; its tokens are {[self.label(t) for t in ids]}"
                )
        return tuple(p % n for p in at)

    def locate(self, what: str, i: int, side: str, prompt: str | Tokens, ids: Tokens, part: str) -> Tokens:
        """Positions of the tokens that hold a character of `part`, which must occur in the prompt once."""
        place = f"{what} of pair {i}: {part!r}"
        if not isinstance(prompt, str):
            raise PairsError(f"{place} is text but the {side} prompt is ids, shape [{len(ids)}]; give positions")
        start = prompt.find(part) if part else -1
        if start < 0:
            raise PairsError(
                f"{place} is not in the {side} prompt {prompt!r}; give text that is, or, where clean and "
                'corrupted prompts say different things, {"clean": ..., "corrupted": ...}'
            )
        if prompt.find(part, start + 1) >= 0:
            raise PairsError(
                f"{place} occurs more than once in the {side} prompt {prompt!r}; give a longer text, or token positions"
            )
        try:
            spans = self.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        except (NotImplementedError, TypeError, KeyError) as error:
            raise PairsError(
                f"{place} cannot be located: this tokenizer gives no character offsets (it is not a fast "
                "one); give token positions"
            ) from error
        shift = len(ids) - len(spans)  # the prefix, where this class added it
        return tuple(p + shift for p, (a, b) in enumerate(spans) if a < b and a < start + len(part) and b > start)

    def check_end(self, side: str, i: int, prompt: str | Tokens, ids: Tokens) -> None:
        """Refuse a text behind which the tokenizer puts special tokens: its answer would be read behind them.

        Raises:
            PairsError: it names the tokens. Ids, and special tokens that stand in the text itself, are taken as they are.
        """
        if not isinstance(prompt, str):
            return
        bare = tuple(self._ids(side, i, prompt, add_special_tokens=False))
        ends = range(len(ids), len(bare) - 1, -1)
        end = next((end for end in ends if ids[end - len(bare) : end] == bare), None)
        if end is None:  # without special tokens the text itself is cut up otherwise
            special = set(getattr(self.tokenizer, "all_special_ids", ()))
            end = next((at for at in range(len(ids), 0, -1) if ids[at - 1] not in special), len(ids))
        if behind := ids[end:]:
            named = ", ".join(f"{self.label(token)!r} (id {token})" for token in behind)
            raise PairsError(
                f"{side} of pair {i}: the tokenizer puts {named} behind the text {prompt!r}, so that the answer would be read "
                f"there; set tokenizer.add_eos_token=False, or give answer_positions={-1 - len(behind)} (-1 where this is "
                "meant), or token ids"
            )

    def looks_padded(self, prompt: str | Tokens) -> bool:
        """Whether ids begin or end with the padding token; one that also begins or ends texts must stand there twice."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if isinstance(prompt, str) or pad is None:
            return False
        marks = {getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")} | set(self.prefix)
        ends = (pad,) * (2 if pad in marks else 1)
        return prompt[: len(ends)] == ends or prompt[-len(ends) :] == ends

    def warn_of_padding(self, padded: Sequence[str]) -> None:
        """Say that prompts of ids look padded: without its mask padding is text like any other."""
        if padded:
            more = f" and {len(padded) - 1} more" if len(padded) > 1 else ""
            warnings.warn(
                f"{padded[0]}{more} begins or ends with the padding token {self.label(self.tokenizer.pad_token_id)!r}: ids are "
                "taken as they are, so padding is run and read as text; give all that the tokenizer gave, whose attention_mask "
                "tells the padding, or ids without it",
                stacklevel=4,
            )

    def label(self, token: int) -> str:
        """The token's text; `<id>` where the tokenizer knows none."""
        try:
            piece = self.tokenizer.convert_ids_to_tokens(token)
        except Exception:  # there is no tokenizer, or a slow one was asked for an id that it does not have
            piece = None
        if piece is None:
            return f"<{token}>"
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text if text and "\ufffd" not in text else piece  # half a character has no text of its own

    def _ids(self, what: str, i: int, text: str, **options: bool) -> list[int]:
        if self.tokenizer is None:
            raise PairsError(
                f"{what} of pair {i} is the text {text!r}, but the model has no tokenizer; give token ids, "
                "or load_model(..., tokenizer=)"
            )
        return [int(token) for token in self.tokenizer(text, **options)["input_ids"]]

    def _answer(self, part: str, i: int, text: str) -> int:
        ids = self._ids(part, i, text, add_special_tokens=False)
        token = self.single(text)
        if token is not None:
            return token
        bare = text.strip()
        fits = [t for t in (" " + bare, bare) if bare and self.single(t) is not None]
        other = "use another word, or the id of its first token"
        remedy = f"{fits[0]!r} is one token: use that" if fits else other
        raise AnswerError(
            f"{part} of pair {i}: {text!r} is not one token of this tokenizer; it is {len(ids)} tokens "
            f"{[self.label(t) for t in ids]}; {remedy}"
        )
