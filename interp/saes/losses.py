"""What something in an activation's place costs a model: cross-entropy of the next token, of many rows at once.

Each row of tokens is run once plainly and once for each thing that takes the activation's place; these copies branch off where
they differ, so the layers below run once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.door import Work, do
from ..engine.program import Place, Program
from ..engine.reading import Reading, entry, packed, read_program, run_readings
from ..engine.trace import Found, execute
from ..models.model import Model
from ..sites import KIND, Site
from ..views import View
from ..windows import Prompt
from .library import Dictionary, is_transcoder
from .views import error_view

#: What takes the place of the activation, and the references that recovery is counted from.
REFERENCES = ("zero", "zero_everywhere", "mean")
#: Numbers of logits that one forward pass may hold.
LOGITS = 2**27


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
            first = row if view is None else 0
            for number, name, value in ((1, site[1], first), (2, kind, start), (4, kind, start + 1)):
                where: dict[str, Any] = {"column": column, "source_column": column, "value": value}
                edits.append(entry(layer, name, "set", number * count + row, [view.name] if view else [], **where))
        edits += [entry(layer, kind, "set", 3 * count + row, value=start) for row in range(count)]
        last = self.model.n_layers - 1
        made = read_program(
            self.model,
            [row.ids for row in rows],
            [(last, "resid_post")],
            edits=edits,
            values=values,
            origin=list(range(count)) * 4,
            stage=[layer + KIND[kind].stage] * (4 * count),
            views={view.name: view.seen()} if view is not None else {},
        )
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
        made: Tensor = self.sae(x)
        return made.float().cpu()
