"""Rows of activations in a seeded order, batch by batch, from memory or from shards on disk, from any place on.

Rows are read in blocks; each epoch takes the blocks in an order of its own, puts as many together as fit a buffer, and draws
the rows of the buffer without repetition. What comes at a place follows from the seed alone: whoever knows how many batches
were taken can go on there, bit for bit. Memory is the buffer's, whatever lies on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import CheckpointError, PlanError
from .shards import StoredActivations

#: Rows of a block, and bytes of a buffer: at d_model 576 some 58,000 rows, from 57 places of what is stored.
BLOCK, BUFFER = 1024, 2**27


class Rows(Protocol):
    """Where rows come from."""

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def blocks(self, count: int) -> Sequence[tuple[int, int, int]]:
        """(place, start, stop) of the blocks that the first `count` rows are in."""

    def read(self, block: tuple[int, int, int]) -> Tensor:
        """The rows `[row, width]` of a block."""


@dataclass(frozen=True)
class Held:
    """Rows that are in memory, `[row, width]`: one block."""

    values: Tensor

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def blocks(self, count: int) -> Sequence[tuple[int, int, int]]:
        """As `Rows.blocks`."""
        return [(0, 0, count)]

    def read(self, block: tuple[int, int, int]) -> Tensor:
        """As `Rows.read`."""
        return self.values[block[1] : block[2]]


@dataclass(frozen=True)
class Stored:
    """Rows of one or more sites in a folder of shards, side by side where there are several."""

    stored: StoredActivations
    names: tuple[str, ...]

    @property
    def width(self) -> int:
        """Numbers of a row, of all sites together."""
        return sum(self.stored.width(name) for name in self.names)

    def __len__(self) -> int:
        return len(self.stored)

    def blocks(self, count: int) -> Sequence[tuple[int, int, int]]:
        """As `Rows.blocks`; none reaches over the end of a shard."""
        made, before = [], 0
        for place, shard in enumerate(self.stored.facts["shards"]):
            size = min(int(shard["tokens"]), count - before)
            made += [(place, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
            before += max(size, 0)
        return made

    def read(self, block: tuple[int, int, int]) -> Tensor:
        """As `Rows.read`. CheckpointError: a shard that is missing or damaged."""
        place, start, stop = block
        path = self.stored.folder / self.stored.facts["shards"][place]["file"]
        try:
            with safe_open(path, framework="pt") as file:
                parts = [file.get_slice(name)[start:stop].flatten(1) for name in self.names]
        except Exception as error:  # safetensors has its own class for damage, and OSError for the rest
            raise CheckpointError(f"cannot read {path}: {error}") from error
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Shuffled:
    """Batches of rows in the order of a seed, epoch after epoch without an end: `batches(from_batch)`.

    Args:
        rows: where they come from.
        size: rows of a batch.
        seed: of the order.
        count: only the first so many rows; None = all. The others are held out.
        buffer: bytes of rows (as fp32) that are mixed at once.

    Raises:
        PlanError: a batch that is larger than the data.
    """

    rows: Rows
    size: int
    seed: int = 0
    count: int | None = None
    buffer: int = BUFFER

    def __post_init__(self) -> None:
        if not 1 <= self.size <= len(self):
            raise PlanError(f"batches of {self.size} rows from {len(self)}: a batch has 1 row to all of them")

    def __len__(self) -> int:
        return len(self.rows) if self.count is None else self.count

    def batches(self, from_batch: int = 0) -> Iterator[Tensor]:
        """Batches `[row, width]` from a place on; those of one epoch's end hold the first rows of the next."""
        skip = from_batch * self.size
        waiting: list[Tensor] = []
        for part in self._parts(skip):
            waiting.append(part)
            if sum(map(len, waiting)) >= self.size:
                whole = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                full = len(whole) // self.size * self.size
                yield from whole[:full].split(self.size)
                waiting = [whole[full:]] if full < len(whole) else []

    def _parts(self, skip: int) -> Iterator[Tensor]:
        """Rows in their order, a few batches at a time, without the first `skip`."""
        epoch, skip = divmod(skip, len(self))
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            for group in self._groups(generator):
                size = sum(stop - start for _, start, stop in group)
                order = torch.randperm(size, generator=generator)
                if skip >= size:
                    skip -= size
                    continue
                parts = [self.rows.read(block) for block in group]
                held = torch.cat(parts) if len(parts) > 1 else parts[0]
                for chosen in order[skip:].split(self.size):
                    yield held[chosen]
                skip = 0
            epoch += 1

    def _groups(self, generator: torch.Generator) -> list[list[tuple[int, int, int]]]:
        """The blocks of an epoch, in its order, as many together as fit the buffer."""
        blocks = self.rows.blocks(len(self))
        limit = max(1, self.buffer // (4 * self.rows.width))
        groups: list[list[tuple[int, int, int]]] = [[]]
        filled = 0
        for index in torch.randperm(len(blocks), generator=generator).tolist():
            rows = blocks[index][2] - blocks[index][1]
            if groups[-1] and filled + rows > limit:
                groups.append([])
                filled = 0
            groups[-1].append(blocks[index])
            filled += rows
        return groups

    def held_out(self) -> Iterator[Tensor]:
        """The rows behind the first `count`, in their own order, in blocks."""
        first = 0
        for place, start, stop in self.rows.blocks(len(self.rows)):
            skip = max(0, len(self) - first)
            first += stop - start
            if first > len(self):
                yield self.rows.read((place, start + skip, stop))
