"""What people give to plots, checked: weights, heads, labels of positions, the sizes of a model. Imports numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from ..errors import PlotError


def numbers(what: str, given: object) -> np.ndarray:
    """A float32 copy of numbers: numpy's, torch's (of any type, device, with a gradient), lists of those.

    Raises:
        PlotError: text, objects, complex numbers, rows of different lengths, a tensor without data.
    """
    try:
        given = [_plain(part) for part in given] if isinstance(given, list | tuple) else _plain(given)
        array = np.asarray(given)
    except Exception as error:  # ragged lists, and tensors that have no data to copy
        raise PlotError(f"{what} holds no numbers to draw ({type(given).__name__}): {error}") from None
    if array.dtype.kind not in "fiub":
        raise PlotError(f"{what} holds no numbers to draw, but {type(given).__name__} of {array.dtype}")
    return np.array(array, dtype=np.float32)


def whole(what: str, given: object) -> int:
    """A whole number, numpy's and torch's too. PlotError: anything else, True and False included."""
    given = given.item() if hasattr(given, "item") and getattr(given, "ndim", 1) == 0 else given
    if isinstance(given, bool) or not isinstance(given, int):
        raise PlotError(f"{what} is {given!r}; it is a whole number")
    return given


def head_of(what: str, given: object) -> tuple[int, int]:
    """(layer, head), both whole numbers from 0 on. PlotError: anything else."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise PlotError(f"{what} is {given!r}; a head is (layer, head)")
    layer, head = (whole(f"{what} {given!r}", part) for part in given)
    if min(layer, head) < 0:
        raise PlotError(f"{what} is {given!r}; layers and heads count from 0")
    return layer, head


def labels_of(tokens: Any) -> list[str]:
    """One label per position. PlotError: a text or something else without entries in order."""
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(tokens, str | bytes | Mapping | Set) or not isinstance(tokens, Iterable):
        raise PlotError(f"tokens is {tokens!r}; give a list with one label per position")
    return [str(token) for token in tokens]


def check_sizes(what: str, given: Mapping[str, Any], known: Mapping[str, int | None], least: Mapping[str, int]) -> None:
    """Hold sizes that were given ("n_layers", "n_heads") against what is drawn.

    Args:
        what: how messages call what is drawn.
        known: the size of the model that it is of, where that is known.
        least: the size that what is drawn needs.

    Raises:
        PlotError: another size than the known one, or one that is too small; with both numbers.
    """
    for name, value in given.items():
        if value is None:
            continue
        part, size = name.removeprefix("n_"), whole(name, value)
        if known.get(name) is not None and size != known[name]:
            raise PlotError(
                f"{name}={size}, but {what} is of a model with {known[name]} {part}; leave {name} out, or correct it"
            )
        if size < least[name]:
            raise PlotError(
                f"{name}={size}, but {what} has {part} up to {least[name] - 1}, so the model has {least[name]} or more; leave "
                f"{name} out, or correct it"
            )


def _plain(given: object) -> Any:
    return given.detach().float().cpu().numpy() if hasattr(given, "detach") else given  # numpy has no bf16
