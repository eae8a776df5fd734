"""The recipe: it runs on the bundled model, writes what it says, and its pages open in a browser with no network."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interp

from .plots.browser import Page

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("grid", "heads", "fact")
PAGES = (*NAMES, "attention")


def recipe(name: str) -> Any:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(bundled: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe wrote for one pair; the model is the one that other tests have loaded."""
    out = tmp_path_factory.mktemp("demo") / "study"
    module, patch = recipe("activation_patching"), pytest.MonkeyPatch()
    patch.setattr(interp, "load_model", lambda *_, **__: bundled)
    try:
        got = module.main(["--n", "1", "--components", "resid_pre", "attn_out", "--out", str(out)])
    finally:
        patch.undo()
    assert got == out
    return out


def test_files(results: Path) -> None:
    written = {path.name for path in results.iterdir()}
    wanted = {f"{name}.nc" for name in NAMES} | {f"{name}.html" for name in (*PAGES, "index")} | {"summary.md"}
    assert written - {f"{name}.png" for name in PAGES} == wanted


def test_effects_are_those_of_a_call_by_hand(results: Path, bundled: interp.Model) -> None:
    saved = interp.Effects.load(results / "grid.nc")
    assert saved.values.dims == ("component", "layer", "position", "pair")
    assert saved.values["component"].values.tolist() == ["resid_pre", "attn_out"]
    pairs = interp.tasks.ioi(bundled.tokenizer, n=1, seed=0, template=0, order="ABBA")
    hand = interp.patch(bundled, pairs, interp.grid("resid_pre", layers=22))
    np.testing.assert_allclose(saved.values.sel(component="resid_pre", layer=22), hand.values[0, 0], atol=1e-5 * 28)
    heads = interp.Effects.load(results / "heads.nc")
    assert dict(heads.values.sizes) == {"component": 1, "layer": 30, "head": 9, "pair": 1}
    fact = interp.Effects.load(results / "fact.nc")
    assert fact.provenance["tokens"][0][1:5] == ["The", " E", "iffel", " Tower"]
    assert fact.clean.item() > 0 > fact.corrupted.item()


def test_summary_says_what_the_effects_say(results: Path) -> None:
    text = (results / "summary.md").read_text()
    grid, heads = (interp.Effects.load(results / f"{name}.nc") for name in ("grid", "heads"))
    assert f"clean {float(grid.clean.mean()):.2f}, corrupted {float(grid.corrupted.mean()):.2f}" in text
    size = abs(heads.mean(normalized=True)).to_series()
    _, layer, head = size.idxmax()
    assert f"`z`, strongest: L{layer}.H{head}: " in text
    assert re.search(r"`resid_pre`.*: 11 ' \w+' \[S2\]: layers 0 to \d+; 15 ' to' \[end\]: layers \d+ to 29", text)
    patches = {name: int(interp.Effects.load(results / f"{name}.nc").values.notnull().sum()) for name in NAMES}
    for name, count in patches.items():
        assert re.search(rf"^\| {name} \| .* \| {count} \| \d+ \|$", text, re.MULTILINE)
    assert "4-bit" in text
    for path in results.iterdir():
        assert f"- {path.name}\n" in text


@pytest.mark.parametrize("name", PAGES)
def test_pages_open_with_no_error_and_no_network(results: Path, chromium: str, name: str) -> None:
    with Page(results / f"{name}.html") as page:
        assert page.errors == []
        assert page.network == []
        words = " ".join(word["text"] for canvas in page.drawn() for word in canvas)
        assert {"grid": "attn_out", "heads": "head", "fact": "iffel", "attention": "L23.H3"}[name] in words


def test_the_index_is_a_report_of_all(results: Path, chromium: str) -> None:
    """Its sentences say the numbers of the records; it opens with no error and asks the network for nothing."""
    with Page(results / "index.html") as page:
        assert page.errors == [] and page.network == []
        words = page.evaluate("document.body.innerText")
    for title in (
        "ioi: components by layer and position",
        "ioi: attention heads",
        "One fact",
        "strongest heads attend to",
    ):
        assert title in words
    grid = interp.Effects.load(results / "grid.nc")
    assert f"{float(grid.clean.mean()):.2f}" in words and "4-bit" in words
    assert (results / "index.html").stat().st_size <= 5_000_000


def test_a_task_of_several_lengths_gives_pairs_of_one(bundled: interp.Model) -> None:
    pairs = interp.studies.aligned_pairs(bundled, "facts", 6, 0)
    assert len(pairs) == 6
    assert len({len(prompt) for prompt in bundled.encode(pairs).clean}) == 1
    several = bundled.encode(interp.tasks.facts(bundled.tokenizer, n=24))
    assert len({len(prompt) for prompt in several.clean}) > 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_use_public_names_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "interp"
    }
    assert used <= {*interp.__all__, "cli", "lens", "plots", "saes", "studies"}
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module.split(".")[0] == "interp"}


def test_a_remote_sweep_and_the_same_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a worker process; loaded again nothing is sent, and the page is written anew."""
    sweep = recipe("remote_sweep")
    page = sweep.main(["--n", "1", "--layers", "3", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "requests: 1" in said and "--resume" in said and page.stat().st_size > 10_000
    before = interp.Effects.load(page.with_suffix(".nc")).values
    page.unlink()
    assert sweep.main(["--resume", str(tmp_path / "sweep.job")]) == page and page.exists()
    assert interp.Effects.load(page.with_suffix(".nc")).values.equals(before)
