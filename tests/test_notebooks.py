"""The notebooks: stripped in git, each runs from top to bottom, and their copies in the docs are what they write."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode

from interp.errors import PlotError

from .plots.browser import Page
from .tools.notebooks import (
    KERNEL,
    LARGEST,
    NAMES,
    PICTURES,
    RECIPES,
    TUTORIALS,
    executed,
    links,
    markdown,
    read,
    rendered,
    said,
    stripped,
    text_of,
    with_settings,
)

#: What the tests that take seconds set: fewer pairs and layers. What the text says of numbers is tested on the whole.
SHORT = {
    "colab_setup": {"MODEL": "gpt2", "WANDB": True},
    "tour": {"N": 2, "LAYERS": [20, 23]},
    "exploratory": {"N": 1, "LAYERS": [20, 23, 24]},
}
PAIR = "Then, Jeffrey and Justin went to the hotel. Jeffrey gave a computer to"
#: Words that each must have written, wherever it runs.
WRITES = {
    "colab_setup": ["no model 'gpt2'", "Going on with the bundled model", "first_patch finished", "Paris", "(16, 576)"],
    "tour": [PAIR, "ioi finished", "site L40.resid_mid: layer 40", "True 1009 checks", "ioi_report.html"],
    "exploratory": [PAIR, "(' Jeffrey', ' Jeffrey')", "n_edges", "L20.H0"],
}
#: What the exploratory notebook says in words, checked in its own kernel behind its last cell.
CLAIMS = """
def near(value, said, within=0.06):
    assert abs(float(value) - said) <= within, (float(value), said)

near(stream.clean.mean(), 4.4); near(stream.corrupted.mean(), -6.7)
at = stream.mean(normalized=True).sel(component="resid_pre")
assert (at.sel(position=11, layer=range(20)) > 0.95).all() and (abs(at.sel(position=15, layer=range(20))) < 0.05).all()
near(at.sel(position=15, layer=21), 0.5); assert (at.sel(position=15, layer=range(25, 30)) > 0.85).all()
assert (abs(at.sel(position=11, layer=range(25, 30))) < 0.05).all()
move = parts.mean(normalized=True)
near(move.sel(component="attn_out", layer=20, position=15), 0.4); near(move.sel(component="attn_out", layer=23, position=15), 0.8)
assert move.sel(component="attn_out", layer=24, position=15) < -0.2 and move.sel(component="mlp_out", layer=0, position=11) > 0.95
others = abs(move.sel(component="mlp_out")).copy(); others.loc[0, 11] = 0; assert others.max() < 0.2
near(ranked[23, 3], 0.4); near(ranked[20, 0], 0.4)
assert {tuple(map(int, one)) for one in ranked.head(2).index} == {(23, 3), (20, 0)} and ranked[29, 1] > 0.2
assert all(ranked[one] < -0.05 for one in [(29, 0), (24, 4), (24, 5)]) and (abs(ranked) > 0.05).sum() <= 12
near(own[23, 3], 2.0); assert own.index[0] == (23, 3) and abs(own[20, 0]) < 0.1
table = looks(["L20.H0", "L23.H3", "L23.H7", "L24.H4"])
near(table["L20.H0"]["S2"], 0.8); near(table["L23.H3"]["S2"], 0.6); assert table["L23.H7"].idxmax() == "IO"
assert min(table["L24.H4"][["IO", "S2"]]) > 0.35
alone = {name: interp.direct_effects(model, interp.PromptPairs(list(pairs.clean), answers=list(answers)), by="head")
         .values.mean("pair").sel(component="head_out") for name, answers in (("IO", pairs.answers), ("S", pairs.distractors))}
near(alone["S"].sel(layer=23, head=3), -2.2); near(alone["IO"].sel(layer=23, head=3), -0.1, 0.1)
near(alone["IO"].sel(layer=23, head=0), 1.1); near(alone["S"].sel(layer=23, head=0), 0.5)
assert all(alone[name].sel(layer=24, head=4) < -0.5 for name in alone)
told = paths.mean(normalized=True)
near(told.sel(sender="L23.H3", receiver="logits"), 0.4); near(told.sel(sender="L0.mlp", receiver="L23.H1.v"), 0.3)
near(told.sel(sender="L20.H0", receiver="L23.H7.q"), 0.2); near(told.sel(sender="L20.H0", receiver="L23.H0.q"), 0.1)
assert abs(told.sel(sender="L20.H0", receiver="logits")) < 0.02
assert (abs(told.sel(receiver="L23.H3.q").dropna("sender")) < 0.05).all()
before, after = looks(["L23.H7", "L23.H0"]), looks(["L23.H7", "L23.H0"], edits=[off])
assert (after.loc["IO"] < before.loc["IO"] - 0.04).all() and (after.loc["S1"] > before.loc["S1"] + 0.03).all()
kept = score.curve.set_index("fraction")["faithfulness"].round(3)
assert circuit.n_edges == 70651; near(kept.iloc[3], 0.8); near(kept.iloc[4], 0.9)
assert [head for head, _ in found.most_common(2)] == ["L20.H0", "L23.H3"]
near(means.iloc[0], 1.1); near(means.iloc[1], 5.6); near(means.iloc[2], 4.4, 0.15)
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels stand beside other test processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")


