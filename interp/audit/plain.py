"""The model's own forward pass, without any tap: streams, what is read off them, gradients, and their rounding.

How far numbers that count as equal may lie apart depends on the processor, the kernels that it picks and the sizes of what
is added up, so it is measured on the model at hand: the same prompt is run in rows whose every block receives its input
with each number moved by about one unit in its last place. What then moves is what rounding moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.reading import read_program
from ..engine.rotary import RowsAlone
from ..engine.trace import Function
from ..models.layout import Envoy, at
from ..models.model import Model

#: Rows that are moved by rounding. Errors of other kernels were up to 5 times what they move (docs/architecture.md).
COPIES, TIMES = 4, 16
#: No check allows more than this part of what it compares, whatever rounding does.
MOST = 0.25
#: Where the stream is read: (layer, "attention" | "mlp"), or (n_layers, "logits").
Place = tuple[int, str]


@dataclass(frozen=True)
class Plain:
    """One prompt through the model: `[1, position, d_model]` at each place where the stream is read, and the logits.

    `noise` by place `[position]`, and `logits_noise`: how far rounding moves them. `gradient [1 + COPIES, position,
    d_model]`: of `probe` by what is read there, moved by rounding in all rows but the first; empty where `why_not` says why.
    """

    stream: dict[Place, Tensor]
    noise: dict[Place, Tensor]
    logits: Tensor
    logits_noise: Tensor
    gradient: dict[Place, Tensor]
    why_not: str


def probe(logits: Tensor, batch: object) -> Tensor:
    """A metric `[row]` that depends on every logit."""
    return (logits * torch.arange(logits.shape[-1], device=logits.device).mul(2.4).cos()).sum(-1)


def readers_of(model: Model) -> dict[str, Place]:
    """The modules whose input is the stream as it is read at each place: a norm, or the readers where it has none."""
    family = model.family
    place_of: dict[str, Place] = {}
    for layer in range(model.n_layers):
        block = f"{family.layers}.{layer}"
        place_of |= {
            f"{block}.{path}": (layer, "attention") for path in ([family.norm1] if family.norm1 else family.qkv)
        }
        if family.norm2 != family.norm1 or not family.norm1:
            place_of[f"{block}.{family.norm2 or family.mlp}"] = (layer, "mlp")
    return {**place_of, family.norm: (model.n_layers, "logits")}


@contextmanager
def inputs_changed(hf: Envoy, paths: Sequence[str], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Run with the first input of each module at `paths` replaced by `change(path, input)`."""

    def hook(path: str) -> Function:
        def before(_: object, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if args:
                return (change(path, args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: change(path, kwargs[name])}

        return before

    handles = [at(hf, path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(model: Model, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits `[row, d_vocab]` of each prompt's last token, by the model's own forward pass."""
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in read_program(model, prompts)["inputs"].items()
    }
    with RowsAlone(model.hf, model.taps):
        logits: Tensor = model.hf(**inputs).logits[:, -1]
    return logits


@torch.no_grad()
def logits_from(model: Model, prompt: Sequence[int], final: Tensor) -> Tensor:
    """Logits `[1, d_vocab]` of the last token from a final residual stream, through all that the model does with it."""
    with inputs_changed(model.hf, [model.family.norm], lambda _, x: final.to(x.device, x.dtype)):
        return logits_of(model, [prompt])


@torch.no_grad()
def moved_by(model: Model, prompt: Sequence[int], path: str, step: Tensor, reader: str) -> Tensor:
    """How far the input of the module at `reader` moves when `step` is added to the first features put out at `path`."""
    seen: list[Tensor] = []

    def keep(_: str, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    def add(_: object, args: object, out: Tensor) -> Tensor:
        moved = out.clone()
        moved[..., : step.shape[-1]] += step.to(out.device, out.dtype)
        return moved

    with inputs_changed(model.hf, [reader], keep):
        logits_of(model, [prompt])
        handle = at(model.hf, path).register_forward_hook(add)
        try:
            logits_of(model, [prompt])
        finally:
            handle.remove()
    return seen[1] - seen[0]


def plain_run(model: Model, prompt: Sequence[int], gradients: bool = False) -> Plain:
    """The prompt alone, and beside COPIES of it that are moved by rounding."""
    readers = readers_of(model)
    blocks = [f"{model.family.layers}.{layer}" for layer in range(model.n_layers)]
    seen: dict[Place, Tensor] = {}
    leaves: dict[Place, Tensor] = {}
    generator = torch.Generator()

    def move(x: Tensor) -> Tensor:
        step = torch.randn(x[1:].shape, generator=generator).to(x.device, x.dtype) * torch.finfo(x.dtype).eps
        return torch.cat([x[:1], x[1:] * (1 + step)])

    def by_row(x: Tensor) -> Tensor:
        return x.reshape(-1, len(prompt), x.shape[-1])  # OPT flattens rows and positions

    def keep(path: str, x: Tensor) -> Tensor:
        seen[readers[path]] = by_row(x.detach())
        return x

    def disturb(path: str, x: Tensor) -> Tensor:
        x = move(by_row(x)).reshape(x.shape) if path in blocks else keep(path, x)
        if gradients and path in readers:  # a leaf of the reader's own
            x = x + leaves.setdefault(readers[path], torch.zeros_like(x, requires_grad=True))
        return x

    with torch.no_grad(), inputs_changed(model.hf, list(readers), keep):
        alone = logits_of(model, [prompt])
        single = dict(seen)

    def run() -> Tensor:
        generator.manual_seed(0)
        with torch.set_grad_enabled(gradients), inputs_changed(model.hf, [*blocks, *readers], disturb):
            return logits_of(model, [prompt] * (1 + COPIES))

    gradient, why_not = {}, ""
    try:
        logits = run()
        if gradients:
            by_leaf = torch.autograd.grad(probe(logits.float(), None).sum(), list(leaves.values()))
            gradient = {place: by_row(grad) for place, grad in zip(leaves, by_leaf, strict=True)}
    except (RuntimeError, NotImplementedError) as error:
        if not gradients:
            raise
        why_not = (str(error).strip().splitlines() or [type(error).__name__])[0]
        gradients = False
        logits = run()
    noise = {place: (seen[place] - x).abs().float().amax((0, 2)) for place, x in single.items()}
    logits_noise = (logits.detach() - alone).abs().float().amax()[None]
    return Plain(single, noise, alone, logits_noise, gradient, why_not)
