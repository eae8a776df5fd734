"""Texts as rows of tokens for what is shown of features, and their activations block by block.

Rows are those of `interp.windows`: each is run by itself behind what comes before a text, which is not counted. A block holds
whole rows and no more numbers than fit, however many features there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..collect import request_of, run_window
from ..errors import PlanError
from ..models.model import Model
from ..pairs import PromptPairs
from ..sites import Site
from ..views import View
from ..windows import Cut, Prompt, bar_of, windows

#: Activations that are collected together, and that are looked at together.
COLLECTED, NUMBERS = 2**25, 2**22


class Block(NamedTuple):
    """Activations `[token, feature]` of whole rows one after another; row and position `[token]` of each token, positions
    counted from the first of the row's own tokens."""

    values: Tensor
    row: Tensor
    position: Tensor


def rows_of(
    model: Model,
    texts: Iterable[str | Sequence[int]] | PromptPairs | str,
    length: int = 128,
    max_tokens: int | None = None,
) -> list[Prompt]:
    """Rows of `length` tokens of texts in any form of `collect_activations`, with `max_tokens` tokens of their own in all.

    Raises:
        PlanError: no text, or sizes that cannot be. PairsError: an empty text, ids outside the vocabulary.
    """
    length = length if model.n_positions is None else min(length, model.n_positions)
    site = last(model)  # rows are the same whatever is read of them
    request = request_of(model, ((str(site), site),), Cut(length, drop=("prefix",), tokens=max_tokens), torch.float32)
    listed = texts.clean if isinstance(texts, PromptPairs) else [texts] if isinstance(texts, str) else texts
    made = [row for window in windows(request, listed, bar_of(None, False)) for row in window if row.places]
    if not made:
        raise PlanError("there is no text with a token of its own to look at features on")
    return made


def last(model: Model) -> Site:
    """The site of the stream that enters the final norm."""
    return model.require(Site("resid_post", layer=model.n_layers - 1))


def own(row: Prompt) -> list[int]:
    """The tokens of a row that are its text's own."""
    return [row.ids[place] for place in row.places]


def blocks(model: Model, view: View, rows: Sequence[Prompt], progress: bool | None = None) -> Iterator[Block]:
    """The activations of all features on rows, in order, in fp32."""
    site = model.require(view.site())
    request = request_of(model, ((str(site), site),), Cut(), torch.float32)
    wide = COLLECTED // view.parts  # tokens; a batch that fits the model may be too large for a wide dictionary
    request = replace(
        request, batch_tokens=min(request.batch_tokens, wide), window_tokens=min(request.window_tokens, wide)
    )
    with bar_of(len(rows), progress) as bar:
        for first, end in grouped([len(row.ids) for row in rows], request.window_tokens):
            values = run_window(request, rows[first:end]).values[str(site)].flatten(1)
            start = 0
            sizes = [len(row.places) for row in rows[first:end]]
            for some, more in grouped(sizes, NUMBERS // view.parts):
                counts = torch.tensor(sizes[some:more])
                stop = start + int(counts.sum())
                row = torch.arange(first + some, first + more).repeat_interleave(counts)
                before = (counts.cumsum(0) - counts).repeat_interleave(counts)
                yield Block(values[start:stop], row, torch.arange(stop - start) - before)
                start = stop
            bar.update(end - first)


def grouped(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours whose sizes together stay within a limit: the first, and what is behind the last. One that is larger stands
    alone."""
    first = held = 0
    for number, size in enumerate(sizes):
        if number > first and held + size > limit:
            yield first, number
            first, held = number, 0
        held += size
    if first < len(sizes):
        yield first, len(sizes)


def final_stream(model: Model, rows: Sequence[Prompt], count: int = 1024) -> Tensor:
    """The stream that enters the final norm `[token, d_model]` at about so many tokens, of rows evenly apart."""
    site = last(model)
    request = request_of(model, ((str(site), site),), Cut(), model.dtype)
    total = sum(len(row.places) for row in rows)
    return run_window(request, rows[:: max(1, total // count)]).values[str(site)]
