"""Rotary embeddings whose frequencies depend on the longest row of a batch, and on runs before: each row has its own here.

RoPE of type `dynamic` and `longrope` (Peng et al. 2023; Ding et al. 2024) takes its frequencies from the largest position in the
batch, and `dynamic` remembers the largest one that it ever saw. A short prompt beside a long one would then not be what it
is alone. Standard library and torch only: these functions also travel to a remote server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, at


def forget(module: Envoy) -> None:
    """Put a rotary embedding back to what it is before its first run."""
    held = {**vars(module), **module._buffers}
    for name, value in held.items():
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_inv_freq", "inv_freq"), value.clone())
        elif name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)


def by_row(module: Envoy, x: Tensor, positions: Tensor, rest: dict[str, Any]) -> Any:
    """What the embedding gives each row alone: positions `[row, position]` -> a tensor or tuple of `[row, position, …]`."""
    rows = positions.shape[-2]  # some have a leading axis of their own
    lengths = positions.reshape(-1, rows, positions.shape[-1]).amax((0, 2))
    parts: list[tuple[Tensor, Any]] = []
    for length in lengths.unique():
        chosen = (lengths == length).nonzero()[:, 0]
        forget(module)
        parts.append((chosen, type(module).forward(module, x, positions[..., chosen, :], **rest)))
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([chosen for chosen, _ in parts]).argsort()

    def joined(pieces: Sequence[Tensor]) -> Tensor:
        axis = next(axis for axis, size in enumerate(pieces[0].shape) if size == len(parts[0][0]))
        return torch.cat(list(pieces), dim=axis).index_select(axis, order)

    if isinstance(parts[0][1], Tensor):
        return joined([made for _, made in parts])
    return tuple(joined(pieces) for pieces in zip(*(made for _, made in parts), strict=True))


def hook(module: Envoy, args: tuple, kwargs: dict[str, Any], _: Any) -> Any:
    """What stands behind the embedding's own forward pass: its output, made anew row by row."""
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    return by_row(module, given.pop("x"), given.pop("position_ids"), given)


class RowsAlone:
    """Run with every row rotated as if it were alone; what the embeddings remember is afterwards as it was.

    A class: functions travel to a server without their decorators.
    """

    def __init__(self, model: Envoy, taps: Taps) -> None:
        embeddings = [at(model, path) for path in taps["rotary"]]
        self.modules = [getattr(one, "_module", one) for one in embeddings]

    def __enter__(self) -> None:
        self.state = [(dict(vars(module)), dict(module._buffers)) for module in self.modules]
        self.handles = [module.register_forward_hook(hook, with_kwargs=True) for module in self.modules]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for module, (held, buffers) in zip(self.modules, self.state, strict=True):
            for name in held:
                if name.endswith(("max_seq_len_cached", "attention_scaling", "inv_freq")):
                    setattr(module, name, held[name])
            module._buffers.update(buffers)
