"""How good a dictionary is on a model: what it explains, what its reconstruction costs the model, which features are used.

1. Statistics: activations are collected as they are for training, and encoded; sums are kept, nothing else.
2. Losses: each row of tokens is run once plainly and once for each thing that takes the activation's place; rows branch off
   where they differ, so the layers below run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collect import request_of, run_window
from ..engine.door import Work, do
from ..engine.program import Place, Program
from ..engine.reading import Reading, entry, packed, read_program, run_readings
from ..engine.trace import Found, execute
from ..errors import PairsError, PlanError
from ..models.model import Model
from ..sites import KIND, Site
from ..views import View
from ..windows import MASSIVE, Cut, Prompt, bar_of, prompts_from, windows
from .library import Dictionary, is_transcoder
from .views import describe, error_view, inference, site_of

#: What takes the place of the activation, and the references that recovery is counted from.
REFERENCES = ("zero", "zero_everywhere", "mean")
#: A feature that is active on more than this share of tokens is dense.
DENSE = 0.1
#: Tokens of a row.
CONTEXT = 128
#: Numbers of logits that one forward pass may hold.
LOGITS = 2**27


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
        names = ("tokens", "l0", "explained_variance", "explained_variance_with_massive", "massive", "dead", "dense")
        made: dict[str, float | str] = {"site": self.site, **{name: getattr(self, name) for name in names}}
        made |= {f"loss_{name}": value for name, value in self.loss.items()}
        return made | {f"recovered_{name}": value for name, value in self.recovered.items()}

    def __str__(self) -> str:
        return "\n".join(
            f"{name:<34}{value:>12.4f}" if isinstance(value, float) else f"{name:<34}{value:>12}"
            for name, value in self.to_dict().items()
        )


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

    Variance is counted without massive tokens (whose activation is longer than three medians) and with all of them; what
    comes before a text is left out, and in the model's forward pass left as it is. A transcoder is measured by how it explains
    the MLP's output.

    Raises:
        PlanError, SiteError: a dictionary that does not fit the model, or whose site is not known. PairsError: no text.
    """
    used = inference(sae)
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
        float(sums.fired.sum() / sums.count),
        *sums.explained(),
        sums.massive / sums.count,
        float((density == 0).float().mean()),
        float((density > DENSE).float().mean()),
        density,
        loss,
        recovered,
    )


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
        self.numbers = torch.zeros(2, 3, dtype=torch.float64)  # tokens, Σ|x|², Σ|x − x̂|²

    def add(self, target: Tensor, made: Tensor, acts: Tensor, massive: Tensor) -> None:
        """Some more tokens."""
        self.count += len(target)
        self.massive += int(massive.sum())
        self.fired += (acts > 0).sum(0).double().cpu()
        error = (target - made).double().pow(2).sum(-1).cpu()
        for place, kept in enumerate((~massive, torch.ones_like(massive))):
            x = target[kept].double().cpu()
            self.x[place] += x.sum(0)
            self.numbers[place] += torch.stack([kept.sum().double(), x.pow(2).sum(), error[kept].sum()])

    @property
    def mean(self) -> Tensor:
        """The mean activation of all tokens."""
        return self.x[1] / self.count

    def explained(self) -> tuple[float, float]:
        """Explained variance without massive tokens, and with all."""
        count, square, error = self.numbers.unbind(1)
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
            made = sae(entered) if is_transcoder(sae) else sae.decode(acts)  # type: ignore[operator]
            sums.add(want, made.float().cpu(), acts, out)
    return sums


