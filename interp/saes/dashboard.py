"""What can be seen of a dictionary's features over texts: where they fire most, how often, and beside which others.

Activations come block by block and are reduced at once: sums and co-activations of all features, a histogram and the largest
contexts of those that are shown. No more than one window of `collect_activations` is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import PlanError
from ..models.model import Model
from ..views import View
from ..windows import Prompt
from .passages import Block, blocks, final_stream, own
from .promoted import Promoted, promoted, why_not

#: Bins of a histogram, from 0 to the power of two above the largest activation.
BINS = 64
#: Features that are shown where none is named, and the density from which one is too common to be among them.
SHOWN, COMMON = 50, 0.1
#: Features that are named beside each, and tokens that it raises and lowers.
BESIDE, TOKENS = 5, 10


class Context(NamedTuple):
    """A stretch of a text: its tokens and their activations, and which of them (`at`) has the largest."""

    text: int
    position: int
    ids: list[int]
    activations: list[float]
    at: int


class Feature(NamedTuple):
    """One feature: on how many tokens it fires, its largest activation, its histogram (tokens by bin of `width`, from 0), the
    contexts where it fires most, features whose activations correlate with its own, and tokens raised and lowered."""

    number: int
    fires: int
    largest: float
    histogram: list[int]
    width: float
    contexts: list[Context]
    beside: list[tuple[int, float]]
    raised: list[tuple[int, float]]
    lowered: list[tuple[int, float]]


@dataclass(frozen=True)
class Dashboard:
    """What was seen over `tokens` tokens; `no_direct` says why no tokens are raised and lowered, where there are none."""

    tokens: int
    features: list[Feature]
    no_direct: str


@dataclass(frozen=True)
class Running:
    """What is kept of all blocks so far, changed in place. Chosen features by row; a context is `reach` tokens on each side."""

    chosen: Tensor  # [feature]
    reach: int
    shift: Tensor  # [every feature]: sums are those of what is left without it, so that they cancel nothing
    total: Tensor  # [every feature], in fp64; and of squares
    squares: Tensor
    products: Tensor  # [feature, every feature]
    counts: Tensor  # [feature, bin]
    exponent: Tensor  # [feature]: bins reach to 2 to this power
    largest: Tensor  # [rank, feature], and where they stand
    row: Tensor
    position: Tensor
    around: Tensor  # [rank, feature, 2 · reach + 1]

    @classmethod
    def of(cls, chosen: Tensor, every: int, top: int, reach: int) -> Running:
        """Nothing seen yet."""
        f, wide = len(chosen), torch.float64
        place = torch.zeros(top, f, dtype=torch.long)
        return cls(
            chosen,
            reach,
            torch.full((every,), float("nan")),
            torch.zeros(every, dtype=wide),
            torch.zeros(every, dtype=wide),
            torch.zeros(f, every, dtype=wide),
            torch.zeros(f, BINS, dtype=torch.long),
            torch.full((f,), -(2**20)),
            torch.zeros(top, f),
            place,
            place.clone(),
            torch.zeros(top, f, 2 * reach + 1),
        )

    def add(self, block: Block) -> None:
        """Take in one block."""
        values = block.values
        if bool(self.shift.isnan().all()):
            self.shift.copy_(values.mean(0))
        left = values - self.shift
        self.total.add_(left.sum(0))
        self.squares.add_(left.square().sum(0))
        self.products.add_(left[:, self.chosen].T @ left)
        acts = values[:, self.chosen]
        self.count(acts)
        self.keep(block, acts)

    def count(self, acts: Tensor) -> None:
        """Histograms of activations `[token, feature]` above 0. A range that is too short doubles: its bins merge in pairs, so
        that counts stay exact."""
        needed = torch.frexp(acts.amax(0)).exponent.long()  # the largest is below 2 to this power
        needed = torch.where(acts.amax(0) > 0, needed, self.exponent)
        while bool((short := (needed > self.exponent) & (self.counts.sum(1) > 0)).any()):
            merged = self.counts[short].unflatten(1, (BINS // 2, 2)).sum(-1)
            self.counts[short] = pad(merged, (0, BINS // 2))
            self.exponent[short] += 1
        torch.maximum(self.exponent, needed, out=self.exponent)
        fires = acts > 0
        unit = torch.tensor([BINS * 2.0**-exponent for exponent in self.exponent.clamp(min=-100).tolist()])
        bins = (acts * unit).long().clamp(0, BINS - 1) + BINS * torch.arange(acts.shape[1])
        self.counts.add_(torch.bincount(bins[fires], minlength=self.counts.numel()).reshape(self.counts.shape))

    def keep(self, block: Block, acts: Tensor) -> None:
        """The contexts with the largest activations so far, around peaks: no token within reach of one has a larger activation,
        or an equal one before it. Of equal peaks the first."""
        order = (acts * peaks(acts, block.row, self.reach)).sort(dim=0, descending=True, stable=True)
        largest, at = (part[: len(self.largest)] for part in order)
        near = at[..., None] + torch.arange(-self.reach, self.reach + 1)
        safe = near.clamp(0, len(acts) - 1)
        inside = (near == safe) & (block.row[safe] == block.row[at, None])
        around = acts[safe, torch.arange(acts.shape[1])[:, None]] * inside
        whole = torch.cat([self.largest, largest])
        best = whole.sort(dim=0, descending=True, stable=True).indices[: len(self.largest)]
        for mine, new in ((self.row, block.row[at]), (self.position, block.position[at])):
            mine.copy_(torch.cat([mine, new]).gather(0, best))
        self.around.copy_(torch.cat([self.around, around]).gather(0, best[..., None].expand_as(self.around)))
        self.largest.copy_(whole.gather(0, best))


def peaks(acts: Tensor, row: Tensor, reach: int) -> Tensor:
    """Which activations `[token, feature]` are peaks within `reach` tokens of their row."""
    found = acts > 0
    for offset in range(1, min(reach, len(acts) - 1) + 1):
        earlier, later = acts[:-offset], acts[offset:]
        apart = (row[:-offset] != row[offset:])[:, None]
        found[offset:] &= apart | (later > earlier)
        found[:-offset] &= apart | (earlier >= later)
    return found


def choose(model: Model, view: View, rows: Sequence[Prompt]) -> list[int]:
    """The features that fire most often among those that fire on less than a tenth of the tokens; then the more common ones,
    the least common first. PlanError: none fires."""
    count, total = torch.zeros(view.parts, dtype=torch.long), 0
    for block in blocks(model, view, rows):
        count += (block.values > 0).sum(0)
        total += len(block.values)
    firing = count.nonzero()[:, 0].tolist()
    if not firing:
        raise PlanError(
            f"no feature of {view.name} fires on these {total:,} tokens; name the features, or give other texts"
        )
    common = {feature: bool(count[feature] >= COMMON * total) for feature in firing}
    order = sorted(firing, key=lambda f: (common[f], int(count[f]) if common[f] else -int(count[f]), f))
    return sorted(order[:SHOWN])


def dashboard(
    model: Model,
    view: View,
    rows: Sequence[Prompt],
    features: Iterable[int],
    top: int = 10,
    reach: int = 16,
) -> Dashboard:
    """What is seen of features of a view over rows of tokens: contexts of `reach` tokens on each side of the `top` largest
    activations that are peaks: of those within `reach` tokens of another the larger."""
    chosen = torch.tensor(list(features))
    running = Running.of(chosen, view.parts, top, reach)
    tokens = 0
    for block in blocks(model, view, rows):
        running.add(block)
        tokens += len(block.values)
    beside = correlated(running, tokens)
    direct = why_not(model, view) or promoted(model, view, chosen, final_stream(model, rows), TOKENS)
    seen = [
        Feature(
            number,
            int(running.counts[f].sum()),
            float(running.largest[0, f]),
            running.counts[f].tolist(),
            2.0 ** int(running.exponent[f]) / BINS if running.counts[f].any() else 0.0,
            contexts(running, rows, f),
            beside[f],
            *tokens_of(direct, f),
        )
        for f, number in enumerate(chosen.tolist())
    ]
    return Dashboard(tokens, seen, direct if isinstance(direct, str) else "")


def correlated(running: Running, tokens: int) -> list[list[tuple[int, float]]]:
    """For each chosen feature the others whose activations have the largest correlation with its own over all tokens (Pearson),
    where it is above 0."""
    spread = tokens * running.squares - running.total.square()
    spread[spread <= (1e-6 * tokens * running.shift).square()] = float("nan")  # constant, or never fires
    own = running.chosen
    covariance = tokens * running.products - running.total[own, None] * running.total
    r = covariance / (spread[own, None] * spread).sqrt()
    r[torch.arange(len(own)), own] = float("nan")
    best = r.nan_to_num(nan=-2.0).topk(min(BESIDE, r.shape[1]), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(g, value) for g, value in zip(*row, strict=True) if value > 0] for row in pairs]


def contexts(running: Running, rows: Sequence[Prompt], f: int) -> list[Context]:
    """The contexts of one chosen feature, largest first."""
    made = []
    for rank, value in enumerate(running.largest[:, f].tolist()):
        if value <= 0:
            break
        row, position = rows[int(running.row[rank, f])], int(running.position[rank, f])
        start, stop = max(0, position - running.reach), min(len(row.places), position + running.reach + 1)
        shift = running.reach - position
        around = running.around[rank, f, start + shift : stop + shift].tolist()
        made.append(Context(*row.index[position], own(row)[start:stop], around, position - start))
    return made


def tokens_of(direct: Promoted | str, f: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Tokens that one chosen feature raises, and those that it lowers."""
    if isinstance(direct, str):
        return [], []
    high, low = (
        list(zip(ids[f].tolist(), by[f].tolist(), strict=True))
        for ids, by in ((direct.raised, direct.raised_by), (direct.lowered, direct.lowered_by))
    )
    return high, low
