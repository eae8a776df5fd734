"""A model frozen around a prompt, by plain PyTorch: norms by their formula with the scale held, queries and keys held, what each
MLP writes a leaf. Weights are read here; nothing of the library is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .configs import tiny
from .names import columns, kv_heads, names_of


def norm_held(module: Any, x: Tensor) -> Tensor:
    """A layer or RMS norm whose denominator takes no part in gradients."""
    if isinstance(module, torch.nn.LayerNorm):
        inside = x - x.mean(-1, keepdim=True)
        scale = (inside.pow(2).mean(-1, keepdim=True) + module.eps).rsqrt().detach()
        return inside * scale * module.weight + (0 if module.bias is None else module.bias)
    if isinstance(module, torch.nn.Identity):
        return x
    eps = getattr(module, "variance_epsilon", None) or module.eps
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
    weight = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    return x * scale * weight


class Frozen:
    """One prompt's forward pass; `leaves` by layer (-1: embedding), `entered` by layer, `logits` of the last position."""

    def __init__(
        self, family: str, ids: Sequence[int], skips: Mapping[int, Tensor] | None = None, hf: Any = None
    ) -> None:
        self.hf = (tiny(family)[0] if hf is None else hf).eval()
        self.names, self.skips = names_of(self.hf.config), dict(skips or {})
        self.blocks = self.hf.get_submodule(self.names.blocks)
        self.leaves: dict[int, Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        handles = [self.hf.get_input_embeddings().register_forward_hook(lambda _, __, out: self.leaf(-1, out))]
        norms = [self.hf.get_submodule(self.names.final)]
        for layer, block in enumerate(self.blocks):
            norms += [
                block.get_submodule(name) for name in (self.names.norm1, self.names.norm2, self.names.post1) if name
            ]
            handles += self.hold_attention(block)
            handles += self.replace_mlp(layer, block)
        handles += [norm.register_forward_hook(lambda m, args, out: norm_held(m, args[0])) for norm in norms]
        try:
            self.logits: Tensor = self.hf(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def leaf(self, layer: int, out: Tensor) -> Tensor:
        self.leaves[layer] = out.detach().requires_grad_(True)
        return self.leaves[layer]

    def hold_attention(self, block: Any) -> list[Any]:
        names, config = self.names, self.hf.config.get_text_config()
        if not names.qkv:
            return [
                block.get_submodule(name).register_forward_hook(lambda _, __, out: out.detach())
                for name in (names.q, names.k)
            ]
        heads = config.num_attention_heads
        d_head = config.hidden_size // heads
        index = columns(names, "v", heads, kv_heads(config), d_head).flatten()

        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            new = out.detach().clone()
            new[..., index] = out[..., index]
            return new

        return [block.get_submodule(names.qkv).register_forward_hook(hook)]

    def replace_mlp(self, layer: int, block: Any) -> list[Any]:
        def enters(_: Any, args: tuple[Any, ...]) -> None:
            self.entered[layer] = args[0]

        def leaves(_: Any, __: Any, out: Tensor) -> Tensor:
            new = self.leaf(layer, out)
            if layer in self.skips:
                around = self.entered[layer] @ self.skips[layer].T
                new = new + around - around.detach()
            return new

        mlp, out = (block.get_submodule(name) for name in (self.names.mlp, self.names.mlp_out))
        return [mlp.register_forward_pre_hook(enters), out.register_forward_hook(leaves)]

    def slopes(self, read: Callable[[Frozen], Tensor]) -> dict[int, Tensor]:
        """The gradient of a number by every leaf `[position, d]`."""
        names = list(self.leaves)
        found = torch.autograd.grad(read(self), [self.leaves[n] for n in names], retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros_like(self.leaves[name])[0] if slope is None else slope[0]
            for name, slope in zip(names, found, strict=True)
        }
