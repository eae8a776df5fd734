"""Pictures of circuits: what stands where, and what slider, hover and clicks do in a real browser."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from bokeh.models import ColorBar, ColumnDataSource, GlyphRenderer, Image, MultiLine, Rect, Slider

from interp.circuits import Circuit, Facts
from interp.errors import PlotError
from interp.plots.browser import PATIENCE
from interp.plots.circuit import plot_circuit_graph, plot_circuit_matrix
from tests.plots.browser import Page

SMALL, GROUPED = Facts(3, 4, 4), Facts(12, 9, 3)
META = {"method": "eap-ig", "model": "toy", "metric": "logit_diff"}


def circuit(facts: Facts = SMALL, n_edges: int = 20, seed: int = 0) -> Circuit:
    scores = np.random.default_rng(seed).standard_normal(facts.mask.shape)
    return Circuit.from_matrix(scores, None, facts, META).top(n_edges=n_edges)


def source(figure: Any, glyph: type) -> ColumnDataSource:
    """The columns behind the lines, boxes or image of a picture."""
    return renderer(figure, glyph).data_source


def renderer(figure: Any, glyph: type) -> GlyphRenderer:
    return [r for r in figure.layout.select({"type": GlyphRenderer}) if isinstance(r.glyph, glyph)][-1]


def test_nodes_stand_by_layer_and_head() -> None:
    whole = circuit(n_edges=60)
    data = source(plot_circuit_graph(whole), Rect).data
    at = dict(zip(data["name"], zip(data["x"], data["y"], strict=True), strict=True))
    assert set(at) == set(whole.nodes())
    for name, (x, y) in at.items():
        if ".H" in name:
            layer, head = (int(part[1:]) for part in name.split("."))
            assert (x, y) == (head, layer + 1)
            assert at["embed"][1] < y < at["logits"][1]
        elif "mlp" in name:  # right of every head, above those of its layer, below those of the next
            assert x > 3.5 and y == pytest.approx(int(name[1]) + 1.48)
    for start, end in nx.DiGraph(whole.edges).edges:
        assert at[start][1] < at[end.rsplit(".", 1)[0] if end[-1] in "qkv" else end][1]


def test_lines_carry_score_rank_and_sign() -> None:
    drawn = circuit()
    figure = plot_circuit_graph(drawn)
    data = source(figure, MultiLine).data
    ranked = [(" → ".join(edge), score) for edge, score in drawn.ranking()]
    assert list(zip(data["name"], data["score"], strict=True)) == ranked[::-1]  # the strongest lie on top
    assert data["rank"].tolist() == list(range(20))[::-1]
    widths = data["width"].tolist()
    assert widths == sorted(widths) and widths[-1] == 6
    for colour, score in zip(data["color"], data["score"], strict=True):
        red, blue = int(colour[1:3], 16), int(colour[5:7], 16)
        assert (red > blue) if score > 0.1 else (red < blue) if score < -0.1 else True
    names = source(figure, Rect).data["name"]
    for i, (start, end) in enumerate(name.split(" → ") for name in data["name"]):
        assert names[data["start"][i]] == start
        heads = {names[j] for j in data["ends"][i]}
        assert heads == {end.rsplit(".", 1)[0] if end[-1] in "qkv" else end}
    bar = figure.layout.select_one({"type": ColorBar})
    largest = max(abs(score) for score in data["score"])
    assert bar.color_mapper.high == -bar.color_mapper.low == largest


def test_an_edge_into_a_group_is_one_line_with_a_branch_for_each_head() -> None:
    edges = {("embed", "L1.H0.k"): 1.0, ("L1.H0", "logits"): 2.0, ("L1.H2", "logits"): 1.0}
    data = source(plot_circuit_graph(Circuit.from_edges(edges, GROUPED)), MultiLine).data
    i = data["name"].index("embed → L1.H0.k")
    assert len(data["ends"][i]) == 2 and np.isnan(data["xs"][i]).sum() == 1
    assert not np.isnan(np.concatenate([x for j, x in enumerate(data["xs"]) if j != i])).any()


def test_only_the_strongest_edges_are_drawn_and_the_page_says_so() -> None:
    figure = plot_circuit_graph(circuit(n_edges=60), max_edges=25)
    data = source(figure, MultiLine).data
    assert len(data["name"]) == 25 and "25 strongest are drawn" in figure.subtitle
    few = plot_circuit_graph(circuit(n_edges=60), max_edges=5)
    assert set(source(few, Rect).data["name"]) < set(circuit(n_edges=60).nodes())
    assert "strongest" not in plot_circuit_graph(circuit()).subtitle
    slider = figure.layout.select_one({"type": Slider})
    assert (slider.start, slider.end, slider.value) == (1, 25, 25)


def test_a_list_of_heads_and_a_circuit_of_nodes() -> None:
    heads = plot_circuit_graph([(0, 1), (2, 3)])
    assert set(source(heads, Rect).data["name"]) == {"embed", "L0.H1", "L2.H3", "logits"}
    assert not list(heads.layout.select({"type": ColorBar}))
    names = source(heads, MultiLine).data["name"]
    assert sorted(names) == sorted(
        ["embed → L0.H1", "embed → L2.H3", "L0.H1 → L2.H3", "embed → logits", "L0.H1 → logits", "L2.H3 → logits"]
    )
    scored = plot_circuit_graph(Circuit.from_nodes({"L0.H1": 1.0, "L1.mlp": -2.0, "L2.H0": 0.1}, SMALL, META))
    data = source(scored, Rect).data
    fill = dict(zip(data["name"], data["fill"], strict=True))
    assert fill["L1.mlp"] == "#2166ac" and fill["logits"] == "#ffffff" and fill["L0.H1"] != fill["L2.H0"]
    rank = dict(zip(data["name"], data["rank"].tolist(), strict=True))
    assert rank == {"embed": -1, "L0.H1": 1, "L1.mlp": 0, "L2.H0": 2, "logits": -1}
    empty = plot_circuit_graph(Circuit.from_edges({}, SMALL))
    assert source(empty, Rect).data["name"] == ["embed", "logits"]


def test_what_cannot_be_drawn() -> None:
    for given in (3, "L0.H1", [(0, 1, 2)], [(0, "x")], [(-1, 2)]):
        with pytest.raises(PlotError, match="neither a Circuit nor a list"):
            plot_circuit_graph(given)
    with pytest.raises(PlotError, match=r"pattern of head \(0, 1\) has shape \(2, 3\)"):
        plot_circuit_graph([(0, 1)], patterns={(0, 1): np.zeros((2, 3))})
    with pytest.raises(PlotError, match=r"has shape \(2, 2\), not \[query, key\] \(3, 3\)"):
        plot_circuit_graph([(0, 1)], patterns={(0, 1): np.zeros((2, 2))}, tokens=["a", "b", "c"])
    with pytest.raises(PlotError, match="no edges to draw"):
        plot_circuit_matrix(Circuit.from_edges({}, SMALL))


def test_the_matrix_holds_every_score_at_its_place() -> None:
    drawn = circuit()
    figure = plot_circuit_matrix(drawn)
    renderers = figure.layout.select({"type": GlyphRenderer})  # in no order
    images = [r.data_source.data["image"][0] for r in renderers if isinstance(r.glyph, Image)]
    kinds, values = sorted(images, key=lambda image: image.dtype.kind == "f")
    rows, columns = (
        [name for name in drawn.nodes("edge") if name in {edge[i] for edge in drawn.edges}] for i in (0, 1)
    )
    assert values.shape == (len(rows), len(columns))
    for (i, j), score in np.ndenumerate(values):
        edge = (rows[i], columns[j])
        exists = edge in Circuit.from_matrix(np.zeros(SMALL.mask.shape), None, SMALL).scores()
        assert kinds[i, j] == (2 if edge in drawn.scores() else 0 if exists else 1)
        assert score == pytest.approx(drawn.scores().get(edge, np.nan), nan_ok=True)


def alphas(page: Page, figure: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Of shown nodes and edges, by name: how opaque they are."""
    found = []
    for glyph in (Rect, MultiLine):
        shown = renderer(figure, glyph)
        found.append(
            page.evaluate(f"""(() => {{
                const view = Bokeh.index.find_one_by_id({json.dumps(shown.id)}).model;
                const data = view.data_source.data, indices = view.view.filter.indices;
                return Object.fromEntries(indices.map((i) => [data.name[i], data.alpha[i]]));
            }})()""")
        )
    return found[0], found[1]


