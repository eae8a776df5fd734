"""Edges and paths: what one node writes to what another reads, patched with plain hooks.

Senders: `embed` (the stream as it enters block 0), `L1.H2`, `L1.mlp`. Receivers: `L3.H2.q`, `L3.H1.k`,
`L3.H1.v` (k and v by kv head), `L3.mlp`, `logits`. Either may end in `@4`: at that position only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Oracle, Patch
from .names import columns, output_matrix

_NODE = re.compile(r"^(?:L(\d+)\.(?:(mlp)|H(\d+)(?:\.([qkv]))?)|embed|logits)(?:@(\d+))?$")


def senders(oracle: Oracle) -> list[str]:
    """Every sender, in the order of the forward pass."""
    names = ["embed"]
    for layer in range(oracle.n_layers):
        names += [f"L{layer}.H{head}" for head in range(oracle.n_heads)] + [f"L{layer}.mlp"]
    return names


def receivers(oracle: Oracle) -> list[str]:
    """Every receiver, in the order of the forward pass."""
    names = []
    for layer in range(oracle.n_layers):
        names += [f"L{layer}.H{head}.q" for head in range(oracle.n_heads)]
        names += [f"L{layer}.H{head}.{kind}" for kind in "kv" for head in range(oracle.n_kv_heads)]
        names.append(f"L{layer}.mlp")
    return [*names, "logits"]


def is_edge(oracle: Oracle, sender: str, receiver: str) -> bool:
    """Whether the receiver reads the sender: in a parallel block the MLP does not read its layer's heads."""
    if sender.startswith("embed") or receiver.startswith("logits"):
        return True
    start, end = _parse(sender), _parse(receiver)
    same_block = start["layer"] == end["layer"] and not oracle.names.parallel
    return start["layer"] < end["layer"] or (same_block and start["head"] is not None and end["mlp"])


def all_edges(oracle: Oracle) -> list[tuple[str, str]]:
    """Every edge of the model."""
    return [(s, r) for r in receivers(oracle) for s in senders(oracle) if is_edge(oracle, s, r)]


