"""Layout: which features of a module's tensor belong to which head or unit, and linear pieces of attention.

Standard library, torch, `errors` and `sites` only; these functions also travel to a remote server. `taps` is the plain
dictionary that `load_model` makes from a row of the table of families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import AuditError
from ..sites import KIND

#: A module, or what nnsight puts in its place inside a trace, which has no types: any attribute may be asked of it.
Envoy = Any

#: Classes whose forward is x·weight + bias.
PROJECTIONS = (
    ("torch.nn.modules.linear", "Linear"),
    ("transformers.pytorch_utils", "Conv1D"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),  # x @ weight.T + bias, in two steps
)


def at(envoy: Envoy, path: str) -> Envoy:
    """The module (or traced operation) below `envoy` at a dotted path; an empty path is `envoy` itself."""
    for part in path.split(".") if path else ():
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy


class Taps(TypedDict):
    """The facts of one model as they travel: sizes read off its modules, paths and switches of its family's row."""

    name: str
    block: tuple[tuple[str, str, tuple[str, ...]], ...]
    embed: str
    layers: str
    norm: str
    head: str
    norm1: str | None
    norm2: str | None
    qkv_layout: str
    qkv: tuple[str, str, str]
    o: str
    mlp: str
    mlp_pre: str | None
    down: str | None
    post_attn: str | None
    post_mlp: str | None
    parallel: bool
    pattern: str
    core_first: int
    alibi: bool
    branch: float
    logit_scale: float
    tuple_output: bool
    moe: bool
    joint_qk_norm: bool
    sinks: bool
    positions: str | None
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    attention: str | None
    rotary: tuple[str, ...]


def count_of(taps: Taps, kind: str) -> int:
    """How many parts a kind of site has in each layer: query heads, key/value heads, units, or 1."""
    counts = {"head": taps["n_heads"], "kv head": taps["n_kv_heads"], "unit": taps["d_mlp"]}
    return counts.get(KIND[kind].axis, 1) or 0


