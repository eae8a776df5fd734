"""Plain forward passes with torch's own hooks, where no trace is opened: what an audit from afar holds traced runs against.

Standard library and torch only: shipped by source, as the functions of `interp.engine.trace`, and called alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, at

if TYPE_CHECKING:
    from .program import Program


class Hooks:
    """What is kept of one plain forward pass, and changed in it.

    `spec`: "changes", (path, side, row, column, index or None, value to add); "moved", rows whose every block receives its input
    with each number moved by a unit in its last place; "keep", (path, side) of modules, "input" or "output".
    """

    def __init__(self, spec: Envoy, blocks: list[str], rows: int) -> None:
        self.rows = rows
        self.kept: dict[tuple[str, str], Tensor] = {}
        self.keep, self.moved = set(spec["keep"]), spec["moved"]
        self.blocks = {(block, "input"): number for number, block in enumerate(blocks)} if self.moved else {}
        self.changes: dict[tuple[str, str], list[Envoy]] = {}
        for path, side, *change in spec["changes"]:
            self.changes.setdefault((path, side), []).append(change)

    def places(self) -> list[tuple[str, str]]:
        """Where there is something to do."""
        return sorted({*self.keep, *self.blocks, *self.changes})

    def touch(self, place: tuple[str, str], tensor: Tensor) -> Tensor:
        """The tensor that goes on from a place."""
        if tensor.ndim == 2:  # rows behind one another (OPT's MLP)
            return self.touch(place, tensor.view(self.rows, -1, tensor.shape[-1])).view(tensor.shape)
        if place in self.blocks or place in self.changes:
            tensor = tensor.clone()
        if place in self.blocks:
            generator = torch.Generator().manual_seed(self.blocks[place])
            for row in self.moved:
                sign = torch.randint(0, 2, tensor.shape[1:], generator=generator) * 2 - 1
                tensor[row] *= 1 + torch.finfo(tensor.dtype).eps * sign.to(tensor.device, tensor.dtype)
        for row, column, index, value in self.changes.get(place, ()):
            step = value.to(tensor.device, tensor.dtype)
            if index is None:
                tensor[row, column] += step
            else:
                tensor[row, column, index.to(tensor.device)] += step
        if place in self.keep:
            self.kept[place] = tensor[:1].detach().cpu().clone()  # some models go on in place
        return tensor

    def put(self, module: Envoy, place: tuple[str, str]) -> Envoy:
        """Put the hook of a place; returns what takes it away again."""

        def before(_: Envoy, args: Envoy, kwargs: Envoy) -> Envoy:
            if args:
                return (self.touch(place, args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: self.touch(place, kwargs[name])}

        def behind(_: Envoy, args: Envoy, out: Envoy) -> Envoy:
            if isinstance(out, tuple):
                return (self.touch(place, out[0]), *out[1:])
            return self.touch(place, out)

        target = at(module, place[0])
        if place[1] == "input":
            return target.register_forward_pre_hook(before, with_kwargs=True)
        return target.register_forward_hook(behind)


def hooked(
    model: Envoy, taps: Taps, programs: list[Program], metric: object, done: Callable[..., object] | None = None
) -> list[Envoy]:
    """Each program's `plain`: {"kept": {(path, side): what the first row had there}, "logits": [row, d_vocab]}; see `Hooks`."""
    module: Envoy = getattr(model, "_module", model)
    device = next(module.parameters()).device
    results = []
    for number, program in enumerate(programs):
        blocks = [f"{taps['layers']}.{layer}" for layer in range(taps["n_layers"])]
        hooks = Hooks(program["plain"], blocks, len(program["inputs"]["input_ids"]))
        inputs = {
            name: value.to(device) if torch.is_tensor(value) else value for name, value in program["inputs"].items()
        }
        handles = [hooks.put(module, place) for place in hooks.places()]
        try:
            with torch.no_grad():
                logits = module(**inputs, use_cache=False).logits[:, -1].cpu()
        finally:
            for handle in handles:
                handle.remove()
        result = {"kept": hooks.kept, "logits": logits}
        if done is None:
            results.append(result)
        else:
            done(number, result)
    return results
