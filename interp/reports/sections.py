"""What a report says of one thing: a heading, sentences made of its record, pictures, tables, provenance, code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import xarray as xr

from ..effects import Effects
from ..errors import InterpError, PlotError
from ..findings import COLUMNS, AuditReport
from ..plots import (
    Figure,
    plot_activation_patching_results,
    plot_attention,
    plot_circuit_graph,
    plot_faithfulness,
    plot_logit_lens,
)
from . import reproduce
from .parts import Section, Table, table_of
from .words import circuit_words, effects_words, evaluation_words, label, listed

if TYPE_CHECKING:
    from ..circuits import Circuit, Evaluation
    from ..saes.library import Dictionary

#: Rows of a table, and edges of a drawn circuit, at most.
ROWS, EDGES = 20, 200


def section_of(item: object, title: str = "") -> Section:
    """The section of anything that can be shown.

    Raises:
        PlotError: a thing that a report has no way to show, with its type.
    """
    from ..circuits import Circuit, Evaluation

    if isinstance(item, str):
        return Section(title, item.split("\n"))
    if isinstance(item, Effects):
        return of_effects(item, title)
    if isinstance(item, Circuit):
        return of_circuit(item, title)
    if isinstance(item, Evaluation):
        return of_evaluation(item, title)
    if isinstance(item, AuditReport):
        return of_audit(item, title)
    if isinstance(item, Figure):
        return Section(title or item.title, item.subtitle.splitlines() if title else (), (item,))
    if isinstance(item, pd.DataFrame):
        return Section(title or "Table", tables=(table_of(item, ""),))
    if isinstance(item, xr.Dataset | xr.DataArray):
        return of_array(item, title)
    if hasattr(item, "W_dec") and hasattr(item, "cfg"):
        return of_dictionary(cast("Dictionary", item), title)
    return of_other(item, title)


def of_effects(effects: Effects, title: str) -> Section:
    """Effects of patching and its kin."""
    record = effects.provenance
    figures: list[Figure] = []
    spread = effects.interval()
    words = effects_words(effects, spread)
    try:
        figures = [plot_activation_patching_results(effects)]
    except InterpError as error:
        words = [*words, f"No picture: {error}"]
    method = str(record.get("method", "effects")).replace("_", " ").replace(":", ", ")
    names = (record.get("plan") or {}).get("components") or []
    heading = title or f"{method[:1].upper()}{method[1:]}" + (f": {listed(names, 3)}" if names else "")
    return Section(heading, words, figures, (strongest(effects, spread),), record, reproduce.of_effects(record))


def strongest(effects: Effects, spread: xr.Dataset) -> Table:
    """The cells that changed most, mean over pairs, with 95 % intervals over pairs."""
    change = spread["mean"] - float(effects.base.mean())
    moved = effects.normalized.mean("pair") if effects.source is not None else None
    cells = [*np.ndindex(change.shape)]
    order = sorted(cells, key=lambda at: -abs(np.nan_to_num(float(change.values[at]))))
    kept = [at for at in order if np.isfinite(change.values[at])][:ROWS]
    names = [str(dim) for dim in change.dims]
    rows = []
    for at in kept:
        labels = [_number(label(change, dim, place)) for dim, place in zip(names, at, strict=True)]
        numbers = [float(spread[part].values[at]) for part in ("mean", "low", "high")]
        more = [] if moved is None else [float(moved.values[at])]
        rows.append([*labels, float(change.values[at]), *more, *numbers])
    columns = [*names, "change", *([] if moved is None else ["normalized"]), "metric", "low", "high"]
    metric = effects.provenance.get("metric", "metric")
    return Table(
        columns, rows, f"The {len(rows)} cells that changed {metric} most, mean over pairs; low to high is 95 %"
    )


def _number(value: object) -> object:
    """A label as a number where it is one, for sorting."""
    return int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value


def of_circuit(circuit: Circuit, title: str) -> Section:
    """A circuit, drawn by its strongest edges where it has many."""
    words, figures = circuit_words(circuit), []
    shown = circuit
    try:
        if circuit.level == "edge" and circuit.n_edges > EDGES:
            shown = circuit.top(n_edges=EDGES)
            words = [*words, f"The picture shows the {EDGES} strongest."]
        figures = [plot_circuit_graph(shown)]
    except InterpError as error:
        words = [*words, f"No picture: {error}"]
    ranking = circuit.ranking()[:ROWS]
    rows = [[*item, score] if isinstance(item, tuple) else [item, score] for item, score in ranking]
    columns = ["sender", "receiver", "score"] if circuit.level == "edge" else ["node", "score"]
    table = Table(columns, rows, f"The {len(rows)} strongest {circuit.level}s: change of the metric when corrupted")
    meta = {name: value for name, value in circuit.meta.items() if name != "trajectory"}
    heading = title or f"A circuit of {circuit.n_edges:,} edges"
    return Section(heading, words, figures, (table,), meta, reproduce.of_circuit(circuit.meta))


def of_evaluation(evaluation: Evaluation, title: str) -> Section:
    """How faithful a circuit is, by size."""
    figures = []
    words = evaluation_words(evaluation)
    try:
        figures = [plot_faithfulness({title or "circuit": evaluation})]
    except PlotError as error:
        words = [*words, f"No picture: {error}"]
    tables = [table_of(evaluation.curve, "Faithfulness by size")]
    if evaluation.minimality is not None:
        tables.append(table_of(evaluation.minimality, "Drop of faithfulness when one part is taken out"))
    record = dict(evaluation.provenance)
    circuit = record.pop("circuit", None)
    code = reproduce.of_evaluation(record, circuit if isinstance(circuit, Mapping) else None)
    return Section(title or "Faithfulness", words, figures, tables, record, code)


def of_audit(report: AuditReport, title: str) -> Section:
    """What an audit found, the worst of each check."""
    said = f"{len(report.findings)} checks of {report.model} ({report.family}): "
    said += "all passed." if report.ok else "; ".join(f"{kind} FAILED: {why}" for kind, why in report.failed.items())
    table = Table(COLUMNS, report.rows(), "The worst layer of each check")
    return Section(title or f"Audit of {report.model}", [said], tables=(table,))


def of_array(given: xr.Dataset | xr.DataArray, title: str) -> Section:
    """Attention patterns and lenses as pictures; other arrays as a table."""
    if isinstance(given, xr.DataArray) and {"head", "query", "key"} <= set(given.dims):
        model = given.attrs.get("model", "")
        words = [f"What each of {given.sizes['head']} heads attends to" + (f" in {model}." if model else ".")]
        return Section(title or "Attention", words, (plot_attention(given),))
    if isinstance(given, xr.Dataset) and {"token", "probability"} <= set(given):
        words = [f"What each layer's stream of {given.attrs.get('model', 'the model')} says comes next."]
        return Section(title or "Logit lens", words, (plot_logit_lens(given),))
    name = str(getattr(given, "name", None) or "value")
    frame = (given.rename(name) if isinstance(given, xr.DataArray) else given).to_dataframe().reset_index()
    return Section(title or name, tables=(table_of(frame, ""),))


def of_dictionary(sae: Dictionary, title: str) -> Section:
    """A dictionary of SAELens: what it is, where it belongs, how it was trained."""
    config = sae.cfg.to_dict()
    metadata = config.pop("metadata", {}) or {}
    known = metadata if isinstance(metadata, Mapping) else metadata.to_dict()
    site = known.get("site") or known.get("hook_name") or "no site that it names"
    said = (
        f"A dictionary of {sae.cfg.d_sae:,} features ({sae.cfg.architecture()}) over {sae.cfg.d_in} numbers of {site}."
    )
    return Section(title or "Dictionary", [said], provenance={**config, "metadata": dict(known)})


def of_other(item: Any, title: str) -> Section:
    """Things that tell of themselves: runs, evaluations of dictionaries, texts that were made, attribution graphs."""
    if hasattr(item, "effects") and hasattr(item, "metrics"):  # a run of interp.tracking
        from .runs import of_run

        return of_run(item, title)
    name = title or type(item).__name__
    known = getattr(item, "__dataclass_fields__", {})
    plain = {field: getattr(item, field) for field in known}
    rows = [[field, value] for field, value in plain.items() if isinstance(value, str | int | float | bool)]
    tables = [Table(["what", "value"], rows, "")] if rows else []
    tables += [table_of(value, field) for field, value in plain.items() if isinstance(value, pd.DataFrame)]
    figures = []
    if hasattr(item, "n_edges") or hasattr(item, "edges"):
        try:
            figures = [plot_circuit_graph(item)]
        except InterpError:
            figures = []
    shown = getattr(item, "_repr_html_", None)
    if not figures and callable(shown) and type(item).__module__.startswith("interp."):
        return Section(name, html=shown())
    if not known and not figures:
        raise PlotError(
            f"a report cannot show a {type(item).__name__}: give effects, circuits, evaluations, figures, tables, text, "
            "dictionaries or runs"
        )
    return Section(name, figures=figures, tables=tables, text=() if rows and tables else (str(item),))
