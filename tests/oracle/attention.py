"""The dot products of attention, seen where they happen: what enters q·kᵀ, and the pattern times v."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class _DotProducts(TorchFunctionMode):
    """Sees the products of batched matrices in an attention module: first q·kᵀ, then pattern·v."""

    def __init__(self, rewrite: Callable[[int, str, Tensor], Tensor]) -> None:
        super().__init__()
        self.rewrite = rewrite
        self.layer: int | None = None
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.layer is not None and name == "scaled_dot_product_attention":
            return self._spelled_out(*args, **kwargs)
        if self.layer is None or name not in ("matmul", "__matmul__", "bmm", "baddbmm"):
            return func(*args, **kwargs)
        operands = [*args, *kwargs.values()]
        if name == "baddbmm":  # BLOOM: alibi.baddbmm(batch1=q, batch2=kᵀ, …)
            return func(*args, **self._scores(kwargs, "batch1", "batch2"))
        left, right = operands[:2]
        if right.ndim == 2:  # a linear layer written as a product (Falcon)
            return func(*args, **kwargs)
        self.products += 1
        if self.products == 1:
            both = self._scores({"q": left, "k": right}, "q", "k")
            return func(both["q"], both["k"])
        return func(self.rewrite(self.layer, "pattern", left), right)

    def _scores(self, operands: dict[str, Any], q: str, k: str) -> dict[str, Any]:
        self.products = 1
        assert self.layer is not None
        query = self.rewrite(self.layer, "q_rot", operands[q])
        key = self.rewrite(self.layer, "k_rot", operands[k].transpose(-1, -2)).transpose(-1, -2)
        return {**operands, q: query, k: key}

    def _spelled_out(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **other: Any) -> Tensor:
        assert self.layer is not None and not other.get("is_causal")
        both = self._scores({"q": q, "k": k.transpose(-1, -2)}, "q", "k")
        scores = both["q"] @ both["k"] / q.shape[-1] ** 0.5 + attn_mask
        self.products = 2
        return self.rewrite(self.layer, "pattern", scores.softmax(-1)) @ v


@contextmanager
def dot_products(
    oracle: Any, sites: Mapping[tuple[str, int], Callable[[Tensor], Tensor]], rows: int = 1
) -> Iterator[None]:
    """While open, `oracle.model` runs with eager attention, its q_rot, k_rot and pattern changed by `sites`.

    `sites` holds by (kind, layer) a function of the activation [row, position, head, …]; k_rot is by kv head.
    """

    def at(layer: int, kind: str, old: Tensor) -> Tensor:
        if (kind, layer) not in sites:
            return old
        by_head = old.reshape(rows, -1, *old.shape[-2:]).transpose(1, 2)
        repeats = by_head.shape[2] // oracle.n_kv_heads if kind == "k_rot" else 1
        new = sites[kind, layer](by_head[:, :, ::repeats].contiguous())
        return new.repeat_interleave(repeats, 2).transpose(1, 2).reshape(old.shape)

    mode = _DotProducts(at)

    def leave(*_: Any) -> None:
        assert mode.products == 2, f"expected q·kᵀ and pattern·v, saw {mode.products} products"
        mode.layer = None

    config, used = oracle.model.config, oracle.model.config._attn_implementation
    if not getattr(oracle.config, "alibi", False):  # Falcon's eager attention adds ALiBi twice
        config._attn_implementation = "eager"  # set_attn_implementation refuses Falcon
    try:
        with ExitStack() as stack:
            for layer in range(oracle.n_layers):

                def enter(*_: Any, layer: int = layer) -> None:
                    mode.layer, mode.products = layer, 0

                stack.callback(oracle.part(layer, "attn").register_forward_pre_hook(enter).remove)
                stack.callback(oracle.part(layer, "attn").register_forward_hook(leave).remove)
            with mode:
                yield
    finally:
        config._attn_implementation = used
