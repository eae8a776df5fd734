"""ACDC: edges are removed one at a time, from the logits down, while the metric hardly moves (Conmy et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm.auto import tqdm

from ..cells import Cell, Resolved
from ..engine.checkpoint import read_identity
from ..engine.context import Experiment
from ..options import Options
from .circuit import Circuit
from .greedy import MOST_AHEAD, Search, kept_log, settled
from .nodes import Facts
from .runs import Masks


def acdc(
    asked: Experiment,
    within: Circuit | None,
    threshold: float | None,
    meta: dict[str, object],
    options: Options,
    ahead: int = MOST_AHEAD,
) -> Circuit:
    """Remove every edge whose removal, all earlier ones removed, changes the mean metric by less than the threshold.

    Receivers go from the logits to the first layer, the senders of each from last to first. All rows of a batch (see
    `greedy.in_turn`) share the layers below the receiver of its last candidate.

    Args:
        asked: the model, the runs of its pairs and the metric; its cells play no part.
        options: with a checkpoint, tested edges are kept and a later call continues.
        ahead: the largest batch; 1 tries one at a time.
    """
    model, runs = asked.model, asked.runs
    options = settled(options, model)
    facts = Facts.of(model)
    kept = facts.mask.copy() if within is None else within.matrix(facts).copy()
    order = [(int(s), r) for r in reversed(range(len(facts.receivers))) for s in reversed(np.flatnonzero(kept[:, r]))]
    masks = Masks(model, runs, asked.metric, "source", rounding=asked.rounding)
    quiet = Options(max_tokens=options.max_tokens, progress=False)
    run = masks.run([kept], quiet)
    current = float(run.values.mean())
    if threshold is None:
        threshold = read_identity(options.checkpoint).get("method", {}).get("threshold")
    if threshold is None:
        assert run.corrupted is not None
        threshold = 0.01 * abs(float(run.clean.mean()) - float(run.corrupted.mean()))
    scores = np.zeros(kept.shape, dtype=np.float32)
    stays = np.zeros(kept.shape, dtype=bool)  # what is expected of each edge
    if within is not None and within.level == "edge":
        stays = np.abs(np.nan_to_num(within.score_matrix(facts))) >= threshold
    trials = 0

    def attempt(batch: Sequence[tuple[int, int]]) -> tuple[list[float], list[bool]]:
        nonlocal trials
        trials += len(batch)
        tried, mask, expected = [], kept, []
        alive = on_paths(facts, mask)
        for edge in batch:
            tried.append(mask.copy())
            tried[-1][edge] = False
            expected.append(bool(stays[edge] and alive[edge]))
            if not expected[-1]:
                mask = tried[-1]
                alive = on_paths(facts, mask) if alive[edge] else alive
        effects = masks.run(tried, quiet, trunk=kept if len(batch) > 2 else None)
        return effects.values.mean("pair").values.tolist(), expected

    resolved = Resolved((), (Cell((0,), cut=kept.T.copy()),), {})
    kept_as = replace(asked, resolved=resolved, details={"threshold": threshold})
    shown = None if options.progress is None else not options.progress
    with (
        tqdm(total=len(order), disable=shown, desc="acdc", unit="edge") as bar,
        kept_log(kept_as, options, len(order)) as log,
    ):
        search = Search(attempt, stays, threshold, ahead, bar, log)
        for edge, change, value in search.in_turn(order, current):
            if stays[edge]:
                scores[edge] = change
            else:
                kept[edge] = False
                current = value
    meta |= {"threshold": threshold, "trials": trials, "tested": len(order), "metric_value": current}
    return Circuit.from_matrix(scores, kept, facts, meta)


def on_paths(facts: Facts, kept: np.ndarray) -> np.ndarray:
    """Which kept edges lie on a path of kept edges from embed to the logits, bool [sender, receiver].

    Any other carries nothing: its sender writes what it writes in the corrupted run, or nothing reads its receiver.
    """
    written = np.zeros(len(facts.senders), dtype=bool)
    written[0] = True
    inputs = [[facts.receiver_index[site] for site in facts.inputs_of(sender)] for sender in facts.senders]
    for sender, places in enumerate(inputs[1:], start=1):
        written[sender] = kept[written][:, places].any()
    used = np.zeros(len(facts.receivers), dtype=bool)
    used[-1] = True
    for sender in reversed(range(1, len(inputs))):
        if kept[sender, used].any():
            used[inputs[sender]] = True
    return kept & written[:, None] & used[None, :]