def sources(notebook: NotebookNode) -> list[str]:
    """The code of each cell."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_stripped_and_valid(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == KERNEL
    assert all(cell.get("id") for cell in notebook.cells) and len({c.id for c in notebook.cells}) == len(notebook.cells)
    text = (RECIPES / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == text_of(stripped(read(name))), "python -m tests.tools.notebooks --strip"
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs, cell.execution_count) == ([], None)


def test_stripping_takes_out_what_a_run_leaves() -> None:
    notebook = read("tour")
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="secret")], 7
    cell.metadata["execution"] = {"shell.execute_reply": "now"}
    notebook.metadata["widgets"] = {"state": 1}
    assert text_of(stripped(notebook)) == (RECIPES / "tour.ipynb").read_text(encoding="utf-8")


def test_settings_of_no_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters are not M"):
        with_settings(read("tour"), {"M": 1})
    with pytest.raises(ValueError, match='tagged "parameters"'):
        with_settings(nbformat.v4.new_notebook(), {"N": 1})


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, tmp_path: Path) -> None:
    """From top to bottom in a new kernel, shortened; nothing is left outside the folder that it ran in."""
    before = {path for folder in (RECIPES, RECIPES.parent) for path in folder.iterdir()}
    notebook = executed(with_settings(read(name), SHORT[name]), tmp_path)
    text = "\n".join(said(cell) for cell in notebook.cells)
    flat = re.sub(r"\s+", " ", text)
    for words in WRITES[name]:
        assert words in flat, text
    assert {path.name for path in tmp_path.iterdir()} <= {"artifacts", ".jupyter"}
    assert {path for folder in (RECIPES, RECIPES.parent) for path in folder.iterdir()} == before
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "text/html" in output.get("data", {})
    ]
    assert all("<iframe srcdoc=" in o.data["text/html"] for o in shown if o.data["text/plain"].startswith("Figure("))
    assert shown


def first_cell() -> str:
    return sources(read("colab_setup"))[0]


def test_elsewhere_the_first_cell_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("installed something"))
    exec(first_cell(), {})
    assert re.search(r"^torch +\d", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("there", [True, False])
def test_on_colab_the_first_cell_installs_the_folder(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    folder = tmp_path / "interp"
    if there:
        folder.mkdir()
    cell = first_cell().replace('"/content/interp"', repr(str(folder)))
    if there:
        exec(cell, {})
        assert ran == [[sys.executable, "-m", "pip", "install", "--quiet", str(folder)]]
    else:
        with pytest.raises(FileNotFoundError, match="put the library's folder"):
            exec(cell, {})
        assert not ran


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_the_notebooks_cells(name: str) -> None:
    """And every picture and page that they link to, each of them small."""
    page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL) == sources(read(name)), (
        "make notebooks"
    )
    for cell in read(name).cells:
        assert cell.cell_type == "code" or links(cell.source) in page, "make notebooks"
    targets = re.findall(r"\]\((?!https?://)([^)\s#]+)\)", page)
    assert all((TUTORIALS / target).exists() for target in targets), targets
    own = {target.removeprefix("img/") for target in targets if target.startswith("img/")}
    assert own == {path.name for path in PICTURES.glob(f"{name}-*.png")}
    assert all((PICTURES / file).stat().st_size <= LARGEST for file in own)


def test_a_copy_has_text_and_pictures() -> None:
    cell = nbformat.v4.new_code_cell("draw()")
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="4.4\n"),
        nbformat.v4.new_output("stream", name="stderr", text="a warning\n"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "Figure('A title')", "image/png": dot}),
    ]
    text = nbformat.v4.new_markdown_cell("# One\n\n[a](../docs/a.md) [b](tour.ipynb)")
    page, pictures = markdown("x", nbformat.v4.new_notebook(cells=[text, cell]))
    assert "[a](../a.md) [b](tour.md)" in page and "```text\n4.4\n```" in page and "warning" not in page
    assert "![A title](img/x-1.png)" in page and pictures["x-1.png"].startswith(b"\x89PNG")


def test_pictures_draw_in_an_exported_page(tmp_path: Path, chromium: str) -> None:
    """What Jupyter shows: the figures' frames in a page of nbconvert, without errors and without the network."""
    from nbconvert import HTMLExporter

    code = """
import numpy as np, interp
interp.plot_attention(np.tril(np.ones((2, 3, 3))) / [[[1], [2], [3]]], ["a", "b", "c"], title="Two heads")
"""
    notebook = executed(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path)
    page, _ = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="").from_notebook_node(notebook)
    page += "<script>document.documentElement.dataset.ready = 'yes'</script>"  # what our browser waits for
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    with Page(tmp_path / "page.html") as opened:
        drawn = """(async () => { for (let i = 0; i < 100; i++) {
            const frame = document.querySelector("iframe").contentDocument;
            if (frame && frame.querySelector("h1") && frame.defaultView.Bokeh) return frame.querySelector("h1").textContent;
            await new Promise((done) => setTimeout(done, 50)); } })()"""
        assert opened.evaluate(drawn) == "Two heads"
        assert opened.errors == []


def test_a_cell_that_fails_fails(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(notebook, tmp_path)


@pytest.mark.slow
def test_what_the_analysis_says_is_so(tmp_path: Path) -> None:
    notebook = read("exploratory")
    notebook.cells.append(nbformat.v4.new_code_cell(CLAIMS))
    executed(notebook, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_what_the_notebooks_write(name: str) -> None:
    """The same words; numbers as near as another processor's arithmetic leaves them."""
    try:
        page, pictures = rendered(name)
    except PlotError as error:  # no browser
        pytest.skip(str(error))
    there = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", re.sub(" +", " ", page)) == re.sub(number, "#", re.sub(" +", " ", there)), (
        "make notebooks"
    )
    for new, old in zip(re.findall(number, page), re.findall(number, there), strict=True):
        assert math.isclose(float(new), float(old), rel_tol=0.05, abs_tol=0.11), "make notebooks"
    assert set(pictures) == {path.name for path in PICTURES.glob(f"{name}-*.png")}
