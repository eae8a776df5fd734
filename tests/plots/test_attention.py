"""Attention patterns: which weight stands where, and the page on which layer and head are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from bokeh.models import ColumnDataSource, LinearColorMapper
from bokeh.plotting import figure

from interp.errors import PlotError
from interp.plots import Figure, plot_attention
from tests.plots.browser import Page

TOKENS = ["<s>", " John", " and", " John", "\n"]


def pattern(*shape: int, causal: bool = True) -> np.ndarray:
    """Random rows that sum to 1, [*shape, query, key]."""
    n = len(TOKENS)
    weights = np.random.default_rng(0).random((*shape, n, n)) + 0.01
    weights = np.tril(weights) if causal else weights
    return weights / weights.sum(-1, keepdims=True)


def panels(picture: Figure) -> list[figure]:
    return [p for r in picture.layout.children[1:] for p in r.children]


def test_few_heads_stand_side_by_side_with_every_weight() -> None:
    weights = pattern(3)
    for h, plot in enumerate(panels(plot_attention(weights, TOKENS))):
        assert plot.title.text == f"head {h}"
        data = plot.renderers[0].data_source.data
        assert len(data["weight"]) == 15  # the causal triangle; the rest is blank
        for q, k, w in zip(data["query"], data["key"], data["weight"], strict=True):
            assert w == pytest.approx(weights[h, q, k], rel=1e-6)
        assert plot.y_range.start > plot.y_range.end  # the first query on top
        assert list(plot.xaxis[0].major_label_overrides.values()) == [
            "<s>",
            "1 ·John",
            "·and",
            "3 ·John",
            "↵",
        ]
        assert data["reads"][list(data["cell"]).index(3 * 5 + 1)] == "3 “·John” → 1 “·John”"


def test_a_pattern_that_looks_ahead_is_drawn_whole() -> None:
    (plot,) = panels(plot_attention(pattern(1, causal=False), TOKENS))
    assert len(plot.renderers[0].data_source.data["weight"]) == 25


def test_scale_runs_from_zero_to_one() -> None:
    mapper = plot_attention(pattern(2), TOKENS).layout.select_one({"type": LinearColorMapper})
    assert (mapper.low, mapper.high) == (0, 1)


def test_torch_in_bf16_with_gradients() -> None:
    weights = torch.tensor(pattern(2), dtype=torch.bfloat16, requires_grad=True)
    data = panels(plot_attention(weights, TOKENS))[1].renderers[0].data_source.data
    np.testing.assert_array_equal(data["weight"], weights[1].detach().float().numpy().ravel()[data["cell"]])


def test_the_given_pattern_is_not_changed() -> None:
    weights = pattern(2).astype(np.float32)
    before = weights.copy()
    plot_attention(weights, TOKENS)
    np.testing.assert_array_equal(weights, before)


def test_chosen_heads_of_chosen_layers() -> None:
    weights = pattern(4, 6)
    plots = panels(plot_attention(weights, TOKENS, heads=[(3, 5), (0, 1)]))
    assert [p.title.text for p in plots] == ["L3.H5", "L0.H1"]
    data = plots[0].renderers[0].data_source.data
    np.testing.assert_allclose(data["weight"], weights[3, 5].ravel()[data["cell"]], rtol=1e-6)
    assert [p.title.text for p in panels(plot_attention(weights[0], TOKENS, heads=[4, 2]))] == [
        "head 4",
        "head 2",
    ]


def test_patterns_bring_their_own_labels_and_numbers_of_layers() -> None:
    weights = pattern(4, 6)
    own = xr.DataArray(weights, {"layer": [2, 3, 4, 5], "token": ("query", TOKENS)}, ("layer", "head", "query", "key"))
    first, second = panels(plot_attention(own, heads=[(5, 1), (2, 0)]))
    assert [first.title.text, second.title.text] == ["L5.H1", "L2.H0"]
    data = first.renderers[0].data_source.data
    np.testing.assert_allclose(data["weight"], weights[3, 1].ravel()[data["cell"]], rtol=1e-6)
    assert first.xaxis.major_label_overrides[2] == "·and"
    assert plot_attention(own).layout.children[1].children[-1].children[1].title.text == "layer 2 · head 0"
    with pytest.raises(PlotError, match="layers 2 to 5, heads 0 to 5"):
        plot_attention(own, heads=[(0, 1)])
    with pytest.raises(PlotError, match=r"\[2, 5\] are not consecutive"):
        plot_attention(own.sel(layer=[2, 5]))
    with pytest.raises(PlotError, match="needs tokens"):
        plot_attention(weights)


@pytest.mark.parametrize(
    ("weights", "heads", "message"),
    [
        (pattern(1)[0], None, r"not of shape \(5, 5\)"),
        (pattern(2)[:, :4, :4], None, "4.*but there are 5 tokens"),
        (pattern(2) * 8 - 4, None, "not 0 and 1: are these scores before softmax"),
        (pattern(2), [2], "head 2 is out of range: the pattern has layer 0, heads 0 to 1"),
        (pattern(2, 2), [(0, 2)], r"head \(0, 2\) is out of range"),
        (pattern(2), [(0, 1)], r"give indices, or \(layer, head\)"),
        (pattern(2), [], "heads is empty"),
    ],
)
def test_refusals(weights: np.ndarray, heads: Any, message: str) -> None:
    with pytest.raises(PlotError, match=message):
        plot_attention(weights, TOKENS, heads=heads)


def test_a_pattern_too_big_for_a_page_is_refused() -> None:
    n = 600
    with pytest.raises(PlotError, match="14,400,000 weights are too many"):
        plot_attention(np.zeros((40, n, n), np.float32), ["a"] * n)


def test_layer_and_head_are_chosen_on_the_page(tmp_path: Path, chromium: str) -> None:
    weights = pattern(3, 9)
    picture = plot_attention(weights, TOKENS)
    widgets, strip, pictures = picture.layout.children[1].children
    (slider, head, way), (overview, large) = widgets.children, pictures.children
    source = large.select_one({"type": ColumnDataSource})
    cells = source.data["cell"]

    def drawn() -> np.ndarray:
        found = page.evaluate(f"[...Bokeh.documents[0].get_model_by_id('{source.id}').data.weight]")
        return np.array(found, dtype=np.float32)

    with Page(picture.save(tmp_path / "page.html")) as page:
        held = np.round(weights * 254) / 254  # what eight bits keep
        np.testing.assert_allclose(drawn(), held[0, 0].ravel()[cells], rtol=1e-6)
        page.mouse(
            *page.point(overview.id, 0.5 + 2 * (1 + 14 / 92), 0.5), click=True
        )  # the third tile of the first row
        page.wait(f"Bokeh.documents[0].get_model_by_id('{head.id}').value === 'head 2'")
        np.testing.assert_allclose(drawn(), held[0, 2].ravel()[cells], rtol=1e-6)
        page.evaluate(f"Bokeh.documents[0].get_model_by_id('{slider.id}').value = 2")
        np.testing.assert_allclose(drawn(), held[2, 2].ravel()[cells], rtol=1e-6)
        assert page.evaluate(f"Bokeh.documents[0].get_model_by_id('{large.title.id}').text") == "layer 2 · head 2"
        tile = page.evaluate(f"""(() => {{
            const tiles = Bokeh.documents[0].get_model_by_id('{overview.renderers[0].data_source.id}');
            return [...tiles.data.image[8]].map((w) => isNaN(w) ? -1 : w); }})()""")
        expected = np.where(np.tri(5, dtype=bool), held[2, 8], -1).ravel()
        np.testing.assert_allclose(tile, expected, rtol=1e-6)
        (boxes, _) = strip.renderers
        words = f"Bokeh.documents[0].get_model_by_id('{boxes.data_source.id}').data"
        lit = lambda: np.array(page.evaluate(f"[...{words}.weight]"), dtype=np.float32)  # noqa: E731
        np.testing.assert_allclose(
            lit(), held[2, 2][4], rtol=1e-6
        )  # the last token reads, before the mouse is anywhere
        page.mouse(*page.point(strip.id, boxes.data_source.data["x"][2], 0))
        page.wait(f"{words}.reads[0].startsWith('2 ')")
        np.testing.assert_allclose(lit(), np.where(np.arange(5) <= 2, held[2, 2][2], 0), rtol=1e-6)
        page.evaluate(f"Bokeh.documents[0].get_model_by_id('{way.id}').active = 1")
        np.testing.assert_allclose(lit(), np.where(np.arange(5) >= 2, held[2, 2][:, 2], 0), rtol=1e-6)
        assert page.evaluate(f"{words}.reads[4]") == "2 “·and” is read by 4 “↵”"
        assert page.errors == [] and page.network == []


def test_patterns_are_weighted_by_values_on_the_page(tmp_path: Path, chromium: str) -> None:
    weights = pattern(2, 6)
    norms = np.random.default_rng(1).random((2, 6, 5)) + 0.1
    coords = {"layer": [0, 1], "token": ("query", TOKENS), "value_norm": (("layer", "head", "key"), norms)}
    picture = plot_attention(xr.DataArray(weights, coords, ("layer", "head", "query", "key")))
    widgets, _, pictures = picture.layout.children[1].children
    slider, _, _, value = widgets.children
    source = pictures.children[1].select_one({"type": ColumnDataSource})
    with Page(picture.save(tmp_path / "page.html")) as page:
        page.evaluate(f"Bokeh.documents[0].get_model_by_id('{slider.id}').value = 1")
        page.evaluate(f"Bokeh.documents[0].get_model_by_id('{value.id}').active = true")
        found = page.evaluate(f"[...Bokeh.documents[0].get_model_by_id('{source.id}').data.weight]")
        held = np.round(weights[1, 0] * 254) / 254 * (norms[1, 0] / norms[1, 0].max())
        np.testing.assert_allclose(found, held.ravel()[source.data["cell"]], rtol=1e-5)
        assert page.errors == []
