"""Curves: the faithfulness of circuits by size, and how pruning went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, CustomJSTickFormatter, FixedTicker, HoverTool, LogScale
from bokeh.models.annotations import Legend, LegendItem, Span

from ..errors import PlotError
from .labels import plain
from .page import FONT, INK, MUTED, PAGE, RULE, Figure, Plot, panel, tooltip

if TYPE_CHECKING:
    from ..circuits import Circuit, Evaluation

#: Told apart by the colour-blind too (Okabe and Ito), then by dashes.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
DASHES = ("solid", "dashed", "dotted")


def plot_faithfulness(evaluations: Mapping[str, Evaluation], *, title: str | None = None) -> Figure:
    """Draw the faithfulness of each evaluation over the part of the edges that is kept, on a logarithmic axis.

    Circuits of nodes stand at the edges between their nodes (alone on the page, at the part of the nodes). Grey lines
    are at 1, the whole model, and at 0, the empty circuit. Bands are the intervals over pairs. A click on a name in the
    legend hides its line; CPR and CMD beside it are the areas under the curve and under its distance from 1, over
    fractions of edges, or of nodes.

    Args:
        evaluations: what `evaluate_circuit` returned, by name.
        title: heading of the page.

    Raises:
        PlotError: nothing to draw, or an evaluation without a size above zero.

    Examples:
        >>> circuit = interp.discover(model, pairs, method="eap", level="node")
        >>> score = interp.evaluate_circuit(model, pairs, circuit, fractions=[0.5, 1.0])
        >>> interp.plot_faithfulness({"eap": score}).save("faithfulness.html").name
        'faithfulness.html'
    """
    if not evaluations:
        raise PlotError("plot_faithfulness needs at least one evaluation, {name: evaluate_circuit(…)}")
    curves = {name: each.curve[each.curve["fraction"] > 0] for name, each in evaluations.items()}
    if empty := [name for name, curve in curves.items() if curve.empty]:
        raise PlotError(f"{empty[0]!r} has no circuit with an edge or node in it to draw")
    edges = [curve for curve in curves.values() if curve.columns[0] == "n_edges"]
    if edges:  # circuits of nodes beside them are placed by their edges
        total = edges[0]["n_edges"].iloc[-1] / edges[0]["fraction"].iloc[-1]
    shares = {name: curve["n_edges"] / total if edges else curve["fraction"] for name, curve in curves.items()}
    fractions = np.concatenate([share.to_numpy(float) for share in shares.values()])
    values = np.concatenate([curve["faithfulness"].to_numpy(float) for curve in curves.values()])
    plot = _shares_panel(fractions, values, "edges" if edges else "nodes")
    items, dots = [], []
    for place, (name, evaluation) in enumerate(evaluations.items()):
        curve, color = curves[name], LINES[place % len(LINES)]
        source = ColumnDataSource(
            {
                "fraction": shares[name],
                "faithfulness": curve["faithfulness"],
                "metric": curve["metric"],
                "low": curve["low"],
                "high": curve["high"],
                "size": [f"{int(n):,} {column[2:]}" for column in curve.columns[:1] for n in curve[column]],
                "name": [plain(name)] * len(curve),
            }
        )
        dash = DASHES[place // len(LINES) % len(DASHES)]
        parts = [plot.line("fraction", "faithfulness", source=source, color=color, width=2.5, line_dash=dash)]
        if np.isfinite(curve["low"]).all():
            band = {"fill_color": color, "fill_alpha": 0.10}
            parts.append(plot.varea("fraction", "low", "high", source=source, **band))
        parts.append(plot.scatter("fraction", "faithfulness", source=source, color=color, size=7))
        dots.append(parts[-1])
        label = f"{plain(name)}   CPR {evaluation.cpr:.2f}   CMD {evaluation.cmd:.2f}"
        items.append(LegendItem(label=label, renderers=parts))
    lines = [("kept", "@size"), ("of all", "@fraction{0.000 %}"), ("faithfulness", "<b>@faithfulness{0.000}</b>")]
    lines += [("interval", "@low{0.00} to @high{0.00}"), ("metric", "@metric{0.000}")]
    plot.add_tools(HoverTool(renderers=dots, tooltips=tooltip("@name", lines)))
    legend = Legend(
        items=items, click_policy="hide", border_line_color=None, label_text_font=FONT, label_text_font_size="12px",
        label_text_color=INK, spacing=4, glyph_width=24,
    )  # fmt: skip
    plot.add_layout(legend, "right")
    ablations = sorted({each.ablation for each in evaluations.values()})
    first = next(iter(evaluations.values()))
    text = f"All else ablated ({', '.join(ablations)}). Metric: {first.full:.2f} for the whole model (faithfulness 1), "
    text += f"{first.empty:.2f} with everything cut (0). Bands: 95 % intervals over pairs."
    return Figure(plot, title or "Faithfulness of circuits", text)


def _shares_panel(fractions: np.ndarray, values: np.ndarray, what: str) -> Plot:
    """An empty panel of faithfulness over the part that is kept, with its lines at 0 and 1."""
    finite = [*values[np.isfinite(values)], 0.0, 1.0]
    room = 0.08 * (max(finite) - min(finite))
    x = (fractions.min() * 0.85, max(fractions.max(), fractions.min() * 2) * 1.15)
    plot: Plot = panel(x, (min(finite) - room, max(finite) + room), PAGE - 430, 440)
    plot.x_scale = LogScale()
    steps = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)]
    plot.xaxis.ticker = FixedTicker(ticks=[step for step in steps if fractions.min() * 0.85 <= step <= 1])
    plot.xaxis.formatter = CustomJSTickFormatter(code="return +(100 * tick).toPrecision(3) + ' %';")
    plot.xaxis.axis_label, plot.yaxis.axis_label = f"{what} kept", "faithfulness"
    for level in (0, 1):
        plot.add_layout(Span(location=level, dimension="width", line_color=RULE, line_width=1.5, level="underlay"))
    return plot


def plot_pruning(circuits: Mapping[str, Circuit] | Circuit, *, title: str | None = None) -> Figure:
    """Draw the trajectories of `iterative_pruning`: the metric, and how many nodes are left, after every test.

    A filled dot is a node that was dropped, a ring one that stayed; a ring stands where the metric would have gone.
    Grey lines part the passes of a single circuit.

    Raises:
        PlotError: nothing to draw, or a circuit without a trajectory.
    """
    named = circuits if isinstance(circuits, Mapping) else {str(circuits.meta.get("ablation", "pruning")): circuits}
    if not named:
        raise PlotError("plot_pruning needs at least one circuit of iterative_pruning")
    if missing := [name for name, circuit in named.items() if not circuit.trajectory]:
        raise PlotError(f"{missing[0]!r} has no trajectory: it is no circuit of iterative_pruning")
    tables = {name: _trajectory(circuit) for name, circuit in named.items()}
    values = np.concatenate([table[part] for table in tables.values() for part in ("metric", "tried")])
    room = 0.06 * (values.max() - values.min() or 1.0)
    last = max(len(table["test"]) for table in tables.values())
    most = max(max(table["left"]) for table in tables.values()) + 1
    x, width = (0.0, last + 1.0), PAGE - 330
    upper: Plot = panel(x, (values.min() - room, values.max() + room), width, 320)
    lower: Plot = panel(x, (0, most * 1.06), width, 150)
    lower.x_range = upper.x_range
    items, dots = [], []
    for place, (name, table) in enumerate(tables.items()):
        color, source = LINES[place % len(LINES)], ColumnDataSource(table)
        parts = [upper.line("test", "metric", source=source, color=color, width=1.5)]
        parts.append(lower.line("test", "left", source=source, color=color, width=2))
        look = {"source": source, "size": 6, "line_color": color, "fill_color": color}
        dots.append(upper.scatter("test", "tried", fill_alpha="filled", line_alpha=0.9, **look))
        label = f"{plain(name)}: {table['left'][-1]} of {table['left'][0] + int(table['filled'][0])} nodes left"
        items.append(LegendItem(label=label, renderers=[*parts, dots[-1]]))
        if len(tables) == 1:
            for test in [i + 0.5 for i in range(1, len(table["pass"])) if table["pass"][i] != table["pass"][i - 1]]:
                for plot in (upper, lower):
                    plot.add_layout(Span(location=test, dimension="height", line_color=RULE, level="underlay"))
    lines = [("pass", "@pass"), ("change", "<b>@change{+0.0000}</b>"), ("metric after it", "@metric{0.000}")]
    lines += [("nodes left", "@left"), ("", "@fate")]
    upper.add_tools(HoverTool(renderers=dots, tooltips=tooltip("@node", lines)))
    upper.add_layout(
        Legend(
            items=items, click_policy="hide", border_line_color=None, label_text_font=FONT, label_text_font_size="12px",
            label_text_color=INK, spacing=4, glyph_width=24,
        ),
        "right",
    )  # fmt: skip
    first = next(iter(named.values()))
    metric = plain(str(first.meta.get("metric", "metric")))
    upper.yaxis.axis_label, lower.yaxis.axis_label, lower.xaxis.axis_label = metric, "nodes left", "tests, in order"
    lower.yaxis.axis_label_text_color = MUTED
    text = f"From the last layer to the first, a node is dropped when its ablation moves {metric} by less than "
    text += f"{first.meta.get('threshold', float('nan')):g}; passes repeat until one drops nothing."
    return Figure(column(upper, lower, spacing=6), title or "Iterative pruning", text)


def _trajectory(circuit: Circuit) -> dict[str, Any]:
    """A trajectory as columns: the metric after each test, where the test went, how many nodes were left."""
    steps = circuit.trajectory
    gone = np.array([step["dropped"] for step in steps])
    changes = np.array([step["change"] for step in steps], dtype=float)
    kept = np.cumsum(np.where(gone, changes, 0.0))
    metric = float(circuit.meta["metric_value"]) - kept[-1] + kept
    return {
        "test": list(range(1, len(steps) + 1)),
        "node": [step["node"] for step in steps],
        "pass": [step["pass"] for step in steps],
        "change": changes,
        "metric": metric,
        "tried": np.where(gone, metric, metric + changes),
        "left": (circuit.n_nodes + gone.sum() - np.cumsum(gone)).tolist(),
        "filled": gone.astype(float),
        "fate": ["dropped" if each else "stays" for each in gone],
    }
