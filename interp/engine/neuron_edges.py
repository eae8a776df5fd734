"""Graphs of neurons inside a trace: effects of hidden units, heads and the embedding, and direct edges between some of them.

An edge is Δ of what its sender writes into the stream times the gradient, by the stream, of what its receiver does for the
metric, as edges of whole MLPs are (`interp.engine.edge_gradients`): what passes through other nodes on the way is theirs.
Standard library and torch only: these functions also travel to a remote server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, affine, at, norm_parts, part_index
from .edge_gradients import Norms, edge_tapes
from .edges import head_contributions
from .gradients import Tape, averaged, backward, difference
from .views import by_part

if TYPE_CHECKING:
    from .program import Place, Program

#: What a head reads, each by a projection of its own.
READS = ("q", "k", "v")


def neuron_tapes(taps: Taps) -> set[Place]:
    """What the edges of whole MLPs tape, and hidden units."""
    return edge_tapes(taps) | {(layer, "neuron") for layer in range(taps["n_layers"])}


def neuron_contributions(taps: Taps, block: Envoy, hidden: Tensor, units: Tensor) -> Tensor:
    """What some hidden units add to the stream, `[row, unit, position, d_model]`; behind a norm, their share of its output."""
    assert taps["down"] is not None, "the kind is available"
    module = at(block, taps["down"])
    weight, _ = affine(module, hidden)
    parts = torch.einsum("rpu,mu->rupm", hidden[..., units.to(hidden.device)], weight[:, units.to(weight.device)])
    if taps["post_mlp"]:
        scale, gain = norm_parts(at(block, taps["post_mlp"]), module(hidden))
        parts = parts * (scale * gain).unsqueeze(1)
    return parts if taps["branch"] == 1 else parts * taps["branch"]


class NeuronGraph:
    """One run of some pairs: the gradients at all that was taped, and what is asked of them."""

    def __init__(self, model: Envoy, taps: Taps, program: Program, tape: Tape, total: Tensor) -> None:
        self.model, self.taps, self.program, self.tape = model, taps, program, tape
        self.gradients = backward(tape, total, list(tape.live), retain=len(program["nodes"]) > 0)
        self.rows = program["gradient"]

    def effects(self) -> dict[str, Tensor]:
        """(source − base) · gradient: neurons `[pair, layer, unit]`, heads `[pair, layer, head]`, the embedding `[pair]`."""
        layers = range(self.taps["n_layers"])
        return {
            "neurons": torch.stack([self.effect(layer, "neuron").sum(1) for layer in layers], dim=1),
            "heads": torch.stack([self.effect(layer, "z").sum((1, 3)) for layer in layers], dim=1),
            "embed": self.effect(0, "resid_pre").sum((1, 2)),
        }

    def effect(self, layer: int, kind: str) -> Tensor:
        """A site's own part of that, by feature."""
        value, slope = (by_part(self.taps, kind, x[layer, kind]) for x in (self.tape.value, self.gradients))
        return (difference(self.program, value) * averaged(self.program, slope)).float().cpu()

    def change(self, parts: Tensor) -> Tensor:
        """Source less base, of parts made of the base rows and then the source rows."""
        half = len(parts) // 2
        return parts[half:] - parts[:half]

    def both(self, layer: int, kind: str) -> Tensor:
        """A tap's tensor in the base rows, then in the source rows."""
        x = self.tape.value[layer, kind]
        return x[torch.cat([self.program["base"], self.program["source"]]).to(x.device)]

    def asked(self, layer: int, kind: int) -> Tensor:
        """The chosen heads (0) or units (1) of a layer, by number."""
        nodes = self.program["nodes"]
        return nodes[(nodes[:, 0] == layer) & (nodes[:, 1] == kind), 2]

    def own_gradients(self, layer: int, kind: str, part: int, by: list[str]) -> list[Tensor]:
        """The gradient, by tensors of its own block, of what one head or unit does for the metric, its own gradient held."""
        site = (layer, kind)
        with torch.enable_grad():
            live, slope = (by_part(self.taps, kind, x[site])[:, :, part] for x in (self.tape.live, self.gradients))
            rows = self.rows.flatten().to(live.device)
            does = (live[rows] * slope[rows].detach()).sum()
        leaves = [self.tape.live[layer, name] for name in by]
        found = torch.autograd.grad(does, leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if made is None else made for x, made in zip(leaves, found, strict=True)]

    def at_rows(self, layer: int, kind: str, slope: Tensor) -> Tensor:
        """A gradient by a tap's tensor, in that one's shape, in the rows that gradients are taken of."""
        return slope.reshape(self.tape.value[layer, kind].shape)[self.rows.flatten().to(slope.device)]

    def read_by_heads(self, layer: int, heads: Tensor, norms: Norms) -> Tensor:
        """The gradient by the stream through each head's q, k and v: `[pair, head · 3, position, d_model]`."""
        block, reads = at(self.model, self.taps["layers"])[layer], []
        entering = norms.entering(layer)
        weights = [affine(at(block, path), entering)[0] for path in self.taps["qkv"]]
        for head in heads.tolist():
            slopes = self.own_gradients(layer, "z", head, list(READS))
            for kind, slope, weight in zip(READS, slopes, weights, strict=True):
                index = part_index(self.taps, kind).flatten().to(slope.device)
                reads.append(self.at_rows(layer, kind, slope)[..., index] @ weight[index])
        return norms.attention(layer, torch.stack(reads, dim=1))

    def read_by_units(self, layer: int, units: Tensor, norms: Norms) -> Tensor:
        """The gradient by the stream through each hidden unit: `[pair, unit, position, d_model]`."""
        reads = []
        for unit in units.tolist():
            (slope,) = self.own_gradients(layer, "neuron", unit, ["mlp_in"])
            reads.append(self.at_rows(layer, "mlp_in", slope))
        return norms.mlp(layer, torch.stack(reads, dim=1))

    def edges(self) -> Tensor:
        """Edges `[pair, read, sender]` between the chosen nodes, in their order: senders begin with the embedding, the reads
        are three of each head, one of each unit, and at last the logits'; zero where there is none."""
        taps, layers = self.taps, at(self.model, self.taps["layers"])
        norms = Norms(self.model, taps, self.program, self.tape)
        changes = [self.change(self.both(0, "resid_pre").unsqueeze(1))]
        rows: list[Tensor] = []

        def put(read: Tensor) -> None:
            written = torch.cat([part.to(read.device) for part in changes], dim=1)
            rows.append(torch.einsum("bsm,brm->brs", written.flatten(2), read.flatten(2)).float().cpu())

        for layer in range(taps["n_layers"]):
            heads, units = self.asked(layer, 0), self.asked(layer, 1)
            wrote = []
            if len(heads):
                put(self.read_by_heads(layer, heads, norms))
                written = head_contributions(taps, layers[layer], self.both(layer, "z"))
                wrote.append(self.change(written[:, heads.to(written.device)]))
            if not taps["parallel"]:  # the MLP reads the heads of its layer too
                changes += wrote
            if len(units):
                put(self.read_by_units(layer, units, norms))
            if taps["parallel"]:
                changes += wrote
            if len(units):
                changes.append(
                    self.change(neuron_contributions(taps, layers[layer], self.both(layer, "neuron"), units))
                )
        put(averaged(self.program, self.gradients[taps["n_layers"] - 1, "resid_post"]).unsqueeze(1))
        width = rows[-1].shape[2]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in rows], dim=1)


def neuron_scores(model: Envoy, taps: Taps, program: Program, tape: Tape, total: Tensor) -> dict[str, Any]:
    """{"effects": of all nodes} where none are chosen yet, or {"edges": between the chosen ones}."""
    graph = NeuronGraph(model, taps, program, tape, total)
    with torch.no_grad():  # the weights may want gradients of their own
        return {"edges": graph.edges()} if len(program["nodes"]) else {"effects": graph.effects()}
