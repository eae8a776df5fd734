"""The laws of edges: what methods rest on that follow edges, split what is written by sender, or freeze norms.

A law that fails refuses the methods that name it (`Model.rests_on`), with the audit's reason. Values come from the
model's own modules and from autograd through its own forward pass (`audit.plain`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import Resolved
from ..engine.compile import compile_chunk, gradient_program
from ..engine.context import Runs, context_of
from ..engine.reading import contribution_program
from ..engine.trace import contributions, execute_gradients
from ..errors import AuditError
from ..findings import Finding
from ..models.layout import affine, as_it_says, at, part_index, sizes
from ..models.model import Model
from ..pairs import PromptPairs
from .adding import check_rules
from .parts import TOLERANCE, Parts, compare
from .plain import MOST, TIMES, Place, Plain, probe


def check_laws(
    model: Model, prompt: Sequence[int], other: Sequence[int], plain: Plain, got: dict[tuple[int, str], Tensor]
) -> Iterator[Finding]:
    """Every law, on two prompts of one length; `plain` is the first one's run, with gradients, `got` what was read in it."""
    yield from check_head(model, plain)
    yield from check_backward(model)
    yield from check_rules(model, prompt, other)
    yield from check_receivers(model, plain, got)
    written = []
    for ids in (prompt, other):
        try:
            ((parts, biases),) = contributions(model.nn, model.taps, [contribution_program(model, ids)], None)
        except AuditError as error:  # a projection that is no affine map
            yield Finding("senders", "law", 0, float("inf"), 0.0, str(error))
            return
        written.append(parts)
        if ids is prompt:
            yield from check_senders(model, parts, biases, plain)
            yield from check_heads(model, got)
    yield from check_gradients(model, prompt, other, written, plain)


