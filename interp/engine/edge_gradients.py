"""Edge attribution inside a trace: Δ of what a sender writes times the gradient of what a receiver reads.

The gradient of a head's read comes from the gradient at the q, k or v projection's output, through that head's rows of
the projection and the norm's vector-Jacobian product; no stream is copied per head in the forward pass. Standard library
and torch only: these functions also travel to a remote server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, affine, at, part_index
from ..order import LOGITS, READERS, Order
from .edges import head_contributions
from .gradients import Tape, averaged, backward
from .ruled import Rows, Ruling

if TYPE_CHECKING:
    from .program import Place, Program


def edge_tapes(taps: Taps) -> set[Place]:
    """The sites that edge attribution tapes: what senders write, and where receivers read."""
    stream = "resid_pre" if taps["parallel"] else "resid_mid"
    kinds = {*READERS[:3], "z", "mlp_in", "mlp_out", "resid_pre", stream}
    last = taps["n_layers"] - 1
    return {(layer, kind) for layer in range(last + 1) for kind in kinds} | {(last, "resid_post")}


def pull_back(norm: Envoy, x: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of a norm at `x [row, position, d_model]` for many cotangents `[row, read, …]` at once."""
    if norm is None:
        return cotangent
    with torch.enable_grad():
        copies = x.detach().unsqueeze(1).expand(-1, cotangent.shape[1], -1, -1).clone().requires_grad_(True)
        out = norm(copies)
        return torch.autograd.grad(out, copies, cotangent.to(out.dtype))[0]


def pull_back_ruled(norm: Envoy, method: str, x: Tensor, end: Tensor, cotangent: Tensor) -> Tensor:
    """The same by a rule of `interp.engine.rules` between x and the other run's `end`: one read at a time, none copied."""
    if norm is None:
        return cotangent
    both = torch.cat([x, end]).detach().requires_grad_(True)
    base = torch.arange(len(x))
    with torch.enable_grad(), Ruling(method, norm, Rows(len(both), base, base + len(x))):
        out = norm(both)[: len(x)]
    parts = [torch.autograd.grad(out, both, one.to(out.dtype), retain_graph=True)[0] for one in cotangent.unbind(1)]
    return torch.stack([part[: len(x)] for part in parts], dim=1)


class Norms:
    """Gradients by what a norm of a block gives, taken back to the stream that it reads, in a program's rows."""

    def __init__(self, model: Envoy, taps: Taps, program: Program, tape: Tape) -> None:
        self.layers, self.taps, self.tape = at(model, taps["layers"]), taps, tape
        self.rows, self.method = program["gradient"], program["rule"]
        self.ends = program["until"].flatten()

    def module(self, layer: int, name: str | None) -> Envoy:
        """A block's norm; None where it has none there."""
        return at(self.layers[layer], name) if name else None

    def entering(self, layer: int) -> Tensor:
        """What the block's projections read."""
        norm, stream = self.module(layer, self.taps["norm1"]), self.tape.value[layer, "resid_pre"]
        here = stream[self.rows.flatten().to(stream.device)]
        return here if norm is None else norm(here)

    def attention(self, layer: int, cotangent: Tensor) -> Tensor:
        """Cotangents `[row, read, position, d_model]` of what attention reads, averaged over each pair's rows."""
        norm = self.module(layer, self.taps["norm1"])
        return self.back(norm, self.tape.value[layer, "resid_pre"], cotangent)

    def mlp(self, layer: int, cotangent: Tensor) -> Tensor:
        """The same of what the MLP reads."""
        stream = self.tape.value[layer, "resid_pre" if self.taps["parallel"] else "resid_mid"]
        return self.back(self.module(layer, self.taps["norm2"]), stream, cotangent)

    def back(self, norm: Envoy, x: Tensor, cotangent: Tensor) -> Tensor:
        """Through one norm, at a stream `[row, position, d_model]`."""
        here = x[self.rows.flatten().to(x.device)].to(cotangent.device)
        if self.method == "gradient":
            made = pull_back(norm, here, cotangent)
        else:
            made = pull_back_ruled(norm, self.method, here, x[self.ends.to(x.device)].to(cotangent.device), cotangent)
        return made.unflatten(0, tuple(self.rows.shape)).mean(1)


