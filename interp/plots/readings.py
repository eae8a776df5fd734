"""What a model says on the way and where it comes from: the logit lens, and direct effects."""

from __future__ import annotations

import numpy as np
import xarray as xr
from bokeh.layouts import column, row
from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, LinearColorMapper
from bokeh.models.annotations import Span
from bokeh.models.ui.ui_element import UIElement
from bokeh.palettes import Blues256, RdBu11, interp_palette
from bokeh.transform import transform

from ..effects import Effects
from ..errors import PlotError
from .labels import told_apart, visible
from .page import INK, MUTED, RULE, Figure, Plot, color_scale, label_cells, panel, tooltip

#: Columns of a source.
Rows = dict[str, list[object]]
#: px of a cell of the lens. Every part stands in a row of its own: Bokeh would align the frames of plots in one column, and so
#: cut the bar of colours.
WIDE, HIGH = 84, 20
#: Prompts of a lens on one page.
PROMPTS = 4
COLORS = {"attn_out": "#0072b2", "head_out": "#0072b2", "mlp_out": "#d55e00"}


def plot_logit_lens(lens: xr.Dataset, *, title: str | None = None) -> Figure:
    """Draw what `interp.logit_lens` found: at each layer (up) and position (across) the token that the stream says comes next.

    Colour is its probability; a frame marks where it is the token that does follow. The hover has the other candidates and the
    rank of the next token. Of more than four prompts the first four are drawn.

    Raises:
        PlotError: no result of `logit_lens`.

    Examples:
        >>> lens = interp.logit_lens(model, ["The Eiffel Tower is in the city of"])
        >>> interp.plot_logit_lens(lens).save("lens.html").name
        'lens.html'
    """
    if not isinstance(lens, xr.Dataset) or not {"text", "probability", "next_token"} <= set(lens):
        raise PlotError(f"plot_logit_lens draws what interp.logit_lens gives, not a {type(lens).__name__}")
    mapper = LinearColorMapper(palette=list(Blues256[::-1]), low=0, high=1, nan_color="rgba(0,0,0,0)")
    scale = color_scale(mapper, "probability of the token named")
    count = lens.sizes["prompt"]
    panels = [
        _lens_panel(lens.isel(prompt=number), mapper, number if count > 1 else None)
        for number in range(count)[:PROMPTS]
    ]
    text = "layers up, positions across; each cell is what the stream behind that layer says comes next"
    text += f"\nthe first {PROMPTS} of {count} prompts" if count > PROMPTS else ""
    model = lens.attrs.get("model", "")
    return Figure(
        column(scale, *map(row, panels), spacing=14), title or f"Logit lens{' · ' + model if model else ''}", text
    )


def _lens_panel(lens: xr.Dataset, mapper: LinearColorMapper, number: int | None) -> Plot:
    """One prompt [layer, position, k]."""
    present = [p for p in range(lens.sizes["position"]) if str(lens["label"].values[p])]
    lens = lens.isel(position=present)
    layers, places = lens["layer"].values.tolist(), lens["position"].values.tolist()
    names = told_apart([visible(str(label)) for label in lens["label"].values], places)
    plot = panel(
        (-0.5, len(places) - 0.5), (-0.5, len(layers) - 0.5), max(WIDE * len(places), 120), max(HIGH * len(layers), 40),
        "" if number is None else f"prompt {number}",
    )  # fmt: skip
    rows: Rows = {name: [] for name in ("x", "y", "word", "p", "ink", "edge", "said", "rank", "y_name", "x_name")}
    for y in range(len(layers)):
        for x in range(len(places)):
            cell = lens.isel(layer=y, position=x)
            p, tokens = cell["probability"].values, [str(text) for text in cell["text"].values]
            hit = int(cell["token"].values[0]) == int(cell["next_token"].values) >= 0
            rows["x"].append(x)
            rows["y"].append(y)
            rows["y_name"].append(layers[y])
            rows["x_name"].append(f"{places[x]} “{names[x]}”")
            rows["word"].append(visible(tokens[0], 10))
            rows["p"].append(float(p[0]))
            rows["ink"].append("#fffffe" if p[0] > 0.5 else "#222223")
            rows["edge"].append("#d6604d" if hit else "#f0f0f0")
            rows["said"].append(
                ", ".join(f"{visible(token, 20)} {100 * q:.1f} %" for token, q in zip(tokens, p, strict=True))
            )
            rank = float(cell["next_rank"].values) if "next_rank" in cell else float("nan")
            rows["rank"].append("–" if np.isnan(rank) else f"{int(rank)}")
    source = ColumnDataSource(rows)
    color = transform("p", mapper)
    cells = plot.rect("x", "y", 0.98, 0.94, source=source, fill_color=color, line_color="edge", line_width=1.5)
    plot.text("x", "y", text="word", source=source, text_color="ink", text_font_size="11px", text_align="center",
              text_baseline="middle")  # fmt: skip
    lines = [("says", "@said"), ("rank of the next token", "<b>@rank</b>")]
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tooltip("layer @y_name, position @x_name", lines)))
    label_cells(plot, names, [str(layer) for layer in layers], WIDE, HIGH)
    plot.yaxis.axis_label = "layer"
    return plot


