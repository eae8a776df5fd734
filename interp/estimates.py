"""What an experiment will take on a server, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from .markup import definitions


@dataclass(frozen=True)
class Estimate:
    """What `model.estimate` found.

    cells: patched runs. forwards: forward passes. requests: how many are sent. bytes_up, bytes_down: of all of them together, and
    `largest` of the largest. tokens: run there, padding included. weights, activations: bytes of memory there, the second for the
    largest forward pass at a time.
    """

    cells: int
    forwards: int
    requests: int
    bytes_up: int
    largest: int
    bytes_down: int
    tokens: int
    weights: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes on the server's devices."""
        return self.weights + self.activations

    def _said(self) -> dict[str, object]:
        return {
            "patched runs": f"{self.cells:,} in {self.forwards:,} forward passes, {self.tokens:,} tokens",
            "requests": f"{self.requests:,}, the largest of {size(self.largest)}",
            "up, down": f"{size(self.bytes_up)}, {size(self.bytes_down)}",
            "memory there": f"{size(self.memory)}: weights {size(self.weights)}, activations about {size(self.activations)}",
        }

    def __repr__(self) -> str:
        return "Estimate(" + "; ".join(f"{name}: {said}" for name, said in self._said().items()) + ")"

    def _repr_html_(self) -> str:
        return definitions(self._said(), "estimate")


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