@torch.no_grad()
def check_head(model: Model, plain: Plain) -> Iterator[Finding]:
    """logits = softcap(factor · head(norm(stream))), and the head is an affine map."""
    final = plain.stream[model.n_layers, "logits"][:, -1:]
    normed = at(model.hf, model.family.norm)(final)
    head = at(model.hf, model.family.head)
    try:
        weight, bias = affine(head, normed)
    except AuditError as error:
        yield Finding("head", "law", model.n_layers, float("inf"), 0.0, str(error))
        return
    logits = (
        torch.nn.functional.linear(normed.to(weight.device, weight.dtype), weight, bias) * model.taps["logit_scale"]
    )
    if (cap := getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    got, want = logits[:, 0].to(plain.logits.dtype), plain.logits
    yield compare("head", "law", model.n_layers, got, want, noise=plain.logits_noise)


def projections(model: Model) -> Iterator[tuple[str, Any]]:
    """The projections inside the blocks, and the head, by name; not the parts that an adapter is made of."""
    whole = ""
    for name, module in at(model.hf, model.family.layers).named_modules():
        if isinstance(getattr(module, "in_features", None), int) and not (whole and name.startswith(whole)):
            whole = f"{name}."
            yield f"{model.family.layers}.{name}", module
    yield model.family.head, at(model.hf, model.family.head)


def check_backward(model: Model) -> Iterator[Finding]:
    """Layers that are no plain projection: autograd through one of each class is how its output moves with its input."""
    seen: set[type] = set()
    for name, module in projections(model):
        if as_it_says(module) or type(module) in seen:
            continue
        seen.add(type(module))
        for length in (1, 5):  # some take another kernel for one row
            generator = torch.Generator().manual_seed(length)
            x, step = (torch.randn(1, length, sizes(module)[1], generator=generator) for _ in range(2))
            x, step = x.to(model.device, model.dtype), 0.1 * step.to(model.device, model.dtype)
            leaf = x.clone().requires_grad_(True)
            try:
                out = module(leaf)
                by_out = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
                (gradient,) = torch.autograd.grad(out, leaf, by_out)
            except (RuntimeError, NotImplementedError) as error:
                said = f"{type(module).__name__} {name}: {str(error).strip().splitlines()[0]}"
                yield Finding("backward", "law", 0, float("inf"), 0.0, said)
                return
            with torch.no_grad():
                moved = (module(x + step) - module(x)).double()
            got, want = (gradient.double() * step.double()).sum(), (by_out.double() * moved).sum()
            scale = by_out.double().norm() * moved.norm()
            allowed = 0.1 * float(
                scale
            )  # a quantised layer moves in steps; one without a derivative is off by as much as moves
            off = float((got - want).abs())
            note = "" if off <= allowed else f"autograd through {type(module).__name__} {name} is not its derivative"
            yield Finding("backward", "law", 0, float("inf") if note else off, allowed, note)


@torch.no_grad()
def check_receivers(model: Model, plain: Plain, got: dict[tuple[int, str], Tensor]) -> Iterator[Finding]:
    """q, k and v by the affine map of their projection; what the MLP receives is its norm of the stream."""
    taps, family = model.taps, model.family
    for layer in range(model.n_layers):
        parts = Parts(model, layer)
        x = parts.normed(family.norm1, plain.stream[layer, "attention"])
        for kind, path in zip("qkv", family.qkv, strict=True):
            module, index = at(parts.block, path), part_index(taps, kind).to(x.device)
            try:
                weight, bias = affine(module, x)
            except AuditError as error:
                yield Finding("receivers", "law", layer, float("inf"), 0.0, str(error))
                continue
            made = torch.nn.functional.linear(x, weight.to(x.dtype), bias)[..., index]
            size = x.abs().flatten(2).amax(-1) * weight.abs().amax()
            yield compare("receivers", "law", layer, made, module(x)[..., index], beside=[size.max()[None]])
        stream = plain.stream.get((layer, "mlp"), plain.stream[layer, "attention"])
        want, inside = parts.normed(family.norm2, stream), got[layer, "mlp_in"]
        yield compare("receivers", "law", layer, inside, want, noise=plain.noise.get((layer, "mlp")))


def read_by(model: Model, place: Place) -> int:
    """How many senders, the first ones in their order, are in the stream that is read at a place."""
    layer, who = place
    return model.order.read_by(layer, who)


@torch.no_grad()
def check_senders(model: Model, parts: Tensor, biases: Tensor, plain: Plain) -> Iterator[Finding]:
    """Contributions `[sender, position, d_model]` and biases add up to the stream at each place where it is read."""
    size = parts.abs().double().cumsum(0)
    total, added = parts.double().cumsum(0), biases.double()
    for place, stream in plain.stream.items():
        count = read_by(model, place)
        layers = place[0] + (count > model.order.sender(place[0], 0))  # an MLP reads the attention of its own layer too
        got = (total[count - 1] + added[:layers].sum(0))[None].to(stream.dtype)
        noise = plain.noise[place]
        want = stream.cpu()
        yield compare("senders", "law", place[0], got, want, beside=[size[count - 1][None].to(want.dtype)], noise=noise)


@torch.no_grad()
def check_heads(model: Model, read: dict[tuple[int, str], Tensor]) -> Iterator[Finding]:
    """What one head writes is what the output projection makes of its z alone, less what it makes of nothing."""
    for layer in range(model.n_layers):
        o, z = at(Parts(model, layer).block, model.family.o), read[layer, "z"][0]  # [position, head, d_head]
        alone = torch.eye(model.n_heads, dtype=z.dtype, device=z.device)[:, None, :, None] * z
        weight, _ = affine(o, read[layer, "z"].flatten(2))
        by_head = weight[:, part_index(model.taps, "z").to(z.device)].to(z.dtype)  # [d_model, head, d_head]
        got = torch.einsum("phd,mhd->hpm", z, by_head)
        want = o(alone.flatten(2)) - o(torch.zeros_like(alone[:1].flatten(2)))
        nothing = o(torch.zeros_like(alone[:1, :1].flatten(2)))
        yield compare("senders", "law", layer, got.flatten(0, 1)[None], want.flatten(0, 1)[None], beside=[nothing[0]])


def readers(model: Model, place: Place, apart: bool) -> tuple[int, int]:
    """The receivers that read at a place, from the first to behind the last; `apart`: the MLP has a norm of its own."""
    layer, who = place
    if who != "attention":
        return model.order.receiver(layer, who), model.order.receiver(layer, who) + 1
    mlp = model.order.receiver(layer, "mlp")
    return model.order.receiver(layer, "q"), mlp if apart else mlp + 1


def check_gradients(
    model: Model, prompt: Sequence[int], other: Sequence[int], written: Sequence[Tensor], plain: Plain
) -> Iterator[Finding]:
    """Edge attribution of each sender, summed over the readers at one place, is its change times autograd's gradient there.

    `written`: what each sender writes in the runs of the two prompts `[sender, position, d_model]`.
    """
    law = "edge gradients"
    if not plain.gradient:
        yield Finding("backward", "law", 0, float("inf"), 0.0, f"autograd says: {plain.why_not}")
        return
    pairs = PromptPairs([list(prompt)], [list(other)])
    context = context_of(model, Runs(model.encode(pairs)), Resolved((), (), {}), "growing")
    program = gradient_program(compile_chunk([], context, "rows", pairs=[0]).program, 1, [], by_edge=True)
    try:
        scores = execute_gradients(model.nn, model.taps, [program], probe)[0]["edges"][0]  # [receiver, sender]
    except AuditError as error:
        yield Finding(law, "law", 0, float("inf"), 0.0, str(error))
        return
    change, both = (written[1] - written[0]).double(), (written[0].abs() + written[1].abs()).double()
    eps = torch.finfo(plain.logits.dtype).eps
    for place, gradient in plain.gradient.items():
        layer = place[0]
        first, last = readers(model, place, (layer, "mlp") in plain.gradient)
        count = read_by(model, place)
        got = scores[first:last, :count].double().sum(0)
        parts, by_row = change[:count].flatten(1), gradient.flatten(1).double().cpu()
        want = by_row @ parts.T  # [row, sender]
        scale = (parts.abs() @ by_row[0].abs()).clamp(min=1e-30)
        noise = (want[1:] - want[:1]).abs().amax(0)
        noise = torch.maximum(noise, scale * (noise / scale).median())  # few rows: some are moved little by chance
        # a sender's change is a difference, which carries the rounding of what both runs write, however little is left of it
        left = TIMES * eps * (both[:count].flatten(1) @ by_row[0].abs())
        floor = TOLERANCE[plain.logits.dtype] * scale.clamp(min=float(scale.max()) * 1e-3)
        allowed = torch.maximum(torch.maximum(floor, left), torch.minimum(TIMES * noise, MOST * scale))
        off = (got - want[0]).abs().nan_to_num(nan=float("inf"))
        worst = int((off / allowed).argmax())
        yield Finding(law, "law", layer, float(off[worst]), float(allowed[worst]))
