"""Steering: a direction added to what a model computes while it makes tokens, beside what it makes without."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .collect import collect_activations
from .edits import Edit
from .errors import PlanError
from .generated import Generation
from .generation import generate
from .journal import experiment
from .markup import table
from .models.layout import count_of, part_index
from .models.model import Model
from .sites import Site
from .views import View


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

    def __repr__(self) -> str:
        return f"Steering({self.what}: {self.before.text[0]!r} became {self.after.text[0]!r})"

    def _repr_html_(self) -> str:
        return table(["without", f"with {self.what}"], list(zip(self.before.text, self.after.text, strict=True)))


@experiment
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

    Examples:
        >>> interp.steering_vector(model, ["I love this", "Wonderful"], ["I hate this", "Terrible"], "L12.resid_post").shape
        torch.Size([576])
    """
    at = model.require(Site.parse(site))
    if at != Site(at.kind, layer=at.layer, view=at.view):
        raise PlanError(f"{at} is a part of a site; a steering vector is of all of it, e.g. 'L8.resid_post'")
    if positions not in ("last", None):
        raise PlanError(f"positions={positions!r}; it is 'last', or None for all")
    part = at.view if isinstance(at.view, View) else at.kind
    means = [
        collect_activations(model, prompts, at.layer, part, positions=positions, dtype=torch.float32, progress=False)
        .flatten(1)
        .mean(0)
        for prompts in (positive, negative)
    ]
    return means[0] - means[1]


@experiment
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
            `Site` of one part (`view.site(unit=3)`, "L5.neuron[7]", "L5.H2.z"), has its activation raised by `strength`.
            Where x is the activation at a view's tap, f what the view reads of it and D its decoder, that is
            x + D[3]·((f[3] + strength) − f[3]): `strength` times the feature's own row of D, whether the feature is active
            or not, and all that the dictionary leaves unexplained stays. Of a head, `strength` is added to each number.
        site: where a vector is added: of a whole kind ("L8.resid_post", "L8.z" over all heads) or of one head ("L8.H2.z",
            `[d_head]`); q, k, v are given by head, however the model's projection lays them out.
        positions: "all" tokens, the "prompt"'s, or "generated" ones.

    Raises:
        PlanError: before anything runs: a vector of another width or with NaN, a site that no number can be added at, no site
            or no feature where one is needed, and what `model.generate` refuses.

    Examples:
        >>> vector = interp.steering_vector(model, ["I love this"], ["I hate this"], "L12.resid_post")
        >>> steered = interp.steer(model, "I think that", vector, 3.0, site="L12.resid_post", steps=5)
        >>> len(steered.before.tokens[0]), len(steered.after.tokens[0])
        (5, 5)
    """
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise PlanError(f"strength={strength!r}: it is a finite number")
    edit, said = change_of(model, what, float(strength), feature, site)
    after = generate(model, prompt, [edit], steps, positions=positions)  # first: what is wrong is refused before a run
    return Steering(generate(model, prompt, (), steps), after, said)


def change_of(
    model: Model, what: Any, strength: float, feature: int | None, site: str | Site | None
) -> tuple[Edit, str]:
    """The edit that steers, and what it is in words. PlanError: what cannot be."""
    if isinstance(what, View):
        raise PlanError(f"steer was given all of {what}: give one part of it, e.g. view.site(layer=8, unit=117)")
    if hasattr(what, "W_dec"):
        from .saes.views import view_of

        if feature is None:
            raise PlanError("steer was given a dictionary: say which of its features, e.g. feature=117")
        what, site = view_of(what, site).site(unit=feature), None
    if isinstance(what, str | Site):
        at = addable(model, what)
        if site is not None:
            raise PlanError(f"steer was given {at}, which says where: leave out site={str(site)!r}")
        if at.part is None:
            raise PlanError(f"{at} is all of a site: give one part of it, such as a unit, or a vector and site=")
        return Edit(at, "add", strength), f"{at} + {strength:g}"
    if site is None:
        raise PlanError("steer was given a vector: say where it is added, e.g. site='L8.resid_post'")
    at = addable(model, site)
    return Edit(at, "add", strength * vector_of(model, at, what)), f"{strength:g} × a vector at {at}"


def addable(model: Model, site: str | Site) -> Site:
    """The site, if numbers can be added to what it holds of a token. PlanError: a pattern, a head's output, the logits."""
    at = model.require(Site.parse(site))
    if not at.facts.width or at.facts.view == "decoder":
        raise PlanError(
            f"nothing can be added at {at}: take what heads mix ('L8.H2.z'), what attention adds to the stream "
            "('L8.attn_out'), or the stream ('L8.resid_post')"
        )
    return at


def vector_of(model: Model, at: Site, what: Any) -> Tensor:
    """A vector as the tensor that holds the site has it, where q, k, v may be slices of one projection. PlanError: none."""
    try:
        vector = torch.as_tensor(what, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        said = f"a {type(what).__name__}"
        raise PlanError(f"steer was given {said}: give a vector, a dictionary, or a Site of one part") from error
    width = model.width_of(at) if at.part is None else model.width_of(at) // parts_of(model, at)
    if vector.shape != (width,) or not bool(vector.isfinite().all()):
        why = "" if vector.shape != (width,) else ", and without NaN or infinity"
        raise PlanError(f"the vector has shape {list(vector.shape)}; one at {at} of {model.name} is [{width}]{why}")
    if at.facts.view != "slice":
        return vector
    index = part_index(model.taps, at.kind)
    whole = vector.new_zeros(int(index.max()) + 1)
    whole[(index if at.part is None else index[at.part]).flatten()] = vector
    return whole


def parts_of(model: Model, at: Site) -> int:
    """How many parts a site's kind has."""
    return at.view.parts if isinstance(at.view, View) else count_of(model.taps, at.kind)
