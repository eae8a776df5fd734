"""How good a dictionary is on a model: what it explains, what its reconstruction costs the model, which features are used.

Activations are collected as they are for training, and encoded; sums are kept, nothing else. Losses are those of `losses`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collect import request_of, run_window
from ..errors import PairsError, PlanError
from ..journal import experiment
from ..markup import table
from ..models.model import Model
from ..sites import Site
from ..windows import MASSIVE, Cut, bar_of, prompts_from, windows
from .library import Dictionary, is_transcoder
from .losses import REFERENCES, losses
from .views import describe, inference, site_of

#: A feature that is active on more than this share of tokens is dense.
DENSE = 0.1
#: Tokens of a row.
CONTEXT = 128


@dataclass(frozen=True)
class SAEReport:
    """What `evaluate_sae` found; `str(report)` is a table.

    `loss`: cross-entropy in nats per token of the plain model ("clean"), with the reconstruction in the activation's place
    ("spliced"), and with "zero" (the prefix kept), "zero_everywhere" and "mean". `recovered`: (reference − spliced) /
    (reference − clean) of each of the three. `density` `[feature]`: on which share of tokens each is active.
    """

    site: str
    tokens: int
    l0: float
    l0_with_massive: float
    explained_variance: float
    explained_variance_with_massive: float
    massive: float
    dead: float
    dense: float
    density: Tensor
    loss: dict[str, float]
    recovered: dict[str, float]

    def to_dict(self) -> dict[str, float | str]:
        """Every number by name, without the densities."""
        names = ("tokens", "l0", "l0_with_massive", "explained_variance", "explained_variance_with_massive", "massive", "dead",
                 "dense")  # fmt: skip
        made: dict[str, float | str] = {"site": self.site, **{name: getattr(self, name) for name in names}}
        made |= {f"loss_{name}": value for name, value in self.loss.items()}
        return made | {f"recovered_{name}": value for name, value in self.recovered.items()}

    def __repr__(self) -> str:
        loss = ", ".join(f"{name} {value:.3f}" for name, value in self.recovered.items())
        return (
            f"SAEReport({self.site}, {self.tokens:,} tokens: L0 {self.l0:.1f}, explained variance {self.explained_variance:.3f}, "
            f"dead {self.dead:.1%}; loss recovered {loss})"
        )

    def _repr_html_(self) -> str:
        return table(["what", "value"], list(self.to_dict().items()))

    def __str__(self) -> str:
        return "\n".join(
            f"{name:<34}{value:>12.4f}" if isinstance(value, float) else f"{name:<34}{value:>12}"
            for name, value in self.to_dict().items()
        )


@experiment
def evaluate_sae(
    model: Model,
    sae: Dictionary,
    texts: Iterable[str | Sequence[int]],
    *,
    site: str | Site | None = None,
    context: int | None = None,
    tokens: int | None = None,
    loss_tokens: int = 4096,
    progress: bool | None = None,
) -> SAEReport:
    """Evaluate a dictionary on texts that it was not trained on, cut to rows of `context` tokens.

    Args:
        site: where it belongs, if it does not say so.
        context: 128, or as many as the model has positions for.
        tokens: use the first so many; None = all.
        loss_tokens: of these, about so many are run to the end for the losses: rows evenly apart.

    Variance and active features are counted without massive tokens (whose activation is longer than three medians) and with
    all of them; what comes before a text is left out, and in the model's forward pass left as it is. A transcoder is measured
    by how it explains the MLP's output.

    Raises:
        PlanError, SiteError: a dictionary that does not fit the model, or whose site is not known. PairsError: no text.

    Examples:
        >>> report = interp.evaluate_sae(model, sae, list(pairs.clean), context=16)
        >>> report.tokens
        30
    """
    used = flat(inference(sae))
    source, target = ends(model, used, site)
    context = context or min(CONTEXT, model.n_positions or CONTEXT)
    cut = Cut(context, drop=("prefix",), tokens=tokens)
    listed = list(texts)
    sums = statistics(model, used, (source, target), cut, listed, progress)
    request = request_of(model, ((str(target), target),), cut, torch.float32)
    rows = [prompt for _, prompt in prompts_from(request, listed) if len(prompt.places) > 1]
    if not rows:
        raise PairsError("evaluate_sae was given no text of two tokens or more")
    length = sum(len(row.places) for row in rows)
    rows = rows[:: max(1, length // loss_tokens)]
    loss = losses(model, used, (source, target), rows, sums.mean.float(), progress)
    recovered = {name: (loss[name] - loss["spliced"]) / (loss[name] - loss["clean"]) for name in REFERENCES}
    density = sums.fired / sums.count
    return SAEReport(
        str(target),
        sums.count,
        *sums.active(),
        *sums.explained(),
        sums.massive / sums.count,
        float((density == 0).float().mean()),
        float((density > DENSE).float().mean()),
        density,
        loss,
        recovered,
    )


def flat(sae: Dictionary) -> Dictionary:
    """The same, of heads side by side: SAELens's dictionaries of z take them apart, `[…, head, d_head]`."""
    if not getattr(sae, "hook_z_reshaping_mode", False):
        return sae
    made = copy.deepcopy(sae)
    made.turn_off_forward_pass_hook_z_reshaping()  # type: ignore[attr-defined]
    return made


