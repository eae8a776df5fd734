"""What people give as prompts, answers and positions, made one form: text, or whole numbers.

Standard library, `errors` and `tokens` only: tensors and arrays are asked for their numbers, a tokenizer's output for its fields.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from .errors import AnswerError, PairsError
from .tokens import Tokens

#: One pair's positions of one name, by side ("clean", "corrupted"): a substring, or positions.
Sides = dict[str, "str | Tokens"]
#: What a model would read beside ids and mask. A prompt of the ids alone would be another one.
_BESIDE = ("inputs_embeds", "pixel_values", "position_ids")
_FORMS = "a prompt is a string, a list of ids, or what a tokenizer gives"

#: What a person gives as a prompt or prompts: text, token ids, arrays, what a tokenizer returns.
Given = Any


def prompts_of(what: str, given: Given) -> Iterator[str | Tokens]:
    """Every prompt in what people give as prompts: text as it is, anything else as a tuple of ids.

    What a tokenizer gives (a mapping with `input_ids`, a `tokenizers.Encoding`) is one prompt per row, without the padding that
    its mask tells. Whole numbers in an array or tensor are one prompt, or one per row. A list holds prompts of all these forms.

    Args:
        what: how messages call an entry, before its number: "clean of pair", "text".

    Raises:
        PairsError: anything else, with the place and what it is.
    """
    array, given = _is_array(given), _plain(what, given) if _is_array(given) else given
    rows: Any = given
    if _is_encoding(given):
        rows = _unpadded(what, given)
    elif isinstance(given, str):
        raise PairsError(f"{what.split()[0]} needs a list with one entry per pair, but is {given!r}; write [{given!r}]")
    elif isinstance(given, bytes | bytearray | Mapping | Set) or not hasattr(given, "__iter__"):
        raise PairsError(f"{what.split()[0]} needs a list of prompts, but is {_said(given)}; {_FORMS}")
    elif array and not any(isinstance(entry, str | list) for entry in given):
        rows = [given]  # one prompt of ids
    number = 0
    for entry in rows:
        for prompt in _entry(f"{what} {number}", entry):
            yield prompt
            number += 1


def one_prompt(what: str, given: Given) -> str | Tokens:
    """The prompt in what is given where one is wanted: any form of `prompts_of` that holds one, or a plain list of ids.

    Raises:
        PairsError: several prompts, or what is no prompt.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and all(isinstance(_plain(what, token), int) for token in given):
        return _ids(what, given)
    prompts = list(prompts_of(what, given))
    if len(prompts) != 1:
        raise PairsError(f"{what} is {len(prompts)} prompts, and one prompt is wanted: give one of them")
    return prompts[0]


def is_ids(prompt: Given) -> bool:
    """Whether it is one prompt of token ids, in a plain list; prompts of other forms tell by themselves."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return hasattr(prompt[0], "__index__") and getattr(prompt[0], "ndim", 0) == 0  # a tensor has it too, of any shape


def listed(part: str, given: Given) -> Any:
    """Answers, distractors or positions with one entry per pair. PairsError: what has no entries in order."""
    if isinstance(given, Mapping | Set):
        said = f"a {type(given).__name__} of {sorted(map(str, given))[:6]}"
        raise PairsError(f"{part} needs a list with one entry per pair, but is {said}: text or token ids, pair by pair")
    if isinstance(given, str) or not hasattr(given, "__len__"):
        raise PairsError(f"{part} needs a list with one entry per pair, but is {given!r}; write [{given!r}]")
    return given


def integer(where: str, value: Given) -> int:
    """One whole number; True and False are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PairsError(f"{where} holds {_said(value)}: neither text nor a whole number")
    return operator.index(value)


def ints(where: str, values: Given) -> Tokens:
    """One whole number or several, one at least."""
    values = _plain(where, values)
    values = values if isinstance(values, list) else [values]
    if not values:
        raise PairsError(f"{where} is empty, shape [0]; give at least one entry")
    return tuple(integer(where, value) for value in values)


def answer_set(part: str, i: int, entry: Given) -> tuple[str | int, ...]:
    """The answers of pair `i`: one token or a set of tokens, text or ids."""
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    entry = sorted(entry, key=str) if isinstance(entry, Set) else entry  # in the same order in every process
    entries = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
    if not entries:
        raise AnswerError(f"{part} of pair {i} is an empty set, shape [0]; give at least one token")
    return tuple(e if isinstance(e, str) else integer(f"{part} of pair {i}", e) for e in entries)


