"""Curves of faithfulness and of pruning: what is drawn, where, and what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bokeh.models import ColumnDataSource, Legend
from bokeh.models.ui.ui_element import UIElement

from interp.circuits import Circuit, Evaluation, Facts
from interp.errors import PlotError
from interp.plots import Figure, plot_faithfulness, plot_pruning

from .browser import Page

FACTS = Facts(2, 2, 2)
TOTAL = FACTS.n_edges


def evaluation(sizes: list[int], values: list[float], nodes: list[int] | None = None, wide: float = 0.1) -> Evaluation:
    """An evaluation with these numbers of edges; of nodes where they are given, of 6."""
    scores = np.array(values)
    curve = pd.DataFrame({"n_edges": sizes, "fraction": [n / TOTAL for n in sizes], "metric": 4 * scores - 1})
    curve = curve.assign(faithfulness=scores, low=scores - wide, high=scores + wide)
    if nodes:
        curve["fraction"] = [n / 6 for n in nodes]
        curve.insert(0, "n_nodes", nodes)
    return Evaluation(curve, 0.75, 0.25, 3.0, -1.0, "mean")


def sources(figure: Figure) -> list[dict[str, Any]]:
    """Every table of data on the page, without repeats."""
    assert isinstance(figure.layout, UIElement)
    found = figure.layout.select({"type": ColumnDataSource})
    return [dict(source.data) for source in found]


def labels(figure: Figure) -> list[str]:
    """The names in the legend."""
    return [item.label["value"] for legend in figure.layout.select({"type": Legend}) for item in legend.items]


def test_lines_stand_at_their_part_of_the_edges() -> None:
    edges = evaluation([1, 4, TOTAL], [0.1, 0.5, 1.0])
    nodes = evaluation([3, 9, TOTAL], [0.2, 0.4, 1.0], nodes=[1, 3, 6])
    figure = plot_faithfulness({"EAP": edges, "exact nodes": nodes})
    tables = {table["name"][0]: table for table in sources(figure) if "name" in table}
    assert set(tables) == {"EAP", "exact nodes"}
    assert list(tables["EAP"]["fraction"]) == pytest.approx([1 / TOTAL, 4 / TOTAL, 1])
    assert list(tables["exact nodes"]["fraction"]) == pytest.approx([3 / TOTAL, 9 / TOTAL, 1])
    assert list(tables["exact nodes"]["size"]) == ["1 nodes", "3 nodes", "6 nodes"]
    assert list(tables["EAP"]["faithfulness"]) == [0.1, 0.5, 1.0]
    assert labels(figure) == ["EAP   CPR 0.75   CMD 0.25", "exact nodes   CPR 0.75   CMD 0.25"]
    assert "mean" in figure.subtitle and "3.00" in figure.subtitle and "-1.00" in figure.subtitle
    alone = plot_faithfulness({"exact nodes": nodes})
    assert list(sources(alone)[0]["fraction"]) == pytest.approx([1 / 6, 3 / 6, 1])


def test_an_empty_circuit_has_no_place_on_a_logarithmic_axis() -> None:
    figure = plot_faithfulness({"EAP": evaluation([0, 2, TOTAL], [0.0, 0.5, 1.0])})
    assert list(sources(figure)[0]["faithfulness"]) == [0.5, 1.0]
    with pytest.raises(PlotError, match="'EAP'"):
        plot_faithfulness({"EAP": evaluation([0], [0.0])})
    with pytest.raises(PlotError, match="at least one"):
        plot_faithfulness({})


def pruned() -> Circuit:
    """Two passes over three nodes: one goes in the first, one in the second, one stays."""
    steps = [
        (1, "L1.mlp", 0.5, False), (1, "L1.H1", -0.1, True), (1, "L0.H0", 2.0, False),
        (2, "L1.mlp", 0.05, True), (2, "L0.H0", 1.5, False), (3, "L0.H0", 1.5, False),
    ]  # fmt: skip
    trajectory = [dict(zip(("pass", "node", "change", "dropped"), step, strict=True)) for step in steps]
    meta = {"trajectory": trajectory, "metric_value": 3.0, "metric": "logit_diff", "threshold": 0.2, "ablation": "zero"}
    return Circuit.from_nodes({"L0.H0": 1.5}, FACTS, meta)


def test_a_trajectory_follows_the_metric_of_the_pruned_model() -> None:
    figure = plot_pruning(pruned())
    (table,) = sources(figure)
    assert list(table["metric"]) == pytest.approx([3.05, 2.95, 2.95, 3.0, 3.0, 3.0])
    assert list(table["tried"]) == pytest.approx([3.55, 2.95, 4.95, 3.0, 4.5, 4.5])
    assert table["left"] == [3, 2, 2, 1, 1, 1] and list(table["filled"]) == [0, 1, 0, 1, 0, 0]
    assert labels(figure) == ["zero: 1 of 3 nodes left"]
    assert "0.2" in figure.subtitle
    assert labels(plot_pruning({"a": pruned(), "b": pruned()})) == ["a: 1 of 3 nodes left", "b: 1 of 3 nodes left"]
    with pytest.raises(PlotError, match="trajectory"):
        plot_pruning(Circuit.from_nodes({"L0.H0": 1.0}, FACTS))
    with pytest.raises(PlotError, match="at least one"):
        plot_pruning({})


@pytest.mark.parametrize("which", ["faithfulness", "pruning"])
def test_pages_open_with_no_error_and_no_network(which: str, chromium: str, tmp_path: Path) -> None:
    one = evaluation([1, 4, TOTAL], [-0.4, float("nan"), 1.0], wide=float("nan"))
    figure = plot_faithfulness({"$$x$$": one}) if which == "faithfulness" else plot_pruning(pruned())
    with Page(figure.save(tmp_path / "page.html")) as page:
        assert page.errors == [] and page.network == []
        words = " ".join(word["text"] for canvas in page.drawn() for word in canvas)
        assert {"faithfulness": "edges kept", "pruning": "nodes left"}[which] in words
