"""Evaluation: how much of the model's behaviour a circuit keeps, at every size, and what its parts are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np
import pandas as pd

from ..errors import CircuitError
from ..journal import experiment
from ..markup import table
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..options import Options, RunOptions
from ..pairs import PromptPairs
from ..saes.library import Dictionary
from ..spans import REST
from .circuit import Circuit
from .feature_discovery import feature_values
from .features import FeatureCircuit
from .files import Item
from .nodes import EMBED, Facts, node
from .runs import Prompts, check_ablation, reference_of, run_masks

#: Sizes of circuits as fractions of all edges (or nodes), the protocol of MIB (Mueller et al. 2025).
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_circuit` found.

    curve: a row per size: (n_nodes,) n_edges, fraction, metric, faithfulness, low, high (95 % bootstrap interval over pairs).
    cpr: area under faithfulness over fractions, linear trapezoid: large when few edges do much.
    cmd: area under |1 − faithfulness|: small when every size behaves as the model does.
    full, empty: mean metric with no edge cut and with every edge cut.
    """

    curve: pd.DataFrame
    cpr: float
    cmd: float
    full: float
    empty: float
    ablation: str
    completeness: float | None = None
    minimality: pd.DataFrame | None = None
    #: of which model, prompts and circuit this is
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Evaluation(cpr={self.cpr:.3f}, cmd={self.cmd:.3f}, full={self.full:.3f}, empty={self.empty:.3f}, "
            f"ablation={self.ablation!r})\n{self.curve.to_string(index=False, float_format=lambda x: f'{x:.4f}')}"
        )

    def _repr_html_(self) -> str:
        return table(list(self.curve.columns), self.curve.itertuples(index=False), repr(self).split("\n")[0])