def read_gradients(
    model: Envoy,
    taps: Taps,
    program: Program,
    tape: Tape,
    gradients: dict[Place, Tensor],
    layer: int,
) -> Tensor:
    """Gradient of the metric by what each receiver of a layer reads: `[pair, receiver, position, d_model]`, q, k, v, mlp."""
    norms, flat, reads = Norms(model, taps, program, tape), program["gradient"].flatten(), []
    entering = norms.entering(layer).to(gradients[layer, "q"].device)
    for place, kind in enumerate(READERS[:3]):
        gradient = gradients[layer, kind]
        index = part_index(taps, kind).to(gradient.device)
        by_head = gradient[flat.to(gradient.device)][..., index]
        weight, _ = affine(at(norms.layers[layer], taps["qkv"][place]), entering)
        reads.append(torch.einsum("rphd,hdm->rhpm", by_head, weight[index]))
    attention = norms.attention(layer, torch.cat(reads, dim=1))
    by_mlp = gradients[layer, "mlp_in"]
    mlp = norms.mlp(layer, by_mlp[flat.to(by_mlp.device)].unsqueeze(1))
    return torch.cat([attention, mlp.to(attention.device)], dim=1)


def edge_scores(model: Envoy, taps: Taps, program: Program, tape: Tape, total: Tensor) -> Tensor:
    """Attributions of every edge: `[pair, receiver, sender]`; zero where there is no edge."""
    gradients = backward(tape, total, list(tape.live), retain=False)
    with torch.no_grad():  # the weights may want gradients of their own
        return combine(model, taps, program, tape, gradients)


def combine(model: Envoy, taps: Taps, program: Program, tape: Tape, gradients: dict[Place, Tensor]) -> Tensor:
    """Δ of every sender times the gradient of every read that is downstream of it: `[pair, receiver, sender]`."""
    layers, end = at(model, taps["layers"]), taps["n_layers"]
    base, source = program["base"], program["source"]
    order = Order.of(taps)
    out = torch.zeros(len(base), order.receivers, order.senders)
    like = tape.value[0, "resid_pre"]
    changes = like.new_empty(len(base), order.senders, *like.shape[1:])  # of the first `written` senders
    written = 0

    def record(part: Tensor) -> None:
        nonlocal written
        half, end = len(base), written + part.shape[1]
        changes[:, written:end] = (part[half:] - part[:half]).to(changes.device)
        written = end

    def streams(layer: int, kind: str) -> Tensor:
        x = tape.value[layer, kind]
        return x[torch.cat([base, source]).to(x.device)]

    def put(first: int, read: Tensor) -> None:
        scores = torch.einsum("bsm,brm->brs", changes[:, :written].flatten(2), read.to(changes.device).flatten(2))
        out[:, first : first + read.shape[1], :written] = scores.float().cpu()

    record(streams(0, "resid_pre").unsqueeze(1))
    for layer in range(end):
        read = read_gradients(model, taps, program, tape, gradients, layer)
        heads = head_contributions(taps, layers[layer], streams(layer, "z"))
        put(order.receiver(layer, READERS[0]), read[:, :-1])
        if not taps["parallel"]:  # the MLP reads the heads of its layer too
            record(heads)
        put(order.receiver(layer, "mlp"), read[:, -1:])
        if taps["parallel"]:
            record(heads)
        record(streams(layer, "mlp_out").unsqueeze(1))
    final = gradients[end - 1, "resid_post"]
    put(order.receiver(end, LOGITS), averaged(program, final).unsqueeze(1))
    return out
