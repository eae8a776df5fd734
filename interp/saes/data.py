"""What dictionaries are trained on, whatever a person has: stored activations, tensors, a DataLoader, any iterator.

A `Stream` gives batches `[row, width]` in fp32 from any batch on; which columns are whose is said by site. What comes is checked:
its width before work, that it is finite batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.identity import value_digest
from ..errors import PlanError
from ..shards import StoredActivations
from ..shuffled import Held, Shuffled, Stored
from ..sites import Site
from .library import Dictionary, is_transcoder, whole
from .streams import Drawn, Given, Loaded, Stream, finite, tensor_of
from .views import describe

#: Rows that are left out of training to count dead features on: the last so many, where there are ten times as many.
HELD_OUT = 16_384
#: Batches from which scale and mean of the inputs are estimated.
ESTIMATE = 50


@dataclass(frozen=True)
class Data:
    """A stream, which columns of it each site has, and rows that were held out of it."""

    stream: Stream
    columns: dict[str, slice]
    held_out: Sequence[Tensor] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    rows: Tensor | None = None  # what a person gave, where it is in memory

    def known_by(self) -> dict[str, Any]:
        """What says which activations these are: of a folder its facts and texts, of a tensor its digest; of others nothing."""
        if self.rows is not None:
            return {"rows": value_digest(self.rows)}
        stored = {key: value for key, value in self.facts.items() if key != "shards"}
        return {**stored, "texts": [shard["texts"] for shard in self.facts.get("shards", ())]}

    def of(self, sae: Dictionary, batch: Tensor) -> Tensor:
        """The rows that a dictionary is trained on: its site's columns, of a transcoder `[input | target]`."""
        names = sites_of(sae)
        if not names or names[0] not in self.columns:
            return batch
        return (
            torch.cat([batch[:, self.columns[name]] for name in names], dim=1)
            if len(names) > 1
            else (batch[:, self.columns[names[0]]])
        )


def sites_of(sae: Dictionary) -> tuple[str, ...]:
    """The names of the sites that a dictionary reads and, if it is another one, writes."""
    metadata = sae.cfg.metadata
    names = [metadata.get("site"), metadata.get("site_out") if is_transcoder(sae) else None]
    return tuple(str(name) for name in names if name)


def width_of(sae: Dictionary) -> int:
    """Numbers in a row that it is trained on."""
    return sae.cfg.d_in + (int(getattr(sae.cfg, "d_out", 0)) if is_transcoder(sae) else 0)


def data_of(
    saes: Sequence[Dictionary], given: Any, tokens: int | None, epochs: int | None, size: int, seed: int
) -> Data:
    """What a person gave, as batches.

    Raises:
        PlanError: rows of another width, NaN, batches larger than the data, nothing that says how long to train.
    """
    for name, value in (("tokens", tokens), ("n_epochs", epochs), ("batch_size", size)):
        if value is not None and whole(value, name) < 1:
            raise PlanError(f"{name}={value}: it is 1 or more")
    if isinstance(given, Mapping):
        given, columns = side_by_side(given)
    elif isinstance(given, StoredActivations):
        columns = stored_columns(saes, given)
    else:
        columns = {}
    if isinstance(given, StoredActivations | Tensor):
        rows = Stored(given, tuple(columns)) if isinstance(given, StoredActivations) else Held(rows_of(given))
        check_widths(saes, rows.width, columns)
        return drawn(rows, columns, given, (tokens, epochs), size, seed)
    length = getattr(given, "__len__", None)
    if callable(length) and not isinstance(given, Iterator):
        own = int(getattr(given, "batch_size", None) or size)
        if not length():
            raise PlanError("the loader of activations has no batch: give it data, or a smaller batch_size")
        loaded = Loaded(given, own, epochs or 1, length())
        check_widths(saes, next(loaded.peek(1)).shape[1], columns)
        return Data(loaded, columns)
    if tokens is None or not isinstance(given, Iterable):
        raise PlanError(
            f"train_sae was given a {type(given).__name__}: give stored activations, a tensor [row, width], a DataLoader with "
            "n_epochs=, or an iterator of batches with tokens="
        )
    iterator = iter(given)
    first = tensor_of(next(iterator, None))
    check_widths(saes, first.shape[1], columns)
    return Data(Given(iterator, len(first), -(-tokens // len(first)), [first]), columns)


def drawn(
    rows: Stored | Held,
    columns: dict[str, slice],
    given: Any,
    asked: tuple[int | None, int | None],
    size: int,
    seed: int,
) -> Data:
    """Rows in a seeded order; the last of them are held out where there are many."""
    tokens, epochs = asked
    held = HELD_OUT if len(rows) >= 10 * HELD_OUT else 0
    count = len(rows) - held
    total = tokens if tokens is not None else count * (epochs or 1)
    shuffled = Shuffled(rows, size, seed, count)
    stream = Drawn(shuffled, size, total // size)
    if not stream.length:
        raise PlanError(f"tokens={tokens} is less than one batch of {size}; give more tokens, or a smaller batch_size")
    facts = dict(given.facts) if isinstance(given, StoredActivations) else {}
    return Data(stream, columns, list(shuffled.held_out()), facts, rows.values if isinstance(rows, Held) else None)


def rows_of(given: Tensor) -> Tensor:
    """Activations of a person as rows, with their heads side by side. PlanError: NaN, or no rows."""
    if given.ndim < 2 or not given.numel():
        raise PlanError(f"activations are [row, width] with 1 row or more, not {list(given.shape)}")
    return finite(given.flatten(1))


def side_by_side(given: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, slice]]:
    """Activations by site as one tensor, and where each stands in it. PlanError: not the same tokens."""
    parts = {str(Site.parse(name)): rows_of(value) for name, value in given.items()}
    if len({len(part) for part in parts.values()}) != 1:
        shapes = {name: list(part.shape) for name, part in parts.items()}
        raise PlanError(f"activations of several sites are of the same tokens, but their shapes are {shapes}")
    return torch.cat(list(parts.values()), dim=1), spans({name: part.shape[1] for name, part in parts.items()})


def spans(widths: Mapping[str, int]) -> dict[str, slice]:
    """Columns of sites that stand side by side."""
    made, start = {}, 0
    for name, width in widths.items():
        made[name] = slice(start, start + width)
        start += width
    return made


def stored_columns(saes: Sequence[Dictionary], given: StoredActivations) -> dict[str, slice]:
    """Columns of the sites that are needed of a folder. PlanError: one that it does not hold."""
    needed = dict.fromkeys(name for sae in saes for name in sites_of(sae))
    if not needed and len(given.names) == 1:
        needed = {given.names[0]: None}
    if missing := [name for name in needed if name not in given.names]:
        raise PlanError(f"{given.folder} holds no {missing[0]}; it holds {', '.join(given.names)}")
    if not needed:
        raise PlanError(
            f"{given.folder} holds {', '.join(given.names)}: say which by SparseAutoencoder(model, site, …)"
        )
    return spans({name: given.width(name) for name in needed})


def check_widths(saes: Sequence[Dictionary], width: int, columns: Mapping[str, slice]) -> None:
    """PlanError: a dictionary of another width than its rows."""
    for sae in saes:
        names = sites_of(sae)
        own = [columns[name] for name in names if name in columns]
        found = sum(part.stop - part.start for part in own) if own else width
        if found != width_of(sae):
            extra = f" and {getattr(sae.cfg, 'd_out', 0)} behind them" if is_transcoder(sae) else ""
            raise PlanError(f"{describe(sae)}{extra} cannot be trained on rows of {found} numbers")
