"""Path patching: what one node tells another directly, with everything else held where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from .effects import Effects
from .engine.context import Experiment, Runs
from .engine.run import run_cells
from .journal import experiment
from .metrics import Metric, logit_diff
from .models.model import EDGE_LAWS, Model
from .options import Options, RunOptions
from .pairs import PromptPairs
from .plan import paths
from .sites import Site


@experiment
def path_patch(
    model: Model,
    pairs: PromptPairs,
    senders: Sequence[str | Site] | str,
    receivers: Sequence[str | Site] | str = ("logits",),
    metric: Metric = logit_diff,
    direction: str = "noising",
    *,
    together: bool = False,
    through_mlps: bool = False,
    **options: Unpack[RunOptions],
) -> Effects:
    """Patch paths from senders to receivers (Goldowsky-Dill et al. 2023; Wang et al. 2022 with `through_mlps`).

    A receiver reads x + Δ: the residual stream with the sender's contribution of the source run in place of the base
    run's. All other nodes between them are held at the base run; what is downstream of the receiver is computed anew.
    With `"logits"` as receiver this is the direct effect on the logits.

    Args:
        senders: `"embed"`, heads (`"L1.H2"`), MLPs (`"L0.mlp"`), each at all positions or at one (`"L1.H2@4"`).
        receivers: `"L3.H1.q"`, `"L3.H1.k"`, `"L3.H1.v"` (k and v by key/value head), `"L3.mlp"`, `"logits"`.
        together: patch all edges at once, one cell.
        through_mlps: MLPs between sender and receiver pass the change on.
        options: of `patch` (schedule, checkpoint, progress, max_tokens).

    Returns:
        Effects with dims (sender, receiver, pair); NaN where the receiver is not downstream of the sender.

    Raises:
        SiteError, PlanError, PairsError, MetricError: before the model runs. AuditError: edges do not add up on this model.

    Examples:
        >>> paths = interp.path_patch(model, pairs, senders=["L20.H0", "L23.H3"], receivers=["L23.H3.q", "logits"])
        >>> paths.mean(normalized=True).round(1).sel(receiver="logits").values
        array([0. , 0.3], dtype=float32)
    """
    model.rests_on("path_patch", *EDGE_LAWS)
    how = Options.of(options)
    plan = paths(senders, receivers, together=together, through_mlps=through_mlps)
    encoded = model.encode(pairs)
    runs = Runs(encoded, direction).need_source()
    return run_cells(Experiment(model, runs, plan.resolve(model, encoded), metric, "path_patch", pairs.name), how)
