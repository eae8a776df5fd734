"""The one loop over gradients: blocks of pairs go through the door as gradient programs, and estimates are added up.

1. Pairs of similar length share a forward and a backward pass. Where gradients are averaged between the two runs, each
   pair has rows that move one site by a fraction of the way ("mix").
2. What comes back is small: (source − base) · gradient by site and position, or by edge.
3. A row's estimate is the sum over its entries, whichever passes they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ..metrics import Metric
from ..models.model import Model
from ..views import Seen
from .compile import compile_chunk, gradient_program
from .context import Context
from .program import Place, Program
from .reading import Reading, run_readings
from .rows import Row, step_rows
from .schedule import pack_pairs
from .trace import execute_gradients

#: Where the metric's gradient by the logits is less than this fraction of its change between the two runs, it is zero but for
#: rounding, and nothing can be estimated from it.
FLAT = 1e-4
#: The cut through a model that all its effects go through.
ENTRY: Place = (-1, "embed")
#: The rows that estimates are wanted of: {pair: {number: row}}.
Wanted = Mapping[int, Mapping[int, Row]]


def midpoints(steps: int) -> tuple[float, ...]:
    """Interpolation points (i + ½)/steps: 0 is the base run, 1 the source run."""
    return tuple((index + 0.5) / steps for index in range(steps))


class GradientSpec(TypedDict):
    """How gradients are taken: of which sites, at which fractions between the runs, and what is moved there.

    `moved`: one site for all ("ig": the input), or () for each site by itself ("ig-activations"); no `fractions`: at the base
    run alone. `drop`, `exact_qk`: AtP*. `by_edge`: scores of edges instead of sites. `rule`: what takes the place of derivatives
    (`interp.engine.rules`); of one that looks at two runs each fraction begins a segment that ends at the next one.
    """

    tape: Sequence[Place]
    fractions: tuple[float, ...]
    moved: Sequence[Place]
    drop: Sequence[int]
    exact_qk: bool
    by_edge: bool
    rule: str


def program_of(context: Context, how: GradientSpec, wanted: Wanted, block: Sequence[int]) -> Program:
    """The gradient program of a block of pairs."""
    steps, width = len(how["fractions"]), max(context.runs.lengths[pair] for pair in block)
    moved = list(how["moved"] or how["tape"]) if steps else []
    values = torch.tensor(how["fractions"])[:, None, None]
    mixed = replace(context, values=dict.fromkeys(moved, values))
    rows = step_rows(context, block, moved, steps, grow=not how["moved"])
    chunk = compile_chunk(rows, mixed, "growing", pairs=block, width=width)
    sites = dict.fromkeys([*how["tape"], *([ENTRY] if how["rule"] != "gradient" and not how["by_edge"] else [])])
    program = gradient_program(chunk.program, len(block), list(sites), how["by_edge"])
    first = 2 * len(block)
    if steps and how["moved"]:
        between = first + torch.arange(len(block) * steps).reshape(len(block), steps)
        if how["rule"] == "gradient":
            program["gradient"] = between
        else:
            program["gradient"] = torch.cat([program["base"][:, None], between], 1)
            program["until"] = torch.cat([between, program["source"][:, None]], 1)
    elif steps:
        program["steps"] = rows_by_site(chunk.rows, len(block), moved, steps, first)
    columns = source_columns(context, block, wanted, width)
    program.update({"columns": columns, "drop": how["drop"], "exact_qk": how["exact_qk"], "rule": how["rule"]})
    return program


def rows_by_site(
    rows: Sequence[Row], pairs: int, sites: Sequence[Place], steps: int, first: int
) -> dict[Place, torch.Tensor]:
    """Which rows interpolate which site: {site: [pair, step]}; a row's cell is its number among `step_rows`."""
    number = {row.cell: first + place for place, row in enumerate(rows)}
    return {
        site: torch.tensor(
            [[number[(p * len(sites) + s) * steps + step] for step in range(steps)] for p in range(pairs)]
        )
        for s, site in enumerate(sites)
    }


def source_columns(context: Context, block: Sequence[int], wanted: Wanted, width: int) -> torch.Tensor | None:
    """The source column that belongs to each base column `[pair, position]`; None where they are the same."""
    columns = torch.arange(width).repeat(len(block), 1)
    runs = context.runs
    assert runs.source is not None
    for place, pair in enumerate(block):
        shift, other = width - len(runs.base[pair]), width - len(runs.source[pair])
        for row in wanted.get(pair, {}).values():
            for entry in row.entries:
                if entry.column >= 0:
                    columns[place, entry.column + shift] = entry.source_column + other
    return None if bool((columns == torch.arange(width)).all()) else columns


