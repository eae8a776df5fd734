"""How texts become the prompts that activations are collected from: cut to rows, and taken in windows.

A window is tokenised, run in batches of similar length, and put back into the order of the texts: the same windows are the
steps of a stream and the shards on disk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .cells import integers
from .engine.identity import value_digest, weights_digest
from .errors import PairsError, PlanError
from .models.model import Model
from .prompts import prompts_of
from .sites import KIND, Site
from .tokens import Text
from .views import Seen, View

#: What can be left out of a collection, beside the prefix of strings.
DROPS = ("prefix", "special", "massive")
#: A token is massive if its activation is longer than so many medians of its window: a few tokens of a residual stream
#: (Sun et al. 2024) hold much of its variance and say nothing.
MASSIVE = 3.0


@dataclass(frozen=True)
class Cut:
    """How texts become rows: `context` tokens each, the prefix included, of one text or (`documents=False`) of all behind one
    another; at most `tokens` of them are collected, without those named in `drop`.

    Raises:
        PlanError: no room for a token behind a prefix, or a word that is none of `DROPS`.
    """

    context: int | None = None
    documents: bool = True
    drop: tuple[str, ...] = ()
    tokens: int | None = None

    def __post_init__(self) -> None:
        if unknown := [word for word in self.drop if word not in DROPS]:
            raise PlanError(f"drop={unknown[0]!r}; what can be left out is: {', '.join(DROPS)}")
        for name, size in (("context", self.context), ("tokens", self.tokens)):
            if size is not None and integers(size, name)[0] < 1:
                raise PlanError(f"{name}={size}; it is 1 token or more")
        if not self.documents and self.context is None:
            raise PlanError("documents=False puts texts behind one another: give context=, the tokens of a row")

    def facts(self) -> dict[str, Any]:
        """As plain data, where it says anything."""
        said = {name: value for name, value in asdict(self).items() if value != getattr(Cut(), name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}


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
    cut: Cut = Cut()
    top_k: int | None = None

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
            **({"top_k": self.top_k} if self.top_k is not None else {}),
            **self.cut.facts(),
        }


@dataclass(frozen=True)
class Prompt:
    """A row of tokens, the positions of it that are collected, and which (text, position) each of them is."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    index: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """Activations `[token, …]` by site, in the order of the texts, (text, position) `[token, 2]` of each row."""

    values: dict[str, Tensor]
    index: Tensor
    texts: int


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
    """Texts as rows of tokens, as many at once as fill a window."""
    rows: list[Prompt] = []
    full = found = seen = 0
    with bar:
        for number, prompt in prompts_from(request, texts):
            if rows and full + len(prompt.ids) > request.window_tokens:
                yield rows
                bar.update(number - seen)
                rows, full, seen = [], 0, number
            left = None if request.cut.tokens is None else request.cut.tokens - found
            if left is not None and len(prompt.places) > left:
                prompt = Prompt(prompt.ids, prompt.places[:left], prompt.index[:left])
            rows.append(prompt)
            full += len(prompt.ids)
            found += len(prompt.places)
            if found == request.cut.tokens:
                break
        if rows:
            yield rows
            bar.update((bar.total or seen + 1) - seen)


def prompts_from(request: Request, texts: Iterable[Any]) -> Iterator[tuple[int, Prompt]]:
    """Every row with the number of the text that it ends in."""
    model, cut = request.model, request.cut
    reader = Text(model.tokenizer, model.prefix_ids, model.vocab_size)
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    warned, number = False, 0
    waiting = Waiting((), ())
    for number, text in enumerate(prompts_of("text", texts)):
        if not warned and (warned := reader.looks_padded(text)):
            reader.warn_of_padding([f"text {number}"])
        ids = reader.prompt("text", number, text)
        lead = lead_of(ids, model.prefix_ids, special) if isinstance(text, str) else 0
        if cut.context is None:
            prompt = prompt_of(request, number, ids, isinstance(text, str))
            yield number, dropped(prompt, request, lead, special)
            continue
        end = None if request.max_length is None else request.max_length
        body = Waiting(ids[lead:end], tuple((number, place) for place in range(lead, len(ids[:end]))))
        waiting = Waiting(waiting.ids + body.ids, waiting.of + body.of)
        size = cut.context - lead
        if size < 1:
            raise PlanError(f"context={cut.context} leaves no room behind the {lead} tokens that come before each text")
        model.check_length("a row", cut.context, "give a smaller context=")
        while len(waiting.ids) >= size or (cut.documents and waiting.ids):
            yield number, dropped(row_of(ids[:lead], waiting, size), request, lead, special)
            waiting = Waiting(waiting.ids[size:], waiting.of[size:])
    if waiting.ids and cut.context is not None:
        yield number, dropped(row_of((), waiting, cut.context), request, 0, special)


class Waiting(NamedTuple):
    """Tokens that are not in a row yet, with the text and position of each."""

    ids: tuple[int, ...]
    of: tuple[tuple[int, int], ...]


def row_of(lead: tuple[int, ...], waiting: Waiting, size: int) -> Prompt:
    """A row of the first tokens that wait, behind what comes before each text."""
    ids = lead + waiting.ids[:size]
    return Prompt(ids, tuple(range(len(lead), len(ids))), waiting.of[:size])


def lead_of(ids: tuple[int, ...], prefix: tuple[int, ...], special: set[int]) -> int:
    """How many tokens come before a text: the model's prefix, and special tokens that its tokenizer puts there."""
    start = len(prefix) if ids[: len(prefix)] == prefix else 0
    while start < len(ids) - 1 and ids[start] in special:
        start += 1
    return start


