"""What an audit compares: findings, and the HuggingFace modules called directly.

Expected values never come from the taps that are on trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.model import Model
from ..models.views import at, features
from ..sites import KINDS

#: Largest error, relative to max(1, largest expected value), by float type.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")


@dataclass(frozen=True)
class Finding:
    """One check at one layer: the largest error, what it may be, and a note where there was nothing to prove."""

    kind: str
    what: str
    layer: int
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance."""
        return self.error <= self.tolerance


def compare(kind: str, what: str, layer: int, got: Tensor, want: Tensor, note: str = "") -> Finding:
    """A finding from two tensors that must be equal."""
    want = want.to(got.device)
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    error = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
    return Finding(kind, what, layer, float("inf") if error != error else error, TOLERANCE[got.dtype] * scale, note)


class Parts:
    """The HuggingFace modules of one block, called directly to say what a consumer should have done."""

    def __init__(self, model: Model, layer: int) -> None:
        self.model, self.family, self.layer = model, model.family, layer
        self.block = at(at(model.hf, model.family.layers), str(layer))

    def normed(self, path: str | None, x: Tensor) -> Tensor:
        """`x` behind the norm at a path, or itself where the family has none there."""
        return at(self.block, path)(x) if path else x

    def projected(self, kind: str, x: Tensor) -> Tensor:
        """q, k or v by head from what the projection reads: `[row, position, head, d_head]`."""
        module = at(self.block, self.family.qkv["qkv".index(kind)])
        return module(x)[..., features(self.model.taps, kind).to(x.device)]

    def attn_out(self, z: Tensor) -> Tensor:
        """What attention adds to the stream, from z `[row, position, head, d_head]`."""
        return self.normed(self.family.post_attn, at(self.block, self.family.o)(z.flatten(2)))

    def mlp_out(self, neuron: Tensor) -> Tensor:
        """What the MLP adds to the stream, from its hidden units."""
        assert self.family.down is not None
        return self.normed(self.family.post_mlp, at(self.block, self.family.down)(neuron))

    def activation(self) -> Any:
        """The MLP's activation function, or None where it has no name that is known."""
        mlp = at(self.block, self.family.mlp)
        return next((getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name)), None)


def kinds_of(model: Model) -> list[str]:
    """The kinds of sites that this model has inside its blocks."""
    absent = set(model.family.missing) | {"logits", "embed"}
    if model.family.name == "falcon" and model.taps["attention"] != "eager":
        absent.add("pattern")
    return [kind for kind in KINDS if kind not in absent]


def logits_of(model: Model, hidden: Tensor) -> Tensor:
    """Logits from the final residual stream, through the model's own norm and head."""
    config = model.hf.config.get_text_config()
    logits = at(model.hf, model.family.head)(at(model.hf, model.family.norm)(hidden))
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
