"""Heatmaps: what stands where, in which colour, with which label — read from the models and from the page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bokeh.models import ColorBar, HoverTool, LinearColorMapper

from interp.effects import Effects
from interp.errors import PlotError
from interp.plots import plot_activation_patching_results
from interp.plots.heatmap import diverging
from interp.plots.labels import position_labels
from tests.plots.browser import Page
from tests.plots.examples import IOI, cells, grid, labels, make, panels


def test_every_cell_stands_at_its_layer_and_position_with_its_mean() -> None:
    effects = grid()
    for name, plot in zip(("resid_pre", "mlp_out"), panels(plot_activation_patching_results(effects)), strict=True):
        assert plot.title.text == name
        data, expected = cells(plot), effects.mean(normalized=True).sel(component=name)
        for x, y, mean in zip(data["x"], data["y"], data["mean"], strict=True):
            assert mean == pytest.approx(float(expected[y, x]), rel=1e-5)
        assert len(data["x"]) == 4 * len(IOI)
        assert plot.y_range.start < plot.y_range.end  # layer 0 at the bottom
        assert labels(plot, "y") == ["0", "1", "2", "3"]


def test_hover_statistics_equal_those_of_the_pairs() -> None:
    effects = grid(pairs=5)
    data = cells(panels(plot_activation_patching_results(effects))[0])
    values = effects.normalized.sel(component="resid_pre").values.reshape(-1, 5)
    assert float(data["std"][7]) == pytest.approx(values[7].std(ddof=1), abs=6e-4)
    low, high = map(float, data["interval"][7].split(" to "))
    assert values[7].min() <= low <= data["mean"][7] <= high <= values[7].max()
    raw = effects.values.sel(component="resid_pre").mean("pair").values.ravel()
    np.testing.assert_allclose(data["raw"], raw, rtol=1e-6)
    assert data["at"][7] == "layer 0 · position 7 “·John”"


def test_one_shared_scale_symmetric_about_zero_with_white_in_the_middle() -> None:
    effects = grid()
    picture = plot_activation_patching_results(effects)
    mappers = {m.id: m for m in picture.layout.select({"type": LinearColorMapper})}
    assert len(mappers) == 1
    (mapper,) = mappers.values()
    assert mapper.high == -mapper.low == pytest.approx(float(np.abs(effects.mean(normalized=True)).max()))
    assert len(mapper.palette) % 2 == 1 and mapper.palette[len(mapper.palette) // 2] == "#ffffff"
    assert len(list(picture.layout.select({"type": ColorBar}))) == 1
    one = plot_activation_patching_results(effects, "mlp_out").layout.select_one({"type": LinearColorMapper})
    largest = float(np.abs(effects.mean(normalized=True).sel(component="mlp_out")).max())
    assert one.high == pytest.approx(largest)


def test_red_is_toward_the_source_and_blue_away() -> None:
    below, above = diverging()[0], diverging()[-1]
    assert int(below[5:7], 16) > int(below[1:3], 16) and int(above[1:3], 16) > int(above[5:7], 16)


def test_repeated_tokens_are_told_apart() -> None:
    short, _ = position_labels(grid())
    assert short[4] == "4 ·John" and short[7] == "7 ·John" and short[2] == "·Mary"
    assert len(set(short)) == len(IOI)
    assert labels(panels(plot_activation_patching_results(grid()))[0]) == short


def test_positions_whose_tokens_differ_between_pairs_are_marked() -> None:
    effects = make(
        {"component": ["z"], "layer": [0], "position": [0, 1, 2, 3]},
        2,
        [["a", " Mary", "!"], ["a", " John", "!", "?"]],
    )
    short, full = position_labels(effects)
    assert short == ["a", "1 ∗", "!", "?"]
    assert full[1] == "position 1, 2 different tokens: “·Mary”, “·John”"


def test_such_a_position_has_the_name_that_all_pairs_give_it() -> None:
    effects = make(
        {"component": ["z"], "layer": [0], "position": [0, 1, 2]}, 2, [["a", " Mary", "x"], ["a", " John", "y"]]
    )
    effects.provenance["prompts"] = {
        "positions": {"A": [[0], [0]], "S": [[1], [1]], "moves": [[1], [2]], "two": [[1, 2]] * 2}
    }
    short, full = position_labels(effects)
    assert short == ["a", "1 S", "2 ∗"]
    assert full[1] == "position 1 (S), 2 different tokens: “·Mary”, “·John”"


def test_positions_without_tokens_and_negative_positions() -> None:
    assert position_labels(make({"position": [0, 5]}))[0] == ["0", "5"]
    assert position_labels(make({"position": [-1, -2]}, 1, [["a", "b"]]))[0] == ["b", "a"]


def test_named_positions_keep_their_names() -> None:
    names = ["subject", "subject_last", "end"]
    effects = make({"component": ["resid_pre"], "layer": [0, 1], "position": names})
    (plot,) = panels(plot_activation_patching_results(effects))
    assert labels(plot) == names
    assert plot.xaxis[0].major_label_orientation == "horizontal"


def test_cells_that_do_not_exist_are_hatched_and_say_so() -> None:
    effects = grid()
    effects.values[1, :, 9:] = np.nan
    picture = plot_activation_patching_results(effects)
    assert "Hatched: no such cell" in picture.subtitle
    whole, gaps = panels(picture)
    assert len(whole.renderers) == 1
    assert len(cells(gaps)["x"]) == 4 * 9
    assert set(cells(gaps, 1)["x"]) == {9, 10, 11, 12}
    assert gaps.renderers[1].glyph.hatch_pattern == "/"
    (hover,) = [t for t in gaps.toolbar.tools if isinstance(t, HoverTool) and gaps.renderers[1] in t.renderers]
    assert "no such cell" in hover.tooltips


def test_a_cell_with_no_difference_between_the_runs_is_not_called_missing() -> None:
    effects = grid(pairs=1)
    same = dataclasses.replace(effects, corrupted=effects.clean)
    (plot, _) = panels(plot_activation_patching_results(same))
    assert len(plot.renderers) == 1
    assert set(cells(plot)["std"]) == {"undefined"}


def test_heads_drop_columns_that_a_component_lacks() -> None:
    effects = make({"component": ["q", "k"], "layer": [0, 1], "head": list(range(9))})
    effects.values[1, :, 3:] = np.nan
    q, k = panels(plot_activation_patching_results(effects))
    assert labels(q) == [str(i) for i in range(9)] and labels(k) == ["0", "1", "2"]
    assert k.xaxis[0].axis_label == "head"
    assert len(k.renderers) == 1


def test_thousands_of_units_are_ranked() -> None:
    effects = make({"component": ["neuron"], "layer": [3, 4], "unit": list(range(500))})
    effects.values[0, 1, 123] = -9.0  # (−9 − 3) / (−1 − 3) = 3, far above the others
    (plot,) = panels(plot_activation_patching_results(effects))
    names = [plot.yaxis[0].major_label_overrides[i] for i in range(30)]
    means = np.abs(cells(plot)["mean"])
    assert names[-1] == "L4 · 123" and cells(plot)["mean"][-1] == pytest.approx(3.0)
    assert (np.diff(means) >= 0).all()  # the largest on top
    assert "30 largest of 1,000 units" in plot.title.text
    assert plot.x_range.start < 0 < 3 < plot.x_range.end


@pytest.mark.parametrize(
    ("dims", "rows", "columns"),
    [
        ({"component": ["a", "b"], "layer": [0, 1, 2]}, ["0", "1", "2"], ["a", "b"]),
        ({"component": ["a", "b"], "head": [0, 1, 2]}, ["a", "b"], ["0", "1", "2"]),
        ({"sender": ["L0.H1", "L0.mlp"], "receiver": ["logits"]}, ["L0.H1", "L0.mlp"], ["logits"]),
        ({"component": ["neuron"], "layer": [5], "unit": [7, 8]}, ["5"], ["7", "8"]),
    ],
)
def test_other_dims(dims: dict[str, Any], rows: list[str], columns: list[str]) -> None:
    (plot,) = panels(plot_activation_patching_results(make(dims)))
    assert (labels(plot, "y"), labels(plot)) == (rows, columns)
    assert len(cells(plot)["x"]) == len(rows) * len(columns)


def test_a_selected_component_is_still_named() -> None:
    effects = grid()
    one = dataclasses.replace(effects, values=effects.values.sel(component="mlp_out"))
    (plot,) = panels(plot_activation_patching_results(one))
    assert plot.title.text == "mlp_out"
    expected = effects.mean(normalized=True).sel(component="mlp_out").values.ravel()
    np.testing.assert_allclose(cells(plot)["mean"], expected, rtol=1e-5)


def test_not_normalised_draws_the_change_of_the_metric() -> None:
    effects = grid()
    plot = panels(plot_activation_patching_results(effects, normalized=False))[0]
    expected = (effects.values - effects.clean).mean("pair").sel(component="resid_pre").values.ravel()
    np.testing.assert_allclose(cells(plot)["mean"], expected, rtol=1e-4)
    alone = Effects(effects.values, effects.clean, None, {"metric": "kl"})
    picture = plot_activation_patching_results(alone)  # no source run: nothing to normalise by
    np.testing.assert_allclose(cells(panels(picture)[0])["mean"], expected, rtol=1e-4)
    assert "change of kl" in picture.layout.select_one({"type": ColorBar}).title


def test_tiny_effects_keep_their_digits_in_the_hover() -> None:
    effects = grid()
    tiny = dataclasses.replace(effects, values=3 + (effects.values - 3) * 1e-5)
    tip = panels(plot_activation_patching_results(tiny, normalized=False))[0].select_one({"type": HoverTool}).tooltips
    assert "@mean{0.0000000}" in tip


def test_named_sets_are_one_column(tmp_path: Path) -> None:
    (plot,) = panels(plot_activation_patching_results(make({"component": ["movers", "inhibitors"]})))
    data = plot.renderers[0].data_source.data
    assert data["x"].tolist() == [0, 0] and data["y"].tolist() == [0, 1]
    assert list(plot.yaxis.major_label_overrides.values()) == ["movers", "inhibitors"]


def test_positions_by_number_and_by_name_together() -> None:
    effects = make({"component": ["z"], "layer": [0], "position": ["0", "end", "-1"]}, 1, [["a", "b"]])
    assert position_labels(effects)[0] == ["a", "end", "b"]
    assert effects.to_dataframe()["token"].tolist() == ["a", None, "b"]


def test_refusals() -> None:
    effects = grid()
    with pytest.raises(PlotError, match="no component attn_out; the effects have resid_pre, mlp_out"):
        plot_activation_patching_results(effects, ["attn_out"])
    with pytest.raises(PlotError, match="no component chosen"):
        plot_activation_patching_results(effects, [])
    with pytest.raises(PlotError, match="no source run"):
        plot_activation_patching_results(Effects(effects.values, effects.clean), normalized=True)
    with pytest.raises(PlotError, match=r"choose one of the others: .*isel\(position=0\)"):
        plot_activation_patching_results(make({"component": ["z"], "layer": [0], "head": [0], "position": [0]}))


def test_page_in_chromium(tmp_path: Path, chromium: str) -> None:
    picture = plot_activation_patching_results(grid(30))
    first = panels(picture)[0]
    with Page(picture.save(tmp_path / "page.html")) as page:
        assert page.errors == [] and page.network == []
        assert page.evaluate("document.title") == "Activation patching · toy"
        page.mouse(*page.point(first.id, 7, 20))
        text = hovered(page, "layer 20")
        assert "resid_pre" in text and "position 7 “·John”" in text and "raw logit_diff" in text
        page.mouse(*page.point(first.id, 12, 3))
        assert "</script>" in hovered(page, "layer 3 ")
        assert page.errors == []


def hovered(page: Page, expected: str) -> str:
    """The text of the page once it holds `expected`."""
    for _ in range(100):
        if expected in (text := page.shadow_text()):
            return text
    raise AssertionError(f"no hover with {expected!r}: {text[-300:]}")
