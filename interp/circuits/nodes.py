"""The nodes and edges that a model has: senders, receivers, and which receiver reads which sender.

Numpy, `errors` and `sites` only. A score matrix is [sender, receiver] in the orders given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..errors import CircuitError, SiteError
from ..order import READERS, Order
from ..sites import KIND, KINDS, RECEIVERS, SENDERS, Site

EMBED, LOGITS = Site("embed"), Site("logits")
#: The kind of site that stands for each reader of `interp.order`.
KIND_READING = {kind.reads: kind.name for kind in KIND.values() if kind.reads}
#: What says which edges a model has: `Facts`, a `Model`, or a mapping with their names.
Described = Any
#: A name such as L999999999.H0 in a damaged file must not make a graph of that size.
MOST_HEADS = 1_000_000


def is_head(site: Site) -> bool:
    """Whether a node is a head, as what it writes."""
    return bool(site.axis) and site.facts.sends


def is_input(site: Site) -> bool:
    """Whether a node is an input of a head: its q, or its key/value head's k or v."""
    return bool(site.axis and site.facts.reads)


@dataclass(frozen=True)
class Facts:
    """What decides the edges of a model; `Facts.of(model)` reads it from a loaded one.

    A sender is `embed`, a head (`L3.H2`) or an MLP (`L3.mlp`). A receiver is a head's q (`L3.H2.q`), a
    key/value head's k or v (`L3.H1.k`), an MLP (`L3.mlp`, the same node as the sender) or `logits`. Attention
    of layer l reads every sender of the layers below; the MLP of layer l also reads the heads of l, unless
    the block is `parallel`, where both read the same stream; the logits read all. So what a receiver reads
    is the first so many senders, in the order of the forward pass.

    Raises:
        CircuitError: a count below one, or query heads that the key/value heads do not divide.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CircuitError(f"facts: {name} must be an integer of at least 1, not {value!r}")
        if self.n_layers * self.n_heads > MOST_HEADS:
            raise CircuitError(f"facts: {self.n_layers} layers of {self.n_heads} heads are no model that exists")
        if not isinstance(self.parallel, bool):
            raise CircuitError(f"facts: parallel must be true or false, not {self.parallel!r}")
        if self.n_heads % self.n_kv_heads:
            raise CircuitError(
                f"facts: {self.n_kv_heads} key/value heads do not divide {self.n_heads} query heads evenly"
            )

    @classmethod
    def of(cls, model: Described) -> Facts:
        """The facts of a `Model`, of other `Facts`, or of a dictionary with these names.

        Raises:
            CircuitError: a name is missing or unknown, or its value is wrong.
        """
        if isinstance(model, Facts):
            return model
        names = [field.name for field in fields(cls)]
        if not isinstance(model, Mapping):
            model = {name: getattr(model, name) for name in names if hasattr(model, name)}
        if unknown := [key for key in model if key not in names]:
            raise CircuitError(f"facts: unknown field {unknown[0]!r}; the fields are {', '.join(names)}")
        if missing := [name for name in names[:3] if name not in model]:
            raise CircuitError(f"facts: field {missing[0]!r} is missing")
        return cls(**model)

    def to_dict(self) -> dict[str, object]:
        """The fields as a JSON-able dictionary."""
        return asdict(self)

    @cached_property
    def order(self) -> Order:
        """The order of senders and receivers."""
        return Order(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel)

    @cached_property
    def senders(self) -> tuple[Site, ...]:
        """Every sender in the order of the forward pass: embed, then heads and MLP of each layer."""
        layers, heads = range(self.n_layers), range(self.n_heads)
        return (
            EMBED,
            *(site for n in layers for site in (*(Site("head_out", n, h) for h in heads), Site("mlp_out", n))),
        )

    @cached_property
    def receivers(self) -> tuple[Site, ...]:
        """Every receiver in forward order: q, k, v by head and the MLP of each layer, then logits."""
        made = [
            Site(KIND_READING[reader], layer, head if KIND[KIND_READING[reader]].axis else None)
            for layer in range(self.n_layers)
            for reader in READERS
            for head in range(self.order.count(reader))
        ]
        return (*made, LOGITS)

    @cached_property
    def sender_index(self) -> dict[Site, int]:
        """Row of each sender in a score matrix."""
        return {site: i for i, site in enumerate(self.senders)}

    @cached_property
    def receiver_index(self) -> dict[Site, int]:
        """Column of each receiver in a score matrix."""
        return {site: i for i, site in enumerate(self.receivers)}

    def upstream_count(self, receiver: Site | str) -> int:
        """How many senders, the first ones in their order, the receiver reads.

        Raises:
            CircuitError: not a receiver of this model.
        """
        if (site := node(receiver)) not in self._counts:
            raise CircuitError(f"{site.node} is no receiver of a model with {self}")
        return self._counts[site]

    @cached_property
    def _counts(self) -> dict[Site, int]:
        return {site: self.order.read_by(site.layer or 0, site.facts.reads) for site in self.receivers}

    @cached_property
    def mask(self) -> np.ndarray:
        """Which edges exist: bool [sender, receiver], read-only."""
        counts = np.array([self._counts[site] for site in self.receivers])
        exists = np.arange(len(self.senders))[:, None] < counts
        exists.setflags(write=False)
        return exists

    @cached_property
    def n_edges(self) -> int:
        """How many edges the model has."""
        return int(self.mask.sum())

    def has_edge(self, sender: Site, receiver: Site) -> bool:
        """Whether both exist in this model and the receiver reads the sender."""
        place = self.sender_index.get(sender)
        return place is not None and place < self._counts.get(receiver, 0)

    def heads_behind(self, receiver: Site) -> tuple[Site, ...]:
        """The heads that an input feeds: its own for q, its group for k and v, none for other receivers."""
        if not is_input(receiver):
            return ()
        size = self.n_heads // self.order.count(receiver.facts.reads)
        first = (receiver.head or 0) * size
        return tuple(Site("head_out", receiver.layer, first + i) for i in range(size))

    def inputs_of(self, sender: Site) -> tuple[Site, ...]:
        """The receivers that a sender is computed from: a head's q, k, v; an MLP itself; none for embed."""
        if not is_head(sender):
            return () if sender == EMBED else (sender,)
        size = self.n_heads // self.n_kv_heads
        return tuple(
            Site(kind, sender.layer, (sender.head or 0) // (size if KIND[kind].axis == "kv head" else 1))
            for kind in map(KIND_READING.__getitem__, READERS[:3])
        )

    def __str__(self) -> str:
        kv = "" if self.n_kv_heads == self.n_heads else f", {self.n_kv_heads} key/value heads"
        return f"{self.n_layers} layers, {self.n_heads} heads{kv}{', parallel blocks' if self.parallel else ''}"


def node(name: Site | str) -> Site:
    """The site of a circuit's node: `embed`, `L3.H2`, `L3.mlp`, `L3.H2.q`, `L3.H1.k`, `L3.H1.v` or `logits`.

    Raises:
        CircuitError: a name of none of these forms; a circuit's nodes stand for all positions.
    """
    try:
        return _node(name)
    except TypeError as error:  # not text, and perhaps not hashable either
        raise CircuitError(f"{name!r} names no node: nodes are named by text or by a Site") from error


@lru_cache(maxsize=1 << 18)
def _node(name: Site | str) -> Site:
    try:
        site = Site.parse(name)
    except SiteError as error:
        raise CircuitError(f"{name!r} names no node: {error}") from error
    known = site.kind in SENDERS or site.kind in RECEIVERS
    numbers = (site.layer, site.head) if site.axis else (site.layer,) if site.facts.layered else ()
    if not known or site.position is not None or any(n is None or n < 0 for n in numbers):
        raise CircuitError(
            f"{site} is no node of a circuit: nodes are embed, L3.H2, L3.mlp, L3.H2.q, L3.H1.k, L3.H1.v and "
            "logits, at all positions"
        )
    return site


def order(site: Site) -> tuple[int, int, int]:
    """Sort key of a node in the order of the forward pass; a head comes after its inputs."""
    if site.layer is None:
        return (-1 if site == EMBED else 1 << 30, 0, 0)
    return (site.layer, KINDS.index(site.kind), site.head or 0)
