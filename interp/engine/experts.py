"""Backward rules of a layer of experts: Σ weight · expert(x), over the few experts that a router chose for each token.

Each expert is run by itself at both ends, its steps by their own rules; each product with a weight is one more. Where the two
runs choose different experts, the change of expert is a step in the gap between their scores, and goes to that gap by its
secant. Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..models.layout import Envoy


class Recorded:
    """Where a module is run at the other ends by itself: what its steps got, in their order."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same twice; it is kept."""
        self.seen.append(x.detach())
        return x.detach(), x.detach()


class Replayed:
    """Where the same module is run at the bases behind that: all rows are bases, the other ends are what was recorded."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = iter(seen)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is here, and what was there."""
        return x.detach(), next(self.seen)

    def base(self, gradient: Tensor) -> Tensor:
        """All of it."""
        return gradient

    def put(self, part: Tensor, shape: torch.Size) -> Tensor:
        """All of it."""
        return part.reshape(shape)


class Flips:
    """Where the two runs chose different experts `[token, slot]`: a step in how far the base's was ahead of the other's."""

    def __init__(self, scores: Tensor, index: Tensor, rows: Envoy) -> None:
        self.index, self.rows = index, rows
        self.base, self.end = rows.ends(index)
        self.where = self.base != self.end
        ahead, there = (
            part.gather(-1, self.base) - part.gather(-1, self.end) for part in (rows.base(scores), rows.ends(scores)[1])
        )
        apart = there - ahead.detach()
        self.passed = (ahead - ahead.detach()) / apart.masked_fill(~self.where | (apart == 0), 1)

    def taken(self, x: Tensor) -> Tensor:
        """What stands at the chosen experts in `x [token, expert]`, with the step from one to another."""
        there = self.rows.ends(x)[1]
        jump = there.gather(-1, self.end) - there.gather(-1, self.base)
        return x.gather(-1, self.index) + in_rows(self.rows, jump * self.passed, len(x))


def in_rows(rows: Envoy, part: Tensor, count: int) -> Tensor:
    """What adds nothing to the bases' tokens, and its gradient, among `count` tokens of all rows."""
    return rows.put(part - part.detach(), (count, *part.shape[1:]))


def mixed(ruling: Envoy, module: Envoy, args: list[Envoy], out: Tensor, flips: Flips | None) -> Tensor:
    """The output of a layer's experts (tokens, the choice of experts, their weights), and its rule at the bases."""
    x, index, weights = args
    rows, forward = ruling.rows, type(module).forward
    flat = x.reshape(-1, x.shape[-1])
    index, weights = index.reshape(len(flat), -1), weights.reshape(len(flat), -1)
    (w_b, w_s), (chosen, others) = rows.ends(weights), rows.ends(index)

    def each(tokens: Tensor, by: Tensor, how: Envoy) -> Tensor:
        """What the chosen experts make of tokens `[token, slot, d_model]`."""
        ruling.rows = how
        try:
            wide = tokens.repeat_interleave(by.shape[1], 0)
            return forward(module, wide, by.reshape(-1, 1), torch.ones_like(w_b).reshape(-1, 1)).unflatten(0, by.shape)
        finally:
            ruling.rows = rows

    recorded = Recorded()
    there = each(rows.ends(flat)[1].requires_grad_(True), chosen, recorded).detach()
    here = each(rows.base(flat), chosen, Replayed(recorded.seen))
    live = rows.base(weights)
    if ruling.method == "relp":
        linear = (w_b / 2).unsqueeze(-1) * here + (here.detach() / 2) * live.unsqueeze(-1)
    else:
        middle, swapped = ((w_b + w_s) / 2).unsqueeze(-1), there
        linear = middle * here
        if flips is not None and bool(flips.where.any()):
            with torch.no_grad():
                swapped = torch.where(flips.where.unsqueeze(-1), each(rows.ends(flat)[1], others, rows), there)
            linear = linear + middle * (swapped - there) * flips.passed.unsqueeze(-1)
        linear = linear + (here.detach() + swapped) / 2 * live.unsqueeze(-1)
    return out.detach() + in_rows(rows, linear.sum(1), len(flat)).reshape(out.shape)


def aligned(base: Tensor, other: Tensor) -> Tensor:
    """The same experts `[…, slot]` in the order of the base's, those that the base does not have in the places left."""
    same = base.unsqueeze(-1) == other.unsqueeze(-2)  # [..., slot of the base, slot of the other]
    place = torch.where(same.any(-2), same.int().argmax(-2), -1)  # of the other's expert among the base's
    free = same.any(-1).int().sort(dim=-1, stable=True).indices  # the base's slots without a match, first
    number = (place < 0).int().cumsum(-1) - 1
    place = torch.where(place < 0, free.gather(-1, number.clamp(min=0)), place)
    return torch.empty_like(other).scatter(-1, place, other)


def is_experts(module: Envoy) -> bool:
    """Whether a module is a layer's experts: it gets tokens, the choice of experts, and their weights."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return len(names) == 3 and "ind" in names[1] and "weights" in names[2]