def dropped(prompt: Prompt, request: Request, lead: int, special: set[int]) -> Prompt:
    """The row without the positions that are to be left out for what their token is."""
    drop = request.cut.drop
    gone = set(range(lead)) if "prefix" in drop else set()
    if "special" in drop:
        gone |= {place for place, token in enumerate(prompt.ids) if token in special}
    if not gone:
        return prompt
    kept = [(place, at) for place, at in zip(prompt.places, prompt.index, strict=True) if place not in gone]
    return Prompt(prompt.ids, tuple(place for place, _ in kept), tuple(at for _, at in kept))


def prompt_of(request: Request, number: int, ids: tuple[int, ...], string: bool) -> Prompt:
    """One text cut to length, with the positions that are collected."""
    ids = ids[: request.max_length]
    limit = request.model.n_positions
    remedy = f"cut texts with max_length={limit}, or into rows with context={limit}"
    request.model.check_length(f"text {number}", len(ids), remedy)
    if request.positions is None:
        prefix = request.model.prefix_ids
        skip = len(prefix) if string and not request.keep_prefix and ids[: len(prefix)] == prefix else 0
        places = tuple(range(skip, len(ids)))
    else:
        for position in request.positions:
            if not -len(ids) <= position < len(ids):
                raise PairsError(f"text {number} has {len(ids)} tokens, so no position {position}")
        places = tuple(position % len(ids) for position in request.positions)
    return Prompt(ids, places, tuple((number, place) for place in places))


def without_massive(window: Window) -> Window:
    """The window without tokens whose activation, at its first site, is longer than three medians."""
    first = next(iter(window.values.values()))
    if not len(first):
        return window
    length = first.flatten(1).float().norm(dim=-1)
    kept = length <= MASSIVE * length.median()
    return Window({name: value[kept] for name, value in window.values.items()}, window.index[kept], window.texts)


def top_of(model: Model, sites: Sequence[tuple[str, Site]], top_k: Any, padded: bool) -> int | None:
    """How many numbers of each row are wanted; None for all. PlanError: more than there are, or in rows of one length."""
    if top_k is None:
        return None
    count = integers(top_k, "top_k")[0]
    for name, site in sites:
        width = model.width_of(site)
        if count < 1 or count > width or padded:
            raise PlanError(
                f"top_k={count} of {name}: it is 1 to {width} numbers of each row, and does not go with padded="
            )
    return count
