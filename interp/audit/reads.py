"""The invariants of reading: what must hold of every kind of site at every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..engine.reading import read
from ..models.model import Model
from ..models.views import at, mix_values
from .parts import Finding, Parts, compare, kinds_of, logits_of


@torch.no_grad()
def check_reads(model: Model, prompt: Sequence[int]) -> Iterator[Finding]:
    """One forward pass: every read at every layer against the model's own modules and its plain forward."""
    kinds, layers = kinds_of(model), range(model.n_layers)
    reads = [(layer, kind) for layer in layers for kind in kinds] + [(-1, "embed")]
    run = read(model, [prompt], reads)
    got: dict[tuple[int, str], Tensor] = run["reads"]
    ids = torch.tensor([list(prompt)], device=model.device)
    plain = model.hf(input_ids=ids, output_hidden_states=True)
    yield compare("logits", "read", model.n_layers, run["logits"], plain.logits[:, -1])
    yield compare("embed", "read", 0, got[-1, "embed"], at(model.hf, model.family.embed)(ids))
    for layer in layers:
        here = {kind: got[layer, kind] for kind in kinds}
        parts = Parts(model, layer)
        pre, post = here["resid_pre"], here["resid_post"]
        yield compare("resid_pre", "read", layer, pre, plain.hidden_states[layer])
        if layer + 1 < model.n_layers:
            yield compare("resid_post", "read", layer, post, plain.hidden_states[layer + 1])
        else:
            yield compare("resid_post", "read", layer, logits_of(model, post[:, -1:])[:, 0], plain.logits[:, -1])
        total = pre + here["attn_out"] + here["mlp_out"]
        for kind in ("mlp_out",) if "resid_mid" in here else ("attn_out", "mlp_out"):
            yield compare(kind, "read", layer, total, post)
        if "resid_mid" in here:
            yield compare("attn_out", "read", layer, pre + here["attn_out"], here["resid_mid"])
            yield compare("resid_mid", "read", layer, here["resid_mid"] + here["mlp_out"], post)
        yield from check_attention_reads(model, parts, here)
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
    o = at(parts.block, model.family.o)
    summed = here["head_out"].sum(2) + (0 if o.bias is None else o.bias)
    yield compare("head_out", "read", layer, parts.normed(model.family.post_attn, summed), here["attn_out"])
    if "pattern" in here:
        pattern = here["pattern"]
        mixed = mix_values(pattern, here["v"].transpose(1, 2))
        recomputed = ("q_rot", "k_rot") if model.family.pattern == "interface" else ()
        for kind in ("pattern", "v", *recomputed):  # one equation that holds only if all of these are right
            yield compare(kind, "read", layer, mixed, here["z"])
        sums = pattern.double().sum(-1).to(pattern.dtype)
        want = torch.ones_like(sums) if not model.family.sinks else sums.clamp(max=1.0)
        yield compare("pattern", "read", layer, sums, want)
    for kind, plain in (("q_rot", "q"), ("k_rot", "k")):
        if kind in here:
            moved = here[kind][:, 0].float().norm(), here[plain][:, 0].float().norm()
            note = "" if float(moved[0]) or not float(moved[1]) else "reads zero"
            yield Finding(kind, "read", layer, 0.0 if not note else float("inf"), 0.0, note)


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