def plot_direct_effects(effects: Effects, *, title: str | None = None) -> Figure:
    """Draw what `interp.direct_effects` found: what each part adds by itself to the logit difference, mean over pairs.

    Parts by layer as bars; heads, and positions that attention reads, as cells on a scale that is centred on zero.

    Raises:
        PlotError: effects of another method.

    Examples:
        >>> interp.plot_direct_effects(interp.direct_effects(model, pairs)).save("direct.html").name
        'direct.html'
    """
    method = effects.provenance.get("method") if isinstance(effects, Effects) else type(effects).__name__
    if method != "direct_effects":
        raise PlotError(f"plot_direct_effects draws what interp.direct_effects gives, not effects of {method!r}")
    mean = effects.values.mean("pair")
    layers = mean["layer"].values.tolist()
    inner = next((str(dim) for dim in mean.dims if dim not in ("component", "layer")), None)
    parts: list[UIElement] = []
    bars = {}
    for name in mean["component"].values.tolist():
        part = mean.sel(component=name)
        if inner is None or np.isfinite(part.values).sum() <= len(layers):
            bars[name] = part if inner is None else part.max(inner)  # one of them has a number
    cells = [name for name in mean["component"].values.tolist() if name not in bars]
    parts.append(_bars(bars, layers))
    if cells and inner is not None:
        most = float(np.nanmax(np.abs(mean.sel(component=cells).values))) or 1.0
        palette = list(interp_palette(RdBu11, 255))
        mapper = LinearColorMapper(palette=palette, low=-most, high=most, nan_color="rgba(0,0,0,0)")
        parts += [color_scale(mapper, f"{effects.provenance.get('metric', 'logit_diff')} that a cell adds")]
        parts += [_cells(mean.sel(component=name), name, inner, mapper, effects) for name in cells]
    total = float(effects.clean.mean())
    text = f"mean over {effects.values.sizes['pair']} pairs; all parts together are {total:.2f}, the clean run's logit difference"
    model = effects.provenance.get("model", "")
    return Figure(
        column(*map(row, parts), spacing=14), title or f"Direct effects{' · ' + str(model) if model else ''}", text
    )


def _bars(parts: dict[str, xr.DataArray], layers: list[int]) -> Plot:
    """A bar for each part and layer; parts without a layer stand below the first."""
    rows: Rows = {name: [] for name in ("y", "value", "color", "name", "height")}
    single = [name for name, part in parts.items() if int(np.isfinite(part.values).sum()) == 1 and name not in COLORS]
    series = [name for name in parts if name not in single]
    labels = [*single, *(str(layer) for layer in layers)]
    for place, name in enumerate(single):
        value = float(parts[name].values[np.isfinite(parts[name].values)][0])
        _row(rows, place, value, MUTED, name, 0.7)
    for number, name in enumerate(series):
        height = 0.8 / max(len(series), 1)
        for place, value in enumerate(parts[name].values.tolist()):
            if np.isfinite(value):
                y = len(single) + place + 0.4 - (number + 0.5) * height
                _row(rows, y, value, COLORS.get(name, "#009e73"), f"{name}, layer {layers[place]}", height * 0.9)
    most = max((abs(float(str(value))) for value in rows["value"]), default=1.0) or 1.0
    plot = panel((-1.08 * most, 1.08 * most), (-0.6, len(labels) - 0.4), 620, 18 * len(labels) + 20)
    plot.add_layout(Span(location=0, dimension="height", line_color=RULE, line_width=1.5, level="underlay"))
    source = ColumnDataSource(rows)
    bars = plot.hbar(y="y", right="value", left=0, height="height", source=source, fill_color="color", line_color=None)
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltip("@name", [("adds", "<b>@value{+0.000}</b>")])))
    label_cells(plot, [], labels, 20, 18)
    plot.xaxis.update(ticker=BasicTicker(desired_num_ticks=7), major_label_overrides={})
    plot.yaxis.axis_label = "layer"
    shown = [f"{name} ({word})" for name, word in (("attn_out", "blue"), ("mlp_out", "orange")) if name in series]
    plot.xaxis.axis_label = "logit difference that a part adds" + (f": {', '.join(shown)}" if shown else "")
    return plot


def _row(rows: Rows, y: float, value: float, color: str, name: str, height: float) -> None:
    """One bar."""
    for column_name, entry in (("y", y), ("value", value), ("color", color), ("name", name), ("height", height)):
        rows[column_name].append(entry)


def _cells(part: xr.DataArray, name: str, inner: str, mapper: LinearColorMapper, effects: Effects) -> Plot:
    """A part by layer and head, or by layer and the position that is read."""
    part = part.transpose("layer", inner)
    layers, items = (
        part["layer"].values.tolist(),
        part[inner].values.tolist() if inner in part.coords else range(part.shape[1]),
    )
    labels = [str(item) for item in items]
    tokens = effects.provenance.get("tokens") or []
    if inner == "position" and len(tokens) == 1:
        labels = told_apart([visible(token) for token in tokens[0]])[: len(labels)]
    wide = int(np.clip(900 / max(len(labels), 1), 16, 44))
    plot = panel((-0.5, len(labels) - 0.5), (-0.5, len(layers) - 0.5), wide * len(labels), 18 * len(layers), name)
    at = np.argwhere(np.isfinite(part.values))
    source = ColumnDataSource({
        "x": at[:, 1], "y": at[:, 0], "value": part.values[at[:, 0], at[:, 1]],
        "where": [f"layer {layers[y]}, {inner} {labels[x]}" for y, x in at],
    })  # fmt: skip
    color = transform("value", mapper)
    cells = plot.rect("x", "y", 1, 1, source=source, fill_color=color, line_color="#f0f0f0", hover_line_color=INK)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tooltip("@where", [("adds", "<b>@value{+0.000}</b>")])))
    label_cells(plot, labels, [str(layer) for layer in layers], wide, 18)
    plot.yaxis.axis_label, plot.xaxis.axis_label = "layer", inner
    return plot
