"""Ablation: what changes when activations are zeroed, averaged, or taken from another prompt's run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from .cells import Resolved
from .edits import Edit
from .effects import Effects
from .encoded import EncodedPairs
from .engine.context import Experiment, Runs, whole_views
from .engine.program import Place, Program
from .engine.reading import Reading, encode_prompts, last_layer, read_program, readings, run_readings
from .engine.run import run_cells
from .engine.trace import Found
from .engine.trial import check_metric
from .errors import PairsError, PlanError
from .journal import experiment
from .metrics import Metric, logit_diff
from .models.layout import part_index
from .models.model import Model
from .options import Options, RunOptions
from .pairs import PromptPairs
from .plan import Plan
from .sites import KIND
from .views import Seen

MODES = ("zero", "mean", "positional_mean", "resample", "counterfactual")


@experiment
def ablate(
    model: Model,
    pairs: PromptPairs,
    plan: Plan,
    mode: str = "zero",
    reference: PromptPairs | Sequence[Any] | None = None,
    metric: Metric = logit_diff,
    direction: str = "noising",
    *,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> Effects:
    """Ablate every cell of a plan in the clean run of every pair; cells of several sites are ablated together.

    Args:
        mode: what takes the place of an activation:
            "zero": zeros. A zeroed `pattern` attends to nothing.
            "mean": the mean over the reference prompts and their positions (prefix included, padding not).
            "positional_mean": the mean over the reference prompts at the same position, counted from each prompt's
            own first token; heads' outputs are means of z (the mean of z·W_O is the mean of z times W_O).
            "resample": the activation at the same position of another prompt's run, drawn for each pair (Chan et
            al. 2022) among the reference prompts that differ from the pair's and have as many tokens.
            "counterfactual": the pair's corrupted run, which is activation patching.
        reference: prompts (strings or token ids), or pairs whose clean prompts are taken; by default the clean
            prompts of `pairs` themselves. "zero" and "counterfactual" have none.
        direction: of "resample" and "counterfactual" ("denoising" puts the clean run's activations into the other
            run); "zero" and "mean" have no second run, always start from the clean one, and record no direction.
        seed: of the draws of "resample".
        options: of `patch` (schedule, checkpoint, progress, max_tokens).

    Returns:
        Effects with the dims of the plan; `corrupted` is None without a second run.

    Raises:
        PlanError: an unknown mode, a reference or direction that the mode has no use for, the mean of a `pattern`.
        PairsError: no reference prompt reaches some position, or none has a pair's length.

    Examples:
        >>> ablated = interp.ablate(model, pairs, interp.heads("z", layers=[23]), mode="mean")
        >>> int((ablated.values - ablated.clean).mean("pair").argmin("head").item())  # L23.H3 is the one that matters
        3
    """
    if mode not in MODES:
        raise PlanError(f"unknown ablation {mode!r}; the modes are: {', '.join(MODES)}")
    if mode in ("zero", "counterfactual") and reference is not None:
        raise PlanError(f"mode {mode!r} uses no reference prompts; leave reference out, or take mode='mean'")
    two_runs = mode in ("resample", "counterfactual")
    if not two_runs and direction != "noising":
        raise PlanError(f"mode {mode!r} has no second run, so no direction; leave direction={direction!r} out")
    how = Options.of(options)
    details: dict[str, object] = {"mode": mode}
    if mode == "counterfactual":
        encoded = model.encode(pairs)
        runs = Runs(encoded, direction).need_source()
        resolved = without_edits(plan.resolve(model, encoded), encoded)
        return run_cells(Experiment(model, runs, resolved, metric, "ablate", pairs.name, details), how)
    encoded = model.encode(pairs.alone())
    references = encode_prompts(model, pairs if reference is None else reference)
    if mode != "zero":
        details["reference"] = references.digest
        details["reference_prompts"] = "own" if reference is None else len(references)
    if mode == "resample":
        drawn = other_prompts(encoded, references, seed)
        details["resample_seed"] = seed
        resolved = without_edits(plan.resolve(model, drawn), drawn)
        return run_cells(
            Experiment(model, Runs(drawn, direction), resolved, metric, "ablate", pairs.name, details), how
        )
    details["direction"] = None
    resolved = plan.resolve(model, encoded)
    refuse_edges(resolved)
    values: dict[Place, Tensor | float] = {}
    rounding = None
    if mode != "zero":
        sites = sites_of(resolved)
        rounding = check_metric(metric, encoded, model.vocab_size, dtype=model.dtype)  # before a mean is taken
        length = max(map(len, encoded.clean)) if mode == "positional_mean" else None
        values.update(means(model, references, sites, length, how.max_tokens, whole_views(resolved)))
    resolved = with_edits(resolved, lambda edit: replace(edit, op="set", value=values.get(edit.site.place, 0.0)))
    asked = Experiment(model, Runs(encoded), resolved, metric, "ablate", pairs.name, details, rounding=rounding)
    return run_cells(asked, how)


def refuse_edges(resolved: Resolved) -> None:
    """PlanError: cells with edges."""
    if any(cell.edges for cell in resolved.cells):
        raise PlanError("ablate changes activations, and this plan has edges between them; use path_patch")


def with_edits(resolved: Resolved, change: Callable[[Edit], Edit]) -> Resolved:
    """The same cells with every edit changed."""
    refuse_edges(resolved)
    cells = (replace(cell, edits=tuple((change(edit), place) for edit, place in cell.edits)) for cell in resolved.cells)
    return replace(resolved, cells=tuple(cells))


def without_edits(resolved: Resolved, encoded: EncodedPairs) -> Resolved:
    """The same cells, every site replaced by the source run's. PairsError: positions that the source run may not have."""
    if any(place.name is None for cell in resolved.cells for _, place in cell.edits):
        encoded.require_aligned("ablation with a second prompt")
    return with_edits(resolved, lambda edit: Edit(edit.site))


