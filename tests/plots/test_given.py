"""What people give to plots: sizes of the model, heads, patterns and labels; and figures that are pickled and copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from bokeh.io import curdoc
from bokeh.models import ColumnDataSource, GlyphRenderer, Rect

from interp.circuits import Circuit, Facts
from interp.errors import PlotError
from interp.plots import (
    Figure,
    plot_activation_patching_results,
    plot_attention,
    plot_circuit_graph,
    plot_circuit_matrix,
)
from tests.plots.examples import grid, make

HEADS = [(0, 1), (2, 3)]
KNOWN = Circuit.from_nodes(["L0.H1", "L2.H3"], Facts(4, 5, 5))
GUESSED = Circuit.from_nodes(["L0.H1", "L2.H3"])
EDGES = Circuit.from_edges({("L0.H1", "L2.H3.q"): 1.0, ("L2.H3", "logits"): -1.0}, Facts(4, 5, 5))


def rows_of(figure: Figure) -> list[str]:
    plot = figure.layout.select_one({"name": "circuit"})
    return list(plot.yaxis[0].major_label_overrides.values())


def weights(n: int = 3) -> np.ndarray:
    values = np.tril(np.random.default_rng(0).random((n, n)) + 0.1)
    return values / values.sum(-1, keepdims=True)


# --- sizes of the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads", [HEADS, [[0, 1], [2, 3]], np.array(HEADS), torch.tensor(HEADS), tuple(HEADS), GUESSED]
)
def test_sizes_make_room_for_layers_and_heads_that_are_not_in_the_list(heads: Any) -> None:
    assert rows_of(plot_circuit_graph(heads)) == ["L0", "L1", "L2"]
    figure = plot_circuit_graph(heads, n_layers=6, n_heads=np.int64(8))
    assert rows_of(figure) == [f"L{layer}" for layer in range(6)]
    data = next(r.data_source.data for r in figure.layout.select({"type": GlyphRenderer}) if isinstance(r.glyph, Rect))
    at = dict(zip(data["name"], zip(data["x"], data["y"], strict=True), strict=True))
    assert at["L0.H1"] == (1, 1) and at["L2.H3"] == (3, 3) and at["embed"][0] == 3.5 and at["logits"][1] == 7
    assert rows_of(plot_circuit_graph(heads, n_layers=5)) == [f"L{layer}" for layer in range(5)]
    assert rows_of(plot_circuit_graph([], n_layers=2, n_heads=2)) == ["L0", "L1"]


@pytest.mark.parametrize("circuit", [KNOWN, EDGES])
def test_the_sizes_of_a_circuit_are_those_of_its_model(circuit: Circuit) -> None:
    assert rows_of(plot_circuit_graph(circuit, n_layers=4, n_heads=5)) == ["L0", "L1", "L2", "L3"]
    for sizes, said in (
        ({"n_layers": 12}, "n_layers=12, but the circuit is of a model with 4 layers"),
        ({"n_layers": 3}, "n_layers=3, but the circuit is of a model with 4 layers"),
        ({"n_layers": 4, "n_heads": 8}, "n_heads=8, but the circuit is of a model with 5 heads"),
    ):
        with pytest.raises(PlotError, match=said):
            plot_circuit_graph(circuit, **sizes)


@pytest.mark.parametrize("heads", [HEADS, GUESSED])
def test_heads_outside_the_sizes_are_refused(heads: Any) -> None:
    with pytest.raises(PlotError, match="n_layers=2, but the circuit has layers up to 2, so the model has 3 or more"):
        plot_circuit_graph(heads, n_layers=2)
    with pytest.raises(PlotError, match="n_heads=3, but the circuit has heads up to 3, so the model has 4 or more"):
        plot_circuit_graph(heads, n_layers=3, n_heads=3)


@pytest.mark.parametrize("size", ["12", 4.0, True, [4], 0, -1])
def test_a_size_is_a_whole_number_of_at_least_what_is_there(size: Any) -> None:
    for draw in (lambda: plot_circuit_graph(HEADS, n_layers=size), lambda: plot_circuit_graph(KNOWN, n_heads=size)):
        with pytest.raises(PlotError, match=r"n_(layers|heads)"):
            draw()
    with pytest.raises(PlotError, match="n_layers"):
        plot_activation_patching_results(grid(layers=4), n_layers=size)


@pytest.mark.parametrize(
    "heads", [[(0, 0.5)], [(0, True)], [("0", "1")], [(-1, 2)], [(0,)], [None], ["L0.H1"], 5, None]
)
def test_what_is_no_head_is_refused(heads: Any) -> None:
    with pytest.raises(PlotError, match=r"neither a Circuit nor a list of \(layer, head\)"):
        plot_circuit_graph(heads)


def test_the_layers_of_effects_are_held_against_the_models() -> None:
    effects = grid(layers=4)
    plot_activation_patching_results(effects, n_layers=4, components=["mlp_out"])
    for size in (3, 5):
        with pytest.raises(PlotError, match=f"n_layers={size}, but the result is of a model with 4 layers"):
            plot_activation_patching_results(effects, n_layers=size)
    some = replace(effects, provenance=effects.provenance | {"plan": {"layers": [0, 1, 2, 3]}})
    plot_activation_patching_results(some, n_layers=12)
    with pytest.raises(PlotError, match="n_layers=3, but the result has layers up to 3, so the model has 4 or more"):
        plot_activation_patching_results(some, n_layers=3)
    known = replace(effects, values=effects.values[:, 1:3], provenance=effects.provenance | {"n_layers": 4})
    plot_activation_patching_results(known, n_layers=4)
    with pytest.raises(PlotError, match="n_layers=30, but the result is of a model with 4 layers"):
        plot_activation_patching_results(known, n_layers=30)
    edges = make({"sender": ["L0.H0", "L9.H1"], "receiver": ["logits"]})
    plot_activation_patching_results(edges, n_layers=12)  # has no axis of layers


# --- patterns ----------------------------------------------------------------------------------------------

HEAD = (2, 3)
WRONG: dict[str, tuple[Any, Any, str]] = {
    "not square": ({HEAD: np.ones((2, 3))}, None, r"head \(2, 3\) has shape \(2, 3\), not \[query, key\] \(3, 3\)"),
    "three dimensions": ({HEAD: np.ones((1, 3, 3))}, None, r"head \(2, 3\) has shape \(1, 3, 3\)"),
    "one dimension": ({HEAD: np.ones(3)}, None, r"head \(2, 3\) has shape \(3,\)"),
    "a number": ({HEAD: 0.5}, None, r"head \(2, 3\) has shape \(\), not \[query, key\] \(n, n\)"),
    "no positions": ({HEAD: np.ones((0, 0))}, None, r"head \(2, 3\) has shape \(0, 0\)"),
    "ragged": ({HEAD: [[1.0], [0.5, 0.5]]}, None, r"pattern of head \(2, 3\) holds no numbers"),
    "text": ({HEAD: "abc"}, None, r"pattern of head \(2, 3\) holds no numbers"),
    "nothing": ({HEAD: None}, None, r"pattern of head \(2, 3\) holds no numbers"),
    "complex": ({HEAD: np.ones((2, 2)) * 1j}, None, r"holds no numbers to draw, but ndarray of complex128"),
    "no data": ({HEAD: torch.ones(2, 2, device="meta")}, None, r"pattern of head \(2, 3\) holds no numbers"),
    "NaN": (
        {HEAD: np.array([[1.0, 0.0], [np.nan, 1.0]])},
        None,
        r"head \(2, 3\), shape \(2, 2\), has weights between nan",
    ),
    "infinite": ({HEAD: np.full((2, 2), np.inf)}, None, r"has weights between inf and inf, not 0 and 1"),
    "scores": ({HEAD: np.full((2, 2), 3.0)}, None, r"has weights between 3 and 3, not 0 and 1: are these scores"),
    "of two sizes": (
        {HEAD: weights(3), (0, 1): weights(4)},
        None,
        r"head \(0, 1\) has shape \(4, 4\), not .* \(3, 3\)",
    ),
    "not as many as tokens": ({HEAD: weights(3)}, ["a", "b"], r"has shape \(3, 3\), not \[query, key\] \(2, 2\)"),
    "a head that is not there": (
        {(1, 1): weights()},
        None,
        r"head \(1, 1\), which is not in the circuit; its heads are",
    ),
    "a name": ({"L2.H3": weights()}, None, r"a key of patterns is 'L2\.H3'; a head is \(layer, head\)"),
    "a number as key": ({3: weights()}, None, r"a key of patterns is 3; a head is"),
    "three numbers": ({(2, 3, 0): weights()}, None, r"a key of patterns is \(2, 3, 0\)"),
    "half a head": ({(2, 3.5): weights()}, None, r"a key of patterns \(2, 3\.5\) is 3\.5; it is a whole number"),
    "a head below zero": ({(2, -1): weights()}, None, r"layers and heads count from 0"),
    "an array": (np.ones((2, 3, 3)), None, r"patterns is a ndarray; give \{\(layer, head\): weights"),
    "a tensor": (torch.ones(2, 3, 3), None, r"patterns is a Tensor"),
    "a DataArray": (xr.DataArray(np.ones((1, 1, 3, 3))), None, r"patterns is a DataArray"),
    "a list": ([weights()], None, r"patterns is a list"),
    "one text as tokens": ({HEAD: weights()}, "abc", r"tokens is 'abc'; give a list with one label per position"),
    "a number as tokens": ({HEAD: weights()}, 3, r"tokens is 3; give a list"),
    "a set as tokens": ({HEAD: weights()}, {"a", "b", "c"}, r"tokens is \{.*\}; give a list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_patterns_that_do_not_fit_name_the_head_and_the_shape(name: str) -> None:
    patterns, tokens, said = WRONG[name]
    for circuit in (HEADS, EDGES):
        with pytest.raises(PlotError, match=said):
            plot_circuit_graph(circuit, patterns=patterns, tokens=tokens)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (torch.tensor(weights(), requires_grad=True), weights()),
        (torch.tensor(weights()).bfloat16(), torch.tensor(weights()).bfloat16().float().numpy()),
        ([torch.tensor(row, requires_grad=True) for row in weights()], weights()),
        (weights().tolist(), weights()),
        (xr.DataArray(weights(), dims=("query", "key")), weights()),
        (np.eye(3, dtype=int), np.eye(3)),
    ],
)
def test_patterns_of_every_form_are_drawn(pattern: Any, wanted: np.ndarray) -> None:
    for key in (HEAD, tuple(np.array(HEAD))):
        figure = plot_circuit_graph(HEADS, patterns={key: pattern}, tokens=np.array(["a", "b", "c"]))
        held = [s.data["image"][0] for s in figure.layout.select({"type": ColumnDataSource}) if "image" in s.data]
        np.testing.assert_allclose(held[0], wanted, rtol=1e-6)
    assert "pattern" not in plot_circuit_graph(HEADS, patterns={}).subtitle


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 3}, "tokens is 3"),
        ({"tokens": "abc"}, "tokens is 'abc'"),
        ({"heads": 1}, "heads=1: give a list"),
        ({"heads": ["a"]}, "a head is 'a'"),
        ({"heads": [0.5]}, r"a head is 0\.5"),
        ({"heads": [True]}, "a head is True"),
        ({"heads": [(0, "x")]}, "is 'x'"),
        ({"heads": [-1]}, "head -1 is out of range"),
        ({"pattern": torch.ones(1, 3, 3, device="meta")}, "draws numbers, not a Tensor"),
        ({"pattern": weights()[None] * 1j}, "draws numbers"),
    ],
)
def test_attention_says_what_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlotError, match=said):
        plot_attention(**{"pattern": weights()[None, None].repeat(2, 1), "tokens": ["a", "b", "c"], **options})


# --- pickled and copied ------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[], Figure]] = {
    "a grid": lambda: plot_activation_patching_results(grid()),
    "units": lambda: plot_activation_patching_results(make({"component": ["neuron"], "unit": list(range(300))})),
    "attention": lambda: plot_attention(np.stack([weights()] * 6)[None].repeat(3, 0), ["a", "b", "$$"]),
    "a circuit": lambda: plot_circuit_graph(EDGES, patterns={HEAD: weights()}),
    "a matrix": lambda: plot_circuit_matrix(EDGES),
}
COPIES: dict[str, Callable[[Figure], Figure]] = {
    "pickled": lambda figure: pickle.loads(pickle.dumps(figure)),
    "an old protocol": lambda figure: pickle.loads(pickle.dumps(figure, protocol=0)),
    "twice": lambda figure: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(figure)))),
    "deep": copy.deepcopy,
    "shallow": copy.copy,
}


def columns(figure: Figure) -> dict[str, str]:
    sources = figure.layout.select({"type": ColumnDataSource})  # in no order
    return {
        s.id: str({name: np.asarray(part, dtype=object).tolist() for name, part in s.data.items()}) for s in sources
    }


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", FIGURES)
def test_a_copy_holds_the_same_picture(name: str, way: str) -> None:
    figure = FIGURES[name]()
    roots = list(curdoc().roots)
    for _ in range(2):
        other = COPIES[way](figure)
        assert (other.title, other.subtitle) == (figure.title, figure.subtitle)
        assert columns(other) == columns(figure) and columns(figure)
        figure.html()  # copied once more when it was drawn
    assert curdoc().roots == roots


def test_a_pickled_figure_is_saved_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pickle.loads(pickle.dumps(FIGURES["a circuit"]()))
    assert figure.save(tmp_path / "page.html").stat().st_size > 1e6
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    figure.show()
    assert len(opened) == 1


@pytest.mark.parametrize("name", FIGURES)
def test_a_pickled_figure_gives_the_same_page(name: str, chromium: str) -> None:
    figure = FIGURES[name]()
    before = figure.png(scale=1)
    assert pickle.loads(pickle.dumps(figure)).png(scale=1) == before == figure.png(scale=1)


def test_circuits_are_pickled_too() -> None:
    other = pickle.loads(pickle.dumps(EDGES))
    assert other.scores() == EDGES.scores() and other.facts == EDGES.facts and other.meta == EDGES.meta
