"""Rules of steps that a softmax is in: itself, its logarithm, logsumexp, and attention in one call.

Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.layout import Envoy
from .step_rules import Call, Rule, Ruled


def precise(x: Tensor) -> Tensor:
    """In double precision, where a device has it."""
    return x.double() if x.device.type != "mps" else x.float()


def log_mean(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The logarithmic mean of p and q, (p − q) / (log p − log q), from their logarithms; 0 where one of them is 0."""
    apart = (log_p - log_q).abs()
    shrunk = torch.where(apart == 0, 1, -torch.expm1(-apart) / apart.masked_fill(apart == 0, 1))
    return (torch.maximum(log_p, log_q).exp() * shrunk).nan_to_num(nan=0.0)


def softmax(middle: bool) -> Rule:
    """With L = the logarithmic mean of p_b and p_s: g ↦ L · (g − Σ L g / Σ L), exact since Σ p is 1 at both ends."""

    def rule(call: Call) -> Ruled:
        out, dim = call.out(), call.given(1, "dim")
        if not middle:
            return Ruled(out, [], lambda gradient: [])
        x, end = (precise(part).log_softmax(dim) for part in call.rows.ends(call.args[0]))
        mean = log_mean(x, end)

        def pull(gradient: Tensor) -> list[Tensor]:
            g = gradient.to(mean.dtype)
            return [(mean * (g - (mean * g).sum(dim, keepdim=True) / mean.sum(dim, keepdim=True))).to(gradient.dtype)]

        return Ruled(out, [call.args[0]], pull)

    return rule


def log_softmax(call: Call) -> Ruled:
    """x less its logsumexp, whose secant is L / Σ L."""
    dim = call.given(1, "dim")
    mean = log_mean(*(precise(part).log_softmax(dim) for part in call.rows.ends(call.args[0])))
    share = mean / mean.sum(dim, keepdim=True)

    def pull(gradient: Tensor) -> list[Tensor]:
        return [gradient - (share * gradient.to(share.dtype).sum(dim, keepdim=True)).to(gradient.dtype)]

    return Ruled(call.out(), [call.args[0]], pull)


def logsumexp(call: Call) -> Ruled:
    """Its secant is L / Σ L."""
    dim, keep = call.given(1, "dim"), call.given(2, "keepdim", False)
    mean = log_mean(*(precise(part).log_softmax(dim) for part in call.rows.ends(call.args[0])))
    share = (mean / mean.sum(dim, keepdim=True)).to(call.args[0].dtype)
    return Ruled(call.out(), [call.args[0]], lambda gradient: [(gradient if keep else gradient.unsqueeze(dim)) * share])


def parts_of_attention(call: Call) -> tuple[list[tuple[Tensor, Tensor]], Envoy, float, bool]:
    """Query, key and value at both ends, keys by query head; the mask, the scale, and whether it is causal."""
    ends = [call.rows.ends(call.given(place, name)) for place, name in enumerate(("query", "key", "value"))]
    heads = ends[0][0].shape[1]
    ends = [tuple(part.repeat_interleave(heads // part.shape[1], dim=1) for part in pair) for pair in ends]
    scale = call.given(6, "scale")
    scale = ends[0][0].shape[-1] ** -0.5 if scale is None else scale
    return ends, call.given(3, "attn_mask"), scale, bool(call.given(5, "is_causal", False))


def log_pattern(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Logarithms of attention probabilities `[row, head, query, key]`, in double precision."""
    scores = precise(query @ key.transpose(-1, -2) * scale)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.log_softmax(-1)


def attention(middle: bool) -> Rule:
    """softmax(Q·Kᵀ)·V in one call: products, and the softmax; without `middle` its pattern is held."""

    def rule(call: Call) -> Ruled:
        (q, k, v), mask, scale, causal = parts_of_attention(call)
        masks = (mask, mask) if mask is None or mask.shape[0] == 1 else call.rows.ends(mask)
        inputs = [call.given(place, name) for place, name in enumerate(("query", "key", "value"))]
        groups = inputs[0].shape[1] // inputs[1].shape[1]

        def by_group(gradient: Tensor) -> Tensor:
            return gradient if groups == 1 else gradient.unflatten(1, (-1, groups)).sum(2)

        def pull(gradient: Tensor) -> list[Tensor]:
            log_p = log_pattern(q[0], k[0], masks[0], scale, causal)
            if not middle:
                p = log_p.exp().nan_to_num(nan=0.0).to(gradient.dtype)
                return [by_group(p.transpose(-1, -2) @ gradient)]
            log_end = log_pattern(q[1], k[1], masks[1], scale, causal)
            p = ((log_p.exp() + log_end.exp()) / 2).nan_to_num(nan=0.0).to(gradient.dtype)
            mean = log_mean(log_p, log_end)
            by_p = (gradient @ ((v[0] + v[1]) / 2).transpose(-1, -2)).to(mean.dtype)
            total = mean.sum(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
            scores = (mean * (by_p - (mean * by_p).sum(-1, keepdim=True) / total)).to(gradient.dtype) * scale
            by_key = scores.transpose(-1, -2) @ ((q[0] + q[1]) / 2)
            return [scores @ ((k[0] + k[1]) / 2), by_group(by_key), by_group(p.transpose(-1, -2) @ gradient)]

        return Ruled(call.out(), inputs if middle else inputs[2:], pull)

    return rule
