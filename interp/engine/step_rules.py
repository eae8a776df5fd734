"""What each rule of `interp.engine.rules` does with one step: its output, unchanged, and how gradients come back through it.

All in base rows alone. Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.layout import Envoy


class Call(NamedTuple):
    """One step of a forward pass: what is called, with what, the rows of it that are runs' bases and their other ends, and what
    it gave, where that is known."""

    function: Callable[..., Tensor]
    args: tuple[Envoy, ...]
    options: dict[str, Envoy]
    rows: Envoy  # Rows or Replayed, see `interp.engine.ruled`
    gave: Tensor | None = None

    def out(self) -> Tensor:
        """What the step gives."""
        if self.gave is not None:
            return self.gave.detach()
        with torch.no_grad():
            return self.function(*self.args, **self.options)

    def given(self, place: int, name: str, default: Envoy = None) -> Envoy:
        """An argument, by its place or its name."""
        return self.args[place] if len(self.args) > place else self.options.get(name, default)


class Ruled(NamedTuple):
    """A step with a rule: its output, its inputs, and `pull`, from the output's gradient to those of the inputs."""

    out: Tensor
    inputs: list[Tensor]
    pull: Callable[[Tensor], list[Tensor]]


Rule = Callable[[Call], Ruled]


def fit(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient by what was broadcast to its shape, in the shape of that."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    for axis, size in enumerate(shape):
        if size == 1 and gradient.shape[axis] > 1:
            gradient = gradient.sum(axis, keepdim=True)
    return gradient


def derivative(call: Call, x: Tensor) -> Tensor:
    """The derivative of a function of single numbers."""
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        y = call.function(leaf, *call.args[1:], **call.options)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return slope


def secant_slope(call: Call, out: Tensor) -> Tensor:
    """(y_s − y_b) / (x_s − x_b); where that would be rounding rather than slope, the derivative half-way."""
    (x, end), (y, y_end) = call.rows.ends(call.args[0]), call.rows.ends(out)
    step, near = end - x, torch.finfo(x.dtype).eps ** 0.5
    slope = derivative(call, (x + end) / 2)
    apart = step.abs() > near * (x.abs() + end.abs()).clamp_(min=near)
    return torch.where(apart, (y_end - y) / step, slope)


def ratio_slope(call: Call, out: Tensor) -> Tensor:
    """y/x; the derivative where x is nothing."""
    x, y = (call.rows.ends(part)[0] for part in (call.args[0], out))
    nothing = x.abs() < torch.finfo(x.dtype).eps
    return torch.where(nothing, derivative(call, x), y / x)


def elementwise(slope: Callable[[Call, Tensor], Tensor]) -> Rule:
    """The rule of a function of single numbers, by its slope."""

    def rule(call: Call) -> Ruled:
        out = call.out()
        by_x = slope(call, out)
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
        matrix, shapes = call.function.__name__.strip("_") in MATRIX, (a_b.shape, b_b.shape)

        def pull(gradient: Tensor) -> list[Tensor]:
            if matrix:
                made = gradient @ by_a.transpose(-1, -2), by_b.transpose(-1, -2) @ gradient
            else:
                made = gradient * by_a, gradient * by_b
            parts = [fit(part, shape) for part, shape in zip(made, shapes, strict=True)]
            return parts if share == 1 else [share * part for part in parts]

        return Ruled(call.out(), [a, b], pull)

    return rule


def projection(call: Call) -> Ruled:
    """x · Wᵀ + b, whose rule is its derivative: taken back in base rows alone, it costs half."""
    weight = call.given(1, "weight")
    return Ruled(
        call.out(), [call.args[0]], lambda gradient: [(gradient.flatten(0, -2) @ weight).view(*gradient.shape[:-1], -1)]
    )


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
            return [*parts, fit(beta * gradient, call.rows.ends(c)[0].shape)] if c.requires_grad else parts

        return Ruled(call.out(), [*factors, c] if c.requires_grad else factors, pull)

    return rule


def quotient(middle: bool) -> Rule:
    """a / b: a product with 1/b, whose secant is −1/(b_b · b_s); without `middle` what is divided by is held."""

    def rule(call: Call) -> Ruled:
        a, b = call.args[:2]
        (a_b, a_s), (b_b, b_s) = call.rows.ends(a), call.rows.ends(b)

        def pull(gradient: Tensor) -> list[Tensor]:
            if not middle:
                return [fit(gradient / b_b, a_b.shape)]
            by_b = -(a_b + a_s) / 2 / (b_b * b_s)
            return [fit(gradient * (1 / b_b + 1 / b_s) / 2, a_b.shape), fit(gradient * by_b, b_b.shape)]

        return Ruled(call.out(), [a, b] if middle else [a], pull)

    return rule


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
        precision = torch.promote_types(call.args[0].dtype, torch.float32)
        ends = [part.to(precision) for part in call.rows.ends(call.args[0])]
        c, c_end = ((part - part.mean(axes, keepdim=True)) if centred else part for part in ends)
        r, r_end = (torch.rsqrt(part.pow(2).mean(axes, keepdim=True) + epsilon) for part in (c, c_end))
        scale, inside = ((r + r_end) / 2, (c + c_end) / 2) if middle else (r, None)
        by_size = -((r * r_end) ** 2) / (r + r_end)

        def pull(gradient: Tensor) -> list[Tensor]:
            g = gradient.to(precision) if weight is None else gradient.to(precision) * weight.detach()
            made = g * scale
            if inside is not None:
                made = made + 2 * by_size * inside * (g * inside).mean(axes, keepdim=True)
            made = made - made.mean(axes, keepdim=True) if centred else made
            return [made.to(gradient.dtype)]

        return Ruled(call.out(), [call.args[0]], pull)

    return rule


#: Products that are matrices'.
MATRIX = ("matmul", "bmm")
INVERSE_ROOT = closed(lambda x, end, y, y_end: -((y * y_end) ** 2) / (y + y_end))
