"""Collecting activations over texts: in memory, as a stream, or on disk in shards that a later call goes on with.

Texts are taken in windows. A window is tokenised, sorted by length into batches, run no further than the last layer
that is needed, and put back into the order of the texts: the same windows are the steps of a stream and the shards
on disk.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .cells import integers
from .engine.identity import value_digest, weights_digest
from .engine.program import Program
from .engine.reading import Reading, last_layer, packed, read_program, run_readings
from .engine.schedule import token_budget
from .engine.trace import Found
from .errors import CheckpointError, PairsError, PlanError
from .files import path_of
from .models.model import Model
from .options import refuse_unknown
from .pairs import PromptPairs
from .prompts import prompts_of
from .shards import Step, StoredActivations, begun_sizes, write_shards
from .sites import KIND, Site
from .tokens import Text
from .views import Seen, View

Collected = Tensor | dict[str, Tensor]
#: A window holds this many batches, and no more than so many bytes of activations.
BATCHES, WINDOW_BYTES = 32, 2**28
#: Without patches there is nothing to save by running less at once; 4,096 tokens and more no longer fit a CPU's caches.
CPU_BATCH = 2048


@dataclass(frozen=True)
class Request:
    """What is collected from each text: sites by name, positions, and how texts become prompts and batches."""

    model: Model
    sites: tuple[tuple[str, Site], ...]  # ("L6.mlp_out", Site("mlp_out", layer=6)), …
    positions: tuple[int, ...] | None
    keep_prefix: bool
    max_length: int | None
    dtype: torch.dtype
    batch_tokens: int
    window_tokens: int

    @property
    def views(self) -> dict[str, Seen]:
        """The views among the sites, by name, with all of their parts."""
        return {site.kind: site.view.seen() for _, site in self.sites if isinstance(site.view, View)}

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on, as plain data, but for the texts."""
        return {
            "model": self.model.name,
            "revision": self.model.revision,
            "weights": weights_digest(self.model.hf),
            "prefix": self.model.prefix,
            "sites": [name for name, _ in self.sites],
            "positions": None if self.positions is None else list(self.positions),
            "keep_prefix": self.keep_prefix,
            "max_length": self.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"views": value_digest(self.views)} if self.views else {}),
        }


