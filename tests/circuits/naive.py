"""Plain-hook loops that circuits are checked against: one forward pass per edge, circuit or candidate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from interp import PromptPairs

from ..families import words
from ..oracle.configs import tiny
from ..oracle.edges import _redirect, _watch_senders, all_edges, contributions
from ..oracle.hooks import Oracle

Edge = tuple[str, str]
#: Answer and distractor of each pair of `two_pairs`.
ANSWERS, DISTRACTORS = (5, 6), (8, 9)


def two_pairs(length: int = 6, other: int = 5) -> PromptPairs:
    """Two pairs of random prompts, of different lengths; the second pair's prompts share their start."""
    (a, b), (c, d) = words(length, other, seed=1), words(length, other, seed=11)
    return PromptPairs([a, b], [c, b[:2] + d[2:]], list(ANSWERS), list(DISTRACTORS))


def in_double(family: str) -> tuple[Any, Any]:
    """A tiny model in float64, whose RMS norms do not fall back to fp32 as their own code does, and its tokenizer."""
    model, tokenizer = tiny(family)
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            plus = 1.0 if "Gemma" in type(module).__name__ else 0.0

            def forward(norm: Any, x: Tensor, plus: float = plus) -> Tensor:
                epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
                return (plus + norm.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

            module.forward = MethodType(forward, module)
    return model, tokenizer


def difference(logits: Tensor, pair: int) -> Tensor:
    """Logit of a pair's answer minus that of its distractor, at the last position of [position, d_vocab]."""
    return logits[-1, ANSWERS[pair]] - logits[-1, DISTRACTORS[pair]]


def cut(oracle: Oracle, ids: Sequence[int], reference: Mapping[str, Tensor], edges: Iterable[Edge]) -> Tensor:
    """Logits of a run whose cut edges carry what `reference` has for their sender, [position or 1, d_model]."""
    mine: dict[str, Tensor] = {}
    wanted: dict[str, list[str]] = {}
    for sender, receiver in edges:
        wanted.setdefault(receiver, []).append(sender)

    def changed(stream: Tensor, receiver: str) -> Tensor:
        return stream + sum(reference[sender] - mine[sender] for sender in wanted[receiver])

    with torch.no_grad(), ExitStack() as stack:
        _watch_senders(oracle, stack, mine)
        for receiver in wanted:
            _redirect(oracle, stack, receiver, lambda stream, at=receiver: changed(stream, at))
        return oracle.run(ids)


@cache
def written(oracle: Oracle, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """`contributions` of a plain run, kept."""
    return contributions(oracle, ids)


@cache
def activation(oracle: Oracle, ids: tuple[int, ...], kind: str, layer: int) -> Tensor:
    """An activation of a plain run, kept."""
    return oracle.read(ids, kind, layer)


def with_edge(
    oracle: Oracle,
    ids: Sequence[int],
    source_ids: Sequence[int],
    edge: Edge,
    size: float | Tensor,
    mixed: tuple[str, int, float] | None = None,
) -> Tensor:
    """Logits where one receiver reads x + size · (source - base contribution of the sender), with a gradient.

    `mixed` (kind, layer, α) puts a site on the way from base to source: (1 - α) · base + α · source.
    """
    sender, receiver = edge
    delta = written(oracle, tuple(source_ids))[sender] - written(oracle, tuple(ids))[sender]
    with torch.enable_grad(), ExitStack() as stack:
        if mixed is not None:
            kind, layer, alpha = mixed
            a, b = (activation(oracle, tuple(prompt), kind, layer) for prompt in (ids, source_ids))
            oracle._hook(stack, kind, layer, lambda _: (a + alpha * (b - a))[None])
        _redirect(oracle, stack, receiver, lambda stream: stream + size * delta)
        return oracle.model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def slope(
    oracle: Oracle,
    ids: Sequence[int],
    source_ids: Sequence[int],
    edge: Edge,
    pair: int,
    mixed: tuple[str, int, float] | None = None,
) -> float:
    """d (logit difference) / d size of `with_edge` at size 0."""
    size = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        value = difference(with_edge(oracle, ids, source_ids, edge, size, mixed), pair)
        return float(torch.autograd.grad(value, size)[0])


def greedy(
    oracle: Oracle, pairs: PromptPairs, order: Sequence[Edge], threshold: float
) -> tuple[set[Edge], dict[Edge, float]]:
    """ACDC one edge at a time: what stays of `order`, tried in that order, and the change when each was tested.

    Every edge that is not in `order` is cut from the start.
    """
    removed = {edge for edge in all_edges(oracle) if edge not in set(order)}
    sources = [contributions(oracle, prompt) for prompt in pairs.corrupted]

    def metric(edges: set[Edge]) -> float:
        runs = [cut(oracle, ids, source, edges) for ids, source in zip(pairs.clean, sources, strict=True)]
        return sum(float(difference(logits, pair)) for pair, logits in enumerate(runs)) / len(runs)

    current, kept, changes = metric(removed), set[Edge](), dict[Edge, float]()
    for edge in order:
        value = metric(removed | {edge})
        changes[edge] = value - current
        if abs(changes[edge]) < threshold:
            removed.add(edge)
            current = value
        else:
            kept.add(edge)
    return kept, changes
