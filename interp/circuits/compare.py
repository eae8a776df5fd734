"""How much circuits agree: with one another, with a reference, and when pairs are drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd

from ..errors import CircuitError
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..options import RunOptions
from ..pairs import PromptPairs
from .circuit import Circuit
from .discovery import discover
from .files import Item
from .nodes import Described, Facts


def stability(
    model: Model,
    pairs: PromptPairs,
    size: int,
    method: str = "eap-ig",
    metric: Metric = logit_diff,
    *,
    samples: int = 10,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> np.ndarray:
    """How much circuits of `size` edges agree when pairs are drawn anew: Jaccard of each two, `[pair of samples]`."""
    generator = np.random.default_rng(seed)
    circuits = []
    for _ in range(samples):
        drawn = pairs[sorted(generator.integers(0, len(pairs), size=len(pairs)).tolist())]
        circuits.append(discover(model, drawn, method, "edge", metric, **options).top(n_edges=size))
    return np.array([a.jaccard(b) for i, a in enumerate(circuits) for b in circuits[i + 1 :]])


def compare_circuits(
    circuit: Circuit, reference: Circuit | Sequence[Item], facts: Described = None
) -> dict[str, float]:
    """Precision, recall and AUROC of a circuit's edges (nodes) against a reference circuit.

    AUROC ranks every possible edge of the model by |score|, absent edges as 0 (in a circuit without scores, what it
    has as 1); ties count half. `embed`, which is in every circuit of nodes, is not counted as one.

    Raises:
        CircuitError: no facts to say which edges are possible, a reference that is empty or everything, or one of
            edges where the other is of nodes.
    """
    facts = Facts.of(facts) if facts is not None else circuit.facts
    if facts is None:
        raise CircuitError("compare_circuits needs facts (a Model or Facts): which edges are possible is not known")
    if not isinstance(reference, Circuit):
        make = Circuit.from_edges if circuit.level == "edge" else Circuit.from_nodes
        reference = make(list(reference), facts)
    truth, scores, kept = _vectors(circuit, reference, facts)
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        raise CircuitError(f"the reference has {positives} of {len(truth)} possible parts: nothing to tell apart")
    ranks = pd.Series(np.abs(np.nan_to_num(scores))).rank().to_numpy()
    auroc = (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))
    hits = int((truth & kept).sum())
    return {
        "precision": hits / max(1, int(kept.sum())),
        "recall": hits / positives,
        "auroc": float(auroc),
    }


def _vectors(circuit: Circuit, reference: Circuit, facts: Facts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every possible part: whether the reference has it, its score, and whether the circuit has it."""
    if circuit.level != reference.level:
        raise CircuitError(f"a circuit of {circuit.level}s cannot be compared with one of {reference.level}s")
    if circuit.level == "edge":
        possible = facts.mask
        truth, kept = reference.matrix(facts)[possible], circuit.matrix(facts)[possible]
        scores = circuit.score_matrix(facts)[possible]
    else:
        names = [site.node for site in facts.senders[1:]]  # embed is in every circuit of nodes
        truth, kept = (np.isin(names, each.nodes()) for each in (reference, circuit))
        scores = np.array([circuit.scores().get(name, 0.0) for name in names])
    return truth, scores if circuit.scores() else kept.astype(float), kept
