"""The state of one forward pass: which rows exist, what is edited and read, what was read.

Standard library and torch only: it is shipped by source to a remote server. A *program* is a
plain dictionary made by the schedule:

    inputs      keyword arguments of the model's forward (input_ids [start, position], and a mask where there is padding)
    origin      [grown] row that each grown row copies, there before it; stage [grown] the layer at which it joins, ascending
    edits       the table of `interp.edits`; columns count from the first position that is run
    values      {(layer, kind): [value, position or 1, feature]} constants for "set", "add", "scale"
    reads       [(layer, kind)] activations to return; last: the last layer that must run, or None
    scored      [n] rows whose logits are wanted, at columns `at` [n]
    clean, corrupted   [n] index into `scored` of the clean and the corrupted run of each scored row (or None)
    answers, distractors   [n] or [n, set] token ids (or None)
    first       blocks below this layer are skipped
    keep, cache a prepared run: the layers whose input is kept, and the class of an empty cache (or None)
    use, pick, column   a run on a prepared one: its number, which of its rows are needed, the first position run
    edges       changed reads, see `interp.engine.edges` (or absent)
    noise       Gaussian noise on the embeddings: std, and table [token, (row, column, seed)] (or absent)
    readout     what is made of the activations that are read, see `interp.engine.readout` (or absent)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..edits import apply_group, group_edits
from ..models.views import features
from .edges import Edges
from .gradients import Tape

#: Kinds that some architectures multiply with a number before they add them to the stream (`taps["branch"]`).
BRANCHES = ("attn_out", "mlp_out")
#: Kinds that are part of a wider tensor, or are divided into heads.
FEATURED = ("q", "k", "v", "z", "q_rot", "k_rot", "mlp_pre")


class Run:
    """The state of one forward pass: which rows exist, what is edited and read, what was read."""

    def __init__(self, taps: dict[str, Any], program: dict[str, Any]) -> None:
        self.taps, self.program = taps, program
        self.start = program["inputs"]["input_ids"].shape[0]
        self.rows = torch.arange(self.start)
        self.edits = group_edits(program["edits"])
        self.values = program["values"]
        self.reads = set(program["reads"])
        self.active = set(self.edits) | self.reads | {tuple(site) for site in program.get("tape", ())}
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.first = program["first"]
        spec = program.get("edges")
        self.edges = Edges(taps, spec, self.start) if spec is not None else None
        self.tape: Tape | None = None  # activations that gradients are taken of
        self.cache: Any = None
        self.below: list[tuple[Tensor, Tensor]] = []  # keys and values below the first position run, by layer
        self.entering: Tensor | None = None  # residual stream entering the first block that is run

    def by_row(self, x: Tensor) -> Tensor:
        """`[row, position, feature]`, also where a family flattens rows and positions (OPT)."""
        return x.unflatten(0, (len(self.rows), -1)) if x.ndim == 2 else x

    def visit(self, layer: int, kind: str, x: Tensor, fresh: bool = False, live: Tensor | None = None) -> Tensor:
        """Apply the edits of one site to `x [row, position, feature]`, keep it if it is to be read, and give what goes on.

        `live` is the tensor in the graph, where what is returned does not take its place.
        """
        scale = self.taps["branch"] if kind in BRANCHES else 1
        if scale == 1:
            return self.visit_site(layer, kind, x, fresh, live)
        added = x * scale  # what the stream receives
        new = self.visit_site(layer, kind, added)
        # as a difference, so that rows that nobody edits keep every bit; a gradient is that of what was added
        return x + (new - added) / scale if self.tape is None else new / scale

    def visit_site(self, layer: int, kind: str, x: Tensor, fresh: bool = False, live: Tensor | None = None) -> Tensor:
        """`visit`, of the site's own tensor."""
        groups = self.edits.get((layer, kind), ())
        if groups:
            index = features(self.taps, kind) if kind in FEATURED else None
            x = x if fresh else x.clone()
            for group in groups:
                apply_group(x, group, self.values.get((layer, kind)), index)
        if (layer, kind) in self.reads:
            own = x[..., features(self.taps, kind).to(x.device)] if kind in FEATURED else x
            own = own[..., 0, :] if kind == "mlp_pre" else own
            self.kept[layer, kind] = own.clone()  # a block may add to it in place later (Falcon)
        return x if self.tape is None else self.tape.take(layer, kind, x, None if groups else live)
