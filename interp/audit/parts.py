"""What an audit compares: findings, and the HuggingFace modules called directly.

Expected values never come from the taps that are on trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..findings import Finding
from ..models.layout import at, part_index
from ..models.model import Model
from ..sites import KINDS
from .plain import MOST, TIMES

#: What may separate two equal numbers, relative to the largest that stands or goes in at their position, by float type.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")


def largest(x: Tensor) -> Tensor:
    """The largest |x| at each position of `[1, position, …]`; of all there is where there are no positions."""
    size = x.abs().float()
    return (
        size.flatten(2).amax(-1)[0] if x.ndim > 2 and x.numel() else size.max()[None] if x.numel() else size.sum()[None]
    )


def compare(
    kind: str,
    what: str,
    layer: int,
    got: Tensor,
    want: Tensor,
    note: str = "",
    *,
    beside: Sequence[Tensor] = (),
    noise: Tensor | None = None,
) -> Finding:
    """A finding from two tensors that must be equal, `[1, position, …]`: the position that is worst for what it may be.

    Args:
        beside: what went into them, whose size decides how they are rounded.
        noise: how far rounding moves them on this model, `[position]`, see `audit.plain`.
    """
    want = want.to(got.device)
    if not got.numel():
        return Finding(kind, what, layer, 0.0, TOLERANCE[got.dtype], note)
    scale = largest(want)
    for part in beside:
        size = largest(part).to(scale.device)
        scale = torch.maximum(scale, size if size.shape == scale.shape else size.max())
    scale = scale.clamp(min=1.0)
    allowed = TOLERANCE[got.dtype] * scale
    if noise is not None:
        allowed = torch.maximum(allowed, torch.minimum(TIMES * noise.to(allowed.device), MOST * scale))
    error = largest(got.double() - want.double()).nan_to_num(nan=float("inf"))
    worst = int((error / allowed).argmax())
    return Finding(kind, what, layer, float(error[worst]), float(allowed[worst]), note)


class Parts:
    """The HuggingFace modules of one block, called directly to say what a consumer should have done."""

    def __init__(self, model: Model, layer: int) -> None:
        self.model, self.family, self.layer = model, model.family, layer
        self.block = at(at(model.hf, model.family.layers), str(layer))
        self.branch = model.taps["branch"]

    def normed(self, path: str | None, x: Tensor) -> Tensor:
        """`x` behind the norm at a path, or itself where the family has none there."""
        return at(self.block, path)(x) if path else x

    def projected(self, kind: str, x: Tensor) -> Tensor:
        """q, k or v by head from what the projection reads: `[row, position, head, d_head]`."""
        module = at(self.block, self.family.qkv["qkv".index(kind)])
        return module(x)[..., part_index(self.model.taps, kind).to(x.device)]

    def attn_out(self, z: Tensor) -> Tensor:
        """What attention adds to the stream, from z `[row, position, head, d_head]`."""
        return self.normed(self.family.post_attn, at(self.block, self.family.o)(z.flatten(2))) * self.branch

    def mlp_out(self, neuron: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its hidden units."""
        assert self.family.down is not None
        return self.normed(self.family.post_mlp, at(self.block, self.family.down)(neuron)) * self.branch

    def through_mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream, from what it receives."""
        out = at(self.block, self.family.mlp)(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.normed(self.family.post_mlp, out) * self.branch

    def activation(self) -> Any:
        """The MLP's activation function, or None where it has no name that is known."""
        mlp = at(self.block, self.family.mlp)
        return next((getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name)), None)


def kinds_of(model: Model) -> list[str]:
    """The kinds of sites that this model has inside its blocks."""
    absent = set(model.family.missing) | {"logits", "embed"}
    return [kind for kind in KINDS if kind not in absent]