@torch.no_grad()
def contributions(oracle: Oracle, ids: Sequence[int]) -> dict[str, Tensor]:
    """What each sender adds to the residual stream, [position, d_model]: with the biases, all of it."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        _watch_senders(oracle, stack, found)
        oracle.run(ids)
    return found


@torch.no_grad()
def edges(oracle: Oracle, ids: Sequence[int], source_ids: Sequence[int], cut: Iterable[tuple[str, str]]) -> Tensor:
    """Logits of `ids` where the receiver of each (sender, receiver) in `cut` reads what the source run wrote.

    It reads x + Σ (source contribution - this run's contribution): its norm and its own slice of q, k or v,
    or the MLP's input, are computed anew from that; nothing else changes.
    """
    source, mine = contributions(oracle, source_ids), dict[str, Tensor]()
    wanted: dict[str, list[str]] = {}
    for sender, receiver in cut:
        assert is_edge(oracle, sender, receiver), f"{receiver} does not read {sender}"
        wanted.setdefault(receiver, []).append(sender)

    def changed(stream: Tensor, receiver: str) -> Tensor:
        delta = torch.zeros_like(stream)
        for sender in wanted[receiver]:
            name = sender.split("@")[0]
            delta += _at(source[name] - mine[name], sender, receiver)
        return stream + delta

    with ExitStack() as stack:
        _watch_senders(oracle, stack, mine)
        for receiver in wanted:
            _redirect(oracle, stack, receiver, lambda stream, at=receiver: changed(stream, at))
        return oracle.run(ids)


def path(
    oracle: Oracle,
    ids: Sequence[int],
    source_ids: Sequence[int],
    start: Iterable[str],
    end: Iterable[str],
    through_mlps: bool = False,
) -> Tensor:
    """Path patching in three passes (Goldowsky-Dill et al. 2023): logits of `ids`.

    The first pass records both runs. In the second the senders write what they do in the source run while all
    other heads and MLPs are held at their base values (with `through_mlps`, MLPs are computed anew, as Wang
    et al. 2022 did), and what the receivers read is recorded. The third is the base run with those reads.
    """
    return paths(oracle, ids, source_ids, [(start, end)], through_mlps)[0]


def paths(
    oracle: Oracle,
    ids: Sequence[int],
    source_ids: Sequence[int],
    cells: Sequence[tuple[Iterable[str], Iterable[str]]],
    through_mlps: bool = False,
) -> Tensor:
    """`path` for each of several (senders, receivers), [cell, position, d_vocab]: each cell is a row of every pass."""
    base, source = contributions(oracle, ids), contributions(oracle, source_ids)
    attention = oracle.reads(ids, [("attn_out", layer) for layer in range(oracle.n_layers)])
    frozen = [_frozen(base, source, attention, start, through_mlps) for start, _ in cells]
    ends = [[_read_by(oracle, receiver) for receiver in end] for _, end in cells]
    seen = oracle.reads_rows(ids, {(kind, layer) for end in ends for kind, layer, *_ in end}, frozen)
    written = [
        [Patch(kind, layer, seen[kind, layer][row], *where) for kind, layer, *where in end]
        for row, end in enumerate(ends)
    ]
    return oracle.run_rows(ids, written)


def _read_by(oracle: Oracle, receiver: str) -> tuple[str, int, tuple[int, ...] | None, int | None]:
    """What a receiver reads: kind, layer, positions and head."""
    node = _parse(receiver)
    rows = None if node["position"] is None else (node["position"],)
    if receiver.startswith("logits"):
        return "resid_post", oracle.n_layers - 1, rows, None
    return node["qkv"] or "mlp_in", node["layer"], rows, node["head"]


def _frozen(
    base: dict[str, Tensor],
    source: dict[str, Tensor],
    attention: dict[tuple[str, int], Tensor],
    start: Iterable[str],
    through_mlps: bool,
) -> list[Patch]:
    """The writes of the second pass: senders as in the source run, all other heads and MLPs as in the base run."""
    held: dict[tuple[str, int], Tensor] = {("resid_pre", 0): base["embed"], **attention}
    if not through_mlps:
        held |= {("mlp_out", layer): base[f"L{layer}.mlp"] for _, layer in attention}
    at_one: list[Patch] = []
    for sender in start:
        name, node = sender.split("@")[0], _parse(sender)
        if node["mlp"] and through_mlps and node["position"] is not None:  # at other positions it is no sender
            at_one.append(Patch("mlp_out", node["layer"], source[name], (node["position"],)))
            continue
        site = ("resid_pre", 0) if name == "embed" else ("mlp_out" if node["mlp"] else "attn_out", node["layer"])
        held[site] = held.get(site, base[name]) + _at(source[name] - base[name], sender)
    return [*(Patch(kind, layer, value) for (kind, layer), value in held.items()), *at_one]


def _parse(name: str) -> dict[str, Any]:
    found = _NODE.match(name)
    assert found, f"no node {name!r}"
    layer, mlp, head, qkv, position = found.groups()
    number = [None if part is None else int(part) for part in (layer, head, position)]
    return {"layer": number[0], "mlp": mlp is not None, "head": number[1], "qkv": qkv, "position": number[2]}


def _at(delta: Tensor, *nodes: str) -> Tensor:
    """`delta` at the positions that every one of the nodes names, zero elsewhere."""
    for node in nodes:
        if (position := _parse(node)["position"]) is not None:
            delta = torch.where((torch.arange(len(delta)) == position)[:, None], delta, 0.0)
    return delta


def _watch_senders(oracle: Oracle, stack: ExitStack, found: dict[str, Tensor]) -> None:
    """Fill `found` with each sender's contribution as a forward pass goes by."""

    def entered(_: nn.Module, args: tuple) -> None:
        found["embed"] = args[0][0].clone()

    stack.callback(oracle.blocks[0].register_forward_pre_hook(entered).remove)
    for layer in range(oracle.n_layers):
        projection = oracle.part(layer, "o")
        post = oracle.part(layer, "post1") if oracle.names.post1 else None
        matrix = output_matrix(projection, oracle.n_heads)

        def projected(
            _: nn.Module,
            args: tuple,
            output: Tensor,
            layer: int = layer,
            post: Any = post,
            matrix: Tensor = matrix,
        ) -> None:
            z = args[0][0].reshape(-1, oracle.n_heads, oracle.d_head)
            gain = torch.ones(()) if post is None else _gain(post, output[0])
            for head in range(oracle.n_heads):
                found[f"L{layer}.H{head}"] = z[:, head] @ matrix[head] * gain * oracle.scale

        def left(_: nn.Module, __: Any, output: Any, layer: int = layer) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[f"L{layer}.mlp"] = output.reshape(-1, output.shape[-1]) * oracle.scale

        stack.callback(projection.register_forward_hook(projected).remove)
        stack.callback(oracle.part(layer, "mlp_out").register_forward_hook(left).remove)


def _gain(norm: Any, y: Tensor) -> Tensor:
    """What an RMS norm multiplies `y` with; at that scale it is linear, so shares sum to its output."""
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = norm.forward(torch.ones_like(y[:1])) * (1 + eps) ** 0.5
    return weight * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def _redirect(oracle: Oracle, stack: ExitStack, receiver: str, changed: Any) -> None:
    """Make one receiver read `changed(stream)` in place of the stream."""
    names, node = oracle.names, _parse(receiver)
    if receiver.startswith("logits"):
        final = oracle.model.get_submodule(names.final)
        stack.callback(final.register_forward_pre_hook(lambda _, args: (changed(args[0][0])[None],)).remove)
        return
    layer, stream = node["layer"], list[Tensor]()

    def norm(which: str, x: Tensor) -> Tensor:
        # forward, not a call: hooks are not meant to see this
        return oracle.part(layer, which).forward(x) if getattr(names, which) else x

    def reads(_: nn.Module, args: tuple) -> None:
        stream[:] = [args[0].reshape(-1, args[0].shape[-1])]

    if node["mlp"]:
        source = oracle.blocks[layer] if names.parallel else oracle.part(layer, "mid")
        stack.callback(source.register_forward_pre_hook(reads).remove)

        def enter(_: nn.Module, args: tuple) -> tuple:
            return (norm("norm2", changed(stream[0])).view(args[0].shape), *args[1:])

        stack.callback(oracle.part(layer, "mlp").register_forward_pre_hook(enter).remove)
        return
    stack.callback(oracle.blocks[layer].register_forward_pre_hook(reads).remove)
    projection: Any = oracle.part(layer, "qkv" if names.qkv else node["qkv"])
    index = columns(names, node["qkv"], oracle.n_heads, oracle.n_kv_heads, oracle.d_head)[node["head"]]

    def project(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, :, index] = projection.forward(norm("norm1", changed(stream[0])))[:, index]
        return output

    stack.callback(projection.register_forward_hook(project).remove)
