"""How much nodes of an attribution graph influence its logits: shares of what comes in, along all paths."""

from __future__ import annotations

import torch
from torch import Tensor


class Influence:
    """A graph's edges as shares of all that comes into their target, signs left off (Ameisen et al. 2025)."""

    def __init__(self, adjacency: Tensor) -> None:
        size = adjacency.abs()
        self.shares = size / size.sum(1, keepdim=True).clamp(min=1e-12)

    def of(self, weights: Tensor) -> Tensor:
        """Influence `[node]` on nodes of these weights: over one edge, two, and so on until nothing is left."""
        total, current = torch.zeros_like(weights), weights
        for _ in range(len(weights)):
            current = current @ self.shares
            if not bool(current.any()):
                break
            total = total + current
        return total

    def edges(self, weights: Tensor) -> Tensor:
        """What of the influence goes over each edge `[target, source]`."""
        return self.shares * (self.of(weights) + weights)[:, None]
