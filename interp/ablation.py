"""Ablation: what changes when activations are zeroed, averaged, or taken from another prompt's run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cells import Resolved
from .edits import Edit
from .effects import Effects
from .engine.reading import encode_prompts, last_layer, packed, read_program
from .engine.run import run_plan
from .engine.schedule import token_budget
from .engine.trace import execute
from .engine.trial import check_metric
from .errors import PairsError, PlanError
from .metrics import Metric, logit_diff
from .models.model import Model
from .models.views import features
from .pairs import EncodedPairs, PromptPairs
from .plan import Plan
from .sites import HEAD_KINDS

MODES = ("zero", "mean", "positional_mean", "resample", "counterfactual")


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
    **options: Any,
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
    """
    if mode not in MODES:
        raise PlanError(f"unknown ablation {mode!r}; the modes are: {', '.join(MODES)}")
    if mode in ("zero", "counterfactual") and reference is not None:
        raise PlanError(f"mode {mode!r} uses no reference prompts; leave reference out, or take mode='mean'")
    if plan.axis == "path":
        raise PlanError("ablate changes activations, and this plan has edges between them; use path_patch")
    two_runs = mode in ("resample", "counterfactual")
    if not two_runs and direction != "noising":
        raise PlanError(f"mode {mode!r} has no second run, so no direction; leave direction={direction!r} out")
    details: dict[str, Any] = {"mode": mode}
    common: dict[str, Any] = {"method": "ablate", "details": details, **options}
    if mode == "counterfactual":
        if plan.axis == "set":
            model.encode(pairs).require_aligned("ablation of sets")
        return run_plan(model, pairs, plan, metric, direction, rewrite=without_edits, **common)
    references = encode_prompts(model, pairs if reference is None else reference)
    if mode != "zero":
        details["reference"] = references.digest
        details["reference_prompts"] = "own" if reference is None else len(references)
    if mode == "resample":
        drawn = other_prompts(model, pairs, references, seed)
        details["resample_seed"] = seed
        return run_plan(model, drawn, plan, metric, direction, rewrite=without_edits, **common)
    clean = clean_only(pairs)
    details["direction"] = None
    values: dict[tuple[int, str], Tensor | float] = {}
    if mode != "zero":
        encoded = model.encode(clean)
        sites = sites_of(plan.resolve(model, encoded))
        common["rounding"] = check_metric(
            metric, encoded, model.vocab_size, dtype=model.dtype
        )  # before a mean is taken
        length = max(map(len, encoded.clean)) if mode == "positional_mean" else None
        values.update(means(model, references, sites, length, options.get("max_tokens")))

    def constant(resolved: Resolved) -> Resolved:
        return with_edits(resolved, lambda edit: replace(edit, op="set", value=values.get(place_of(edit), 0.0)))

    return run_plan(model, clean, plan, metric, "noising", rewrite=constant, needs_source=False, **common)


def place_of(edit: Edit) -> tuple[int, str]:
    """Layer (-1 for the embedding) and kind of an edit's site."""
    return (-1 if edit.site.layer is None else edit.site.layer, edit.site.kind)


def with_edits(resolved: Resolved, change: Any) -> Resolved:
    """The same cells with every edit changed."""
    cells = (replace(cell, edits=tuple((change(edit), place) for edit, place in cell.edits)) for cell in resolved.cells)
    return replace(resolved, cells=tuple(cells))


def without_edits(resolved: Resolved) -> Resolved:
    """The same cells, every site replaced by the source run's."""
    return with_edits(resolved, lambda edit: Edit(edit.site))


def sites_of(resolved: Resolved) -> list[tuple[int, str]]:
    """Every (layer, kind) that is ablated, for which a mean must exist.

    Raises:
        PlanError: the mean of a pattern.
    """
    sites = sorted({place_of(edit) for cell in resolved.cells for edit, _ in cell.edits})
    if any(kind == "pattern" for _, kind in sites):
        raise PlanError(
            "a mean attention pattern is not defined: rows attend to different numbers of positions, and prompts "
            "differ in length; ablate 'z', or take mode='zero', 'resample' or 'counterfactual'"
        )
    return sites


def clean_only(pairs: PromptPairs) -> PromptPairs:
    """The clean run alone, with its answers and named positions."""
    named = {name: [{"clean": row["clean"]} for row in rows] for name, rows in pairs.positions.items()}
    return PromptPairs(
        pairs.clean,
        None,
        pairs.answers,
        pairs.distractors,
        positions=named,
        answer_positions=pairs.answer_positions,
        name=pairs.name,
    )


def other_prompts(model: Model, pairs: PromptPairs, references: EncodedPairs, seed: int) -> PromptPairs:
    """The pairs with another prompt as corrupted one: of equal length, not the pair's own, drawn from a seed.

    Raises:
        PairsError: no such prompt among the references.
    """
    encoded = model.encode(clean_only(pairs))
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
    named = {name: [{"clean": at, "corrupted": at} for at, _ in rows] for name, rows in encoded.positions.items()}
    return PromptPairs(
        encoded.clean,
        drawn,
        encoded.answers,
        encoded.distractors,
        positions=named,
        answer_positions=encoded.answer_positions,
        name=pairs.name,
    )


def means(
    model: Model,
    references: EncodedPairs,
    sites: Sequence[tuple[int, str]],
    length: int | None,
    budget: int | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Means of sites over reference prompts: {(layer, kind): [feature], or with a length [position, feature]}, fp32.

    Features are those of the tensor that the site is written in (a fused projection's, where there is one). Sums are
    made where the model runs.

    Raises:
        PairsError: no reference prompt has some position below `length`.
    """
    longest = max(map(len, references.clean))
    if length is not None and longest < length:
        raise PairsError(
            f"a mean at position {longest} is needed (the longest pair has {length} tokens), but the longest "
            f"reference prompt has {longest}; give longer reference prompts, or take mode='mean'"
        )
    reads = sorted({(layer, "z" if kind == "head_out" else kind) for layer, kind in sites})
    programs = []
    counts = torch.zeros(length or 1)
    for group in packed([len(prompt) for prompt in references.clean], budget or token_budget(model)):
        prompts = [references.clean[index] for index in group]
        width = max(map(len, prompts))
        tokens = [
            (row, width - len(prompt) + position, 0 if length is None else position)
            for row, prompt in enumerate(prompts)
            for position in range(len(prompt) if length is None else min(len(prompt), length))
        ]
        rows, columns, place = torch.tensor(tokens).unbind(1)
        counts.index_add_(0, place, torch.ones(len(place)))
        spec = {"kind": "sums", "rows": rows, "columns": columns, "place": place, "places": len(counts)}
        programs.append({**read_program(model, prompts, reads, last=last_layer(model, reads)), "readout": spec})
    found = model.backend.call(model, execute, model.taps, programs, None)
    made = {}
    for layer, kind in sites:
        site = (layer, "z" if kind == "head_out" else kind)
        total = sum(part["reads"][site].double().cpu() for part in found)
        mean = (total / counts.view(-1, *[1] * (total.ndim - 1))).float().flatten(1)  # [position or 1, feature]
        if kind in HEAD_KINDS or kind == "mlp_pre":
            index = features(model.taps, "z" if kind == "head_out" else kind).flatten()
            whole = mean.new_zeros(len(mean), int(index.max()) + 1)
            whole[:, index] = mean
            mean = whole
        made[layer, kind] = mean[0] if length is None else mean
    return made
