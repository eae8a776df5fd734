"""Edges inside a forward pass: what one node writes, what another reads, and reads that are changed by a difference.

A sender is `embed` (the stream that enters the first block), a head or an MLP; a receiver is a head's q, a key/value
head's k or v, an MLP, or the logits. A receiver whose edges change by Δ (a tensor in the residual stream) reads x + Δ:
its norm and its slice of the projection are recomputed from that, and nothing else changes. Standard library and torch
only: these functions also travel to a remote server.

A program's `edges` is a dictionary with `mode`:
    "patch"   `table [edge, field]` (FIELDS): in row `row`, the receiver reads what it reads in the base run, with the
              source run's contribution of `sender` instead of the base run's
    "cut"     `rows`, `mask [row, receiver, sender]` (True = cut), `reference`: every receiver of these rows reads, for
              cut edges, the reference's contribution instead of this run's own. `reference` is "source" (row
              `source [row]`), "zero", or constants `[sender, position or 1, d_model]`; `origin [row]`: the row that it copies
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.views import affine, at, features, norm_parts, project_heads

FIELDS = ("row", "base", "source", "sender", "layer", "kind", "head", "column")
#: The last three add the difference to the stream itself, where the sender writes it: everything downstream sees it.
RECEIVERS = ("q", "k", "v", "mlp", "logits", "attn_out", "mlp_out", "embed")


def sender_index(taps: dict[str, Any], layer: int, head: int | None) -> int:
    """Place of a sender in their order: embed (layer -1), then heads and MLP (`head` None) of each layer."""
    if layer < 0:
        return 0
    heads = int(taps["n_heads"])
    return 1 + layer * (heads + 1) + (heads if head is None else head)


def receiver_index(taps: dict[str, Any], layer: int, kind: str, head: int = 0) -> int:
    """Place of a receiver in their order: q, k, v by head and the MLP of each layer, then the logits."""
    heads, kv = int(taps["n_heads"]), int(taps["n_kv_heads"])
    per_layer = heads + 2 * kv + 1
    offset = {"q": 0, "k": heads, "v": heads + kv, "mlp": heads + 2 * kv, "logits": 0}[kind]
    return (taps["n_layers"] if kind == "logits" else layer) * per_layer + offset + head


def head_contributions(taps: dict[str, Any], block: Any, z: Tensor) -> Tensor:
    """What each head adds to the stream, without biases, `[row, head, position, d_model]`; z is by feature.

    Behind a post-attention norm, a head's part is its share of the norm's output at the norm's scale in this run.
    """
    weight, bias = affine(at(block, taps["o"]), z)
    by_head = weight[:, features(taps, "z").to(z.device)]  # [d_model, head, d_head]
    heads = torch.einsum("rphd,mhd->rhpm", z.unflatten(2, (taps["n_heads"], -1)), by_head)
    if taps["post_attn"]:
        whole = heads.sum(1) + (0 if bias is None else bias)
        scale, gain = norm_parts(at(block, taps["post_attn"]), whole)
        heads = heads * (scale * gain).unsqueeze(1)
    return heads if taps["branch"] == 1 else heads * taps["branch"]


def bias_contribution(taps: dict[str, Any], block: Any, z: Tensor) -> Tensor | None:
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


class Edges:
    """Contributions seen so far in one forward pass, and the reads that they change."""

    def __init__(self, taps: dict[str, Any], spec: dict[str, Any], start: int) -> None:
        self.taps, self.spec, self.mode = taps, spec, spec["mode"]
        self.hidden: Tensor | None = None  # what enters the current block `[row, position, d_model]`
        self.mid: Tensor | None = None  # what the current MLP's norm reads
        self.parts: list[Tensor] = []  # contributions `[row, sender, position, d_model]` where no row is cut
        #: "cut": the reference's contribution minus each cut row's own (cut to zero: its own), filled sender by sender
        self.change: Tensor | None = None  # [row, sender, position, d_model]
        self.reads: tuple[int, Any, Tensor] | None = None  # layer, its `cut_reads`, what its q, k and v receive
        self.whole = spec.get("reference") == "source" if isinstance(spec.get("reference"), str) else False
        self.biases: list[Tensor] = []  # "cut" to zero: what attention biases add `[row, position or 1, d_model]`
        self.deltas: dict[int, Tensor] = {}  # "patch": sender -> source − base `[stream, position, d_model]`
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

    def wants(self, layer: int, kind: str) -> bool:
        """Whether any receiver of this kind at this layer is changed."""
        if self.mode == "cut":
            if kind not in ("q", "k", "v", "mlp", "logits"):
                return False
            first = receiver_index(self.taps, layer, kind)
            count = {"q": self.taps["n_heads"], "mlp": 1, "logits": 1}.get(kind, self.taps["n_kv_heads"])
            return bool(self.spec["mask"][:, first : first + count].any())
        return (layer, kind) in self.by_layer

    def at_tap(self, layer: int, kinds: tuple[str, ...]) -> bool:
        """Whether a tap must be stopped at, to record a sender or to change a read."""
        if "mlp_in" in kinds or "resid_mid" in kinds:
            return self.wants(layer, "mlp")
        if "z" in kinds or "mlp_out" in kinds:
            return True
        return any(kind in ("q", "k", "v", "attn_out") and self.wants(layer, kind) for kind in kinds)

    def pass_tap(self, layer: int, kinds: tuple[str, ...], block: Any, x: Tensor) -> Tensor:
        """At a tap: record what is written there, or change what is read."""
        if "z" in kinds:
            self.record(layer, "heads", x, block)
        elif "mlp_out" in kinds:
            self.record(layer, "mlp", x if self.taps["branch"] == 1 else x * self.taps["branch"])
        for kind in kinds:
            if kind in ("q", "k", "v"):
                x = self.project(layer, kind, block, x)
            elif kind in ("attn_out", "mlp_out"):
                x = self.add(layer, kind, x)
        return x

    def add(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """Add changes to what is written to the stream `[row, position, d_model]`."""
        if not self.wants(layer, kind):
            return x
        rows, _, _, _, delta = self.changes(layer, kind, x)
        x = x.clone()
        x[rows] = x[rows] + (delta if kind == "embed" else delta / self.taps["branch"])
        return x

    def record(self, layer: int, what: str, x: Tensor, block: Any = None) -> None:
        """Keep what a sender writes: "embed", "heads" (x is z) or "mlp"."""
        taps = self.taps
        first = sender_index(taps, layer, 0 if what == "heads" else None)
        if self.mode == "patch":
            count = taps["n_heads"] if what == "heads" else 1
            if not self.needed.intersection(range(first, first + count)):
                return
            base, source = (self.streams[:, side].to(x.device) for side in (0, 1))
            rows = torch.cat([x[base], x[source]])
            parts = head_contributions(taps, block, rows) if what == "heads" else rows.unsqueeze(1)
            half = len(base)
            for offset in range(count):
                if first + offset in self.needed:
                    self.deltas[first + offset] = parts[half:, offset] - parts[:half, offset]
            return
        # a copy of x: a block may add to it in place later (Falcon)
        parts = head_contributions(taps, block, x) if what == "heads" else x.unsqueeze(1).clone()
        if len(self.spec["rows"]):
            self.fill(first, parts)
        else:
            self.parts.append(parts)
        if what == "heads" and isinstance(self.spec["reference"], str):
            added = bias_contribution(taps, block, x)
            # a bias behind a norm belongs to no sender and differs between runs: their streams differ by more than senders
            self.whole &= added is None or not taps["post_attn"]
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
            senders = sender_index(self.taps, self.taps["n_layers"] - 1, None) + 1
            self.change = own.new_empty(len(own), senders, *own.shape[2:])
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

    def cut_reads(
        self, layer: int, kind: str, count: int, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """ "cut": (rows, source rows, taken, numbers, reads) of `count` receivers from the first of a kind at a layer.

        `taken [row, read]`: all edges are cut, so what the source run has there is taken as it is. `reads [row, number,
        position, d_model]` is what the receivers with these `numbers` read, some of whose edges are cut in some row; the
        others read what they do. Cut to zero, a read is summed from what is kept: the difference of a stream and all of
        its parts is rounding noise, which a norm would blow up to the size of a read.
        """
        spec, taps = self.spec, self.taps
        joined = int((spec["rows"] < len(like)).sum())  # rows ascend, so these are the first ones
        names = ("rows", "origin", "source")
        rows, origin, source = (spec[name][:joined].to(like.device) for name in names)
        after = kind == "mlp" and not taps["parallel"]  # it also reads the heads of its layer
        senders = sender_index(taps, layer, None if after else 0)
        assert self.change is not None
        change = self.change[:joined, :senders].to(like.device)
        first = receiver_index(taps, layer, kind)
        mask = spec["mask"][:joined, first : first + count, :senders].to(like.device)
        cut = mask.any(2)
        taken = mask.all(2) & self.whole
        numbers = (cut & ~taken).any(0).nonzero()[:, 0]
        weights, stream = mask[:, numbers].to(like.dtype), like[rows].unsqueeze(1)
        if isinstance(spec["reference"], str) and spec["reference"] == "zero":
            kept = weighted(1 - weights, change)
            for bias in self.biases[: layer + after]:
                kept = kept + bias[torch.where(rows < len(bias), rows, origin)].to(like.device).unsqueeze(1)
            reads = torch.where(cut[:, numbers, None, None], kept, stream)
        else:
            reads = stream + weighted(weights, change)
        return rows, source, taken, numbers, reads

    def project(self, layer: int, kind: str, block: Any, x: Tensor) -> Tensor:
        """Write the changed reads of q, k or v into their projection's output `[row, position, feature]`."""
        if not self.wants(layer, kind):
            return x
        assert self.hidden is not None
        hidden = self.hidden.to(x.device)  # a block's input may still lie on the device of the block before
        taps = self.taps
        module = at(block, taps["qkv"]["qkv".index(kind)])
        index = features(taps, kind).to(x.device)
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
            found = self.cut_reads(layer, "q", taps["n_heads"] + 2 * taps["n_kv_heads"], hidden)
            self.reads = (layer, found, at(block, taps["norm1"])(found[-1]) if taps["norm1"] else found[-1])
        _, (rows, source, taken, numbers, _), normed = self.reads
        first = receiver_index(taps, layer, kind) - receiver_index(taps, layer, "q")
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

    def mlp_input(self, layer: int, block: Any, x: Tensor) -> Tensor:
        """Write the changed reads of MLPs into what the MLP receives (behind its norm)."""
        if not self.wants(layer, "mlp"):
            return x
        taps = self.taps
        stream = self.hidden if taps["parallel"] else self.mid
        assert stream is not None
        stream = stream.to(x.device)
        norm = at(block, taps["norm2"]) if taps["norm2"] else None
        x = x.clone()
        if self.mode == "patch":
            rows, base, _, columns, delta = self.changes(layer, "mlp", stream)
            read = stream[base] + delta
        else:
            return self.exchange(x, norm, *self.cut_reads(layer, "mlp", 1, stream))
        new = norm(read) if norm is not None else read
        for number, (row, places) in enumerate(zip(rows.tolist(), columns, strict=True)):
            for where in places:
                x[row, where] = new[number, where]
        return x

    def final(self, x: Tensor) -> Tensor:
        """Write the changed reads of the logits into the final residual stream."""
        end = self.taps["n_layers"]
        if not self.wants(end, "logits"):
            return x
        x = x.clone()
        if self.mode == "patch":
            rows, base, _, _, delta = self.changes(end, "logits", x)
            x[rows] = x[base] + delta
        else:
            x = self.exchange(x, None, *self.cut_reads(end, "logits", 1, x))
        return x

    def exchange(
        self, x: Tensor, norm: Any, rows: Tensor, source: Tensor, taken: Tensor, numbers: Tensor, reads: Tensor
    ) -> Tensor:
        """ "cut": what one receiver of each row receives `[row, position, d_model]`, in place."""
        if len(numbers):
            x[rows] = torch.where(taken[:, :, None], x[rows], reads[:, 0] if norm is None else norm(reads[:, 0]))
        x[rows[taken[:, 0]]] = x[source[taken[:, 0]]]
        return x