def sides(key: str, i: int, entry: Given, has_corrupted: bool) -> Sides:
    """The positions of one name in pair `i`, by side."""
    needed = ("clean", "corrupted") if has_corrupted else ("clean",)
    entry = entry if isinstance(entry, Mapping) else dict.fromkeys(needed, entry)
    if not set(needed) <= set(entry) <= {"clean", "corrupted"}:
        raise PairsError(f"positions[{key!r}] of pair {i} has the sides {list(entry)}; give {list(needed)}")
    return {s: at if isinstance(at := entry[s], str) else ints(f"positions[{key!r}] of pair {i}", at) for s in needed}


def _entry(where: str, entry: Given) -> list[str | Tokens]:
    """The prompts in one entry of a list: one, or the rows of a tokenizer's output."""
    if isinstance(entry, str):
        return [entry]
    if _is_encoding(entry):
        return [_ids(where, row) for row in _unpadded(where, entry)]
    array, value = _is_array(entry), _plain(where, entry)
    if isinstance(value, int) and not isinstance(value, bool):
        raise PairsError(f"{where} is the one id {value}; {_FORMS}: for one prompt of ids write [[{value}, …]]")
    if not isinstance(value, list):
        raise PairsError(f"{where} is {_said(entry)}; {_FORMS}")
    if array and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # [1, n], as `return_tensors` gives it
    return [_ids(where, value)]


def _ids(where: str, values: Given) -> Tokens:
    """Token ids, which lie in one list."""
    values = _plain(where, values)
    if nested := [value for value in values if isinstance(value, list)]:
        raise PairsError(f"{where} holds a list, {_said(nested[0])}, where a whole number should be; {_FORMS}")
    return ints(where, values)


def _unpadded(where: str, given: Given) -> list[list[Any]]:
    """The rows of a tokenizer's output, without what its attention mask leaves out at either end."""
    fields = given if isinstance(given, Mapping) else {"input_ids": given.ids, "attention_mask": given.attention_mask}
    if beside := [name for name in _BESIDE if fields.get(name) is not None]:
        raise PairsError(f"{where} holds {beside[0]} beside input_ids: token ids alone would be another prompt")
    rows, masks = (_rows(where, name, fields.get(name)) for name in ("input_ids", "attention_mask"))
    if masks and [*map(len, masks)] != [*map(len, rows)]:
        raise PairsError(
            f"{where} has input_ids of {[*map(len, rows)]} tokens, but an attention_mask of {[*map(len, masks)]}"
        )
    kept = []
    for number, row in enumerate(rows):
        seen = [at for at, value in enumerate(masks[number] if masks else [1] * len(row)) if value]
        if masks and not set(masks[number]) <= {0, 1}:
            raise PairsError(
                f"{where}: the attention_mask of row {number} holds {sorted(set(masks[number]))}; it is 0 and 1"
            )
        if row and not seen:
            raise PairsError(f"{where}: the attention_mask of row {number} leaves out all {len(row)} tokens")
        if seen and seen[-1] - seen[0] >= len(seen):
            raise PairsError(
                f"{where}: the attention_mask of row {number} leaves out tokens between others; only padding at the ends "
                "can be dropped"
            )
        kept.append(row[seen[0] : seen[-1] + 1] if seen else row)
    return kept


def _rows(where: str, name: str, given: Given) -> list[list[Any]]:
    """A field of a tokenizer's output as rows; a flat one is one row."""
    value = _plain(where, given)
    if value is None:
        return []
    if not isinstance(value, list):
        raise PairsError(f"{where} has {name} {_said(given)}; it is a list of ids, or one per row")
    nested = [isinstance(entry, list) for entry in value]
    return value if any(nested) and all(nested) else [value]


def _is_encoding(given: Given) -> bool:
    if isinstance(given, Mapping):
        return "input_ids" in given
    return not isinstance(given, type) and hasattr(given, "ids") and hasattr(given, "attention_mask")


def _is_array(given: Given) -> bool:
    plain = isinstance(given, str | bytes | bytearray | Mapping | list | tuple)
    return not plain and (hasattr(given, "tolist") or hasattr(given, "__array__"))


def _plain(where: str, given: Given) -> Any:
    """Arrays, and sequences of them, as lists of Python's own numbers; anything else as it is."""
    if _is_array(given):
        try:
            return given.tolist() if hasattr(given, "tolist") else given.__array__().tolist()
        except Exception as error:  # a tensor without data fails in a way of its own
            raise PairsError(f"{where} is a {type(given).__name__} that holds no numbers to read: {error}") from error
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray):
        return [entry if type(entry) is int else _plain(where, entry) for entry in given]
    return given


def _said(given: Given) -> str:
    """What something is, for a message."""
    if isinstance(given, Mapping):
        return f"a {type(given).__name__} of {sorted(map(str, given))[:6]} without input_ids"
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:56]} …, a {type(given).__name__}"
