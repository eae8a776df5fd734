"""The state of one forward pass: which rows exist, what is edited and read, what was read.

Standard library and torch only: it is shipped by source to a remote server. A *program* is a plain dictionary made by
`interp.engine.compile`; its fields are those of `interp.engine.program.Program`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..edits import apply_group, group_edits
from ..models.layout import Taps
from ..sites import KIND, KINDS
from .edges import Edges
from .gradients import Tape
from .views import by_part, index_of, parts_of, there, write_through

if TYPE_CHECKING:
    from .program import Place, Program

#: What attention is called with: query, key, value, mask, and its keyword arguments.
Core = dict[str, Any]


class Run:
    """One forward pass. Taps hand their tensor to `visit`, which passes it on to all who listen there."""

    def __init__(self, taps: Taps, program: Program) -> None:
        self.taps, self.program = taps, program
        self.start = program["inputs"]["input_ids"].shape[0]
        self.rows = torch.arange(self.start)
        self.views = dict(program.get("views") or {})
        self.edits = group_edits(program["edits"], [*KINDS, *self.views])
        self.values = program["values"]
        self.reads = set(program["reads"])
        self.active: set[Place] = set()
        self.stops: set[Place] = set()
        self.want(*self.edits, *self.reads)
        self.kept: dict[Place, Tensor] = {}
        self.first = program["first"]
        spec = program.get("edges")
        self.edges = Edges(taps, spec) if spec is not None else None
        self.tape: Tape | None = None  # activations that gradients are taken of
        self.rules: Any = None  # backward rules, which may be the metric's too
        self.cache: Any = None
        self.below: list[tuple[Tensor, Tensor]] = []  # keys and values below the first position run, by layer
        self.entering: Tensor | None = None  # residual stream entering the first block that is run
        self.core: Core | None = None  # the attention call of this layer, where its pattern is to be written
        self.z: Tensor | None = None  # what this layer's output projection receives

    def want(self, *sites: Place) -> None:
        """Listen at these sites; a view, and a kind that is written through another, is listened for at that one's tap."""
        self.active.update(sites)
        for layer, kind in sites:
            tap = self.views[kind].tap if kind in self.views else KIND[kind].through if kind in KIND else ""
            self.stops.update([(layer, kind), (layer, tap or kind)])

    def wants(self, layer: int, kind: str) -> bool:
        """Whether this site is edited, read or taped."""
        return (layer, kind) in self.active

    def stops_at(self, layer: int, kind: str) -> bool:
        """Whether anybody listens at a kind's tap."""
        return (layer, kind) in self.stops or (self.edges is not None and self.edges.listens(layer, kind))

    def visit(self, layer: int, kind: str, x: Tensor, fresh: bool = False, live: Tensor | None = None) -> Tensor:
        """Hand a tap's tensor `x [row, position, feature]` to all who listen there, and give what goes on.

        Args:
            fresh: x may be written in place.
            live: the tensor in the graph, where what is returned does not take its place: it is written in place.
        """
        if self.edges is not None:
            x = self.edges.visit(layer, kind, x)
        scale = self.taps["branch"] if KIND[kind].branch else 1
        if scale == 1:
            return self.listen(layer, kind, x, fresh, live)
        added = x * scale  # what the stream receives
        new = self.listen(layer, kind, added)
        # as a difference, so that rows that nobody edits keep every bit; a gradient is that of what was added
        return x + (new - added) / scale if self.tape is None else new / scale

    def listen(self, layer: int, kind: str, x: Tensor, fresh: bool = False, live: Tensor | None = None) -> Tensor:
        """`visit`, of the site's own tensor: its edits, those of views of it, what is read of it, the tape."""
        site = (layer, kind)
        groups = self.edits.get(site, ())
        if groups:
            index = index_of(self.taps, kind)
            x = x if fresh else x.clone()
            for group in groups:
                apply_group(x, group, self.values.get(site), index)
        views = [name for name, view in self.views.items() if view.tap == kind and (layer, name) in self.active]
        for name in views:
            self.views[name] = there(self.views[name], x.device)
            if own := self.edits.get((layer, name)):
                written = write_through(x, self.views[name], own, self.values.get((layer, name)))
                groups, x = own, written if live is None else x.copy_(written)
        if site in self.reads:
            part = by_part(self.taps, kind, x)
            self.kept[site] = part.clone() if part is x else part  # a block may add to it in place later (Falcon)
        for name in views:
            if (layer, name) in self.reads:
                parts = parts_of(self.views[name], x)
                self.kept[layer, name] = parts[..., 0] if parts.shape[-1] == 1 else parts
        return x if self.tape is None else self.tape.take(layer, kind, x, None if groups else live)
