"""Batches of activations in an order that can be gone on with: drawn, from a loader, or as an iterator gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import PlanError
from ..shuffled import Shuffled


class Stream(Protocol):
    """Batches in an order that can be gone on with, of `size` rows."""

    @property
    def size(self) -> int: ...

    @property
    def length(self) -> int | None:
        """How many batches there are; None where nobody knows, or without an end."""

    def batches(self, done: int, place: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Batches behind the first `done`, given what `place` said there."""

    def place(self) -> dict[str, Tensor]:
        """What is needed beside the number of batches to go on from here."""


@dataclass(frozen=True)
class Drawn:
    """Rows in a seeded order: the place is the number of batches."""

    shuffled: Shuffled
    size: int
    length: int | None

    def batches(self, done: int, place: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """As `Stream.batches`."""
        return self.shuffled.batches(done)

    def place(self) -> dict[str, Tensor]:
        """Nothing more."""
        return {}


@dataclass(frozen=True)
class Loaded:
    """A DataLoader, or anything that is iterated anew each epoch. What it draws comes from torch's generator: its state at the
    start of an epoch is kept, and an epoch that was broken off is drawn again up to where it was."""

    loader: Iterable[Any]
    size: int
    epochs: int
    per_epoch: int
    at: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """As `Stream.length`."""
        return self.epochs * self.per_epoch

    def peek(self, count: int) -> Iterator[Tensor]:
        """Some batches of an epoch of their own, the same whenever they are asked for; no generator is moved."""
        own = getattr(self.loader, "generator", None)
        before = None if own is None else own.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if own is not None:
                own.manual_seed(0)
            taken = list(islice(map(tensor_of, self.loader), count))
        if own is not None:
            own.set_state(before)
        return iter(taken)

    def batches(self, done: int, place: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """As `Stream.batches`."""
        own = getattr(self.loader, "generator", None)
        if place:
            torch.set_rng_state(place["torch"])
            if own is not None:
                own.set_state(place["loader"])
        for epoch in range(done // self.per_epoch, self.epochs):
            self.at["torch"] = torch.get_rng_state()
            if own is not None:
                self.at["loader"] = own.get_state()
            skip = done - epoch * self.per_epoch if epoch == done // self.per_epoch else 0
            yield from islice(map(tensor_of, self.loader), skip, None)

    def place(self) -> dict[str, Tensor]:
        """The generators' states as the epoch began."""
        return dict(self.at)


@dataclass(frozen=True)
class Given:
    """An iterator: it is taken as it comes, once; to go on, as many batches are passed over in a new one."""

    iterator: Iterator[Any]
    size: int
    length: int
    ahead: list[Tensor] = field(default_factory=list)

    def peek(self, count: int) -> Iterator[Tensor]:
        """The next batches, which stay."""
        self.ahead.extend(map(tensor_of, islice(self.iterator, max(0, count - len(self.ahead)))))
        return iter(self.ahead[:count])

    def batches(self, done: int, place: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """As `Stream.batches`. PlanError: it ends too early."""
        taken = 0
        for item in islice(chain(self.ahead, self.iterator), done, None):
            taken += 1
            yield tensor_of(item)
        raise PlanError(
            f"the iterator of activations ended after {done + taken} batches, and tokens= asks for {self.length} of "
            f"{self.size}; what was trained is in the dictionary, give more batches or fewer tokens"
        )

    def place(self) -> dict[str, Tensor]:
        """Nothing more."""
        return {}


def tensor_of(item: Any) -> Tensor:
    """A batch `[row, width]` in fp32, from what loaders give. PlanError: no numbers of two dimensions, or NaN."""
    item = item[0] if isinstance(item, list | tuple) and len(item) else item
    if not isinstance(item, Tensor) or item.ndim < 2 or not item.numel():
        shape = list(item.shape) if isinstance(item, Tensor) else type(item).__name__
        raise PlanError(f"a batch of activations is a tensor [row, width], not {shape}")
    return finite(item.flatten(1).float())


def finite(batch: Tensor) -> Tensor:
    """The same, if every number is finite. PlanError: NaN or infinity."""
    if not bool(batch.isfinite().all()):
        bad = int((~batch.isfinite()).any(1).sum())
        raise PlanError(
            f"{bad} of {len(batch)} rows of activations hold NaN or infinity: a model in float16 overflows (load it in "
            "float32 or bfloat16), and padded= fills with NaN (collect without it)"
        )
    return batch
