"""Edges inside a forward pass: what one node writes, what another reads, and reads that are changed by a difference.

Senders and receivers are numbered in the order of `interp.order`. A receiver whose edges change by Δ (a tensor in the
residual stream) reads x + Δ: its norm and its slice of the projection are recomputed from that, and nothing else changes.
Standard library and torch only: these functions also travel to a remote server.

A program's `edges` is a dictionary with `mode`:
    "patch"   `table [edge, field]` (FIELDS): in row `row`, the receiver reads what it reads in the base run, with the
              source run's contribution of `sender` instead of the base run's
    "cut"     `rows`, `mask [row, receiver, sender]` (True = cut), `reference`: every receiver of these rows reads, for
              cut edges, the reference's contribution instead of this run's own. `reference` is "source" (row
              `source [row]`), "zero", or constants `[sender, position or 1, d_model]`; `origin [row]`: the row that it copies
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, affine, at, norm_parts, part_index, project_heads
from ..order import LOGITS, READERS, Order

FIELDS = ("row", "base", "source", "sender", "layer", "kind", "head", "column")
#: The last three add the difference to the stream itself, where the sender writes it: everything downstream sees it.
RECEIVERS = (*READERS, LOGITS, "attn_out", "mlp_out", "embed")


def head_contributions(taps: Taps, block: Envoy, z: Tensor) -> Tensor:
    """What each head adds to the stream, without biases, `[row, head, position, d_model]`; z is by feature.

    Behind a post-attention norm, a head's part is its share of the norm's output at the norm's scale in this run.
    """
    weight, bias = affine(at(block, taps["o"]), z)
    by_head = weight[:, part_index(taps, "z").to(z.device)]  # [d_model, head, d_head]
    heads = torch.einsum("rphd,mhd->rhpm", z.unflatten(2, (taps["n_heads"], -1)), by_head)
    if taps["post_attn"]:
        whole = heads.sum(1) + (0 if bias is None else bias)
        scale, gain = norm_parts(at(block, taps["post_attn"]), whole)
        heads = heads * (scale * gain).unsqueeze(1)
    return heads if taps["branch"] == 1 else heads * taps["branch"]


def bias_contribution(taps: Taps, block: Envoy, z: Tensor) -> Tensor | None:
    """What an attention layer adds that is no head's: its output bias, `[row, position or 1, d_model]`."""
    module = at(block, taps["o"])
    _, bias = affine(module, z)
    if bias is None:
        return None
    bias = bias * taps["branch"]
    if taps["post_attn"]:
        scale, weight = norm_parts(at(block, taps["post_attn"]), module(z))
        return bias * scale * weight
    return bias[None, None].expand(len(z), 1, -1)


def weighted(weights: Tensor, parts: Tensor) -> Tensor:
    """Sums over senders: weights `[row, read, sender]`, parts `[row, sender, position, d_model]` -> `[row, read, …]`."""
    return torch.bmm(weights, parts.flatten(2)).unflatten(2, parts.shape[2:])


class CutReads(NamedTuple):
    """What the receivers of one kind of a layer read in the cut rows, see `Edges.cut_reads`."""

    rows: Tensor
    source: Tensor
    taken: Tensor
    numbers: Tensor
    reads: Tensor