def faithfulness_of(values: np.ndarray, full: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """(m(C) − m(∅)) / (m(full) − m(∅)) of means over pairs: values `[circuit, pair]` -> `[circuit]`.

    Raises:
        CircuitError: full and empty model score the same but for rounding, so there is nothing to be faithful to.
    """
    whole = full.mean() - empty.mean()
    if abs(whole) <= max(1e-12, REST * max(abs(full.mean()), abs(empty.mean()))):
        raise CircuitError(f"the full and the empty model both score {full.mean():.4g}; faithfulness has no scale here")
    return (values.mean(-1) - empty.mean()) / whole


class EvaluationOptions(RunOptions, total=False):
    """The keyword options of `evaluate_circuit`."""

    completeness: bool
    minimality: int
    samples: int
    seed: int
    saes: Sequence[Dictionary]
    errors: bool


@experiment
def evaluate_circuit(
    model: Model,
    pairs: PromptPairs,
    circuit: Circuit | FeatureCircuit,
    ablation: str = "counterfactual",
    metric: Metric = logit_diff,
    *,
    fractions: Sequence[float] | None = None,
    absolute: bool = True,
    reference: Prompts | None = None,
    **options: Unpack[EvaluationOptions],
) -> Evaluation:
    """Faithfulness of the circuit's best edges (or nodes) at every size, all else ablated.

    A circuit of scores over the whole model is cut to its top fractions (MIB's sizes by default); of a smaller circuit
    the last row is all of it, and of one without scores the only row. `absolute` ranks by |score|; False by score, so
    that edges that hurt come last.

    Args:
        ablation, reference: what cut edges carry, as in `run_circuit`, and the prompts of its means.
        fractions: sizes, parts of all edges (or nodes) of the model.
        samples, seed: of the bootstrap over pairs, 1000 and 0.
        completeness: also how near the model without the circuit comes to the empty one, 1 − |f(model without it)|.
        minimality: also the drop of faithfulness when each of this many strongest edges (nodes) alone is taken out.
        saes, errors: of a circuit of features, as in `run_circuit`; its sizes are numbers of its own strongest nodes.
        options: of `patch` (schedule, progress, max_tokens, checkpoint).

    Raises:
        CircuitError, PairsError, MetricError: before the model runs. AuditError: edges do not add up on this model.

    Examples:
        >>> circuit = interp.discover(model, pairs, method="eap", level="node")
        >>> score = interp.evaluate_circuit(model, pairs, circuit, fractions=[0.5, 1.0])
        >>> score.curve["faithfulness"].round(1).tolist()
        [1.0, 1.0]
    """
    how = Options.of(options, *EvaluationOptions.__annotations__, error=CircuitError)
    if isinstance(circuit, FeatureCircuit):
        return _of_features(model, pairs, circuit, ablation, metric, how, options)
    fractions = sorted(FRACTIONS if fractions is None else fractions)
    if not fractions or not 0 <= fractions[0] <= fractions[-1] <= 1:
        raise CircuitError(f"fractions={list(fractions)}; give sizes between 0 and 1, parts of all {circuit.level}s")
    facts = Facts.of(model)
    total = facts.n_edges if circuit.level == "edge" else len(facts.senders) - 1
    whole, sizes = circuit.matrix(facts), _sizes(circuit, fractions, total)
    masks = _largest(circuit, sizes, absolute, facts)
    nothing = np.zeros_like(whole)
    completeness = options.get("completeness", False)
    rest = [facts.mask & ~whole] if completeness else []
    without = _taken_out(circuit, options.get("minimality", 0), facts)
    taken = [whole, *without.values()] if without else []
    filled = reference_of(model, pairs, ablation, reference, metric)
    every = [nothing, *masks, *rest, *taken]
    effects = run_masks(model, pairs, every, ablation, metric, reference=filled, options=how)
    values, full = (part.values.astype(np.float64) for part in (effects.values, effects.clean))
    empty, rows, tail = values[0], values[1 : len(masks) + 1], values[len(masks) + 1 :]
    scores = faithfulness_of(rows, full, empty)
    low, high = _intervals(rows, full, empty, options.get("samples", 1000), options.get("seed", 0))
    curve = pd.DataFrame(
        {
            "n_edges": [int(mask.sum()) for mask in masks],
            "fraction": [size / total for size in sizes],
            "metric": rows.mean(1),
            "faithfulness": scores,
            "low": low,
            "high": high,
        }
    )
    if circuit.level == "node":
        curve.insert(0, "n_nodes", sizes)
    fraction = curve["fraction"].to_numpy()
    complete, minimal = None, None
    if completeness:
        complete = 1 - abs(float(faithfulness_of(tail[:1], full, empty)[0]))
        tail = tail[1:]
    if without:
        kept, *others = faithfulness_of(tail, full, empty)
        minimal = pd.DataFrame({"part": list(without), "drop": kept - np.array(others)})
    return Evaluation(
        curve,
        float(np.trapezoid(scores, fraction)),
        float(np.trapezoid(np.abs(1 - scores), fraction)),
        float(full.mean()),
        float(empty.mean()),
        ablation,
        complete,
        minimal,
        {**effects.provenance, "ablation": ablation, "fractions": list(fractions), "circuit": dict(circuit.meta)},
    )


def _of_features(
    model: Model,
    pairs: PromptPairs,
    circuit: FeatureCircuit,
    ablation: str,
    metric: Metric,
    how: Options,
    options: EvaluationOptions,
) -> Evaluation:
    """A circuit of features at the sizes 1, 2, 5, 10, … of its own nodes."""
    check_ablation(ablation, pairs)
    own = len(circuit.nodes)
    sizes = [size for power in range(7) for step in (1, 2, 5) if (size := step * 10**power) < own] + [own]
    circuits = {str(size): circuit.top(size) for size in (0, *sizes)}
    saes, errors = options.get("saes") or circuit.saes, bool(options.get("errors"))
    values, full = feature_values(model, pairs, circuits, saes, (ablation, errors), metric, how)
    empty, rows = values[0].astype(np.float64), values[1:].astype(np.float64)
    scores = faithfulness_of(rows, full, empty)
    low, high = _intervals(rows, full, empty, options.get("samples", 1000), options.get("seed", 0))
    every = sum(circuit.meta.get("dictionaries", [own])) + len(circuit.meta.get("sites", ()))
    columns = {"n_nodes": sizes, "fraction": [size / every for size in sizes], "metric": rows.mean(1)}
    curve = pd.DataFrame({**columns, "faithfulness": scores, "low": low, "high": high})
    cpr, cmd = (float(np.trapezoid(y, curve["fraction"])) for y in (scores, np.abs(1 - scores)))
    return Evaluation(curve, cpr, cmd, float(full.mean()), float(empty.mean()), ablation)


def _ranking(circuit: Circuit) -> list[tuple[Item, float]]:
    """What can be left out, strongest first: embed is in every circuit of nodes."""
    return [(name, score) for name, score in circuit.ranking() if name != EMBED.node]


def _sizes(circuit: Circuit, fractions: Sequence[float], total: int) -> list[int]:
    """How many edges or nodes each row keeps; those of a circuit that is not the whole model end with all it has."""
    sizes = [min(total, max(int(fraction > 0), round(fraction * total))) for fraction in fractions]
    own = circuit.n_edges if circuit.level == "edge" else circuit.n_nodes
    if len(_ranking(circuit)) < own:  # no scores to rank by
        return [own]
    return sizes if own == total else [*(size for size in sizes if size < own), own]


def _largest(circuit: Circuit, sizes: Sequence[int], absolute: bool, facts: Facts) -> list[np.ndarray]:
    """Masks of the circuit's strongest edges or nodes, one for each size."""
    ranked = _ranking(circuit)
    if not ranked:
        return [circuit.matrix(facts) for _ in sizes]
    if not absolute:
        ranked = sorted(ranked, key=lambda item: -item[1])
    if circuit.level == "node":
        return [Circuit.from_nodes(dict(ranked[:size]), facts).matrix() for size in sizes]
    senders, receivers = facts.sender_index, facts.receiver_index
    places = np.array([(senders[node(s)], receivers[node(r)]) for (s, r), _ in ranked])
    masks = []
    for size in sizes:
        mask = np.zeros_like(facts.mask)
        mask[places[:size, 0], places[:size, 1]] = True
        masks.append(mask)
    return masks


def _taken_out(circuit: Circuit, count: int, facts: Facts) -> dict[str, np.ndarray]:
    """Masks of the circuit without each of its strongest parts, by the part's name."""
    ranked, out = _ranking(circuit), {}
    for name, _ in ranked[:count]:
        if circuit.level == "node":
            out[name] = Circuit.from_nodes({n: score for n, score in ranked if n != name}, facts).matrix()
            continue
        mask = circuit.matrix(facts)
        mask[facts.sender_index[node(name[0])], facts.receiver_index[node(name[1])]] = False
        out[" -> ".join(name)] = mask
    return out


def _intervals(
    rows: np.ndarray, full: np.ndarray, empty: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals of faithfulness, pairs drawn with replacement; NaN for one pair."""
    pairs = rows.shape[1]
    if pairs < 2:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    drawn = np.random.default_rng(seed).integers(0, pairs, size=(samples, pairs))
    base = empty[drawn].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn_scores = (rows[:, drawn].mean(2) - base) / (full[drawn].mean(1) - base)
    low, high = np.nanpercentile(drawn_scores, [2.5, 97.5], axis=1)
    return low, high
