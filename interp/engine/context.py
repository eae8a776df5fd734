"""What the engine is asked: cells on the runs of pairs, scored by a metric; and the facts that compiling them needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..cells import Resolved
from ..edits import Edit
from ..encoded import EncodedPairs
from ..errors import PlanError
from ..metrics import Metric
from ..models.layout import Taps, part_index
from ..models.model import Model
from ..order import Order
from ..sites import KINDS, Site
from ..tokens import Tokens
from ..views import Seen, View

if TYPE_CHECKING:
    from .program import Place

#: What stands in for cut edges: "source", "zero", or constants [sender, position or 1, d_model].
Reference = str | torch.Tensor
DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the base run's embeddings: standard deviation, and per pair ((position, seed), …)."""

    std: float
    at: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Runs:
    """The two runs of every pair, and which of them is the base: the one that takes activations of the other, the source.

    Raises:
        PlanError: an unknown direction.
    """

    encoded: EncodedPairs
    direction: str = "noising"
    noise: Noise | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise PlanError(
                f"direction {self.direction!r}; it is 'noising' (clean run, corrupted patches) or 'denoising'"
            )

    def need_source(self) -> Runs:
        """The same. PlanError: there is no source run."""
        if self.encoded.corrupted is None:
            raise PlanError("these pairs have no corrupted prompts to patch from; give PromptPairs(corrupted=[...])")
        return self

    def __len__(self) -> int:
        return len(self.encoded)

    @cached_property
    def noising(self) -> bool:
        """Whether the clean run is the base, as it is where there is no other."""
        return self.direction == DIRECTIONS[0] or self.encoded.corrupted is None

    @property
    def base(self) -> tuple[Tokens, ...]:
        """Token ids of the base run of every pair."""
        return self.encoded.clean if self.noising or self.encoded.corrupted is None else self.encoded.corrupted

    @property
    def source(self) -> tuple[Tokens, ...] | None:
        """Token ids of the source run of every pair, or None."""
        if self.encoded.corrupted is None:
            return None
        return self.encoded.corrupted if self.noising else self.encoded.clean

    @property
    def streams(self) -> int:
        """How many runs each pair has."""
        return 1 if self.encoded.corrupted is None else 2

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the longer prompt of each pair."""
        return [max(map(len, prompts)) for prompts in zip(self.base, self.source or self.base, strict=True)]

    @cached_property
    def order(self) -> list[int]:
        """The pairs, shortest first."""
        return sorted(range(len(self)), key=lambda pair: (self.lengths[pair], pair))

    @property
    def first_difference(self) -> Tokens | None:
        """Per pair the first position at which base and source differ; None where that is not known."""
        if self.noise is not None:
            return tuple(min(position for position, _ in at) for at in self.noise.at)
        known = self.encoded.corrupted is not None and self.encoded.aligned
        return self.encoded.first_difference if known else None

    def prompt(self, pair: int, source: bool) -> Tokens:
        """Token ids of a run; the base run's where there is no source run."""
        return self.source[pair] if source and self.source is not None else self.base[pair]

    def answer_at(self, pair: int, source: bool) -> int:
        """The position in the base (or source) prompt whose logits are read."""
        clean = source != self.noising
        return (self.encoded.answer_positions if clean else self.encoded.answer_positions_corrupted)[pair]


@dataclass(frozen=True)
class Experiment:
    """Cells on the runs of pairs, scored by a metric: all that the engine is asked, and what the record says of it.

    `name` is what records and plots call the pairs; `details` are facts of the method, for provenance and for the identity
    of a checkpoint; `rounding` is what `check_metric` said of the metric, where the caller has asked already.
    """

    model: Model
    runs: Runs
    resolved: Resolved
    metric: Metric
    method: str
    name: str = ""
    details: Mapping[str, object] = field(default_factory=dict)
    reference: Reference = "source"
    rounding: float | None = None


