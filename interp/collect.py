"""Collecting activations over texts: in memory, as a stream, or on disk in shards that a later call goes on with.

Texts are taken in windows. A window is tokenised, sorted by length into batches, run no further than the last layer
that is needed, and put back into the order of the texts: the same windows are the steps of a stream and the shards
on disk.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from .engine.program import Program
from .engine.reading import Reading, last_layer, packed, read_program, run_readings
from .engine.schedule import token_budget
from .engine.trace import Found
from .errors import CheckpointError, PlanError
from .files import path_of
from .journal import experiment
from .models.model import Model
from .options import refuse_unknown
from .pairs import PromptPairs
from .shards import Step, StoredActivations, begun_sizes, write_shards
from .sites import Site
from .views import View
from .windows import (
    DROPS,
    Cut,
    Prompt,
    Request,
    Window,
    bar_of,
    places_of,
    prompts_from,
    sites_of,
    top_of,
    windows,
    without_massive,
)

Collected = Tensor | dict[str, Tensor]
#: A window holds this many batches, and no more than so many bytes of activations.
BATCHES, WINDOW_BYTES = 32, 2**28
#: Without patches there is nothing to save by running less at once; 4,096 tokens and more no longer fit a CPU's caches.
CPU_BATCH = 2048


class CollectOptions(TypedDict, total=False):
    """The keyword options of `collect_activations` that say in which form activations come back."""

    padded: bool
    index: bool
    stream: bool
    to_disk: str | Path | None
    progress: bool | None
    context: int | None
    documents: bool
    drop: Sequence[str]
    tokens: int | None
    top_k: int | None


@experiment
def collect_activations(
    model: Model,
    texts: Iterable[str | Sequence[int]] | PromptPairs | str,
    layer: int | Sequence[int] | None = None,
    component: str | View | Sequence[str | View] = "resid_post",
    *,
    positions: int | Sequence[int] | str | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    keep_prefix: bool = False,
    dtype: torch.dtype | str | None = None,
    **form: Unpack[CollectOptions],
) -> Any:
    """Activations of texts, run in batches of similar length no further than the last layer that is needed.

    Args:
        texts: strings or token ids in any form of `prompts_of`, or pairs whose clean prompts are taken; any iterable of them
            is read as it is needed.
        layer, component: one or several; each component at each layer (`embed` once).
        positions: None is every token of each text, "last" the last one; or positions from the text's own first
            token (prefix included), negative from its end. Padding is never collected.
        keep_prefix: the prefix that the model puts before strings is collected too; by default it is left out, since
            it is no token of the text and its activations are far outliers. Token ids are taken as they are.
        batch_tokens: tokens in one forward pass, padding included; by default what the device takes.
        max_length: texts are cut to this many tokens (prefix included).
        context: rows of this many tokens (prefix included) are cut from each text, to its end; `documents=False`: from all
            texts behind one another. The index still names text and position of every token.
        drop: what is left out: "prefix" (all that comes before a text), "special" tokens, "massive" tokens, whose activation
            is longer than three medians. In the residual stream a few of these hold much of the variance.
        tokens: stop after so many tokens (massive ones counted).
        dtype: of the result; by default the model's.
        top_k: of each row the so many largest numbers alone, found where the model runs: of a dictionary's view its most active
            features. Under the site's name their values `[token, k]`, largest first, under "<name>.index" which they are.
        padded: one row per text, `[text, position, …]`: NaN where a text has no such position.
        index: return `(activations, index)`, index `[token, 2]` the text and position of every row.
        stream: an iterator over windows of texts, each a result of its own, in the order of the texts.
        to_disk: a folder for shards; a later call with the same arguments goes on where an earlier one stopped. What it will
            need of the disk is compared with what is free before anything runs, and shown with the bar.
        progress: show a bar; by default on a terminal.

    Returns:
        A tensor `[token, d]`, in the order of texts and positions; `[token, head, d_head]` for kinds with heads
        (`head_out`: `[token, head, d_model]`). Where several layers or components are asked for, a dictionary
        by site ("L6.mlp_out"). With `to_disk`, `StoredActivations`; `interp.shards.StoredActivations.open(folder)` reads it.

    Raises:
        SiteError: a layer or component that this model does not have. PlanError: options that exclude each other, a
            `pattern` (it has no row per token). PairsError: an empty text, a position that a text does not have.
        CheckpointError: the folder holds activations of another model, other texts or settings, or cannot be written.

    Examples:
        >>> interp.collect_activations(model, list(pairs.clean), layer=6, component="mlp_out").shape
        torch.Size([30, 576])
    """
    refuse_unknown(form, CollectOptions.__annotations__)
    padded, index, stream = (bool(form.get(name)) for name in ("padded", "index", "stream"))
    to_disk, progress = form.get("to_disk"), form.get("progress")
    if sum((padded, stream, to_disk is not None)) > 1 or (index and (padded or to_disk is not None)):
        raise PlanError("padded, stream and to_disk exclude each other; index goes with plain and streamed results")
    for name, size in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if size is not None and size < 1:
            raise PlanError(f"{name}={size}; it is 1 token or more")
    cut = cut_of(form, positions is not None or keep_prefix, padded)
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise PlanError(f"dtype={dtype!r} is no type of torch; use e.g. torch.float16")
    sites = sites_of(model, layer, component)
    places = (-1,) if positions == "last" else places_of(positions)
    request = request_of(model, sites, cut, dtype or model.dtype, batch_tokens)
    top_k = top_of(model, sites, form.get("top_k"), padded)
    request = replace(request, positions=places, keep_prefix=keep_prefix, max_length=max_length, top_k=top_k)
    listed: Any = texts.clean if isinstance(texts, PromptPairs) else [texts] if isinstance(texts, str) else texts
    total = len(listed) if isinstance(listed, list | tuple) else None
    if to_disk is not None:
        return write(
            request, listed, path_of(to_disk, CheckpointError, "to_disk"), batch_tokens is None, bar_of(total, progress)
        )
    run_windows = (run_window(request, prompts) for prompts in windows(request, listed, bar_of(total, progress)))
    several = len(sites) > 1 or top_k is not None
    if stream:
        return (shaped(window, several, index) for window in run_windows)
    if not (whole := list(run_windows)):
        raise PlanError("collect_activations was given no text")
    joined = Window(
        {name: torch.cat([window.values[name] for window in whole]) for name in whole[0].values},
        torch.cat([window.index for window in whole]),
        sum(window.texts for window in whole),
    )
    return shaped(pad(joined, request.positions) if padded else joined, several, index and not padded)


def request_of(
    model: Model, sites: tuple[tuple[str, Site], ...], cut: Cut, dtype: torch.dtype, batch_tokens: int | None = None
) -> Request:
    """A request for every token of texts, in batches and windows of the size that the device takes."""
    budget = batch_tokens or max(token_budget(model), CPU_BATCH if model.device.type == "cpu" else 0)
    element = dtype.itemsize * sum(model.width_of(site) for _, site in sites)
    window = max(budget, min(BATCHES * budget, WINDOW_BYTES // element))
    return Request(model, sites, None, False, None, dtype, budget, window, cut)


def cut_of(form: CollectOptions, chosen: bool, padded: bool) -> Cut:
    """How texts become rows. PlanError: what does not go together; `chosen`: positions or the prefix are asked for."""
    drop = form.get("drop", ())
    if not isinstance(drop, str | Sequence):
        raise PlanError(f"drop={drop!r}; it is one or more of {', '.join(DROPS)}")
    cut = Cut(
        form.get("context"),
        form.get("documents", True),
        (drop,) if isinstance(drop, str) else tuple(drop),
        form.get("tokens"),
    )
    if cut.context is not None and chosen:
        raise PlanError("context= collects every token of rows; leave positions= and keep_prefix= out")
    if padded and (cut.context is not None or cut.drop or cut.tokens is not None):
        raise PlanError("padded= gives one row for each text; it does not go with context=, drop= or tokens=")
    return cut


def run_window(request: Request, prompts: Sequence[Prompt]) -> Window:
    """The activations of one window, in the order of its texts."""
    model = request.model
    views = request.views
    reads = [site.place for _, site in request.sites]
    last = last_layer(reads, views)
    starts = [0, *accumulate(len(prompt.places) for prompt in prompts)]
    values: dict[str, Tensor] = {}

    def program(chosen: Sequence[int]) -> Program:
        width = max(len(prompts[i].ids) for i in chosen)
        tokens = [
            (row, width - len(prompts[i].ids) + place) for row, i in enumerate(chosen) for place in prompts[i].places
        ]
        rows, columns = torch.tensor(tokens).reshape(-1, 2).unbind(1)
        made = read_program(model, [prompts[i].ids for i in chosen], reads, last=last, views=views)
        made["readout"] = {"kind": "tokens", "rows": rows, "columns": columns, "top": request.top_k}
        return made

    def put(piece: Reading, result: Found) -> None:
        target = torch.tensor([row for i in piece.asked for row in range(starts[i], starts[i + 1])], dtype=torch.long)
        for name, site in request.sites:
            found = {name: result["reads"].pop(site.place).to("cpu", request.dtype)}
            if request.top_k is not None:
                found[f"{name}.index"] = result["top"].pop(site.place).to("cpu", torch.int32)
            for own, value in found.items():
                if own not in values:
                    values[own] = value.new_empty(starts[-1], *value.shape[1:])
                values[own][target] = value

    groups = packed([len(prompt.ids) for prompt in prompts], request.batch_tokens)
    pieces = [Reading.of(group, program) for group in groups if any(prompts[i].places for i in group)]
    run_readings(model, pieces, put)
    for name, site in request.sites:
        values.setdefault(name, torch.empty(0, request.top_k or model.width_of(site), dtype=request.dtype))
    index = torch.tensor([at for prompt in prompts for at in prompt.index], dtype=torch.int32).reshape(-1, 2)
    window = Window(values, index, len(prompts))
    return without_massive(window) if "massive" in request.cut.drop else window


def shaped(window: Window, several: bool, index: bool) -> Any:
    """A window as the caller wants it."""
    values: Collected = window.values if several else next(iter(window.values.values()))
    return (values, window.index) if index else values


def pad(window: Window, positions: tuple[int, ...] | None) -> Window:
    """One row per text: `[text, position, …]`, NaN where a text has no such position."""
    text, place = window.index.long().unbind(1)
    if positions is not None:  # places are counted along the positions asked for
        place = torch.arange(len(text)) % len(positions)
    size = (window.texts, int(place.max()) + 1 if len(place) else 0)
    values = {}
    for name, value in window.values.items():
        values[name] = value.new_full((*size, *value.shape[1:]), float("nan"))
        values[name][text, place] = value
    return replace(window, values=values)


def write(request: Request, texts: Iterable[Any], folder: Path, free: bool, bar: Any) -> StoredActivations:
    """One shard per window; those that an earlier call finished are not run again."""
    begun = begun_sizes(folder) if free else None  # windows as they were begun, whatever memory is free now
    if begun is not None:
        request = replace(request, batch_tokens=begun[0], window_tokens=begun[1])
    sizes = {"batch_tokens": request.batch_tokens, "window_tokens": request.window_tokens}
    bar.set_description(disk_need(request, texts, folder))

    def steps() -> Iterator[Step]:
        for prompts in windows(request, texts, bar):
            digest = hashlib.sha256(repr([prompt.ids for prompt in prompts]).encode()).hexdigest()
            ends = [prompt.index[place][0] for prompt, place in ((prompts[0], 0), (prompts[-1], -1)) if prompt.index]
            yield digest, f"texts {' to '.join(map(str, ends))}", partial(tensors_of, request, prompts)

    return write_shards(folder, {**request.facts(), **sizes}, steps())


#: Texts whose length in tokens stands for that of all.
SAMPLE = 20


def disk_need(request: Request, texts: Iterable[Any], folder: Path) -> str:
    """What shards will take, in words; nothing where nobody knows how many texts there are.

    Raises:
        CheckpointError: more than is free.
    """
    tokens = request.cut.tokens
    if tokens is None and isinstance(texts, list | tuple) and texts:
        few = texts[:SAMPLE]
        found = sum(len(prompt.places) for _, prompt in prompts_from(request, few))
        tokens = int(found * sum(map(len, texts)) / max(1, sum(map(len, few))))
    if tokens is None:
        return ""
    numbers = sum(request.top_k or request.model.width_of(site) for _, site in request.sites)
    row = numbers * (request.dtype.itemsize + 4 * (request.top_k is not None)) + 8
    need = max(0, tokens * row - sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if need > free:
        raise CheckpointError(
            f"{tokens:,} tokens of {', '.join(name for name, _ in request.sites)} need about {need / 1e9:.1f} GB on disk, and "
            f"{free / 1e9:.1f} GB are free at {folder}: give tokens=, a smaller dtype=, or another folder"
        )
    return f"{folder.name}: about {need / 1e9:.2g} of {free / 1e9:.3g} GB free"


def tensors_of(request: Request, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What a shard holds."""
    return {**(window := run_window(request, prompts)).values, "index": window.index}
