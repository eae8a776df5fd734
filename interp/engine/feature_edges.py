"""Edges between features of dictionaries inside a trace (Marks et al. 2024): Δ of an upstream part times the gradient, by it, of
what each downstream part does for the metric.

The parts at a site (features, and what the dictionary does not explain) add up to the stream's change, so what arrives at a
downstream part from all upstream ones is all that arrives there. Standard library and torch only: these functions also travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.layout import Taps
from .gradients import Tape
from .views import parts_of, pulled, there

if TYPE_CHECKING:
    from ..views import Seen
    from .program import Place, Program


def feature_tapes(program: Program) -> set[Place]:
    """The taps of all dictionaries."""
    views = program["views"]
    return {(layer, views[features].tap) for layer, features, _ in program["features"]}


class Ends:
    """One dictionary's site in a run: its tap's tensor, and its parts there, features first, the rest as the last."""

    def __init__(self, program: Program, tape: Tape, place: tuple[int, str, str]) -> None:
        layer, *names = place
        first = program["views"][names[0]]
        self.live: Tensor = tape.live[layer, first.tap]
        self.views: list[Seen] = [there(program["views"][name], self.live.device) for name in names]
        self.base = program["base"].to(self.live.device)
        self.source = program["source"].to(self.live.device)

    def change(self) -> list[Tensor]:
        """Source less base of the features, and of the rest: `[pair, position, part, 1]`."""
        x = self.live.detach()
        return [parts_of(view, x[self.source]) - parts_of(view, x[self.base]) for view in self.views]

    def reached(self, gradient: Tensor) -> Tensor:
        """What every part's change does along a gradient by the tap `[row, position, d]`: `[pair, features + 1]`."""
        effects = [
            change * pulled(view, gradient[self.base]) for view, change in zip(self.views, self.change(), strict=True)
        ]
        return torch.cat([effects[0].sum((1, 3)), effects[1].sum((1, 2, 3))[:, None]], dim=1)

    def targets(self, gradient: Tensor) -> Tensor:
        """What each part does for the metric, with its own gradient held: `[features + 1]`, summed over pairs."""
        made = []
        for view in self.views:
            parts, slope = parts_of(view, self.live[self.base]), pulled(view, gradient[self.base]).detach()
            made.append((parts * slope).sum((0, 1, 3)))
        return torch.cat([made[0], made[1].sum()[None]])


def feature_scores(taps: Taps, program: Program, tape: Tape, total: Tensor) -> dict[str, Any]:
    """{"nodes": for each site [pair, part], "edges": for each site but the first [pair, downstream part, upstream part]}."""
    ends = [Ends(program, tape, place) for place in program["features"]]
    slopes = torch.autograd.grad(total, [end.live for end in ends], retain_graph=True)
    nodes, edges = [], []
    for number, (end, slope) in enumerate(zip(ends, slopes, strict=True)):
        with torch.no_grad():
            nodes.append(end.reached(slope).float().cpu())
        if not number:
            continue
        before = ends[number - 1]
        rows = []
        for target in end.targets(slope):
            (gradient,) = torch.autograd.grad(target, before.live, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                found = torch.zeros_like(before.live) if gradient is None else gradient
                rows.append(before.reached(found).float().cpu())
        edges.append(torch.stack(rows, dim=1))
    return {"nodes": nodes, "edges": edges}