class Estimates:
    """Estimated changes of rows and the unpatched metrics `[pair]`, filled block by block."""

    def __init__(self, context: Context, rows: Sequence[Row]) -> None:
        self.context, self.rows = context, list(rows)
        pairs = len(context.runs)
        self.base = np.full(pairs, np.nan, dtype=np.float32)
        self.source = np.full(pairs, np.nan, dtype=np.float32)
        self.reached = np.zeros(pairs, dtype=np.float64)  # of all embeddings together, where a rule looks at both runs
        self.slope = 0.0
        self.totals = [np.zeros(1)] * len(self.rows)  # of each row: the plain estimate, then one for each dropped layer
        self.by_pair: dict[int, dict[int, Row]] = {}  # each pair's rows, by number
        for number, row in enumerate(rows):
            self.by_pair.setdefault(row.pair, {})[number] = row

    def add(self, piece: Reading, result: dict) -> None:
        """Put what came back of one block: every entry of a row whose site it tells of."""
        scores = result["metric"].float().cpu().numpy()
        self.slope = max(self.slope, result["slope"])
        told = {tuple(site): part.float().cpu().numpy() for site, part in result["attributions"].items()}
        width = piece.program["inputs"]["input_ids"].shape[1]
        for place, pair in enumerate(piece.asked):
            self.base[pair], self.source[pair] = scores[2 * place], scores[2 * place + 1]
            if ENTRY in told:
                self.reached[pair] = told[ENTRY][0, place].sum(dtype=np.float64)
            shift = width - len(self.context.runs.base[pair])
            for number, row in self.by_pair.get(pair, {}).items():
                for entry in row.entries:
                    part = told.get((entry.layer, self.context.names[entry.kind]))
                    if part is None:
                        continue
                    part = part[:, place, shift:] if entry.column < 0 else part[:, place, shift + entry.column]
                    part = part[..., entry.part] if entry.part >= 0 else part
                    total = part.reshape(len(part), -1).sum(1, dtype=np.float64)
                    self.totals[number] = self.totals[number] + total

    def changes(self, cells: int) -> np.ndarray:
        """Estimated changes `[cell, pair]`; NaN where a cell has no row."""
        changes = np.full((cells, len(self.base)), np.nan, dtype=np.float32)
        for row, total in zip(self.rows, self.totals, strict=True):
            changes[row.cell, row.pair] = grad_drop(total)
        return changes


def grad_drop(estimates: np.ndarray) -> float:
    """One number from the plain estimate and those with a layer dropped `[1 + dropped]` (GradDrop).

    A dropped estimate leaves out what comes back through one layer, so that what two paths cancel shows. Its size is the mean
    size of the dropped ones, divided by one less than there are: with its own layer dropped nothing of a node is left. Its
    sign is the plain estimate's, or that of their sum where it is zero.
    """
    plain, dropped = estimates[0], estimates[1:]
    if not len(dropped):
        return float(plain)
    return float((np.sign(plain) or np.sign(dropped.sum())) * np.abs(dropped).sum() / (len(dropped) - 1))