class Edges:
    """Contributions seen so far in one forward pass, and the reads that they change."""

    def __init__(self, taps: Taps, spec: dict[str, Any]) -> None:
        self.taps, self.spec, self.mode, self.order = taps, spec, spec["mode"], Order.of(taps)
        self.block: Envoy = None  # the block that runs
        self.hidden: Tensor | None = None  # what enters it `[row, position, d_model]`
        self.mid: Tensor | None = None  # what its MLP's norm reads
        self.parts: list[Tensor] = []  # contributions `[row, sender, position, d_model]` where no row is cut
        #: "cut": the reference's contribution minus each cut row's own (cut to zero: its own), filled sender by sender
        self.change: Tensor | None = None  # [row, sender, position, d_model]
        self.reads: tuple[int, CutReads, Tensor] | None = None  # layer, its `cut_reads`, what its q, k and v receive
        self.whole = spec.get("reference") == "source" if isinstance(spec.get("reference"), str) else False
        self.biases: list[Tensor] = []  # "cut" to zero: what attention biases add `[row, position or 1, d_model]`
        self.deltas: dict[int, Tensor] = {}  # "patch": sender -> source − base `[stream, position, d_model]`
        #: what is done at the tap of a kind of site, and (reader) whose changed reads call for it; None: always
        self.handlers: dict[str, tuple[Callable[[int, Tensor], Tensor], str | None]] = {
            "resid_pre": (self.enter, None),
            "z": (self.heads, None),
            "attn_out": (lambda layer, x: self.add(layer, "attn_out", x), "attn_out"),
            "resid_mid": (self.middle, "mlp"),
            "mlp_in": (self.mlp_input, "mlp"),
            "mlp_out": (self.mlp, None),
            "resid_post": (self.final, None),
        }
        for kind in READERS[:3]:
            self.handlers[kind] = (partial(self.project, kind), kind)
        #: "cut": of each receiver whether any row cuts an edge to it; masks are large, and asked at every tap
        self.is_cut: list[bool] = spec["mask"].any(0).any(1).tolist() if self.mode == "cut" else []
        if self.mode == "patch":
            table = spec["table"].long()
            self.table = table
            self.streams, self.stream_of = torch.unique(table[:, 1:3], dim=0, return_inverse=True)
            self.needed = set(table[:, FIELDS.index("sender")].tolist())
            self.by_layer: dict[tuple[int, str], Tensor] = {}
            keys = table[:, [FIELDS.index("layer"), FIELDS.index("kind")]]
            for layer, kind in torch.unique(keys, dim=0).tolist():
                chosen = (keys[:, 0] == layer) & (keys[:, 1] == kind)
                self.by_layer[layer, RECEIVERS[kind]] = chosen.nonzero()[:, 0]

    def wants(self, layer: int, reader: str) -> bool:
        """Whether any receiver of this kind at this layer is changed."""
        if self.mode == "patch":
            return (layer, reader) in self.by_layer
        if reader not in (*READERS, LOGITS):
            return False
        first = self.order.receiver(layer, reader)
        return any(self.is_cut[first : first + self.order.count(reader)])

    def listens(self, layer: int, kind: str) -> bool:
        """Whether a tap must be stopped at, to record a sender or to change a read."""
        if kind not in self.handlers:
            return False
        reader = self.handlers[kind][1]
        return reader is None or self.wants(layer, reader)

    def visit(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """At a tap: record what is written there, or change what is read."""
        return self.handlers[kind][0](layer, x) if kind in self.handlers else x

    def enter(self, layer: int, x: Tensor) -> Tensor:
        """What enters a block; what enters the first one is a sender's."""
        if layer == 0:
            self.record(0, x.unsqueeze(1))
            x = self.add(-1, "embed", x)
        self.hidden = x
        return x

    def middle(self, layer: int, x: Tensor) -> Tensor:
        """The stream that an MLP's norm reads; the block goes on with the same tensor."""
        self.mid = x
        return x

    def heads(self, layer: int, z: Tensor) -> Tensor:
        """What heads write, of z `[row, position, feature]`."""
        self.record(self.order.sender(layer, 0), z, self.block)
        return z

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """What an MLP writes."""
        branch = self.taps["branch"]
        self.record(self.order.sender(layer, None), (x if branch == 1 else x * branch).unsqueeze(1))
        return self.add(layer, "mlp_out", x)

    def add(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """Add changes to what is written to the stream `[row, position, d_model]`."""
        if not self.wants(layer, kind):
            return x
        rows, _, _, _, delta = self.changes(layer, kind, x)
        x = x.clone()
        x[rows] = x[rows] + (delta if layer < 0 else delta / self.taps["branch"])
        return x

    def record(self, first: int, x: Tensor, block: Envoy = None) -> None:
        """Keep what senders from `first` on write: x `[row, sender, position, d_model]`, or z of the heads of `block`."""
        count = x.shape[1] if block is None else self.taps["n_heads"]
        if self.mode == "patch":
            if not self.needed.intersection(range(first, first + count)):
                return
            base, source = (self.streams[:, side].to(x.device) for side in (0, 1))
            rows = torch.cat([x[base], x[source]])
            parts = rows if block is None else head_contributions(self.taps, block, rows)
            half = len(base)
            for offset in range(count):
                if first + offset in self.needed:
                    self.deltas[first + offset] = parts[half:, offset] - parts[:half, offset]
            return
        # a copy of x: a block may add to it in place later (Falcon)
        parts = x.clone() if block is None else head_contributions(self.taps, block, x)
        if len(self.spec["rows"]):
            self.fill(first, parts)
        else:
            self.parts.append(parts)
        if block is not None and isinstance(self.spec["reference"], str):
            added = bias_contribution(self.taps, block, x)
            # behind a norm a bias is scaled by each run's own norm: no sender's, and not the same in both runs, so that with
            # all edges cut the read is still not the source run's
            self.whole &= added is None or not self.taps["post_attn"]
            self.biases.append(x.new_zeros(len(x), 1, parts.shape[-1]) if added is None else added)

    def fill(self, first: int, parts: Tensor) -> None:
        """ "cut": write into `change` what senders from `first` on add, `[row, sender, position, d_model]`.

        A row that joins later is the row that it copies until then.
        """
        spec, end = self.spec, first + parts.shape[1]
        rows, origin = spec["rows"].to(parts.device), spec["origin"].to(parts.device)
        own = parts[torch.where(rows < len(parts), rows, origin)]
        if isinstance(spec["reference"], Tensor):
            own = spec["reference"][None, first:end].to(own.device, own.dtype) - own
        elif spec["reference"] == "source":
            own = parts[spec["source"].to(parts.device)] - own
        if self.change is None:
            self.change = own.new_empty(len(own), self.order.senders, *own.shape[2:])
        self.change[:, first:end] = own.to(self.change.device)

    # ---- reads -------------------------------------------------------------------------------------------------

    def changes(self, layer: int, kind: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[slice]], Tensor]:
        """ "patch": (rows, base rows, heads, columns, Δ `[read, position, d_model]`) of a layer's changed reads.

        Columns are where each read changes: everywhere, or where any of its edges is.
        """
        chosen = self.by_layer[layer, kind]
        table, streams = self.table[chosen], self.stream_of[chosen]
        place = {name: index for index, name in enumerate(FIELDS)}
        fields = [place["row"], place["base"], place["head"]]
        reads, of = torch.unique(table[:, fields], dim=0, return_inverse=True)
        delta = like.new_zeros(len(reads), *like.shape[1:])
        columns: list[set[int]] = [set() for _ in range(len(reads))]
        for entry, read, stream in zip(table.tolist(), of.tolist(), streams.tolist(), strict=True):
            part = self.deltas[entry[place["sender"]]][stream].to(like.device)
            column = entry[place["column"]]
            if column < 0:
                delta[read] += part
            else:
                delta[read, column] += part[column]
            columns[read].add(column)
        where = [[slice(None)] if -1 in at else [slice(c, c + 1) for c in sorted(at)] for at in columns]
        return reads[:, 0].to(like.device), reads[:, 1].to(like.device), reads[:, 2], where, delta

    def cut_reads(self, layer: int, reader: str, count: int, like: Tensor) -> CutReads:
        """ "cut": (rows, source rows, taken, numbers, reads) of `count` receivers from the first of a kind at a layer.

        `taken [row, read]`: all edges are cut, so what the source run has there is taken as it is. `reads [row, number,
        position, d_model]` is what the receivers with these `numbers` read, some of whose edges are cut in some row; the
        others read what they do. Cut to zero, a read is summed from what is kept: the difference of a stream and all of
        its parts is rounding noise, which a norm would blow up to the size of a read.
        """
        spec = self.spec
        joined = int((spec["rows"] < len(like)).sum())  # rows ascend, so these are the first ones
        names = ("rows", "origin", "source")
        rows, origin, source = (spec[name][:joined].to(like.device) for name in names)
        senders = self.order.read_by(layer, reader)
        layers = layer + (senders > self.order.sender(layer, 0))  # whose attention it reads: an MLP its own layer's too
        assert self.change is not None
        change = self.change[:joined, :senders].to(like.device)
        first = self.order.receiver(layer, reader)
        mask = spec["mask"][:joined, first : first + count, :senders].to(like.device)
        cut = mask.any(2)
        taken = mask.all(2) & self.whole
        numbers = (cut & ~taken).any(0).nonzero()[:, 0]
        weights, stream = mask[:, numbers].to(like.dtype), like[rows].unsqueeze(1)
        if isinstance(spec["reference"], str) and spec["reference"] == "zero":
            kept = weighted(1 - weights, change)
            for bias in self.biases[:layers]:
                kept = kept + bias[torch.where(rows < len(bias), rows, origin)].to(like.device).unsqueeze(1)
            reads = torch.where(cut[:, numbers, None, None], kept, stream)
        else:
            reads = stream + weighted(weights, change)
        return CutReads(rows, source, taken, numbers, reads)

    def project(self, kind: str, layer: int, x: Tensor) -> Tensor:
        """Write the changed reads of q, k or v into their projection's output `[row, position, feature]`."""
        if not self.wants(layer, kind):
            return x
        assert self.hidden is not None
        hidden = self.hidden.to(x.device)  # a block's input may still lie on the device of the block before
        taps, block = self.taps, self.block
        module = at(block, taps["qkv"][READERS.index(kind)])
        index = part_index(taps, kind).to(x.device)
        x = x.clone()
        if self.mode == "patch":
            rows, base, heads, columns, delta = self.changes(layer, kind, hidden)
            read = hidden[base] + delta
            new = module(at(block, taps["norm1"])(read) if taps["norm1"] else read)
            for number, (row, head, places) in enumerate(zip(rows.tolist(), heads.tolist(), columns, strict=True)):
                for where in places:
                    x[row, where, index[head]] = new[number, where, index[head]]
            return x
        if self.reads is None or self.reads[0] != layer:  # q, k and v of a layer read at one place
            cut = self.cut_reads(layer, READERS[0], self.order.per_layer - 1, hidden)
            self.reads = (layer, cut, at(block, taps["norm1"])(cut.reads) if taps["norm1"] else cut.reads)
        _, (rows, source, taken, numbers, _), normed = self.reads
        first = self.order.receiver(layer, kind) - self.order.receiver(layer, READERS[0])
        taken = taken[:, first : first + len(index)]
        own = x[rows][..., index]  # [row, position, head, d_head]
        own = torch.where(taken[:, None, :, None], x[source][..., index], own) if taken.any() else own
        here = (numbers >= first) & (numbers < first + len(index))
        if here.any():
            heads = numbers[here] - first
            new = project_heads(module, normed[:, here], index[heads]).transpose(1, 2)
            own[:, :, heads] = torch.where(taken[:, None, heads, None], own[:, :, heads], new)
        x[rows[:, None, None], torch.arange(x.shape[1])[None, :, None], index.flatten()[None, None]] = own.flatten(2)
        return x

    def mlp_input(self, layer: int, x: Tensor) -> Tensor:
        """Write the changed reads of MLPs into what the MLP receives (behind its norm)."""
        if not self.wants(layer, "mlp"):
            return x
        taps, block = self.taps, self.block
        stream = self.hidden if taps["parallel"] else self.mid
        assert stream is not None
        stream = stream.to(x.device)
        norm = at(block, taps["norm2"]) if taps["norm2"] else None
        x = x.clone()
        if self.mode == "patch":
            rows, base, _, columns, delta = self.changes(layer, "mlp", stream)
            read = stream[base] + delta
        else:
            return self.exchange(x, norm, self.cut_reads(layer, "mlp", 1, stream))
        new = norm(read) if norm is not None else read
        for number, (row, places) in enumerate(zip(rows.tolist(), columns, strict=True)):
            for where in places:
                x[row, where] = new[number, where]
        return x

    def final(self, layer: int, x: Tensor) -> Tensor:
        """Write the changed reads of the logits into the final residual stream."""
        end = self.taps["n_layers"]
        if layer + 1 < end or not self.wants(end, LOGITS):
            return x
        x = x.clone()
        if self.mode == "patch":
            rows, base, _, _, delta = self.changes(end, LOGITS, x)
            x[rows] = x[base] + delta
        else:
            x = self.exchange(x, None, self.cut_reads(end, LOGITS, 1, x))
        return x

    def exchange(self, x: Tensor, norm: Envoy, cut: CutReads) -> Tensor:
        """ "cut": what one receiver of each row receives `[row, position, d_model]`, in place."""
        rows, source, taken, numbers, reads = cut
        if len(numbers):
            x[rows] = torch.where(taken[:, :, None], x[rows], reads[:, 0] if norm is None else norm(reads[:, 0]))
        x[rows[taken[:, 0]]] = x[source[taken[:, 0]]]
        return x
