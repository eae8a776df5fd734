"""Running circuits: every edge outside is cut, and its receiver reads a reference's contribution instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..cells import Cell, Resolved
from ..effects import Effects
from ..engine.reading import contribution_program, encode_prompts
from ..engine.run import run_plan
from ..engine.trace import contributions
from ..engine.trial import check_metric
from ..errors import CircuitError
from ..metrics import Metric, logit_diff
from ..models.model import EDGE_LAWS, Model
from ..pairs import EncodedPairs, PromptPairs
from .circuit import Circuit
from .nodes import Facts

ABLATIONS = ("counterfactual", "mean", "positional_mean", "zero")


@dataclass(frozen=True)
class Cells:
    """A plan whose cells are given outright; `dim` labels them."""

    dim: str
    labels: tuple[Any, ...]
    cells: tuple[Cell, ...]
    spec: Mapping[str, Any]

    def resolve(self, model: Any, encoded: EncodedPairs) -> Resolved:
        """The cells as they are; pairs must be aligned."""
        encoded.require_aligned("a circuit")
        return Resolved(((self.dim, self.labels),), self.cells, dict(self.spec))


def check_ablation(ablation: str, pairs: PromptPairs) -> None:
    """Raises CircuitError for an unknown ablation, or a counterfactual one without corrupted prompts."""
    if ablation not in ABLATIONS:
        raise CircuitError(f"unknown ablation {ablation!r}; the ablations are: {', '.join(ABLATIONS)}")
    if ablation == "counterfactual" and pairs.corrupted is None:
        raise CircuitError("counterfactual ablation needs PromptPairs(corrupted=[...]); or ablation='mean' or 'zero'")


def reference_of(
    model: Model, pairs: PromptPairs, ablation: str, reference: Any = None, metric: Metric | None = None
) -> Any:
    """What stands in for a cut edge: the source run, zero, or mean contributions over reference prompts.

    Means are over the reference prompts (the pairs' own clean ones by default) and, for "mean", their positions. What is
    wrong with the pairs, or with the metric where one is given, is told before a mean is taken.
    """
    check_ablation(ablation, pairs)
    model.rests_on("running a circuit", *EDGE_LAWS)
    if ablation == "counterfactual":
        return "source"
    if ablation == "zero":
        return "zero"
    encoded = model.encode(pairs)
    if metric is not None:
        check_metric(metric, encoded, model.vocab_size)
    prompts = encode_prompts(model, pairs if reference is None else reference).clean
    if ablation == "positional_mean":
        length, *others = sorted({len(prompt) for prompt in encoded.clean})
        shortest = min(map(len, prompts))
        if others or shortest < length:
            found = f"pairs of {[length, *others]} tokens" if others else f"a reference prompt of {shortest} tokens"
            raise CircuitError(
                f"positional_mean needs pairs of one length and references at least as long; here are {found}"
                + ("" if others else f" for pairs of {length}")
                + "; use ablation='mean'"
            )
        prompts = tuple(prompt[:length] for prompt in prompts)  # what follows does not change what came before
    total: torch.Tensor | None = None
    count = 0
    for prompt in prompts:
        parts, _ = model.backend.call(model, contributions, model.taps, contribution_program(model, prompt))
        parts = parts.double()  # a running sum in bf16 would stop growing
        part = parts if ablation == "positional_mean" else parts.sum(1, keepdim=True)
        total = part if total is None else total + part
        count += 1 if ablation == "positional_mean" else len(prompt)
    assert total is not None
    return (total / count).float()


def run_masks(
    model: Model,
    pairs: PromptPairs,
    kept: Sequence[np.ndarray],
    ablation: str = "counterfactual",
    metric: Metric = logit_diff,
    *,
    labels: Sequence[Any] | None = None,
    reference: Any = None,
    trunk: np.ndarray | None = None,
    **options: Any,
) -> Effects:
    """The metric of several circuits given as kept-edge masks `[sender, receiver]`: dims (circuit, pair).

    `reference` is what `reference_of` returned, or None to compute it. Base clean, source corrupted. `trunk` is a
    kept-edge mask that the circuits nearly share: it is run once, and each branches off at the first layer that differs.
    """
    facts = Facts.of(model)
    possible = facts.mask
    source = reference_of(model, pairs, ablation) if reference is None else reference
    shared = None if trunk is None else (possible & ~trunk).T.copy()
    cells = tuple(Cell((i,), cut=(possible & ~mask).T.copy(), trunk=shared) for i, mask in enumerate(kept))
    spec = {"circuits": [int(mask.sum()) for mask in kept], "ablation": ablation}
    plan: Any = Cells("circuit", tuple(range(len(kept)) if labels is None else labels), cells, spec)
    return run_plan(
        model,
        pairs,
        plan,
        metric,
        "noising",
        method="circuit",
        reference=source,
        needs_source=source == "source" if isinstance(source, str) else False,
        **options,
    )


def run_circuit(
    model: Model,
    pairs: PromptPairs,
    circuit: Circuit | Sequence[Any],
    ablation: str = "counterfactual",
    metric: Metric = logit_diff,
    **options: Any,
) -> np.ndarray:
    """The metric of a circuit with all else ablated, per pair `[pair]`.

    Args:
        circuit: a Circuit, or kept heads and MLPs: names, or (layer, head).
        ablation: what cut edges carry: "counterfactual" (the corrupted run's contributions), "mean" or
            "positional_mean" (over the pairs' clean prompts, or `reference=` prompts), "zero".

    Raises:
        CircuitError, PairsError, MetricError: before the model runs. AuditError: edges do not add up on this model.
    """
    prompts = options.pop("reference", None)
    reference = reference_of(model, pairs, ablation, prompts, metric)
    if not isinstance(circuit, Circuit):
        circuit = Circuit.from_nodes(circuit, model)
    found = run_masks(model, pairs, [circuit.matrix(model)], ablation, metric, reference=reference, **options)
    return found.values.values[0]
