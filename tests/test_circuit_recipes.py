"""The recipes on circuits: they run on a tiny model, write what they say, and their numbers are those of calls by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp

from .oracle.configs import widen
from .plots.browser import Page
from .test_recipes import recipe
from .toy_tokenizers import byte_level, task_texts


@pytest.fixture(scope="module")
def model() -> interp.Model:
    """A random model with a tokenizer that knows every word of the tasks."""
    tokenizer = byte_level(task_texts())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval().requires_grad_(False)
    widen(hf)
    return interp.load_model(hf, tokenizer=tokenizer)


def run(name: str, model: interp.Model, arguments: list[str], pictures: bool = True) -> Path:
    """What a recipe's main returns, on a model in place of the one it would load; without pictures, as without a browser."""
    module, patch = recipe(name), pytest.MonkeyPatch()
    patch.setattr(interp, "load_model", lambda *_, **__: model)
    if not pictures:
        patch.setenv("INTERP_CHROMIUM", "none")
    try:
        return module.main(arguments)
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def ioi(model: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ioi_circuit wrote for three pairs."""
    out = tmp_path_factory.mktemp("recipes") / "ioi"
    assert run("ioi_circuit", model, ["--n", "3", "--steps", "2", "--target", "0.2", "--out", str(out)]) == out
    return out


@pytest.fixture(scope="module")
def pruned(model: interp.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prune_circuit wrote for every ablation."""
    out = tmp_path_factory.mktemp("recipes") / "prune"
    arguments = ["--threshold", "0.24", "--ablation", "zero", "mean", "resample", "--out", str(out)]
    assert run("prune_circuit", model, arguments, pictures=False) == out
    return out


def test_files(ioi: Path, pruned: Path) -> None:
    def written(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if path.suffix != ".png"}

    assert written(ioi) == {
        "circuit.html", "circuit.json", "curves.csv", "curves.html", "index.html", "matrix.html", "sizes.csv", "summary.md",
    }  # fmt: skip
    names = {f"{name}.{suffix}" for name in ("zero", "mean", "resample") for suffix in ("json", "html")}
    assert written(pruned) == names | {"trajectory.html", "trajectory.csv", "summary.md"}


def pairs_of(model: interp.Model, n: int) -> interp.PromptPairs:
    return interp.tasks.ioi(model.tokenizer, n=n, seed=0, template=0, order="ABBA")


def test_curves_are_those_of_calls_by_hand(model: interp.Model, ioi: Path) -> None:
    pairs, curves = pairs_of(model, 3), pd.read_csv(ioi / "curves.csv")
    assert curves["method"].unique().tolist() == ["EAP", "EAP-IG", "exact nodes", "random"]
    for name, (method, level, options) in {
        "EAP": ("eap", "edge", {}),
        "EAP-IG": ("eap-ig", "edge", {"steps": 2}),
        "exact nodes": ("exact", "node", {}),
    }.items():
        circuit = interp.discover(model, pairs, method, level, progress=False, **options)
        evaluation = interp.evaluate_circuit(model, pairs, circuit, progress=False)
        rows = curves[curves["method"] == name]
        assert rows["faithfulness"].tolist() == pytest.approx(evaluation.curve["faithfulness"].tolist(), abs=1e-4)
        assert rows["cpr"].iloc[0] == pytest.approx(evaluation.cpr, abs=1e-4)
        assert rows["cmd"].iloc[0] == pytest.approx(evaluation.cmd, abs=1e-4)
    assert (curves.groupby("method")["faithfulness"].last() - 1).abs().max() <= 1e-4


def test_the_circuit_is_the_connected_part_of_a_measured_size(model: interp.Model, ioi: Path) -> None:
    circuit, pairs = interp.Circuit.from_json(ioi / "circuit.json"), pairs_of(model, 3)
    ranking = interp.discover(model, pairs, "eap-ig", steps=2, progress=False)
    step = circuit.meta["selection"][-1]
    assert set(circuit.edges) <= set(ranking.top(n_edges=step["n_edges"]).edges)
    value = interp.run_circuit(model, pairs, circuit, progress=False)
    whole = interp.run_circuit(model, pairs, ranking.top(n_edges=step["n_edges"]), progress=False)
    assert value.tolist() == pytest.approx(whole.tolist(), abs=1e-4)  # what is on no path moves nothing
    sizes = pd.read_csv(ioi / "sizes.csv").set_index("top")
    assert sizes["on_a_path"][step["n_edges"]] == circuit.n_edges == step["after"]
    smaller = sizes[(sizes.index < step["n_edges"]) & (sizes["on_a_path"] > 0)]
    assert sizes["faithfulness"][step["n_edges"]] >= 0.2 and (smaller["faithfulness"] < 0.2).all()
    text = (ioi / "summary.md").read_text()
    assert f"to reach 0.2: {circuit.n_edges} edges" in text and f"the best {step['n_edges']} that lie" in text
    assert "completeness" in text and "peak memory" in text


def test_pruned_circuits_are_those_of_calls_by_hand(model: interp.Model, pruned: Path) -> None:
    pairs, tests = pairs_of(model, 1), pd.read_csv(pruned / "trajectory.csv")
    clean = interp.run_circuit(model, pairs, interp.discover(model, pairs, "eap", progress=False), progress=False)
    for name in ("zero", "mean", "resample"):
        circuit = interp.Circuit.from_json(pruned / f"{name}.json")
        found = interp.iterative_pruning(model, pairs=pairs, threshold=0.24, ablation_type=name, progress=False)
        assert circuit.nodes() == found.nodes() and 0 < circuit.n_nodes < 15
        rows = tests[tests["ablation"] == name]
        assert rows["node"].tolist() == [test["node"] for test in found.trajectory]
        heads = len(list(circuit))
        row = next(line for line in (pruned / "summary.md").read_text().splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == [str(heads), str(circuit.n_nodes - heads)]
        assert float(cells[6]) == pytest.approx(clean[0], abs=0.006)
        assert float(cells[7]) == pytest.approx(circuit.meta["metric_value"], abs=0.006)


@pytest.mark.parametrize(
    ("folder", "page", "word"),
    [("ioi", "curves", "faithfulness"), ("ioi", "circuit", "logits"), ("pruned", "trajectory", "nodes left")],
)
def test_pages_open_with_no_error_and_no_network(
    folder: str, page: str, word: str, chromium: str, request: pytest.FixtureRequest
) -> None:
    with Page(request.getfixturevalue(folder) / f"{page}.html") as opened:
        assert opened.errors == [] and opened.network == []
        assert word in " ".join(text["text"] for canvas in opened.drawn() for text in canvas)


def test_a_prompt_of_ones_own_can_be_pruned(model: interp.Model, tmp_path: Path) -> None:
    arguments: list[Any] = ["--prompt", "They went to", "--answers", " Mary", " John", "--threshold", "100"]
    run("prune_circuit", model, [*arguments, "--ablation", "mean", "--out", str(tmp_path)])  # with its pictures
    assert "none left" in (tmp_path / "summary.md").read_text()
    assert torch.is_grad_enabled()
    with pytest.raises(SystemExit):
        run("prune_circuit", model, [*arguments, "--ablation", "resample", "--out", str(tmp_path)], pictures=False)
    with pytest.raises(SystemExit):
        run("prune_circuit", model, ["--prompt", "They went to", "--out", str(tmp_path)], pictures=False)
