"""The invariants of reading: what must hold of every kind of site at every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.reading import read
from ..errors import AuditError
from ..findings import Finding
from ..models.layout import at, mix_values
from ..models.model import Model
from .parts import Parts, compare, kinds_of
from .plain import Plain


def read_all(model: Model, prompt: Sequence[int]) -> tuple[dict[str, Any], list[str], list[Finding]]:
    """One forward pass in which every site is read: {"reads": {(layer, kind): activation}, "logits": [1, d_vocab]}.

    Also the kinds that could be read, and a finding on heads' outputs where an output projection is no affine map.
    """
    kinds = kinds_of(model)
    findings: list[Finding] = []

    def run() -> dict[str, Any]:
        reads = [(layer, kind) for layer in range(model.n_layers) for kind in (*kinds, "value")]
        return read(model, [prompt], [*reads, (-1, "embed")])

    try:
        return run(), kinds, findings
    except AuditError as error:
        findings.append(Finding("head_out", "read", 0, float("inf"), 0.0, str(error)))
        kinds.remove("head_out")
        return run(), kinds, findings


@torch.no_grad()
def check_reads(
    model: Model, prompt: Sequence[int], plain: Plain, run: dict[str, Any], kinds: Sequence[str]
) -> Iterator[Finding]:
    """Every read at every layer against the model's own modules and its plain forward."""
    layers = range(model.n_layers)
    got: dict[tuple[int, str], Tensor] = run["reads"]
    ids = torch.tensor([list(prompt)], device=model.device)
    yield compare("logits", "read", model.n_layers, run["logits"], plain.logits, noise=plain.logits_noise)
    yield compare("embed", "read", 0, got[-1, "embed"], at(model.hf, model.family.embed)(ids))
    for layer in layers:
        here = {kind: got[layer, kind] for kind in (*kinds, "value") if (layer, kind) in got}
        parts = Parts(model, layer)
        pre, post = here["resid_pre"], here["resid_post"]
        following = (layer + 1, "attention" if layer + 1 < model.n_layers else "logits")
        for kind, x, place in (("resid_pre", pre, (layer, "attention")), ("resid_post", post, following)):
            yield compare(kind, "read", layer, x, plain.stream[place], noise=plain.noise[place])
        added = (here["attn_out"], here["mlp_out"])
        total, operands = pre + added[0] + added[1], (pre, *added)
        for kind in ("mlp_out",) if "resid_mid" in here else ("attn_out", "mlp_out"):
            yield compare(kind, "read", layer, total, post, beside=operands)
        if "resid_mid" in here:
            mid = here["resid_mid"]
            yield compare("attn_out", "read", layer, pre + here["attn_out"], mid, beside=operands)
            yield compare("resid_mid", "read", layer, mid + here["mlp_out"], post, beside=(mid, *operands))
        yield from check_attention_reads(model, parts, here)
        entered = parts.normed(model.family.norm2, here.get("resid_mid", pre))
        yield compare("mlp_in", "read", layer, here["mlp_in"], entered)
        if "neuron" in here:
            yield compare("neuron", "read", layer, parts.mlp_out(here["neuron"]), here["mlp_out"])
            yield check_units(parts, here["mlp_pre"], here["neuron"])


def check_attention_reads(model: Model, parts: Parts, here: dict[str, Tensor]) -> Iterator[Finding]:
    """Heads: projections of the stream, their mixture by the pattern, and what they write."""
    layer = parts.layer
    x = parts.normed(model.family.norm1, here["resid_pre"])
    for kind in "qkv":
        yield compare(kind, "read", layer, here[kind], parts.projected(kind, x))
    yield compare("z", "read", layer, parts.attn_out(here["z"]), here["attn_out"])
    if "head_out" in here:
        o = at(parts.block, model.family.o)
        summed = here["head_out"].sum(2) + o(torch.zeros_like(here["z"].flatten(2)))  # and the bias
        wrote = parts.normed(model.family.post_attn, summed) * parts.branch
        yield compare("head_out", "read", layer, wrote, here["attn_out"], beside=(here["head_out"],))
    if "pattern" in here:
        pattern = here["pattern"]
        recomputed = ("q_rot", "k_rot") if model.family.pattern == "interface" else ()
        noise = rounding_of_pattern(here) if recomputed else None
        # one equation that holds only if all of these are right, with v as the projection wrote it and as it is mixed
        mixed_as = here["value"] if here["v"].shape == getattr(here.get("value"), "shape", None) else here["v"]
        for value, kinds in ((mixed_as, ("pattern", *recomputed)), (here["v"], ("v",))):
            mixed = mix_values(pattern, value.transpose(1, 2))
            for kind in kinds:
                yield compare(kind, "read", layer, mixed, here["z"], beside=(value.abs().max()[None],), noise=noise)
        sums = pattern.double().sum(-1).to(pattern.dtype)
        want = torch.ones_like(sums) if not model.family.sinks else sums.clamp(max=1.0)
        yield compare("pattern", "read", layer, sums, want)
    for kind, plain in (("q_rot", "q"), ("k_rot", "k")):
        if kind in here:
            moved = here[kind][:, 0].float().norm(), here[plain][:, 0].float().norm()
            note = "" if float(moved[0]) or not float(moved[1]) else "reads zero"
            yield Finding(kind, "read", layer, 0.0 if not note else float("inf"), 0.0, note)


def rounding_of_pattern(here: dict[str, Tensor]) -> Tensor:
    """How far z moves when the scores are rounded: one unit in the last place of |q|·|k| moves a probability by as much."""
    query, key = (here[kind].float().norm(dim=-1).max() for kind in ("q_rot", "k_rot"))
    size = query * key * here["q_rot"].shape[-1] ** -0.5
    return (torch.finfo(here["v"].dtype).eps * size * here["v"].float().abs().max())[None]


def check_units(parts: Parts, pre: Tensor, neuron: Tensor) -> Finding:
    """Hidden units are the activation function of `mlp_pre`, times another factor in gated MLPs."""
    act = parts.activation()
    if act is None or pre.shape != neuron.shape:
        return compare(
            "mlp_pre", "read", parts.layer, neuron[..., :0], neuron[..., :0], "activation function not found"
        )
    active = act(pre)
    dead = active.abs() < 1e-6
    return compare("mlp_pre", "read", parts.layer, neuron.masked_fill(~dead, 0), torch.zeros_like(neuron))