@dataclass(frozen=True)
class Prompt:
    """One text as tokens, and the positions that are collected from it."""

    text: int
    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Activations `[token, …]` by site, in the order of the texts, (text, position) `[token, 2]` of each row."""

    values: dict[str, Tensor]
    index: Tensor
    texts: int


class CollectOptions(TypedDict, total=False):
    """The keyword options of `collect_activations` that say in which form activations come back."""

    padded: bool
    index: bool
    stream: bool
    to_disk: str | Path | None
    progress: bool | None


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
        dtype: of the result; by default the model's.
        padded: one row per text, `[text, position, …]`: NaN where a text has no such position.
        index: return `(activations, index)`, index `[token, 2]` the text and position of every row.
        stream: an iterator over windows of texts, each a result of its own, in the order of the texts.
        to_disk: a folder for shards; a later call with the same arguments goes on where an earlier one stopped.
        progress: show a bar; by default on a terminal.

    Returns:
        A tensor `[token, d]`, in the order of texts and positions; `[token, head, d_head]` for kinds with heads
        (`head_out`: `[token, head, d_model]`). Where several layers or components are asked for, a dictionary
        by site ("L6.mlp_out"). With `to_disk`, `StoredActivations`; `interp.shards.StoredActivations.open(folder)` reads it.

    Raises:
        SiteError: a layer or component that this model does not have. PlanError: options that exclude each other, a
            `pattern` (it has no row per token). PairsError: an empty text, a position that a text does not have.
        CheckpointError: the folder holds activations of another model, other texts or settings, or cannot be written.
    """
    refuse_unknown(form, CollectOptions.__annotations__)
    padded, index, stream = (bool(form.get(name)) for name in ("padded", "index", "stream"))
    to_disk, progress = form.get("to_disk"), form.get("progress")
    if sum((padded, stream, to_disk is not None)) > 1 or (index and (padded or to_disk is not None)):
        raise PlanError("padded, stream and to_disk exclude each other; index goes with plain and streamed results")
    for name, size in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if size is not None and size < 1:
            raise PlanError(f"{name}={size}; it is 1 token or more")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise PlanError(f"dtype={dtype!r} is no type of torch; use e.g. torch.float16")
    sites = sites_of(model, layer, component)
    budget = batch_tokens or max(token_budget(model), CPU_BATCH if model.device.type == "cpu" else 0)
    element = (dtype or model.dtype).itemsize * sum(model.width_of(site) for _, site in sites)
    request = Request(
        model,
        sites,
        (-1,) if positions == "last" else places_of(positions),
        keep_prefix,
        max_length,
        dtype or model.dtype,
        budget,
        max(budget, min(BATCHES * budget, WINDOW_BYTES // element)),
    )
    listed: Any = texts.clean if isinstance(texts, PromptPairs) else [texts] if isinstance(texts, str) else texts
    total = len(listed) if isinstance(listed, list | tuple) else None
    if to_disk is not None:
        return write(
            request, listed, path_of(to_disk, CheckpointError, "to_disk"), batch_tokens is None, bar_of(total, progress)
        )
    run_windows = (run_window(request, prompts) for prompts in windows(request, listed, bar_of(total, progress)))
    several = len(sites) > 1
    if stream:
        return (shaped(window, several, index) for window in run_windows)
    whole = list(run_windows)
    if not whole:
        raise PlanError("collect_activations was given no text")
    joined = Window(
        {name: torch.cat([window.values[name] for window in whole]) for name, _ in sites},
        torch.cat([window.index for window in whole]),
        sum(window.texts for window in whole),
    )
    if padded:
        return shaped(pad(joined, request.positions), several, False)
    return shaped(joined, several, index)


def sites_of(model: Model, layer: Any, component: Any) -> tuple[tuple[str, Site], ...]:
    """Every component at every layer, by name; a view of one layer at that one.

    Raises:
        SiteError, PlanError: one that cannot be collected.
    """
    components = [component] if isinstance(component, str | View) else list(component)
    layers = range(model.n_layers) if layer is None else integers(layer, "layers")
    if named := [kind for kind in components if isinstance(kind, str) and "." in kind]:
        raise PlanError(f"{named[0]!r} names a layer: give the kind of site, and layer=")
    if not components or not layers:
        raise PlanError("collect_activations was given no layer or no component")
    made: dict[str, Site] = {}
    for kind in components:
        if isinstance(kind, View):
            own = kind.tap.layer
            for chosen in layers if own is None else [own]:
                site = model.require(kind.site(chosen))
                made[str(site)] = site
            continue
        kind = Site.parse(kind).kind if "hook" in kind else kind
        facts = KIND.get(kind)
        if facts is not None and not facts.width:
            instead = "use interp.lens.attention_patterns" if facts.layered else "collect e.g. 'resid_post'"
            raise PlanError(f"{kind!r} cannot be collected: it is no vector of each token; {instead}")
        at: Sequence[int | None] = layers if facts is None or facts.layered else [None]
        for number in at:
            site = model.require(Site(kind, layer=number))
            made[str(site)] = site
    return tuple(made.items())


def places_of(positions: Any) -> tuple[int, ...] | None:
    """Positions as a tuple, or None for all."""
    if isinstance(positions, str):
        raise PlanError(f"positions={positions!r}; it is None, 'last', or positions as numbers")
    if positions is None:
        return None
    if not (places := integers(positions, "positions")):
        raise PlanError("positions is empty; None is all positions")
    return places


def bar_of(total: int | None, progress: bool | None) -> Any:
    """A bar over texts."""
    return tqdm(total=total, unit="text", disable=not (sys.stderr.isatty() if progress is None else progress))


def windows(request: Request, texts: Iterable[Any], bar: Any) -> Iterator[list[Prompt]]:
    """Texts as tokens, as many at once as fill a window."""
    model = request.model
    reader = Text(model.tokenizer, model.prefix_ids, model.vocab_size)
    prompts: list[Prompt] = []
    full, warned = 0, False
    with bar:
        for number, text in enumerate(prompts_of("text", texts)):
            if not warned and (warned := reader.looks_padded(text)):
                reader.warn_of_padding([f"text {number}"])
            prompt = prompt_of(request, number, reader.prompt("text", number, text), isinstance(text, str))
            if prompts and full + len(prompt.ids) > request.window_tokens:
                yield prompts
                bar.update(len(prompts))
                prompts, full = [], 0
            prompts.append(prompt)
            full += len(prompt.ids)
        if prompts:
            yield prompts
            bar.update(len(prompts))


def prompt_of(request: Request, number: int, ids: tuple[int, ...], string: bool) -> Prompt:
    """One text cut to length, with the positions that are collected."""
    ids = ids[: request.max_length]
    limit = request.model.n_positions
    request.model.check_length(f"text {number}", len(ids), f"cut texts with max_length={limit}, or split them")
    if request.positions is None:
        prefix = request.model.prefix_ids
        skip = len(prefix) if string and not request.keep_prefix and ids[: len(prefix)] == prefix else 0
        return Prompt(number, ids, tuple(range(skip, len(ids))))
    for position in request.positions:
        if not -len(ids) <= position < len(ids):
            raise PairsError(f"text {number} has {len(ids)} tokens, so no position {position}")
    return Prompt(number, ids, tuple(position % len(ids) for position in request.positions))


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
        made["readout"] = {"kind": "tokens", "rows": rows, "columns": columns}
        return made

    def put(piece: Reading, result: Found) -> None:
        target = torch.tensor([row for i in piece.asked for row in range(starts[i], starts[i + 1])], dtype=torch.long)
        for name, site in request.sites:
            value = result["reads"].pop(site.place).to("cpu", request.dtype)
            if name not in values:
                values[name] = value.new_empty(starts[-1], *value.shape[1:])
            values[name][target] = value

    groups = packed([len(prompt.ids) for prompt in prompts], request.batch_tokens)
    pieces = [Reading.of(group, program) for group in groups if any(prompts[i].places for i in group)]
    run_readings(model, pieces, put)
    for name, site in request.sites:
        values.setdefault(name, torch.empty(0, model.width_of(site), dtype=request.dtype))
    places = [(prompt.text, place) for prompt in prompts for place in prompt.places]
    return Window(values, torch.tensor(places, dtype=torch.int32).reshape(-1, 2), len(prompts))


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

    def steps() -> Iterator[Step]:
        for prompts in windows(request, texts, bar):
            digest = hashlib.sha256(repr([prompt.ids for prompt in prompts]).encode()).hexdigest()
            said = f"texts {prompts[0].text} to {prompts[-1].text}"
            yield digest, said, partial(tensors_of, request, prompts)

    return write_shards(folder, {**request.facts(), **sizes}, steps())


def tensors_of(request: Request, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What a shard holds."""
    window = run_window(request, prompts)
    return {**window.values, "index": window.index}
