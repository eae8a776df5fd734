"""Steering: a direction added to what a model computes while it makes tokens, beside what it makes without."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .collect import collect_activations
from .edits import Edit
from .errors import PlanError
from .generated import Generation
from .generation import generate
from .models.model import Model
from .sites import Site


@dataclass(frozen=True)
class Steering:
    """What a model makes without and with a change; `print` shows the two side by side."""

    before: Generation
    after: Generation
    what: str

    def __str__(self) -> str:
        lines = [f"{'without':<48}  with {self.what}"]
        for left, right in zip(self.before.text, self.after.text, strict=True):
            sides = [textwrap.wrap(repr(text)[1:-1], 46) or [""] for text in (left, right)]
            for row in range(max(map(len, sides))):
                cells = [side[row] if row < len(side) else "" for side in sides]
                lines.append(f"{cells[0]:<48}  {cells[1]}")
            lines.append("")
        return "\n".join(lines).rstrip()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='vertical-align:top'>{html.escape(left)}</td><td>{html.escape(right)}</td></tr>"
            for left, right in zip(self.before.text, self.after.text, strict=True)
        )
        return f"<table><tr><th>without</th><th>with {html.escape(self.what)}</th></tr>{rows}</table>"


def steering_vector(
    model: Model,
    positive: Sequence[Any] | str,
    negative: Sequence[Any] | str,
    site: str | Site,
    positions: str | None = "last",
) -> Tensor:
    """The difference of the means of an activation over two lists of prompts `[d]` (Turner et al. 2023; Rimsky et al. 2024).

    Args:
        site: e.g. "L8.resid_post".
        positions: "last", each prompt's last token; None, all of them (what comes before a text left out).

    Raises:
        PlanError: a part of a site. SiteError: one that the model does not have. PairsError: no prompts.
    """
    at = model.require(Site.parse(site))
    if at != Site(at.kind, layer=at.layer, view=at.view):
        raise PlanError(f"{at} is a part of a site; a steering vector is of all of it, e.g. 'L8.resid_post'")
    if positions not in ("last", None):
        raise PlanError(f"positions={positions!r}; it is 'last', or None for all")
    means = [
        collect_activations(model, prompts, at.layer, at.kind, positions=positions, dtype=torch.float32, progress=False)
        .flatten(1)
        .mean(0)
        for prompts in (positive, negative)
    ]
    return means[0] - means[1]


def steer(
    model: Model,
    prompt: str | Sequence[Any],
    what: Any,
    strength: float,
    *,
    feature: int | None = None,
    site: str | Site | None = None,
    positions: str = "all",
    steps: int = 20,
) -> Steering:
    """Make tokens with and without a change that holds at every token.

    Args:
        what: a vector `[d]`, of which `strength` times is added at `site`; or a dictionary of SAELens, whose `feature`, or a
            `Site` of one part (`view.site(unit=3)`, "L5.neuron[7]"), has its activation raised by `strength`: for a
            feature that adds `strength` times its decoder's direction, and the rest of the activation stays.
        positions: "all" tokens, the "prompt"'s, or "generated" ones.

    Raises:
        PlanError: a vector of another width or with NaN, no site or no feature where one is needed.
    """
    if not isinstance(strength, int | float) or strength != strength:
        raise PlanError(f"strength={strength!r}: it is a number")
    edit, said = change_of(model, what, float(strength), feature, site)
    before = generate(model, prompt, (), steps)
    return Steering(before, generate(model, prompt, [edit], steps, positions=positions), said)


def change_of(
    model: Model, what: Any, strength: float, feature: int | None, site: str | Site | None
) -> tuple[Edit, str]:
    """The edit that steers, and what it is in words. PlanError: what cannot be."""
    if hasattr(what, "W_dec"):
        from .saes.views import view_of

        if feature is None:
            raise PlanError("steer was given a dictionary: say which of its features, e.g. feature=117")
        what = view_of(what, site).site(unit=feature)
    if isinstance(what, str | Site):
        at = model.require(Site.parse(what))
        if at.part is None:
            raise PlanError(f"{at} is all of a site: give one part of it, such as a unit, or a vector and site=")
        return Edit(at, "add", strength), f"{at} + {strength:g}"
    vector = torch.as_tensor(what, dtype=torch.float32)
    if site is None:
        raise PlanError("steer was given a vector: say where it is added, e.g. site='L8.resid_post'")
    at = model.require(Site.parse(site))
    width = model.width_of(at)
    if vector.shape != (width,) or not bool(vector.isfinite().all()):
        why = "" if vector.shape != (width,) else ", and without NaN or infinity"
        raise PlanError(f"the vector has shape {list(vector.shape)}; one at {at} of {model.name} is [{width}]{why}")
    return Edit(at, "add", strength * vector), f"{strength:g} × a vector at {at}"
