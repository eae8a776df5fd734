"""Activation patching: what changes when activations of one run are put into another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from .effects import Effects
from .engine.context import Experiment, Runs
from .engine.run import run_cells
from .journal import experiment
from .metrics import Metric, logit_diff
from .models.model import Model
from .options import Options, Path, RunOptions
from .pairs import PromptPairs
from .plan import Plan, grid


@experiment
def patch(
    model: Model,
    pairs: PromptPairs,
    plan: Plan,
    metric: Metric = logit_diff,
    direction: str = "noising",
    *,
    schedule: str = "auto",
    checkpoint: Path | None = None,
    progress: bool | None = None,
    max_tokens: int | None = None,
) -> Effects:
    """Patch every cell of a plan on every pair (Vig et al. 2020; Meng et al. 2022; Heimersheim & Nanda 2024).

    Args:
        plan: from `grid`, `heads`, `neurons` or `sets`.
        metric: `metric(logits [row, d_vocab], batch) -> [row]`, see `interp.metrics`.
        direction: "noising" runs the clean prompt with activations of the corrupted one; "denoising" the reverse.
        schedule: "auto", or one of "naive", "rows", "growing", "prefix"; all give the same numbers.
        checkpoint: a path; finished cells are written there and a later call with the same arguments continues.
        progress: show a bar; by default for long work on a terminal.
        max_tokens: tokens in one forward pass; by default what the device takes.

    Returns:
        Effects with dims (component, layer, position | head | unit, pair), in the metric's own units; heads and units that
        are crossed with positions have both, `sets` (component, pair).

    Raises:
        SiteError, SiteUnavailableError, AuditError, PairsError, AnswerError, PlanError, MetricError: before the model runs.
        CheckpointError: a checkpoint of something else, or one that cannot be written. BackendError: a server failed.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.grid("resid_pre", layers=[0, 29], positions=[-1]))
        >>> dict(effects.values.sizes)
        {'component': 1, 'layer': 2, 'position': 1, 'pair': 2}
        >>> f"{effects.mean(normalized=True).sel(layer=29).item():.1f}"
        '0.9'
    """
    options = Options(schedule, max_tokens, progress, checkpoint)
    encoded = model.encode(pairs)
    runs = Runs(encoded, direction).need_source()
    return run_cells(Experiment(model, runs, plan.resolve(model, encoded), metric, "patch", pairs.name), options)


@experiment
def comprehensive_activation_patching(
    model: Model,
    clean_prompt: str | Sequence[int],
    corrupted_prompt: str | Sequence[int],
    answer_tokens: Sequence[str | int],
    components: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    metric: Metric = logit_diff,
    direction: str = "noising",
    **options: Unpack[RunOptions],
) -> Effects:
    """Patch each component at every layer and position of one pair of prompts.

    Args:
        answer_tokens: [right, wrong], each one token (string or id); the metric is their logit difference by default.
        options: passed to `patch`.

    Examples:
        >>> effects = interp.comprehensive_activation_patching(
        ...     model,
        ...     "The Eiffel Tower is in the city of",
        ...     "The Colosseum is in the city of",
        ...     answer_tokens=[" Paris", " Rome"],
        ...     components=["resid_pre"],
        ... )
        >>> dict(effects.values.sizes)
        {'component': 1, 'layer': 30, 'position': 10, 'pair': 1}
    """
    pairs = PromptPairs.one({"clean_prompt": clean_prompt, "corrupted_prompt": corrupted_prompt}, answer_tokens)
    return patch(model, pairs, grid(components), metric, direction, **options)
