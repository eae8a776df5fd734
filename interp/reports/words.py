"""Sentences of what was done and what came of it, made from records; no number in them that is not in the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..effects import Effects

if TYPE_CHECKING:
    from ..circuits import Circuit, Evaluation


def number(value: float) -> str:
    """A number in a sentence."""
    return f"{value:.2f}".replace("-", "−") if abs(value) < 1000 else f"{value:.3g}".replace("-", "−")


def span(values: Sequence[object] | None, what: str) -> str:
    """`layers 3 to 8`, `layers 3, 5 and 8`, `every layer`."""
    if values is None:
        return f"every {what}"
    listed = list(values)
    if len(listed) == 1:
        return f"{what} {listed[0]}"
    numbers = [value for value in listed if isinstance(value, int)]
    if (
        len(numbers) == len(listed)
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        and len(numbers) > 2
    ):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return f"{what}s {', '.join(map(str, listed[:-1]))} and {listed[-1]}"


def listed(names: Sequence[object], most: int = 6) -> str:
    """Some names, and how many more."""
    shown = [str(name) for name in names]
    if len(shown) > most:
        return f"{', '.join(shown[:most])} and {len(shown) - most} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "nothing"


def of_pairs(effects: Effects) -> str:
    """`4 pairs of ioi`."""
    n = effects.values.sizes["pair"]
    name = (effects.provenance.get("prompts") or {}).get("name", "")
    return f"{n} pair{'s' * (n != 1)}" + (f" of {name}" if name else "")


def what_was_done(effects: Effects) -> str:
    """The first sentence."""
    record, pairs = effects.provenance, of_pairs(effects)
    method, _, kind = str(record.get("method", "")).partition(":")
    plan = record.get("plan") or {}
    model = record.get("model", "a model")
    if method == "path_patch":
        return (
            f"Paths from {listed(plan['senders'])} to {listed(plan['receivers'])} of {model} were patched, on {pairs}: "
            "the receiver alone reads what the sender wrote in the other run."
        )
    if method == "direct_effects":
        return f"What each part of {model} adds by itself to the logit difference, on {pairs}."
    where = listed(plan.get("components") or [])
    if plan.get("axis") in ("position", "head", "unit"):
        item = {"position": plan.get("positions"), "head": plan.get("items"), "unit": plan.get("items")}[plan["axis"]]
        where += f" at {span(plan.get('layers'), 'layer')} and {span(item, plan['axis'])}"
    if method == "causal_trace":
        return (
            f"The subject of {pairs} was corrupted by noise of {record.get('noise')} standard deviations "
            f"({record.get('samples')} samples), and {where} of {model} restored one at a time."
        )
    if method == "ablate":
        return f"{where} of {model} were ablated ({record.get('mode', '')}) one at a time, on {pairs}."
    runs = ("corrupted", "clean") if record.get("direction") == "denoising" else ("clean", "corrupted")
    did = f"The effect of patching was estimated ({kind}) at" if method == "attribute" else "Patched:"
    return (
        f"{did} {where} of {model}, on {pairs}; the {runs[0]} run with one activation of the {runs[1]} run at a time."
    )


def effects_words(effects: Effects, spread: xr.Dataset) -> list[str]:
    """What was done; the runs that nothing was done to; the strongest cell. `spread` is `effects.interval()`."""
    record = effects.provenance
    metric = record.get("metric", "metric")
    runs = f"{metric} is {number(float(effects.clean.mean()))} in the clean run"
    if effects.corrupted is not None:
        runs += f" and {number(float(effects.corrupted.mean()))} in the corrupted one"
    return [what_was_done(effects), f"{runs} (means over pairs). {found(effects, spread)}"]


def found(effects: Effects, spread: xr.Dataset) -> str:
    """The cell that changed the metric most, with its interval."""
    direct = effects.provenance.get("method") == "direct_effects"
    base = 0.0 if direct else float(effects.base.mean())
    change = spread["mean"] - base
    if not np.isfinite(change.values).any():
        return "No cell has a number."
    at = np.unravel_index(int(np.nanargmax(np.abs(change.values))), change.shape)
    low, high = (float(spread[part].values[at]) - base for part in ("low", "high"))
    place = ", ".join(named(change, str(dim), int(index)) for dim, index in zip(change.dims, at, strict=True))
    between = f" (95 % interval over pairs {number(low)} to {number(high)})" if np.isfinite(low) else ""
    verb = "The largest part is" if direct else "The strongest cell is"
    text = f"{verb} {place}: {'' if direct else 'it changes the metric by '}{number(float(change.values[at]))}{between}"
    if effects.source is not None and not direct:
        text += f", {number(float(effects.normalized.mean('pair').values[at]))} of the way to the other run"
    return text + "."


def label(array: xr.DataArray, dim: str, place: int) -> object:
    """What stands at a place along a dim."""
    return array[dim].values[place].item() if dim in array.coords else place


def named(array: xr.DataArray, dim: str, place: int) -> str:
    """A place along a dim, in words."""
    value = label(array, dim, place)
    return str(value) if dim == "component" else f"{dim} {value}"


def circuit_words(circuit: Circuit) -> list[str]:
    """How a circuit was found, how large it is, what is strongest in it."""
    meta = circuit.meta
    method = {"iterative_pruning": "iterative pruning"}.get(str(meta.get("method")), str(meta.get("method") or ""))
    facts = circuit.facts
    share = f" ({100 * circuit.n_edges / facts.n_edges:.3g} % of all)" if facts is not None else ""
    how = f"found by {method}" if method else "written by hand"
    first = f"A circuit of {meta.get('model', 'a model')}, {how}"
    first += f" on {meta['pairs']} pairs" if meta.get("pairs") else ""
    first += f": {circuit.n_edges:,} edges{share} between {circuit.n_nodes:,} heads and MLPs."
    ranking = circuit.ranking()[:3]
    if not ranking or ranking[0][1] is None:
        return [first]
    names = [" → ".join(item) if isinstance(item, tuple) else str(item) for item, _ in ranking]
    scores = [
        f"{name} ({number(float(score))})" for name, (_, score) in zip(names, ranking, strict=True) if score is not None
    ]
    return [first, f"Strongest: {listed(scores)}; in brackets the change of {meta.get('metric', 'the metric')}."]


def evaluation_words(evaluation: Evaluation) -> list[str]:
    """How faithful, at which size."""
    curve = evaluation.curve
    size = str(curve.columns[0])
    what = size.removeprefix("n_")
    good = curve[curve["faithfulness"] >= 0.8]
    text = (
        f"All else ablated ({evaluation.ablation}): the metric is {number(evaluation.full)} for the whole model and "
        f"{number(evaluation.empty)} with everything cut."
    )
    if len(good):
        row = good.iloc[0]
        text += (
            f" {int(row[size]):,} {what} ({100 * row['fraction']:.3g} %) are the smallest size measured that keeps 0.8 of the "
            f"difference: faithfulness {number(float(row['faithfulness']))}."
        )
    else:
        text += (
            f" No size measured keeps 0.8 of the difference; the best has {number(float(curve['faithfulness'].max()))}."
        )
    text += f" CPR {number(evaluation.cpr)}, CMD {number(evaluation.cmd)}."
    text += f" Completeness {number(evaluation.completeness)}." if evaluation.completeness is not None else ""
    return [text]