def hovered(page: Page, expected: str) -> str:
    """The text of the page once it holds `expected`."""
    end = time.monotonic() + PATIENCE
    while expected not in (text := page.shadow_text()):
        assert time.monotonic() < end, f"no hover with {expected!r}: {text[-300:]}"
    return text


def set_slider(page: Page, figure: Any, n: int) -> None:
    slider = figure.layout.select_one({"type": Slider})
    page.evaluate(f"Bokeh.documents[0].get_model_by_id({json.dumps(slider.id)}).value = {n}")


def click(page: Page, figure: Any, name: str, click: bool = True) -> None:
    data = source(figure, Rect).data
    i = data["name"].index(name)
    time.sleep(0.4 if click else 0)  # a second click that soon would be a double one
    page.mouse(*page.point(plot_id(figure), data["x"][i], data["y"][i]), click=click)


def plot_id(figure: Any) -> str:
    lines = renderer(figure, MultiLine)
    return next(p.id for p in figure.layout.select({"name": "circuit"}) if lines in p.renderers)


def test_500_edges_in_a_browser(tmp_path: Path, chromium: str) -> None:
    drawn = circuit(GROUPED, n_edges=500)
    figure = plot_circuit_graph(drawn)
    order = [" → ".join(edge) for edge, _ in drawn.ranking()]
    with Page(figure.save(tmp_path / "graph.html"), 1400, 1300) as page:
        assert set(alphas(page, figure)[1]) == set(order[:100])
        for n in (500, 37):
            set_slider(page, figure, n)
            nodes, edges = alphas(page, figure)
            assert set(edges) == set(order[:n]) and set(nodes.values()) == {1}
            touched = {name for edge in drawn.top(n_edges=n).edges for name in (edge[0], *owners(drawn, edge[1]))}
            assert set(nodes) == touched | {"embed", "logits"}

        graph = nx.DiGraph()
        for start, end in drawn.top(n_edges=37).edges:
            graph.add_edges_from(((start, owner) for owner in owners(drawn, end)), name=f"{start} → {end}")
        chosen = max(graph, key=lambda n: min(graph.in_degree(n), graph.out_degree(n)))
        click(page, figure, chosen)
        nodes, edges = alphas(page, figure)
        before, after = nx.ancestors(graph, chosen), nx.descendants(graph, chosen)
        assert {name for name, alpha in nodes.items() if alpha == 1} == before | after | {chosen}
        lit = {graph.edges[e]["name"] for side in (before, after) for e in graph.edges if set(e) <= side | {chosen}}
        assert {name for name, alpha in edges.items() if alpha > 0.9} >= lit
        assert any(alpha < 0.1 for alpha in edges.values())
        assert len([alpha for alpha in edges.values() if alpha > 0.9]) < 37

        click(page, figure, chosen, click=False)
        assert "reads" in hovered(page, chosen)
        strongest = order[0]
        data = source(figure, MultiLine).data
        i, middle = data["name"].index(strongest), 8
        page.mouse(*page.point(plot_id(figure), data["xs"][i][middle], data["ys"][i][middle]))
        assert "1 of 500" in hovered(page, strongest)
        assert not page.errors and not page.network
        page.save(tmp_path / "selected.png")