@dataclass(frozen=True)
class Context:
    """What compiling a forward pass needs: the runs, the model's taps and its forward's arguments, constants and views."""

    runs: Runs
    taps: Taps
    accepts: frozenset[str]
    cache_class: type | None = None
    values: dict[Place, torch.Tensor] = field(default_factory=dict)
    indices: dict[object, int] = field(default_factory=dict)
    reference: Reference = "source"
    masks: tuple[np.ndarray, ...] = ()  # edges that are cut, [receiver, sender], each once
    views: dict[str, Seen] = field(default_factory=dict)
    parts: dict[str, dict[int, int]] = field(default_factory=dict)  # which row of a view's tensors each part is
    want_logits: bool = False

    @cached_property
    def order(self) -> Order:
        """The order of senders and receivers."""
        return Order.of(self.taps)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """The number of each kind of site, and of each view, in tables of edits."""
        return {name: number for number, name in enumerate((*KINDS, *self.views))}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Kinds and views by number."""
        return tuple(self.kinds)

    @cached_property
    def mask_of(self) -> dict[int, int]:
        """Where a mask stands among `masks`."""
        return {id(mask): number for number, mask in enumerate(self.masks)}

    def part(self, site: Site) -> int:
        """The head or unit of a site as tables have it; -1 for all."""
        if site.part is None:
            return -1
        return self.parts[site.kind][site.part] if site.view is not None else site.part

    def value_index(self, edit: Edit) -> int:
        """Where the constant of an edit stands in the values of its site; -1 for none."""
        return self.indices.get((edit.site.place, value_key(edit.value)), -1)


def context_of(model: Model, runs: Runs, resolved: Resolved, schedule: str, reference: Reference = "source") -> Context:
    """What compiling needs to know about this model, these runs and these cells.

    Raises:
        PlanError: a constant that does not fit its site; two views of one name.
    """
    from transformers import DynamicCache

    views, parts = views_of(resolved)
    values, indices = constants(resolved, model.taps, max(map(len, runs.base)), parts)
    cache = DynamicCache if schedule == "prefix" else None
    masks = {id(mask): mask for cell in resolved.cells for mask in (cell.cut, cell.trunk) if mask is not None}
    return Context(
        runs, model.taps, model.accepts, cache, values, indices, reference, tuple(masks.values()), views, parts
    )


def views_of(resolved: Resolved) -> tuple[dict[str, Seen], dict[str, dict[int, int]]]:
    """The views that cells name, with the tensors of the parts in use alone, and which row of them each part is."""
    used: dict[str, tuple[View, set[int] | None]] = {}
    for cell in resolved.cells:
        for edit, _ in cell.edits:
            view = edit.site.view
            if view is None:
                continue
            assert isinstance(view, View)
            known, units = used.get(view.name, (view, set()))
            if known is not view:
                raise PlanError(f"two views of one plan are named {view.name!r}: {known} and {view}; rename one")
            part = edit.site.part
            used[view.name] = (view, None if units is None or part is None else units | {part})
    seen, parts = {}, {}
    for name, (view, units) in used.items():
        chosen = None if units is None else sorted(units)
        seen[name] = view.seen(chosen)
        parts[name] = {part: row for row, part in enumerate(range(view.parts) if chosen is None else chosen)}
    return seen, parts


def whole_views(resolved: Resolved) -> dict[str, Seen]:
    """The views that cells name, with all of their parts: constants by part are given for all."""
    sites = [edit.site for cell in resolved.cells for edit, _ in cell.edits]
    return {site.kind: site.view.seen() for site in sites if isinstance(site.view, View)}


def value_key(value: object) -> object:
    """Equal constants share one entry: numbers by value, tensors by identity."""
    return id(value) if isinstance(value, torch.Tensor) else value


def constants(
    resolved: Resolved, taps: Taps, length: int, parts: Mapping[str, Mapping[int, int]]
) -> tuple[dict[Place, torch.Tensor], dict[object, int]]:
    """The constants of cells by site: `[value, position or 1, feature or 1]`, and where each edit's constant stands.

    Raises:
        PlanError: a constant that is no finite number or tensor, or does not fit its site or prompts of this length.
    """
    listed: dict[Place, list[torch.Tensor]] = {}
    indices: dict[object, int] = {}
    for cell in resolved.cells:
        for edit, _ in cell.edits:
            if edit.value is None:
                continue
            site, key = edit.site.place, (edit.site.place, value_key(edit.value))
            if key not in indices:
                indices[key] = len(listed.setdefault(site, []))
                value = constant(edit, taps, length)
                if edit.site.view is not None and value.shape[1] > 1:  # only the parts in use travel
                    by_part = value.unflatten(1, (edit.site.view.parts, -1))
                    value = by_part[:, list(parts[edit.site.kind])].flatten(1)
                listed[site].append(value)
    stacked = {}
    for site, values in listed.items():
        shape = [max(value.shape[dim] for value in values) for dim in (0, 1)]
        stacked[site] = torch.stack([value.expand(*shape) for value in values])
    return stacked, indices


def width_of(site: Site, taps: Taps) -> int:
    """How many numbers the tensor that holds a site must have for a constant to fit: up to its last feature."""
    facts = site.facts
    if site.view is not None:
        return site.view.parts
    if facts.view == "mixture":
        return 1
    return taps["d_model"] if facts.view == "whole" else int(part_index(taps, site.kind).max()) + 1


def constant(edit: Edit, taps: Taps, length: int) -> torch.Tensor:
    """An edit's constant as `[position or 1, feature or 1]`, checked against its site."""
    try:
        value = torch.as_tensor(edit.value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"the value of {edit.op!r} at {edit.site} is {edit.value!r}, no number or tensor") from error
    width = width_of(edit.site, taps)
    shape = (1,) * (2 - value.ndim) + tuple(value.shape)
    fits = len(shape) == 2 and (shape[1] == 1 or shape[1] >= width) and (shape[0] == 1 or shape[0] >= length)
    if not fits:
        raise PlanError(
            f"the value of {edit.op!r} at {edit.site} has shape {list(value.shape)}; it is a number, [{width}] features, "
            f"or [{length}, {width}] by position, as the site's module has them"
        )
    if not value.isfinite().all():
        raise PlanError(f"the value of {edit.op!r} at {edit.site}, shape {list(value.shape)}, holds NaN or infinity")
    return value.reshape(shape)