def sites_of(resolved: Resolved) -> list[Place]:
    """Every (layer, kind) that is ablated, for which a mean must exist.

    Raises:
        PlanError: the mean of a pattern.
    """
    sites = sorted({edit.site.place for cell in resolved.cells for edit, _ in cell.edits})
    if any(kind in KIND and KIND[kind].view == "mixture" for _, kind in sites):
        raise PlanError(
            "a mean attention pattern is not defined: rows attend to different numbers of positions, and prompts "
            "differ in length; ablate 'z', or take mode='zero', 'resample' or 'counterfactual'"
        )
    return sites


def other_prompts(encoded: EncodedPairs, references: EncodedPairs, seed: int) -> EncodedPairs:
    """The pairs with another prompt as corrupted one: of equal length, not the pair's own, drawn from a seed.

    Raises:
        PairsError: no such prompt among the references.
    """
    labels = dict(zip(references.clean, references.labels, strict=True))
    drawn = []
    for pair, prompt in enumerate(encoded.clean):
        choices = sorted({other for other in references.clean if len(other) == len(prompt) and other != prompt})
        if not choices:
            lengths = sorted({len(other) for other in references.clean})
            raise PairsError(
                f"no prompt to resample pair {pair} from: it has {len(prompt)} tokens, and the reference prompts "
                f"(lengths {lengths}) hold no other of that length; give reference=[...] prompts that do"
            )
        own = hashlib.sha256(repr((seed, pair)).encode()).digest()
        drawn.append(random.Random(own).choice(choices))
    return encoded.beside(drawn, [labels[prompt] for prompt in drawn])


def means(
    model: Model,
    references: EncodedPairs,
    sites: Sequence[Place],
    length: int | None,
    max_tokens: int | None = None,
    views: Mapping[str, Seen] | None = None,
) -> dict[Place, Tensor]:
    """Means of sites over reference prompts: {(layer, kind): [feature], or with a length [position, feature]}, fp32.

    Features are those of the tensor that the site is written in (a fused projection's, where there is one); of a view its
    parts. Sums are made where the model runs.

    Raises:
        PairsError: no reference prompt has some position below `length`.
    """
    prompts, views = references.clean, views or {}
    longest = max(map(len, prompts))
    if length is not None and longest < length:
        raise PairsError(
            f"a mean at position {longest} is needed (the longest pair has {length} tokens), but the longest "
            f"reference prompt has {longest}; give longer reference prompts, or take mode='mean'"
        )
    # a head's output is z·W_O, so its mean is the mean of z times W_O: that is what it is written through
    through = {(layer, kind): (layer, kind if kind in views else KIND[kind].through or kind) for layer, kind in sites}
    reads = sorted(set(through.values()))
    ends = [len(prompt) if length is None else min(len(prompt), length) for prompt in prompts]

    def program(chosen: Sequence[int]) -> Program:
        width = max(len(prompts[index]) for index in chosen)
        tokens = [
            (row, width - len(prompts[index]) + position, 0 if length is None else position)
            for row, index in enumerate(chosen)
            for position in range(ends[index])
        ]
        rows, columns, place = torch.tensor(tokens).unbind(1)
        made = read_program(model, [prompts[i] for i in chosen], reads, last=last_layer(reads, views), views=views)
        made["readout"] = {"kind": "sums", "rows": rows, "columns": columns, "place": place, "places": length or 1}
        return made

    totals: dict[Place, Tensor] = {}

    def add(_: Reading, result: Found) -> None:
        for site in reads:
            part = result["reads"][site].double().cpu()
            totals[site] = totals[site] + part if site in totals else part

    run_readings(model, readings(model, [len(prompt) for prompt in prompts], program, max_tokens), add)
    counts = torch.tensor([sum(ends)] if length is None else [sum(end > at for end in ends) for at in range(length)])
    made = {}
    for site in sites:
        layer, kind = through[site]
        total = totals[layer, kind]
        mean = (total / counts.view(-1, *[1] * (total.ndim - 1))).float().flatten(1)  # [position or 1, feature]
        if kind not in views and KIND[kind].view == "slice":
            index = part_index(model.taps, kind).flatten()
            whole = mean.new_zeros(len(mean), int(index.max()) + 1)
            whole[:, index] = mean
            mean = whole
        made[site] = mean[0] if length is None else mean
    return made