def owners(circuit: Circuit, receiver: str) -> list[str]:
    """The components that a receiver belongs to."""
    if receiver[-1] not in "qkv":
        return [receiver]
    site = next(site for site in circuit.graph if site.node == receiver)
    return [head.node for head in circuit.graph.successors(site)]


def test_a_click_on_a_head_shows_its_pattern(tmp_path: Path, chromium: str) -> None:
    drawn = circuit(n_edges=30)
    heads = list(drawn)[:3]
    generator = torch.Generator().manual_seed(0)
    patterns = {head: torch.rand(4, 4, generator=generator).softmax(-1).bfloat16() for head in heads}
    tokens = ["<bos>", " a", " b", " a"]
    figure = plot_circuit_graph(drawn, patterns=patterns, tokens=tokens)
    image = source(figure, Image)
    writes = [sender for (sender, _), _ in drawn.ranking()]
    strongest = min(heads, key=lambda head: writes.index(f"L{head[0]}.H{head[1]}"))
    assert strongest != heads[0]
    assert np.allclose(image.data["image"][0], patterns[strongest].float())
    with Page(figure.save(tmp_path / "graph.html"), 1400, 1000) as page:
        for head in heads[::-1]:
            click(page, figure, f"L{head[0]}.H{head[1]}")
            values = page.evaluate(f"[...Bokeh.documents[0].get_model_by_id({json.dumps(image.id)}).data.image[0]]")
            assert np.allclose(np.reshape(values, (4, 4)), patterns[head].float())
            titles = "Bokeh.documents[0]._all_models.values().map((m) => m.text ?? '').toArray()"
            assert f"L{head[0]}.H{head[1]} attends" in page.evaluate(titles)
        click(page, figure, "logits")  # has no pattern: the last one stays
        assert page.evaluate(titles).count(f"L{heads[0][0]}.H{heads[0][1]} attends") == 1
        assert not page.errors and not page.network