def part_index(taps: Taps, kind: str) -> Tensor:
    """Indices into the last dimension of the tensor that carries `kind`: `[head, d_head]`, or `[unit, 1]`.

    q, k and v are found in their projection's output whatever the layout; z, q_rot and head_out are laid out by query
    head, k_rot by key/value head. `mlp_pre` is the first part of a projection that also holds the other factor of a
    gated MLP.
    """
    count, d = count_of(taps, kind), taps["d_head"]
    part = torch.arange(count)
    if KIND[kind].axis == "unit":
        return part[:, None]
    heads, kv = taps["n_heads"], taps["n_kv_heads"]
    projected = bool(KIND[kind].reads)
    layout = taps["qkv_layout"] if projected else "separate"
    place = "qkv".index(kind) if projected else 0
    if layout == "separate":
        first = part * d
    elif layout == "split":
        first = part * d + (0, heads * d, (heads + kv) * d)[place]
    elif layout == "interleaved":
        first = part * 3 * d + place * d
    else:  # grouped: [q of the group's heads | k | v] for every key/value head
        group = heads // kv
        if place == 0:
            first = (part // group) * (group + 2) * d + (part % group) * d
        else:
            first = part * (group + 2) * d + (group + place - 1) * d
    return first[:, None] + torch.arange(d)[None, :]


def rotates_by_length(module: Envoy) -> bool:
    """Whether a module is a rotary embedding whose frequencies depend on the longest row, see `interp.engine.rotary`."""
    kinds = vars(module).get("rope_type", "")
    return any(
        "dynamic" in str(kind) or kind == "longrope"
        for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
    )


def sizes(module: Envoy) -> tuple[int, int]:
    """(out, in) of a projection, by what it says of itself: packed weights of quantised layers have another shape."""
    inner: Envoy = getattr(module, "_module", module)
    if hasattr(inner, "out_features"):
        return int(inner.out_features), int(inner.in_features)
    if hasattr(inner, "nf"):  # transformers' Conv1D
        return int(inner.nf), int(inner.nx)
    out, into = inner.weight.shape
    return int(out), int(into)


def as_it_says(module: Envoy) -> bool:
    """Whether a module computes x·weight + bias by its class alone: a Linear or Conv1D that nobody changed.

    An adapter, a quantised or parametrised layer is of another class; hooks and a replaced forward show on the module.
    """
    inner: Envoy = getattr(module, "_module", module)
    kind = type(inner)
    if (kind.__module__, kind.__name__) not in PROJECTIONS or inner._forward_hooks or inner._forward_pre_hooks:
        return False
    own = inner.__dict__.get("forward")
    if type(getattr(inner, "_hf_hook", None)).__name__ == "AlignDevicesHook":  # accelerate moves inputs between devices
        own = inner.__dict__.get("_old_forward")
    own = getattr(getattr(own, "state", None), "body", own)  # nnsight's handle on a module's forward
    return own is None or getattr(own, "__func__", own) is kind.forward


def affine(module: Envoy, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The affine map of a projection at its input x `[…, in]`: weight `[out, in]` and bias `[out]`, or None for none.

    `.weight` is read only where that is what the module computes. Any other module is asked, by its outputs for the unit
    vectors, and the map is held against what the module makes of x.

    Raises:
        AuditError: a module that is no affine map at x: a clipped projection, or one that quantises its input.
    """
    inner: Envoy = getattr(module, "_module", module)
    if as_it_says(module):
        weight = inner.weight.T if type(inner).__name__ == "Conv1D" else inner.weight
        return weight, inner.bias
    with torch.no_grad():
        units = torch.eye(sizes(module)[1], dtype=x.dtype, device=x.device)
        flat = x.detach().reshape(1, -1, x.shape[-1])
        bias = module(torch.zeros_like(units[None, :1]))[0, 0]
        weight = (module(units[None])[0] - bias).T
        got, want = module(flat), flat @ weight.T + bias
        size = flat.abs() @ weight.abs().T + bias.abs()
        rounding = 64 * torch.finfo(x.dtype).eps * size + torch.finfo(x.dtype).tiny
        off = ((got - want).abs() / rounding).max() if flat.numel() else torch.zeros(())
    if not float(off) <= 1:
        out, into = sizes(module)
        raise AuditError(
            f"the projection {type(inner).__name__} [{out}, {into}] is no affine map at its input here (off by {float(off):.3g} "
            "times its rounding: it clips, or quantises what it reads), so that nothing can be split by head or read"
        )
    return weight, bias


def output_matrix(module: Envoy, index: Tensor, z: Tensor) -> Tensor:
    """W_O by head from an output projection: `[head, d_head, d_model]`, for the features `index [head, d_head]` of its
    input z `[…, feature]`."""
    return affine(module, z)[0][:, index.to(z.device)].permute(1, 2, 0)


def project_heads(module: Envoy, x: Tensor, index: Tensor) -> Tensor:
    """Each head's slice of a projection of its own input: x `[row, head, position, d_model]` -> `[…, d_head]`."""
    weight, bias = affine(module, x)
    out = torch.einsum("rhpm,hdm->rhpd", x, weight[index])
    return out if bias is None else out + bias[index][None, :, None]


def norm_parts(norm: Envoy, x: Tensor) -> tuple[Tensor, Tensor]:
    """An RMS norm at `x` as a product: norm(x) = x · scale · weight, scale `[…, 1]` and weight `[d_model]`.

    The weight is found by asking the norm itself, so that families that store it as 1 + w need no case of their own.
    """
    epsilon = next(float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    weight = norm(torch.ones_like(x[:1, :1])) * (1 + epsilon) ** 0.5
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon).to(x.dtype)
    return scale, weight


def affine_parts(norm: Envoy, x: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """A norm at `x [row, d_model]`, its scale frozen: norm(x) = (x, less its mean if centred) · scale · weight + bias.

    Scale `[row, 1]`, weight and bias `[d_model]` in fp32, and whether it centres: found by asking the norm itself, so
    that RMS and layer norms, whatever they add to their weights, need no case of their own.
    """
    probe = torch.full_like(x[:1], 1024.0)  # so large that the norm's epsilon is nothing
    bias = norm(torch.zeros_like(probe)).float()
    x, probe = x.to(bias.device), probe.to(bias.device)  # layers may be spread over devices
    level = norm(probe).float() - bias
    probe[:, ::2] *= -1
    swing = norm(probe).float() - bias
    centred = bool(level.abs().max() < 0.01 * swing.abs().max())
    spread, inside = probe.float(), x.float()
    if centred:
        spread, inside = (part - part.mean(-1, keepdim=True) for part in (spread, inside))
    weight = swing / spread * spread.pow(2).mean().sqrt()
    unscaled = inside * weight
    out = norm(x).float() - bias
    scale = (out * unscaled).sum(-1, keepdim=True) / unscaled.pow(2).sum(-1, keepdim=True)
    return scale, weight[0], bias[0], centred


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """What enters the softmax `[row, head, query, key]`, behind the mask; one more key where there are attention sinks.

    query `[row, head, position, d_head]`, key by key/value head. Masks may be absent (causal), boolean or additive;
    `options` are the keyword arguments of the attention call: scaling, softcap, attention sinks.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scaling = options.get("scaling")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    queries, keys = scores.shape[-2:]
    if mask is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores = scores.masked_fill(~allowed, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., :keys], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[..., :keys]
    if (sinks := options.get("s_aux")) is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    return scores


def attention_pattern(query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """Attention probabilities `[row, head, query, key]`: the softmax of `attention_scores`, without the sinks."""
    scores = attention_scores(query, key, mask, options)
    precise = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=precise)[..., : key.shape[2]].to(query.dtype)


def mix_values(pattern: Tensor, value: Tensor) -> Tensor:
    """P·v by query head: pattern `[row, head, query, key]`, value by key/value head -> `[row, query, head, d_head]`."""
    value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
    return (pattern @ value).transpose(1, 2)
