"""A model made linear around one prompt: attention patterns and the scales of norms held, MLPs replaced by what they wrote.

What a later part reads is then a sum over what earlier ones wrote, exactly (Ameisen et al. 2025): gradients are edges. Values
stay those of the forward pass: each surrogate is its linear part, and the rest is held as a constant. Standard library and
torch only: this travels to a remote server by source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, affine_parts, at, part_index

if TYPE_CHECKING:
    from .program import Program


def linear_norm(module: Envoy, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """A norm's output, of which only its scale's part is held."""
    x = args[0]
    forward = type(module).forward
    with torch.no_grad():
        scale, weight, _, centred = affine_parts(lambda part: forward(module, part), x.detach().flatten(0, -2))
    inside = x - x.mean(-1, keepdim=True) if centred else x
    linear = (inside.float() * scale.view(*x.shape[:-1], 1) * weight).to(out.dtype)
    return linear + (out - linear).detach()


class Frozen:
    """Hooks on a model's modules while one forward pass runs. Afterwards `leaves` hold what the embedding and each MLP wrote
    (layer -1 is the embedding), `entered` what each MLP received, and `logits` what the head gave.

    A class: functions travel to a server without their decorators.
    """

    def __init__(self, model: Envoy, taps: Taps, skips: dict[int, Tensor]) -> None:
        self.model, self.taps, self.skips = model, taps, skips
        self.leaves: dict[int, Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        self.logits: Tensor | None = None
        self.handles: list[Any] = []

    def module(self, path: str, layer: int | None = None) -> Any:
        """The torch module at a path, of a block where a layer is given."""
        root = self.model if layer is None else at(self.model, self.taps["layers"])[layer]
        found = at(root, path)
        return getattr(found, "_module", found)

    def __enter__(self) -> None:
        taps = self.taps
        norms = [self.module(taps["norm"])]
        self.hook(self.module(taps["embed"]), lambda _, __, out: self.leaf(-1, out))
        for layer in range(taps["n_layers"]):
            paths = (taps["norm1"], taps["norm2"], taps["post_attn"])
            norms += [self.module(path, layer) for path in paths if path]
            for place, path in enumerate(dict.fromkeys(taps["qkv"])):
                self.hook(self.module(path, layer), self.only_values(place))
            inputs, outputs = (
                next(path for path, _, kinds in taps["block"] if kind in kinds) for kind in ("mlp_in", "mlp_out")
            )
            self.handles.append(
                self.module(inputs, layer).register_forward_pre_hook(self.keep(layer), with_kwargs=True)
            )
            self.hook(self.module(outputs, layer), self.replace(layer))
        for norm in dict.fromkeys(norms):
            self.hook(norm, linear_norm)
        self.hook(self.module(taps["head"]), self.end)

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def hook(self, module: Any, function: Any) -> None:
        """Put a hook on a module's output."""
        self.handles.append(module.register_forward_hook(function))

    def leaf(self, layer: int, out: Tensor) -> Tensor:
        """A tensor that gradients end at."""
        self.leaves[layer] = out.detach().requires_grad_(True)
        return self.leaves[layer]

    def only_values(self, place: int) -> Any:
        """Queries and keys are held; the values of a fused projection are not."""

        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            if len(set(self.taps["qkv"])) == 3:
                return out if place == 2 else out.detach()
            mask = torch.zeros(out.shape[-1], dtype=out.dtype, device=out.device)
            mask[part_index(self.taps, "v").flatten().to(out.device)] = 1
            return out * mask + (out * (1 - mask)).detach()

        return hook

    def keep(self, layer: int) -> Any:
        """What an MLP receives."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            self.entered[layer] = x

        return hook

    def replace(self, layer: int) -> Any:
        """What an MLP adds to the stream: a leaf, and a linear path around it where a transcoder has one."""

        def hook(_: Any, __: Any, out: Any) -> Any:
            whole = out[0] if isinstance(out, tuple) else out
            scale = self.taps["branch"]
            new = self.leaf(layer, whole.reshape(self.entered[layer].shape) * scale)
            if layer in self.skips:
                around = self.entered[layer] @ self.skips[layer].to(new.device, new.dtype).T
                new = new + around - around.detach()
            new = (new / scale).view_as(whole)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    def end(self, _: Any, __: Any, out: Tensor) -> Tensor:
        """The head's output, before what may cap it."""
        self.logits = out
        return out


def edge_rows(frozen: Frozen, taps: Taps, program: Program) -> Tensor:
    """What arrives at every target from every source `[target, source]`: embeddings by position, errors by layer and position,
    then the features.

    `targets`: `rows`, `layer` (the number of layers for a logit), `position`, `vector [target, d]` (of a logit: `token`);
    `sources`: `errors [layer, position, d]`, `layer`, `position`, `writes [feature, d]`.
    """
    targets, sources = program["targets"], program["sources"]
    end, count = taps["n_layers"], len(targets["layer"])
    total = torch.zeros(())
    assert frozen.logits is not None
    for row in range(count):
        layer, position = int(targets["layer"][row]), int(targets["position"][row])
        if layer == end:
            logits = frozen.logits[row, -1].float() * taps["logit_scale"]
            read = logits[int(targets["token"][row])] - logits.mean()
        else:
            x = frozen.entered[layer].reshape(frozen.leaves[-1].shape)[row, position]
            read = (x.float() * targets["vector"][row].to(x.device)).sum()
        total = total.to(read.device) + read
    names = list(frozen.leaves)
    slopes = torch.autograd.grad(total, [frozen.leaves[name] for name in names], allow_unused=True)
    by_layer = {
        name: torch.zeros_like(frozen.leaves[name]) if slope is None else slope
        for name, slope in zip(names, slopes, strict=True)
    }
    like = {name: slope.reshape(frozen.leaves[-1].shape).float().cpu() for name, slope in by_layer.items()}
    embedded = (like[-1] * frozen.leaves[-1].detach().float().cpu()).sum(-1)
    stacked = torch.stack([like[layer] for layer in range(end)], dim=1)  # [row, layer, position, d]
    errors = (stacked * sources["errors"]).sum(-1).flatten(1)
    reached = stacked[:, sources["layer"], sources["position"]]  # [row, feature, d]
    features = (reached * sources["writes"]).sum(-1)
    return torch.cat([embedded, errors, features], dim=1)[:count]
