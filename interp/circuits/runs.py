"""Running circuits: every edge outside is cut, and its receiver reads a reference's contribution instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch

from ..cells import Cell, Resolved
from ..effects import Effects
from ..encoded import EncodedPairs
from ..engine.context import Experiment, Reference, Runs
from ..engine.reading import Reading, contribution_program, encode_prompts, run_readings
from ..engine.run import run_cells
from ..engine.trace import contributions
from ..engine.trial import check_metric
from ..errors import CircuitError
from ..journal import experiment
from ..metrics import Metric, logit_diff
from ..models.model import EDGE_LAWS, Model
from ..options import Options, RunOptions
from ..pairs import PromptPairs
from ..saes.library import Dictionary
from .circuit import Circuit
from .feature_discovery import feature_values
from .features import FeatureCircuit
from .files import Item
from .nodes import Facts

Prompts = PromptPairs | Sequence[Any] | str
ABLATIONS = ("counterfactual", "mean", "positional_mean", "zero")


def given_cells(
    encoded: EncodedPairs, dim: str, labels: Sequence[object], cells: Sequence[Cell], spec: Mapping[str, object]
) -> Resolved:
    """Cells that are given outright, labelled along one dim. PairsError: pairs that are not aligned."""
    encoded.require_aligned("a circuit")
    return Resolved(((dim, tuple(labels)),), tuple(cells), dict(spec))


def check_ablation(ablation: str, pairs: PromptPairs) -> None:
    """Raises CircuitError for an unknown ablation, or a counterfactual one without corrupted prompts."""
    if ablation not in ABLATIONS:
        raise CircuitError(f"unknown ablation {ablation!r}; the ablations are: {', '.join(ABLATIONS)}")
    if ablation == "counterfactual" and pairs.corrupted is None:
        raise CircuitError("counterfactual ablation needs PromptPairs(corrupted=[...]); or ablation='mean' or 'zero'")


def reference_of(
    model: Model, pairs: PromptPairs, ablation: str, reference: Prompts | None = None, metric: Metric | None = None
) -> Reference:
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
    by_position = ablation == "positional_mean"
    sums: list[torch.Tensor] = []

    def add(_: Reading, written: tuple[torch.Tensor, torch.Tensor]) -> None:
        parts = written[0].double()  # a running sum in bf16 would stop growing
        part = parts if by_position else parts.sum(1, keepdim=True)
        sums[:] = [part if not sums else sums[0] + part]

    make = lambda chosen: contribution_program(model, prompts[chosen[0]])  # noqa: E731
    run_readings(model, [Reading.of([number], make) for number in range(len(prompts))], add, contributions)
    return (sums[0] / (len(prompts) if by_position else sum(map(len, prompts)))).float()


def run_masks(
    model: Model,
    pairs: PromptPairs,
    kept: Sequence[np.ndarray],
    ablation: str = "counterfactual",
    metric: Metric = logit_diff,
    *,
    reference: Reference | None = None,
    options: Options | None = None,
    **more: Unpack[RunOptions],
) -> Effects:
    """The metric of several circuits given as kept-edge masks `[sender, receiver]`: dims (circuit, pair).

    `reference` is what `reference_of` returned, or None to compute it. Base clean, source corrupted.
    Options are one value, or keyword arguments.
    """
    source = reference_of(model, pairs, ablation) if reference is None else reference
    masks = Masks(model, Runs(model.encode(pairs)), metric, source, ablation)
    return masks.run(kept, options or Options.of(more))


@dataclass(frozen=True)
class Masks:
    """Circuits of one model on the runs of some pairs, cut edges standing for `reference`."""

    model: Model
    runs: Runs
    metric: Metric
    reference: Reference
    ablation: str = "counterfactual"
    rounding: float | None = None

    def run(
        self,
        kept: Sequence[np.ndarray],
        options: Options,
        trunk: np.ndarray | None = None,
    ) -> Effects:
        """The metric of circuits given as kept-edge masks `[sender, receiver]`: dims (circuit, pair).

        `trunk` is a kept-edge mask that the circuits nearly share: it is run once, and each branches off at the first layer
        that differs.
        """
        possible = Facts.of(self.model).mask
        shared = None if trunk is None else (possible & ~trunk).T.copy()
        cells = [Cell((i,), cut=(possible & ~mask).T.copy(), trunk=shared) for i, mask in enumerate(kept)]
        spec = {"circuits": [int(mask.sum()) for mask in kept], "ablation": self.ablation}
        resolved = given_cells(self.runs.encoded, "circuit", range(len(kept)), cells, spec)
        if isinstance(self.reference, str) and self.reference == "source":
            self.runs.need_source()
        asked = Experiment(
            self.model, self.runs, resolved, self.metric, "circuit", reference=self.reference, rounding=self.rounding
        )
        return run_cells(asked, options)


class CircuitOptions(RunOptions, total=False):
    """The keyword options of `run_circuit`."""

    reference: Prompts | None
    saes: Sequence[Dictionary]
    errors: bool


@experiment
def run_circuit(
    model: Model,
    pairs: PromptPairs,
    circuit: Circuit | FeatureCircuit | Sequence[Item],
    ablation: str = "counterfactual",
    metric: Metric = logit_diff,
    **options: Unpack[CircuitOptions],
) -> np.ndarray:
    """The metric of a circuit with all else ablated, per pair `[pair]`.

    Args:
        circuit: a Circuit, or kept heads and MLPs: names, or (layer, head); or one of features, run with all other features of
            its dictionaries cut, and what they do not explain unless it is a node (`errors=True` leaves it everywhere).
        ablation: what cut edges carry: "counterfactual" (the corrupted run's contributions), "mean" or
            "positional_mean" (over the pairs' clean prompts, or `reference=` prompts), "zero".

    Raises:
        CircuitError, PairsError, MetricError: before the model runs. AuditError: edges do not add up on this model.

    Examples:
        >>> interp.run_circuit(model, pairs, ["L20.H0", "L23.H3"]).shape
        (2,)
    """
    how, prompts = Options.of(options, "reference", "saes", "errors"), options.get("reference")
    if isinstance(circuit, FeatureCircuit):
        check_ablation(ablation, pairs)
        saes, errors = options.get("saes") or circuit.saes, bool(options.get("errors"))
        return feature_values(model, pairs, {"circuit": circuit}, saes, (ablation, errors), metric, how)[0][0]
    reference = reference_of(model, pairs, ablation, prompts, metric)
    if not isinstance(circuit, Circuit):
        circuit = Circuit.from_nodes(circuit, model)
    effects = run_masks(model, pairs, [circuit.matrix(model)], ablation, metric, reference=reference, options=how)
    return effects.values.values[0]