def test_circuits_of_nodes_and_matrices_in_a_browser(tmp_path: Path, chromium: str) -> None:
    names = [site.node for site in GROUPED.senders[1::5]]
    nodes = Circuit.from_nodes(dict(zip(names, np.linspace(-2, 1, len(names)), strict=True)), GROUPED, META)
    figure = plot_circuit_graph(nodes)
    with Page(figure.save(tmp_path / "nodes.html"), 1400, 1000) as page:
        set_slider(page, figure, 4)
        shown, edges = alphas(page, figure)
        kept = {name for name, _ in nodes.ranking()[:4]}
        assert set(shown) == kept | {"embed", "logits"}
        assert {end for name in edges for end in name.split(" → ")} == set(shown)
        assert not page.errors and not page.network
    with Page(plot_circuit_matrix(circuit()).save(tmp_path / "matrix.html"), 1200, 900) as page:
        assert not page.errors and not page.network


@pytest.mark.slow
def test_500_edges_stay_fluid(tmp_path: Path, chromium: str) -> None:
    """Moving the slider over 500 edges: the processor time of a step in the page, in units of a fixed piece of work there."""
    figure = plot_circuit_graph(circuit(GROUPED, n_edges=500))
    slider = json.dumps(figure.layout.select_one({"type": Slider}).id)
    with Page(figure.save(tmp_path / "graph.html"), 1400, 1300) as page:
        page.call("Performance.enable", timeDomain="threadTicks")

        def busy() -> float:
            metrics = page.call("Performance.getMetrics")["metrics"]
            return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

        def spent(code: str) -> float:
            before = busy()
            page.evaluate(code)
            return busy() - before

        work = "(() => { let sum = 0; for (let i = 0; i < 1e7; i++) sum += `${i}`.length; return sum; })()"
        units = [spent(work)]
        steps = spent(f"""(async () => {{
            const slider = Bokeh.documents[0].get_model_by_id({slider});
            for (let n = 500; n > 400; n -= 10) {{
                slider.value = n;
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            }}
        }})()""")
        units.append(spent(work))
        assert steps / 10 < sum(units) / 2
