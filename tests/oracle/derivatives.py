"""Derivatives by a site's activation, on the oracle: autograd through plain hooks, finite differences beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from .hooks import Oracle, Patch

Score = Callable[[Tensor], Tensor]
Site = tuple[str, int]


def live_logits(oracle: Oracle, ids: Sequence[int], patches: Iterable[Patch] = ()) -> Tensor:
    """Logits [position, d_vocab] in the model's own precision, in autograd's graph of the patches' values."""
    seen: list[Tensor] = []
    handle = oracle.model.register_forward_hook(lambda _, __, output: seen.append(output.logits[0]))
    try:
        with torch.enable_grad():
            Oracle._forward.__wrapped__(oracle, ids, [list(patches)], {})  # type: ignore[attr-defined]
    finally:
        handle.remove()
    return seen[0]


def gradient(
    oracle: Oracle, ids: Sequence[int], site: Site, score: Score, patches: Iterable[Patch] = (), cut: int | None = None
) -> Tensor:
    """d score(logits) / d activation of one site, as `Oracle.read` shapes it, in the run with some patches.

    cut: a layer through whose attention and MLP nothing flows back.
    """
    kind, layer = site
    like = oracle.read(ids, kind, layer, patches)
    step = torch.zeros_like(like, requires_grad=True)
    with ExitStack() as stack:
        for part in ("attn_out", "mlp_out") if cut is not None else ():
            # after the site's own hook: what is patched there is cut as well
            hook = oracle.part(cut, part).register_forward_hook(_detached)  # type: ignore[arg-type]
            stack.callback(hook.remove)
        total = score(live_logits(oracle, ids, [*patches, Patch(kind, layer, step, op="add")]))
    if not total.requires_grad:
        return torch.zeros_like(like)
    (found,) = torch.autograd.grad(total, step, allow_unused=True)
    return torch.zeros_like(like) if found is None else found


def slope(
    oracle: Oracle, ids: Sequence[int], site: Site, direction: Tensor, score: Score, epsilon: float, **where: object
) -> float:
    """d score / d ε of the run in which ε · direction is added at a site, by a difference of fourth order."""

    def at(factor: float) -> float:
        step = Patch(*site, epsilon * factor * direction, op="add", **where)  # type: ignore[arg-type]
        return float(score(live_logits(oracle, ids, [step])).detach())

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * epsilon)


def _detached(_: object, __: object, output: Tensor | tuple) -> Tensor | tuple:
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()
