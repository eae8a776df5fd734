"""The order of nodes: every sender and receiver of a model as a number, as a forward pass reaches them.

A sender is `embed` (the stream that enters the first block), a head or an MLP; a receiver is a head's q, a key/value
head's k or v, an MLP, or the logits. Masks and score matrices have their axes in this order. Standard library only: this
also travels to a remote server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

#: What a layer's receivers are, in their order; `logits` stands behind all layers.
READERS = ("q", "k", "v", "mlp")
LOGITS = "logits"


class Order(NamedTuple):
    """What decides the order: how many layers and heads there are, and whether attention and MLP read one stream."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, taps: Mapping[str, object]) -> Order:
        """The order of a model's nodes, from the facts that travel with every trace."""
        n_layers, n_heads, n_kv_heads = (int(str(taps[name])) for name in cls._fields[:3])
        return cls(n_layers, n_heads, n_kv_heads, bool(taps["parallel"]))

    def count(self, reader: str) -> int:
        """How many receivers of a kind each layer has: query heads, key/value heads, or one."""
        return {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}.get(reader, 1)

    @property
    def senders(self) -> int:
        """How many senders there are."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def receivers(self) -> int:
        """How many receivers there are."""
        return self.n_layers * self.per_layer + 1

    @property
    def per_layer(self) -> int:
        """How many receivers each layer has."""
        return sum(self.count(reader) for reader in READERS)

    def sender(self, layer: int, head: int | None) -> int:
        """The number of a sender: 0 for embed (layer -1), then the heads and the MLP (`head` None) of each layer."""
        if layer < 0:
            return 0
        return 1 + layer * (self.n_heads + 1) + (self.n_heads if head is None else head)

    def layer_of(self, sender: int) -> int:
        """The layer of a sender; 0 for embed, which enters there."""
        return max(0, (sender - 1) // (self.n_heads + 1))

    def receiver(self, layer: int, reader: str, head: int = 0) -> int:
        """The number of a receiver: q, k, v by head and the MLP of each layer, then the logits."""
        if reader == LOGITS:
            return self.n_layers * self.per_layer
        before = READERS[: READERS.index(reader)]
        return layer * self.per_layer + sum(self.count(kind) for kind in before) + head

    def layer_read(self, receiver: int) -> int:
        """The layer of a receiver; the number of layers for the logits."""
        return receiver // self.per_layer

    def read_by(self, layer: int, reader: str) -> int:
        """How many senders, the first ones in their order, a receiver reads: those below its layer.

        An MLP also reads the heads of its own layer, unless both read the same stream (`parallel`).
        """
        if reader == LOGITS:
            return self.senders
        after = reader == "mlp" and not self.parallel
        return self.sender(layer, None if after else 0)
