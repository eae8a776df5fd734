"""Heatmaps of Effects: layer × position, layer × head, the largest units. Imports bokeh, numpy, xarray."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper
from bokeh.palettes import RdBu11, interp_palette
from bokeh.plotting import figure
from bokeh.transform import transform

from ..effects import Effects, bootstrap
from ..errors import PlotError
from .given import check_sizes
from .labels import coordinate, extent, position_labels, visible
from .page import INK, MUTED, PAGE, Figure, color_scale, label_cells, panel, tooltip

TOP_UNITS = 30
MAX_UNIT_COLUMNS = 64  # more units than this are ranked, not laid out


@dataclass(frozen=True)
class _View:
    """What is drawn: `shown` and raw `values`, dims (component, …, pair), on one colour scale."""

    effects: Effects
    shown: xr.DataArray
    values: xr.DataArray
    normalized: bool
    mapper: LinearColorMapper
    digits: int  # after the point, in hovers


def plot_activation_patching_results(
    effects: Effects,
    components: str | Sequence[str] | None = None,
    *,
    n_layers: int | None = None,
    normalized: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the mean effect over pairs as one heatmap per component, on one colour scale centred on zero.

    Args:
        effects: of a grid (layer × position, or named positions), of heads (layer × head), of units (the 30
            largest as bars), or of any two dimensions, such as (sender, receiver).
        components: which to draw, in this order; None: all.
        n_layers: of the model; checked against the effects.
        normalized: True draws (patched − base) / (source − base), False draws patched − base in the metric's
            units, None the first where the effects have a source run, else the second.
        title: heading of the page; None: made from the provenance.

    Raises:
        PlotError: an unknown component, another number of layers than the model's, more than two dimensions, or normalised
            values without a source run.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[20, 23]))
        >>> interp.plot_activation_patching_results(effects).save("heads.html").name
        'heads.html'
    """
    _check_layers(effects, n_layers)
    view = _view(effects, components, normalized)
    names = [str(name) for name in view.values["component"].values]
    axes = [str(d) for d in view.values.dims if d not in ("component", "pair")]
    if len(axes) > 2 or not axes:
        raise PlotError(
            f"cannot draw dims {effects.values.dims}: two besides component and pair; choose one of the others: "
            f"dataclasses.replace(effects, values=effects.values.isel({axes[-1] if axes else 'component'}=0))"
        )
    if "unit" in axes and view.values.sizes["unit"] > MAX_UNIT_COLUMNS:
        panels, across = [_bars(view, name) for name in names], 2
    elif len(axes) == 1:  # the components themselves are the second axis
        y, x = ("layer", "component") if axes == ["layer"] else ("component", axes[0])
        panels, across = [_heatmap(view, None, y, x, _cell_size(view, y, x, 1))], 1
    else:
        y, x = ("layer", next(a for a in axes if a != "layer")) if "layer" in axes else axes
        room = view.values.sizes[x] * 20 + 90  # the width of a panel whose labels can still stand slanted
        across = max(1, min(len(names), PAGE // room, 3))
        size = _cell_size(view, y, x, across)
        panels = [_heatmap(view, name, y, x, size) for name in names]
    rows = [row(*panels[i : i + across], spacing=22) for i in range(0, len(panels), across)]
    layout = column(color_scale(view.mapper, _quantity(view)), *rows, spacing=14)
    return Figure(layout, title or _title(effects), _subtitle(view))


def diverging(n: int = 255) -> list[str]:
    """`n` (odd) colours from blue over exact white to red, ColorBrewer's RdBu reversed."""
    anchors = list(RdBu11)
    anchors[5] = "#ffffff"
    return list(interp_palette(tuple(anchors), n))


def _view(effects: Effects, components: str | Sequence[str] | None, normalized: bool | None) -> _View:
    if normalized and effects.source is None:
        raise PlotError("these effects have no source run, so they cannot be normalised: use normalized=False")
    normalized = effects.source is not None if normalized is None else normalized
    values = effects.values
    shown = effects.normalized if normalized else (values - effects.base).transpose(*values.dims)
    if "component" not in values.dims:
        name = str(values["component"].item()) if "component" in values.coords else ""
        shown, values = (a.drop_vars("component", errors="ignore") for a in (shown, values))
        shown, values = (a.expand_dims(component=[name]) for a in (shown, values))
    if set(values.dims) == {"component", "pair"}:  # named sets: one column
        shown, values = (a.expand_dims({"set": [""]}) for a in (shown, values))
    known = [str(name) for name in values["component"].values]
    names = [components] if isinstance(components, str) else known if components is None else list(components)
    if not names or (unknown := [name for name in names if name not in known]):
        missing = ", ".join(unknown) if names else "chosen"
        raise PlotError(f"no component {missing}; the effects have {', '.join(known)}")
    shown, values = shown.sel(component=names), values.sel(component=names)
    end = float(np.abs(shown.mean("pair")).max())
    end = end if np.isfinite(end) and end > 0 else 1.0
    mapper = LinearColorMapper(palette=diverging(), low=-end, high=end, nan_color="#d9d9d9")
    return _View(effects, shown, values, normalized, mapper, max(3, 2 - math.floor(math.log10(end))))


def _check_layers(effects: Effects, n_layers: int | None) -> None:
    """Hold the number of layers against the model's, where the record says it, else against the layers that are there."""
    values, record = effects.values, effects.provenance
    here = [at for at in coordinate(values, "layer") if isinstance(at, int)] if "layer" in values.dims else []
    least, known = max(here, default=-1) + 1, record.get("n_layers")
    if known is None and here and (record.get("plan") or {}).get("layers") is None:
        known = least  # nothing says that these are not all
    check_sizes("the result", {"n_layers": n_layers}, {"n_layers": known}, {"n_layers": least})


def _labels(view: _View, dim: str) -> tuple[list[str], list[str]]:
    """Short labels for the axis and full ones for the hover."""
    if dim == "position":
        return position_labels(view.effects)
    at = coordinate(view.values, dim)
    full = [f"{dim} {i}" if isinstance(i, int) else str(i) for i in at]
    return [visible(str(i), 18) if i != "" else "" for i in at], full


def _cell_size(view: _View, y: str, x: str, across: int) -> tuple[int, int]:
    """Width and height of a cell in px: labels of up to ~100 columns fit, more are thinned out."""
    labels = _labels(view, x)[0]
    room = (PAGE / across - 90) / len(labels)
    level = max(map(extent, labels)) * 1.1  # px that the longest label takes if it is not slanted
    widest = level if 30 < level <= room else 30 if x == "head" else 44
    height = int(np.clip(440 / view.values.sizes[y], 5, 26))
    return int(np.clip(room, 12 if len(labels) <= 110 else 4, widest)), height


def _statistics(shown: xr.DataArray, values: xr.DataArray, digits: int) -> dict[str, np.ndarray]:
    """Columns for the hover, one entry per cell of `shown` (all dims but `pair`, flattened)."""
    spread = bootstrap(shown, samples=1000)
    mean, low, high = (spread[k].values.ravel().astype(np.float32) for k in ("mean", "low", "high"))
    std, count = shown.std("pair", ddof=1).values.ravel(), shown.notnull().sum("pair").values.ravel()
    few = ["undefined", "one pair"]
    ends = zip(low, high, count, strict=True)
    spans = [few[n] if n < 2 else f"{a:.{digits}f} to {b:.{digits}f}" for a, b, n in ends]
    return {
        "mean": mean, "low": low, "high": high, "n": count.astype(np.int32),
        "raw": values.mean("pair").values.ravel().astype(np.float32),
        "std": np.array([few[n] if n < 2 else f"{s:.{digits}f}" for s, n in zip(std, count, strict=True)]),
        "interval": np.array(spans),
    }  # fmt: skip


def _heatmap(view: _View, component: str | None, y: str, x: str, size: tuple[int, int]) -> figure:
    shown, values = (
        (a if component is None else a.sel(component=component)).transpose(y, x, "pair")
        for a in (view.shown, view.values)
    )
    (columns, columns_full), (rows, rows_full) = _labels(view, x), _labels(view, y)
    held = np.flatnonzero(values.notnull().any([y, "pair"]).values)
    if x == "head" and held.size:  # k and v have fewer heads than q beside them: no columns for the rest
        shown, values = shown.isel(head=held), values.isel(head=held)
        columns, columns_full = [columns[i] for i in held], [columns_full[i] for i in held]
    (n_y, n_x), (width, height) = values.shape[:2], size
    plot = panel((-0.5, n_x - 0.5), (-0.5, n_y - 0.5), width * n_x, height * n_y, component or "")
    data = _statistics(shown, values, view.digits)
    data["x"], data["y"] = np.tile(np.arange(n_x), n_y), np.repeat(np.arange(n_y), n_x)
    data["at"] = np.array([f"{a} · {b}" for a in rows_full for b in columns_full])
    exists, color = values.notnull().any("pair").values.ravel(), transform("mean", view.mapper)
    cells = plot.rect(
        "x", "y", 1, 1, source=ColumnDataSource({k: v[exists] for k, v in data.items()}), fill_color=color,
        line_color="#ffffff" if min(size) >= 12 else None, hover_fill_color=color, hover_line_color=INK,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[cells], tooltips=_hover(view, component)))
    if not exists.all():
        gaps = plot.rect(
            "x", "y", 1, 1, source=ColumnDataSource({k: data[k][~exists] for k in ("x", "y", "at")}),
            fill_color="#f1f1f1", line_color=None, hatch_pattern="/", hatch_color="#cfcfcf", hatch_scale=9,
            hatch_weight=0.7,
        )  # fmt: skip
        told = HoverTool(renderers=[gaps], tooltips=tooltip(_heading(component), [("no such cell", "")]))
        plot.add_tools(told)
    label_cells(plot, columns, rows, width, height)
    plot.yaxis.axis_label = None if y == "component" else y
    plot.xaxis.axis_label = None if x in ("position", "component", "set") else x
    return plot


def _bars(view: _View, component: str) -> figure:
    """The units with the largest |mean effect| over all layers, largest on top, with their 95 % intervals."""
    dims = [d for d in view.values.dims if d not in ("component", "pair")]
    shown, values = (
        a.sel(component=component, drop=True).stack(cell=dims).transpose("cell", "pair")
        for a in (view.shown, view.values)
    )
    size = np.abs(shown.mean("pair").values)
    top = np.argsort(-np.nan_to_num(size, nan=-1.0), kind="stable")[:TOP_UNITS]
    top = top[np.isfinite(size[top])][::-1]
    keys = [np.atleast_1d(shown.indexes["cell"][i]).tolist() for i in top]
    marks = ["L" if d == "layer" else "" for d in dims]
    labels = [" · ".join(f"{m}{v}" for m, v in zip(marks, key, strict=True)) for key in keys]
    data = _statistics(shown.isel(cell=top), values.isel(cell=top), view.digits)
    data["y"], data["at"] = np.arange(len(top)), np.array([f"unit {label}" for label in labels])
    ends = np.concatenate([[0.0], data["mean"], data["low"][data["n"] > 1], data["high"][data["n"] > 1]])
    low, high = ends.min() - 0.05 * np.ptp(ends), ends.max() + 0.05 * (np.ptp(ends) or 1.0)
    rows, count = (-0.6, len(top) - 0.4), int(np.isfinite(size).sum())
    heading, source = f"{component}: {len(top)} largest of {count:,} units", ColumnDataSource(data)
    plot = panel((low, high), rows, 440, 17 * max(len(top), 1), heading)
    bars = plot.hbar(
        y="y", left=0, right="mean", height=0.72, source=source, line_color="#9a9a9a", line_width=0.6,
        fill_color=transform("mean", view.mapper),
    )  # fmt: skip
    plot.segment("low", "y", "high", "y", source=source, line_color=INK, line_width=1.2)
    plot.segment([0], [rows[0]], [0], [rows[1]], line_color=MUTED, line_width=1)
    plot.add_tools(HoverTool(renderers=[bars], tooltips=_hover(view, component)))
    plot.yaxis.update(ticker=list(range(len(top))), major_label_overrides=dict(enumerate(labels)))
    plot.yaxis.axis_label = " · ".join(map(str, dims))
    plot.xaxis.axis_label = "mean effect with 95 % interval"
    return plot


def _quantity(view: _View) -> str:
    metric = view.effects.provenance.get("metric") or "metric"
    name = "normalised effect" if view.normalized else f"change of {metric}"
    return name + (", mean over pairs" if view.values.sizes["pair"] > 1 else "")


def _title(effects: Effects) -> str:
    method = str(effects.provenance.get("method") or "patch").replace("_", " ")
    method = {"patch": "activation patching"}.get(method, method)
    model = effects.provenance.get("model")
    return method[:1].upper() + method[1:] + (f" · {model}" if model else "")


def _subtitle(view: _View) -> str:
    """Two lines: what was run, and how to read the colours."""
    effects, pairs = view.effects, view.values.sizes["pair"]
    parts = [str(effects.provenance[k]) for k in ("metric", "direction") if effects.provenance.get(k)]
    parts.append(f"{pairs} pair{'s' if pairs != 1 else ''}")
    for name, run in (("clean", effects.clean), ("corrupted", effects.corrupted)):
        if run is not None:
            parts.append(f"{name} {float(run.mean()):.3g}".replace("-", "−"))
    base, source = ("corrupted", "clean") if effects.direction == "denoising" else ("clean", "corrupted")
    above = f"1: became the {source} run." if view.normalized else "above 0: the metric rose."
    gaps = " Hatched: no such cell." if bool(view.values.isnull().all("pair").any()) else ""
    cells = [dim for dim in view.values.dims if dim != "pair"]
    if lost := int((view.shown.isnull().all(cells) & view.values.notnull().any(cells)).sum()):
        gaps += f" {lost} of {pairs} pairs are left out: their two runs differ by rounding only."
    return f"{' · '.join(parts)}\n0: as the {base} run, unpatched; {above}{gaps}"


def _hover(view: _View, component: str | None) -> str:
    number = "0." + "0" * view.digits
    metric = _escaped(str(view.effects.provenance.get("metric") or "metric"))
    lines = [("normalised effect" if view.normalized else f"change of {metric}", f"<b>@mean{{{number}}}</b>")]
    if view.values.sizes["pair"] > 1:
        lines += [("std over pairs", "@std"), ("95 % interval of the mean", "@interval"), ("pairs", "@n")]
    return tooltip(_heading(component), [*lines, (f"raw {metric}", f"@raw{{{number}}}")])


def _heading(component: str | None) -> str:
    return f"<b>{_escaped(component)}</b> · @at" if component else "@at"


def _escaped(text: str) -> str:
    """Safe as HTML and free of the characters that Bokeh's templates read."""
    return html.escape(text).replace("@", "&#64;").replace("$", "&#36;")