def ends(model: Model, sae: Dictionary, site: str | Site | None) -> tuple[Site, Site]:
    """The sites that a dictionary reads and explains, if it fits the model. PlanError: it does not."""
    at = site_of(sae) if site is None else Site.parse(site)
    source = Site("mlp_in", layer=at.layer) if is_transcoder(sae) else at
    target = Site("mlp_out", layer=at.layer) if is_transcoder(sae) else at
    found = (model.require(source), model.require(target))
    if found[0].head is not None or found[0].position is not None:
        raise PlanError(f"{found[0]} is a part of a site; a dictionary is of all of it")
    width = model.width_of(found[0])
    if width != sae.cfg.d_in:
        raise PlanError(f"{describe(sae)} does not fit {found[0]} of {model.name}, which has {width} numbers")
    return found


class Sums:
    """Sums over tokens, in double precision: of those that are not massive, and of all."""

    def __init__(self, sae: Dictionary) -> None:
        width, n = sae.b_dec.shape[0], sae.cfg.d_sae
        self.count = self.massive = 0
        self.fired = torch.zeros(n, dtype=torch.float64)
        self.x = torch.zeros(2, width, dtype=torch.float64)
        self.numbers = torch.zeros(2, 4, dtype=torch.float64)  # tokens, Σ|x|², Σ|x − x̂|², active features

    def add(self, target: Tensor, made: Tensor, acts: Tensor, massive: Tensor) -> None:
        """Some more tokens."""
        self.count += len(target)
        self.massive += int(massive.sum())
        self.fired += (acts > 0).sum(0).double().cpu()
        active = (acts > 0).sum(-1).double().cpu()
        error = (target - made).double().pow(2).sum(-1).cpu()
        for place, kept in enumerate((~massive, torch.ones_like(massive))):
            x = target[kept].double().cpu()
            self.x[place] += x.sum(0)
            self.numbers[place] += torch.stack(
                [kept.sum().double(), x.pow(2).sum(), error[kept].sum(), active[kept].sum()]
            )

    @property
    def mean(self) -> Tensor:
        """The mean activation of all tokens."""
        return self.x[1] / self.count

    def active(self) -> tuple[float, float]:
        """Active features of a token, without massive tokens and with all."""
        count, _, _, active = self.numbers.unbind(1)
        ratio = active / count
        return float(ratio[0]), float(ratio[1])

    def explained(self) -> tuple[float, float]:
        """Explained variance without massive tokens, and with all."""
        count, square, error, _ = self.numbers.unbind(1)
        total = square - self.x.pow(2).sum(1) / count
        ratio = 1 - error / total
        return float(ratio[0]), float(ratio[1])


@torch.no_grad()
def statistics(
    model: Model, sae: Dictionary, at: tuple[Site, Site], cut: Cut, texts: Sequence[Any], progress: bool | None
) -> Sums:
    """Sums over every token of texts."""
    sites = tuple((str(site), site) for site in dict.fromkeys(at))
    request = request_of(model, sites, cut, torch.float32)
    sums = Sums(sae)
    for prompts in windows(request, texts, bar_of(len(texts), progress)):
        values = run_window(request, prompts).values
        x, target = (values[str(site)].flatten(1) for site in at)
        length = target.norm(dim=-1)
        massive = length > MASSIVE * length.median()
        for part, want, out in zip(x.split(2048), target.split(2048), massive.split(2048), strict=True):
            entered = part.to(sae.device, sae.dtype)
            acts = sae.encode(entered)
            made = sae(entered) if is_transcoder(sae) else sae.decode(acts)
            sums.add(want, made.float().cpu(), acts, out)
    return sums
