"""Every kind of picture as every reader meets it: axe-core, light and dark, a phone, paper, files for a paper or slides."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import interp
from interp.circuits import Evaluation
from interp.errors import PlotError
from interp.plots import (
    Figure,
    plot_activation_patching_results,
    plot_attention,
    plot_circuit_graph,
    plot_circuit_matrix,
    plot_faithfulness,
    plot_tokens,
)
from tests.plots.browser import Page
from tests.plots.examples import grid
from tests.plots.look import WAYS, Seen, assert_pleasant


def attention() -> Figure:
    rng, n = np.random.default_rng(0), 12
    weights = np.tril(rng.random((3, 6, n, n)) + 0.01)
    coords = {"token": ("query", [f" tok{i}" for i in range(n)]), "layer": [0, 1, 2]}
    coords["value_norm"] = (("layer", "head", "key"), rng.random((3, 6, n)))  # type: ignore[assignment]
    pattern = xr.DataArray(weights / weights.sum(-1, keepdims=True), coords, ("layer", "head", "query", "key"))
    return plot_attention(pattern)


def circuit() -> interp.Circuit:
    edges = {("embed", "L0.H0.q"): 0.5, ("L0.H0", "L1.mlp"): -1.0, ("L1.mlp", "logits"): 2.0, ("L0.H0", "logits"): 0.1}
    return interp.Circuit.from_edges(edges)


def curves() -> Figure:
    curve = pd.DataFrame(
        {"n_edges": [1, 10, 100], "fraction": [0.01, 0.1, 1.0], "metric": [0.1, 1, 2], "faithfulness": [0.1, 0.6, 1.0],
         "low": [0.0, 0.5, 1.0], "high": [0.2, 0.7, 1.0]}
    )  # fmt: skip
    return plot_faithfulness({"EAP": Evaluation(curve, 0.7, 0.3, 2.0, 0.0, "counterfactual")})


def lens() -> Figure:
    from tests.families import loaded, words

    return interp.plot_logit_lens(interp.logit_lens(loaded("gpt2"), words(6, 4)))


def direct() -> Figure:
    from tests.families import loaded, words

    clean = words(6, 5)
    return interp.plot_direct_effects(
        interp.direct_effects(loaded("gpt2"), interp.PromptPairs(clean, None, [7, 8], [9, 10]), by="head")
    )


def tokens() -> Figure:
    values = np.array([[1.0, -0.5], [-2.0, np.nan], [0.0, 3.0]])
    return plot_tokens([" The", "</script>\n", " <b>"], values, names=["loss", "feature 3"])


FIGURES: dict[str, Callable[[], Figure]] = {
    "heatmap": lambda: plot_activation_patching_results(grid(layers=6)),
    "attention": attention,
    "circuit": lambda: plot_circuit_graph(circuit()),
    "matrix": lambda: plot_circuit_matrix(circuit()),
    "curves": curves,
    "lens": lens,
    "direct": direct,
    "tokens": tokens,
}


@pytest.mark.parametrize(
    "ways", [WAYS[:2], pytest.param(WAYS[2:], marks=pytest.mark.slow)], ids=["two ways", "the others"]
)
@pytest.mark.parametrize("name", FIGURES)
def test_every_picture_is_pleasant_to_every_reader(
    name: str, ways: tuple[tuple[int, str], ...], tmp_path: Path, chromium: str
) -> None:
    assert_pleasant(FIGURES[name]().save(tmp_path / "page.html"), ways)


def test_what_axe_would_find_is_found(tmp_path: Path, chromium: str) -> None:
    page = tokens().html().replace("</main>", '</main><p style="color:#bbbbbb">faint</p><img src="data:,">')
    (tmp_path / "bad.html").write_text(page)
    with Seen(tmp_path / "bad.html") as seen:
        found = " ".join(seen.violations())
        assert "color-contrast" in found and "image-alt" in found


def test_bokeh_follows_the_page_into_the_dark_and_back(tmp_path: Path, chromium: str) -> None:
    path = FIGURES["heatmap"]().save(tmp_path / "page.html")
    colours = (
        "[...Bokeh.documents[0]._all_models.values()].map((m) => m.major_label_text_color).filter(Boolean).map(String)"
    )
    with Seen(path, scheme="dark") as page:
        assert set(page.evaluate(colours)) == {"#e8e8e8"}
        page.print_it()
        page.wait(f"new Set({colours}).has('#222222')", 5)
        assert set(page.evaluate(colours)) == {"#222222"}
    with Seen(path) as page:
        assert set(page.evaluate(colours)) == {"#222222"}


@pytest.mark.parametrize("name", ["heatmap", "circuit", "attention", "tokens"])
def test_svg_and_pdf_hold_the_whole_picture(name: str, tmp_path: Path, chromium: str) -> None:
    figure = FIGURES[name]()
    data = figure.save(tmp_path / "picture.svg").read_text()
    root = ElementTree.fromstring(data)
    assert root.tag.endswith("svg") and root.find("{http://www.w3.org/2000/svg}title").text == figure.title  # type: ignore[union-attr]
    words = "".join(root.itertext())
    for word in {"heatmap": ("resid_pre", "layer", "·Mary"), "circuit": ("logits",), "attention": ("·tok3", "query"),
                 "tokens": ("The", "<b>")}[name]:  # fmt: skip
        assert word in words
    width, height = float(root.get("width")), float(root.get("height"))  # type: ignore[arg-type]
    script = (
        "const i = new Image(); i.onload = () => { const d = document.documentElement.dataset; d.size = i.naturalWidth;"
    )
    script += " d.ready = 'yes'; }; i.src = 'picture.svg'"
    (tmp_path / "shown.html").write_text(f"<!DOCTYPE html><html><body><script>{script}</script></body></html>")
    with Page(tmp_path / "shown.html") as page:
        assert float(page.evaluate("document.documentElement.dataset.size")) == width > 300 and height > 60
        assert [error for error in page.errors if "picture.svg" not in error] == []
    pdf = figure.save(tmp_path / "picture.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    png = figure.save(tmp_path / "picture.png").read_bytes()
    wide, high = struct.unpack(">II", png[16:24])
    box = re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", pdf)
    assert box is not None
    assert float(box[1]) == pytest.approx(wide / 2 * 0.75, abs=2) and float(box[2]) == pytest.approx(
        high / 2 * 0.75, abs=2
    )


def test_text_is_coloured_by_the_series_that_is_chosen(tmp_path: Path, chromium: str) -> None:
    with Page(tokens().save(tmp_path / "page.html")) as page:
        spans = "[...document.querySelectorAll('.tokens span')]"
        titles = page.evaluate(f"{spans}.map((span) => span.title)")
        assert titles == ["·The: 1", "</script>↵: -2", "·<b>: 0"]
        colours = page.evaluate(f"{spans}.map((span) => span.style.background)")
        assert colours == ["rgba(178, 24, 43, 0.275)", "rgba(33, 102, 172, 0.55)", "rgba(178, 24, 43, 0)"]
        page.evaluate(
            "(() => { const s = document.querySelector('select'); s.value = 1; s.dispatchEvent(new Event('change')); })()"
        )
        titles = page.evaluate(f"{spans}.map((span) => span.title)")
        assert titles == ["·The: -0.5", "</script>↵", "·<b>: 3"]
        assert page.evaluate("document.querySelector('.tokens').textContent") == " The</script>↵\n <b>"
        assert page.errors == []


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        ("text", [1], "needs a list of tokens"),
        ([], [], "needs a list of tokens"),
        (["a", "b"], [1], r"there are 2 tokens, but values of shape \[1\]"),
        ([["a"], ["b"]], [[1]], "2 texts, but values of 1"),
        (["a"], ["x"], "no numbers to draw"),
    ],
)
def test_tokens_and_values_that_do_not_fit(given: list[str], values: object, said: str) -> None:
    with pytest.raises(PlotError, match=said):
        plot_tokens(given, values)


def test_values_that_know_their_tokens() -> None:
    from tests.families import loaded, words

    model = loaded("gpt2")
    prompts = words(6, 4)
    cache = model.run(prompts, ["L1.neuron[5]", "L1.neuron", "L1.z"]).cache
    page = plot_tokens(cache["L1.neuron[5]"]).body
    ids = [model.tokens(prompt) for prompt in prompts]
    assert page == plot_tokens(ids, [cache["L1.neuron[5]"].values[n, : len(one)] for n, one in enumerate(ids)]).body
    assert page.count("<span style") == 10 and page.count('class="tokens"') == 2
    assert plot_tokens(cache["L1.neuron"].isel(prompt=0)[:, :3]).body.count("<option") == 3
    with pytest.raises(PlotError, match=r"choose of \['head', 'd_head'\]"):
        plot_tokens(cache["L1.z"])
    with pytest.raises(PlotError, match="do not know their tokens"):
        plot_tokens(xr.DataArray([1.0, 2.0], dims="position"))
    with pytest.raises(PlotError, match="the tokens of a text, not 5"):
        plot_tokens([5, 6], [1, 2])  # type: ignore[list-item]


def test_other_results_are_not_drawn_as_lens_or_direct_effects() -> None:
    with pytest.raises(PlotError, match=r"interp\.logit_lens gives"):
        interp.plot_logit_lens(grid())  # type: ignore[arg-type]
    with pytest.raises(PlotError, match=r"not effects of 'patch'"):
        interp.plot_direct_effects(grid())


@pytest.mark.parametrize("name", ["lens", "direct", "heatmap", "attention"])
def test_the_bar_of_colours_is_whole(name: str, tmp_path: Path, chromium: str) -> None:
    """Its ticks stand at even distances, the last one too."""
    with Page(FIGURES[name]().save(tmp_path / "page.html")) as page:
        title = {"direct": "that a cell adds", "heatmap": "normalised", "lens": "probability"}.get(
            name, "attention weight"
        )
        (bar,) = [words for words in page.drawn() if any(title in word["text"] for word in words)]
    ticks = [word for word in bar if re.fullmatch(r"[−-]?[\d.]+", word["text"])]
    values = [float(word["text"].replace("−", "-")) for word in ticks]
    places = [sum(corner[0] for corner in word["corners"]) / 4 for word in ticks]
    assert len(values) >= 3 and np.corrcoef(values, places)[0, 1] > 0.9999
    scale = np.diff(places) / np.diff(values)
    np.testing.assert_allclose(scale, scale[0], rtol=0.08)


def test_direct_effects_are_drawn_as_they_are() -> None:
    from tests.families import loaded, words

    effects = interp.direct_effects(loaded("llama_gqa"), interp.PromptPairs(words(6, 5), None, [7, 8], [9, 10]))
    figure = interp.plot_direct_effects(effects)
    ((bars,),) = [part.children for part in figure.layout.children]  # type: ignore[union-attr]
    data = bars.renderers[0].data_source.data
    assert sum(data["value"]) == pytest.approx(float(effects.clean.mean()), abs=1e-4)
    by_name = dict(zip(data["name"], data["value"], strict=True))
    want = float(effects.values.sel(component="mlp_out", layer=1).mean())
    assert by_name["mlp_out, layer 1"] == pytest.approx(want, abs=1e-6)
    assert bars.x_range.start == -bars.x_range.end


def test_a_lens_is_drawn_as_it_is() -> None:
    from tests.families import loaded, words

    found = interp.logit_lens(loaded("gpt2"), words(6, 4), layers=[0, 2])
    figure = interp.plot_logit_lens(found)
    _, (first,), (second,) = [getattr(part, "children", part) for part in figure.layout.children]  # type: ignore[union-attr]
    for number, (plot, length) in enumerate(((first, 6), (second, 4))):
        data = plot.renderers[0].data_source.data
        assert len(data["p"]) == 2 * length  # what is behind a prompt's end is not drawn
        for x, y, p in zip(data["x"], data["y"], data["p"], strict=True):
            assert p == pytest.approx(float(found["probability"][number, y, x, 0]), abs=1e-6)
