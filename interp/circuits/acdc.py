"""ACDC: edges are removed one at a time, from the logits down, while the metric hardly moves (Conmy et al. 2023)."""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..metrics import Metric
from ..models.model import Model
from ..pairs import PromptPairs
from .circuit import Circuit
from .nodes import Facts
from .runs import reference_of, run_masks

#: How many candidates are tried ahead of the first whose fate is not known.
MOST_AHEAD = 64


def acdc(
    model: Model,
    pairs: PromptPairs,
    metric: Metric,
    within: Circuit | None,
    threshold: float | None,
    meta: dict[str, Any],
    *,
    max_tokens: int | None = None,
    progress: bool | None = None,
    ahead: int | None = None,
) -> Circuit:
    """Remove every edge whose removal, all earlier ones removed, changes the mean metric by less than the threshold.

    Receivers go from the logits to the first layer, the senders of each from last to first. Candidates are tried in
    batches: row i assumes that all candidates before it in the batch were removed, so the batch holds up to the first
    that stays; those behind it are tried again. The result is that of one at a time, whatever the batch size.

    Args:
        ahead: the largest batch; 1 tries one at a time.
    """
    facts = Facts.of(model)
    kept = facts.mask.copy() if within is None else within.matrix(facts).copy()
    order = [(int(s), r) for r in reversed(range(len(facts.receivers))) for s in reversed(np.flatnonzero(kept[:, r]))]
    reference = reference_of(model, pairs, "counterfactual")
    options: dict[str, Any] = {"max_tokens": max_tokens, "progress": False}
    run = run_masks(model, pairs, [kept], "counterfactual", metric, reference=reference, **options)
    current = float(run.values.mean())
    if threshold is None:
        assert run.corrupted is not None
        threshold = 0.01 * abs(float(run.clean.mean()) - float(run.corrupted.mean()))
    scores = np.zeros(kept.shape, dtype=np.float32)
    most = MOST_AHEAD if ahead is None else ahead
    size, done, trials = min(8, most), 0, 0
    bar = tqdm(total=len(order), disable=None if progress is None else not progress, desc="acdc", unit="edge")
    with bar:
        while done < len(order):
            batch = order[done : done + size]
            masks, mask = [], kept.copy()
            for s, r in batch:
                mask = mask.copy()
                mask[s, r] = False
                masks.append(mask)
            found = run_masks(model, pairs, masks, "counterfactual", metric, reference=reference, **options)
            values = found.values.mean("pair").values
            trials += len(batch)
            used = 0
            for (s, r), value in zip(batch, values, strict=True):
                used += 1
                change = float(value) - current
                if abs(change) < threshold:
                    kept[s, r] = False
                    current = float(value)
                else:
                    scores[s, r] = change
                    break
            size = min(most, 2 * size) if used == len(batch) else max(1, min(most, 2 * used))
            done += used
            bar.update(used)
    meta |= {"threshold": threshold, "trials": trials, "tested": len(order), "metric_value": current}
    return Circuit.from_matrix(scores, kept, facts, meta)
