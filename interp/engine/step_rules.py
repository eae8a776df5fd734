"""What each rule of `interp.engine.rules` does with one step: its output, unchanged, and how gradients come back through it.

All in base rows alone. Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One step of a forward pass: what is called, with what, the rows of it that are runs' bases and their other ends."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    options: dict[str, Any]
    rows: Any  # Rows or Replayed, see `interp.engine.ruled`

    def out(self) -> Tensor:
        """What the step gives."""
        with torch.no_grad():
            return self.function(*self.args, **self.options)

    def given(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by its place or its name."""
        return self.args[place] if len(self.args) > place else self.options.get(name, default)


class Ruled(NamedTuple):
    """A step with a rule: its output, its inputs, and `pull`, from the output's gradient to those of the inputs."""

    out: Tensor
    inputs: list[Tensor]
    pull: Callable[[Tensor], list[Tensor]]


Rule = Callable[[Call], Ruled]


def fit(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient by what was broadcast to its shape, in the shape of that."""
    while gradient.ndim > like.ndim:
        gradient = gradient.sum(0)
    for axis, size in enumerate(like.shape):
        if size == 1 and gradient.shape[axis] > 1:
            gradient = gradient.sum(axis, keepdim=True)
    return gradient


def close(x: Tensor, other: Tensor) -> Tensor:
    """Where a quotient of differences would be rounding rather than slope."""
    near = torch.finfo(x.dtype).eps ** 0.5
    return (other - x).abs() <= near * torch.maximum(x.abs(), other.abs()).clamp(min=near)


def derivative(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a function of single numbers makes of x, and its derivative there."""
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        y = call.function(leaf, *call.args[1:], **call.options)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), slope


def secant_slope(call: Call) -> tuple[Tensor, Tensor]:
    """(y_s − y_b) / (x_s − x_b); the mean of the two derivatives where the ends are close."""
    y, slopes = derivative(call, call.args[0])
    (x, end), (y_x, y_end), (d_x, d_end) = (call.rows.ends(part) for part in (call.args[0], y, slopes))
    near = close(x, end)
    step = (end - x).masked_fill(near, 1)
    return y, torch.where(near, (d_x + d_end) / 2, (y_end - y_x) / step)


def ratio_slope(call: Call) -> tuple[Tensor, Tensor]:
    """y/x; the derivative where x is nothing."""
    y, slopes = derivative(call, call.args[0])
    x, y_x, d_x = (call.rows.ends(part)[0] for part in (call.args[0], y, slopes))
    nothing = x.abs() < torch.finfo(x.dtype).eps
    return y, torch.where(nothing, d_x, y_x / x.masked_fill(nothing, 1))


def elementwise(slope: Callable[[Call], tuple[Tensor, Tensor]]) -> Rule:
    """The rule of a function of single numbers, by its slope."""

    def rule(call: Call) -> Ruled:
        out, by_x = slope(call)
        return Ruled(out, [call.args[0]], lambda gradient: [by_x * gradient])

    return rule