def estimate(
    model: Model, context: Context, rows: Sequence[Row], metric: Metric, how: GradientSpec, budget: int
) -> Estimates:
    """Estimates of rows: one gradient program for each block of pairs, and for each group of sites that move by themselves."""
    estimates = Estimates(context, rows)
    runs, steps = context.runs, len(how["fractions"])
    streams = runs.streams + (steps if how["moved"] else 0)
    pieces = []
    for block in pack_pairs(runs.order, runs.lengths, streams, budget):
        groups = [how["tape"]]
        if steps and not how["moved"]:
            width = max(runs.lengths[pair] for pair in block)
            size = max(1, budget // (width * len(block) * steps))
            groups = [how["tape"][start : start + size] for start in range(0, len(how["tape"]), size)]
        for group in groups:
            part: GradientSpec = {**how, "tape": group}
            make = partial(program_of, context, part, estimates.by_pair)
            pieces.append(Reading.of(block, make))
    run_readings(model, pieces, estimates.add, execute_gradients, metric)
    return estimates


def change_of(piece: Reading, result: dict) -> Tensor:
    """The metric of the source run less that of the base run `[pair]`, of the pairs of one block."""
    ends = result["metric"][: 2 * len(piece.asked)].double().cpu()
    return ends[1::2] - ends[::2]


def edge_estimates(
    model: Model,
    context: Context,
    metric: Metric,
    fractions: tuple[float, ...],
    groups: Mapping[Place, Sequence[int]],
    budget: int,
    bar: tuple[str, bool | None],
    rule: str = "gradient",
) -> tuple[np.ndarray, np.ndarray]:
    """Attributions of every edge `[pair, sender, receiver]`, zero where there is none, and the metric's change `[pair]`.

    `groups`: the sites that are moved, each by itself, and the senders (by their number) whose scores come of that.
    """
    runs, order = context.runs, context.order
    scores = np.zeros((len(runs), order.senders, order.receivers), dtype=np.float32)
    change = np.zeros(len(runs), dtype=np.float64)

    def add(piece: Reading, result: dict) -> None:
        change[list(piece.asked)] = change_of(piece, result).numpy()
        chosen = groups[piece.key]
        by_sender = result["edges"].float().cpu().numpy().transpose(0, 2, 1)
        scores[np.ix_(piece.asked, chosen)] = by_sender[:, chosen]

    pieces = []
    for block in pack_pairs(runs.order, runs.lengths, runs.streams + len(fractions), budget):
        for site in groups:
            how = GradientSpec(
                tape=[], fractions=fractions, moved=[site], drop=[], exact_qk=False, by_edge=True, rule=rule
            )
            pieces.append(Reading.of(block, partial(program_of, context, how, {}), site))
    run_readings(model, pieces, add, execute_gradients, metric, bar)
    return scores, change


def feature_estimates(
    model: Model,
    context: Context,
    metric: Metric,
    views: Mapping[str, Seen],
    ends: Sequence[tuple[int, str, str]],
    budget: int,
    bar: tuple[str, bool | None],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Effects of parts of dictionaries, `[pair, part]` for each of `ends`, and of edges between neighbours, `[pair, downstream,
    upstream]`; see `interp.engine.feature_edges`.
    """
    runs = context.runs
    nodes: dict[int, list[Tensor]] = {}
    edges: dict[int, list[Tensor]] = {}
    how = GradientSpec(tape=[], fractions=(), moved=[], drop=[], exact_qk=False, by_edge=False, rule="gradient")

    def make(block: Sequence[int]) -> Program:
        program = program_of(context, how, {}, block)
        program["views"], program["features"] = dict(views), list(ends)
        return program

    def add(piece: Reading, result: dict) -> None:
        for place, pair in enumerate(piece.asked):
            nodes[pair] = [part[place] for part in result["nodes"]]
            edges[pair] = [part[place] for part in result["edges"]]

    blocks = pack_pairs(runs.order, runs.lengths, runs.streams, budget)
    run_readings(model, [Reading.of(block, make) for block in blocks], add, execute_gradients, metric, bar)
    return tuple(  # type: ignore[return-value]
        [np.stack([found[pair][part].numpy() for pair in range(len(runs))]) for part in range(len(found[0]))]
        for found in (nodes, edges)
    )


def neuron_estimates(
    model: Model,
    context: Context,
    metric: Metric,
    nodes: Sequence[tuple[int, int, int]],
    how: GradientSpec,
    budget: int,
    bar: tuple[str, bool | None],
) -> dict[str, np.ndarray]:
    """Effects of all neurons, heads and of the embedding, by name, or "edges" between `nodes`; see `interp.engine.neuron_edges`.

    With them "change", the metric's between the runs. Axes begin with the pair.
    """
    found: dict[str, dict[int, Tensor]] = {}

    def make(block: Sequence[int]) -> Program:
        program = program_of(context, how, {}, block)
        program["nodes"] = torch.tensor(list(nodes), dtype=torch.long).reshape(-1, 3)
        return program

    def add(piece: Reading, result: dict) -> None:
        made = {"change": change_of(piece, result), **result.get("effects", {})}
        if "edges" in result:
            made["edges"] = result["edges"]
        for name, part in made.items():
            found.setdefault(name, {}).update(zip(piece.asked, part, strict=True))

    runs = context.runs
    blocks = pack_pairs(runs.order, runs.lengths, runs.streams + len(how["fractions"]), budget)
    run_readings(model, [Reading.of(block, make) for block in blocks], add, execute_gradients, metric, bar)
    return {name: torch.stack([part[pair] for pair in range(len(runs))]).numpy() for name, part in found.items()}