def losses(
    model: Model,
    sae: Dictionary,
    at: tuple[Site, Site],
    rows: Sequence[Prompt],
    mean: Tensor,
    progress: bool | None,
) -> dict[str, float]:
    """Cross-entropy of the next token, in nats: plainly, and with each thing in the activation's place."""
    view = None if is_transcoder(sae) else error_view(sae, at[1])
    splices = Splices(model, sae, at, mean, view)
    lengths = [len(row.ids) for row in rows]
    names = ("clean", "spliced", *REFERENCES)
    budget = max(max(lengths), LOGITS // model.vocab_size // len(names))
    totals = torch.zeros(len(names), dtype=torch.float64)
    count = 0

    def put(piece: Reading, result: Found) -> int:
        nonlocal count
        found = result["next_loss"][0].double().reshape(len(names), -1)
        totals.add_(found.sum(1))
        count += found.shape[1]
        return len(piece.asked)

    pieces = [
        Reading.of(group, lambda chosen: splices.program([rows[i] for i in chosen]))
        for group in packed(lengths, budget)
    ]
    do(model, Work(pieces, put, execute, None, len(rows), "row", "losses"), progress)
    return dict(zip(names, (totals / count).tolist(), strict=True))


@dataclass(frozen=True)
class Splices:
    """The forward passes of `losses`: rows of every text, in the order of the names, behind one another."""

    model: Model
    sae: Dictionary
    at: tuple[Site, Site]
    mean: Tensor
    view: View | None  # set to 0 it leaves the reconstruction; a transcoder has none

    def program(self, rows: Sequence[Prompt]) -> Program:
        """One pass over some rows: plain ones, and a copy of each for every thing that takes the activation's place."""
        count, layer, kind = len(rows), self.at[1].layer or 0, self.at[1].kind
        width = max(len(row.ids) for row in rows)
        at = [(row, width - len(one.ids) + place) for row, one in enumerate(rows) for place in one.places]
        view = self.view
        site: Place = (layer, view.name if view is not None else kind)
        values: dict[Place, Tensor] = {site: self.spliced(rows, width)}
        own = values.setdefault((layer, kind), torch.zeros(0, 1, 1))
        constants = torch.stack([torch.zeros_like(self.mean), self.mean])[:, None].expand(-1, own.shape[1] or 1, -1)
        start = len(own) if view is None else 0
        values[layer, kind] = torch.cat([own, constants]) if start else constants
        edits = []
        for row, column in at:
            where = {"column": column, "source_column": column}
            first = row if view is None else 0
            edits.append(entry(layer, site[1], "set", count + row, [view.name] if view else [], value=first, **where))
            for number, value in ((2, start), (4, start + 1)):
                edits.append(entry(layer, kind, "set", number * count + row, value=value, **where))
        edits += [entry(layer, kind, "set", 3 * count + row, value=start) for row in range(count)]
        more = {
            "edits": edits,
            "values": values,
            "origin": list(range(count)) * 4,
            "stage": [layer + KIND[kind].stage] * (4 * count),
            "views": {view.name: view.seen()} if view is not None else {},
        }
        last = self.model.n_layers - 1
        made = read_program(self.model, [row.ids for row in rows], [(last, "resid_post")], **more)
        asked = [(row, column) for row, column in at if column < width - 1]
        made["readout"] = {"kind": "lens", "layers": [last], "top": 1, **self.following(rows, asked, width, count)}
        return made

    def following(
        self, rows: Sequence[Prompt], asked: Sequence[tuple[int, int]], width: int, count: int
    ) -> dict[str, Tensor]:
        """Which token comes next where, for every copy of the rows."""
        nexts = [rows[row].ids[column - width + len(rows[row].ids) + 1] for row, column in asked]
        row_of, columns = torch.tensor(asked).unbind(1)
        every = torch.cat([row_of + number * count for number in range(5)])
        return {"rows": every, "columns": columns.repeat(5), "next": torch.tensor(nexts).repeat(5)}

    @torch.no_grad()
    def spliced(self, rows: Sequence[Prompt], width: int) -> Tensor:
        """Constants of the spliced rows `[value, position or 1, feature]`: no error, or what a transcoder makes."""
        if not is_transcoder(self.sae):
            return torch.zeros(1, 1, 1)
        site = self.at[0].place
        found: list[Tensor] = []

        def program(chosen: Sequence[int]) -> Program:
            return read_program(self.model, [rows[i].ids for i in chosen], [site], last=site[0])

        def put(piece: Reading, result: Found) -> None:
            found.append(result["reads"][site])

        run_readings(self.model, [Reading.of(range(len(rows)), program)], put)
        x = found[0].to(self.sae.device, self.sae.dtype)
        made: Tensor = self.sae(x)  # type: ignore[operator]
        return made.float().cpu()