def closed(slope: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """The same where the secant has a closed form of x and y at both ends, which no rounding spoils."""

    def rule(call: Call) -> Ruled:
        out = call.out()
        by_x = slope(*call.rows.ends(call.args[0]), *call.rows.ends(out))
        return Ruled(out, [call.args[0]], lambda gradient: [by_x * gradient])

    return rule


def power(otherwise: Rule) -> Rule:
    """x ** n: the closed forms of squares, cubes and inverse roots."""
    forms = {
        2: closed(lambda x, end, y, y_end: x + end),
        3: closed(lambda x, end, y, y_end: x * x + x * end + end * end),
        -0.5: INVERSE_ROOT,
    }

    def rule(call: Call) -> Ruled:
        exponent = call.given(1, "exponent")
        return forms.get(exponent, otherwise)(call) if isinstance(exponent, int | float) else otherwise(call)

    return rule


def held(call: Call) -> Ruled:
    """Nothing comes back through this step."""
    return Ruled(call.out(), [], lambda gradient: [])


def product(share: float, middle: bool) -> Rule:
    """a · b, a @ b: to each factor what the other one is, at the mean of the ends or at the base."""

    def rule(call: Call) -> Ruled:
        a, b = call.args[:2]
        (a_b, a_s), (b_b, b_s) = call.rows.ends(a), call.rows.ends(b)
        by_a, by_b = ((b_b + b_s) / 2, (a_b + a_s) / 2) if middle else (b_b, a_b)
        matrix = call.function.__name__ in MATRIX

        def pull(gradient: Tensor) -> list[Tensor]:
            if matrix:
                made = gradient @ by_a.transpose(-1, -2), by_b.transpose(-1, -2) @ gradient
            else:
                made = gradient * by_a, gradient * by_b
            return [share * fit(part, like) for part, like in zip(made, (a_b, b_b), strict=True)]

        return Ruled(call.out(), [a, b], pull)

    return rule


def added_product(share: float, middle: bool) -> Rule:
    """beta · c + alpha · a @ b: a product beside what is added to it."""
    inner = product(share, middle)

    def rule(call: Call) -> Ruled:
        c = call.args[0]
        factors = [call.given(1, "batch1"), call.given(2, "batch2")]
        beta, alpha = call.options.get("beta", 1), call.options.get("alpha", 1)
        made = inner(Call(torch.matmul, tuple(factors), {}, call.rows))

        def pull(gradient: Tensor) -> list[Tensor]:
            parts = [alpha * part for part in made.pull(gradient)]
            return [*parts, fit(beta * gradient, call.rows.ends(c)[0])] if c.requires_grad else parts

        return Ruled(call.out(), [*factors, c] if c.requires_grad else factors, pull)

    return rule


def quotient(middle: bool) -> Rule:
    """a / b: a product with 1/b, whose secant is −1/(b_b · b_s); without `middle` what is divided by is held."""

    def rule(call: Call) -> Ruled:
        a, b = call.args[:2]
        (a_b, a_s), (b_b, b_s) = call.rows.ends(a), call.rows.ends(b)

        def pull(gradient: Tensor) -> list[Tensor]:
            if not middle:
                return [fit(gradient / b_b, a_b)]
            by_b = -(a_b + a_s) / 2 / (b_b * b_s)
            return [fit(gradient * (1 / b_b + 1 / b_s) / 2, a_b), fit(gradient * by_b, b_b)]

        return Ruled(call.out(), [a, b] if middle else [a], pull)

    return rule


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


def norm(middle: bool) -> Rule:
    """c · r · weight with c = x, less its mean in a layer norm, and r = (mean c² + ε)^−½: a product, r by its secant."""

    def rule(call: Call) -> Ruled:
        shape = call.args[1]
        axes = tuple(range(-len(shape), 0))
        weight, epsilon = call.given(2, "weight"), call.given(4, "eps", 1e-5)
        centred = call.function.__name__ == "layer_norm"
        if not centred:
            epsilon = call.given(3, "eps")
            epsilon = torch.finfo(call.args[0].dtype).eps if epsilon is None else epsilon
        ends = [part.float() for part in call.rows.ends(call.args[0])]
        c, c_end = ((part - part.mean(axes, keepdim=True)) if centred else part for part in ends)
        r, r_end = (torch.rsqrt(part.pow(2).mean(axes, keepdim=True) + epsilon) for part in (c, c_end))
        scale, inside = ((r + r_end) / 2, (c + c_end) / 2) if middle else (r, None)
        by_size = -((r * r_end) ** 2) / (r + r_end)

        def pull(gradient: Tensor) -> list[Tensor]:
            g = gradient.float() if weight is None else gradient.float() * weight.detach()
            made = g * scale
            if inside is not None:
                made = made + 2 * by_size * inside * (g * inside).mean(axes, keepdim=True)
            made = made - made.mean(axes, keepdim=True) if centred else made
            return [made.to(gradient.dtype)]

        return Ruled(call.out(), [call.args[0]], pull)

    return rule


def parts_of_attention(call: Call) -> tuple[list[tuple[Tensor, Tensor]], Any, float, bool]:
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


#: Products that are matrices'.
MATRIX = ("matmul", "bmm", "__matmul__")
INVERSE_ROOT = closed(lambda x, end, y, y_end: -((y * y_end) ** 2) / (y + y_end))
