"""Circuits of features against autograd and plain hooks on the blocks' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.circuits import FeatureCircuit
from interp.errors import CircuitError, PlanError
from interp.saes.library import Dictionary
from tests.families import allowed, loaded, words
from tests.oracle.configs import tiny
from tests.saes.made import random_dictionary

FAMILIES = ("gpt2", "llama_gqa", "gemma3", "gpt_neox")
LAYERS = (0, 1, 2)
every = pytest.mark.parametrize("family", FAMILIES)


@cache
def dictionaries(family: str) -> tuple[Dictionary, ...]:
    forms = {0: "TopK", 1: "JumpReLU", 2: "Standard"}
    d = loaded(family).d_model
    return tuple(random_dictionary(forms[layer], d, 24, f"L{layer}.resid_post") for layer in LAYERS)


@cache
def pairs() -> PromptPairs:
    clean = words(7, 7)
    corrupted = [[prompt[0], 99 - prompt[1] % 50, *prompt[2:]] for prompt in clean]
    return PromptPairs(clean, corrupted, [20, 21], [40, 41])


class Hooked:
    """The plain model; each block's output can be kept, and changed."""

    def __init__(self, family: str) -> None:
        self.hf = tiny(family)[0].eval()
        self.blocks = next(part for part in self.hf.modules() if isinstance(part, torch.nn.ModuleList))

    def run(
        self, ids: Any, changes: Mapping[int, Callable[[Tensor], Tensor]], pair: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        seen: dict[int, Tensor] = {}
        handles = []
        for layer in LAYERS:

            def hook(_: Any, __: Any, out: Any, layer: int = layer) -> Any:
                x = out[0] if isinstance(out, tuple) else out
                seen[layer] = changes.get(layer, lambda y: y)(x)
                return (seen[layer], *out[1:]) if isinstance(out, tuple) else seen[layer]

            handles.append(self.blocks[layer].register_forward_hook(hook))
        try:
            logits = self.hf(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits[20 + pair] - logits[40 + pair], seen


def expected(family: str) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Effects of every node and edge, mean over pairs, by autograd alone."""
    hooked, saes = Hooked(family), dictionaries(family)
    nodes: dict[str, list[float]] = {}
    edges: dict[tuple[str, str], list[float]] = {}
    for pair, (clean, corrupted) in enumerate(zip(pairs().clean, pairs().corrupted or (), strict=True)):
        with torch.no_grad():
            source = hooked.run(corrupted, {}, pair)[1]
        leaf = {0: lambda x: x.detach().requires_grad_(True)}
        metric, x = hooked.run(clean, leaf, pair)
        slopes = dict(zip(LAYERS, torch.autograd.grad(metric, [x[n] for n in LAYERS], retain_graph=True), strict=True))

        def parts(layer: int, gradient: Tensor, x: Any = x, source: Any = source) -> list[float]:
            """What each feature's change, and the error's, does along a gradient."""
            sae = saes[layer]
            with torch.no_grad():
                now, then = x[layer].detach(), source[layer]
                features = (sae.encode(then) - sae.encode(now)) * (gradient @ sae.W_dec.T)
                error = ((then - sae(then)) - (now - sae(now))) * gradient  # type: ignore[operator]
            return [*features.sum((0, 1)).tolist(), float(error.sum())]

        def names(layer: int) -> list[str]:
            return [*(f"L{layer}.sae{layer}[{unit}]" for unit in range(24)), f"L{layer}.error{layer}"]

        for layer in LAYERS:
            for name, score in zip(names(layer), parts(layer, slopes[layer]), strict=True):
                nodes.setdefault(name, []).append(score)
        for layer in LAYERS[1:]:
            sae, gradient = saes[layer], slopes[layer]
            f = sae.encode(x[layer]) * (gradient @ sae.W_dec.T).detach()
            error = (x[layer] - sae(x[layer])) * gradient  # type: ignore[operator]
            for end, target in zip(names(layer), [*f.sum((0, 1)), error.sum()], strict=True):
                (back,) = torch.autograd.grad(target, x[layer - 1], retain_graph=True)
                for start, score in zip(names(layer - 1), parts(layer - 1, back), strict=True):
                    edges.setdefault((start, end), []).append(score)
    return {k: float(np.mean(v)) for k, v in nodes.items()}, {k: float(np.mean(v)) for k, v in edges.items()}


@every
def test_nodes_and_edges_are_those_of_autograd(family: str) -> None:
    found = interp.discover(
        loaded(family), pairs(), "eap", "feature", saes=list(reversed(dictionaries(family))), top=1000
    )
    nodes, edges = expected(family)
    assert set(found.nodes) == set(nodes)
    inner = {edge: score for edge, score in found.edges.items() if edge[1] != "logits"}
    assert set(inner) == set(edges)
    for got, want in ((found.nodes, nodes), (inner, edges)):
        values = torch.tensor(list(want.values()))
        assert float(values.abs().max()) > 1e-3
        np.testing.assert_allclose([got[key] for key in want], values, rtol=0, atol=allowed(values))
    last = {edge[0]: score for edge, score in found.edges.items() if edge[1] == "logits"}
    assert last == {name: score for name, score in found.nodes.items() if name.startswith("L2.")}


@every
@torch.no_grad()
def test_a_circuit_is_run_with_all_other_nodes_cut(family: str) -> None:
    saes, model = dictionaries(family)[:2], loaded(family)
    whole = interp.discover(model, pairs(), "eap", "feature", saes=saes, top=1000)
    circuit = whole.top(12)
    hooked = Hooked(family)
    for errors in (False, True):
        found = interp.run_circuit(model, pairs(), circuit, errors=errors)
        for pair, (clean, corrupted) in enumerate(zip(pairs().clean, pairs().corrupted or (), strict=True)):
            source = hooked.run(corrupted, {}, pair)[1]

            def cut(layer: int, source: Any = source, errors: bool = errors) -> Callable[[Tensor], Tensor]:
                sae = saes[layer]
                kept = [unit for unit in range(24) if f"L{layer}.sae{layer}[{unit}]" in circuit.nodes]
                stays = errors or f"L{layer}.error{layer}" in circuit.nodes

                def change(x: Tensor) -> Tensor:
                    f, other = sae.encode(x), sae.encode(source[layer])
                    other[..., kept] = f[..., kept]
                    rest = x if stays else source[layer]
                    return sae.decode(other) + (rest - sae(rest))  # type: ignore[operator]

                return change

            want = hooked.run(clean, {0: cut(0), 1: cut(1)}, pair)[0]
            assert float(abs(found[pair] - want)) <= 2e-5
    evaluation = interp.evaluate_circuit(model, pairs(), whole)
    assert evaluation.curve["n_nodes"].tolist() == [1, 2, 5, 10, 20, 50]
    assert evaluation.curve["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-4), "with every node it is the model"
    corrupted = [float(hooked.run(ids, {}, pair)[0]) for pair, ids in enumerate(pairs().corrupted or ())]
    assert evaluation.empty == pytest.approx(np.mean(corrupted), abs=1e-5), "with none it is the corrupted run"
    zero = interp.run_circuit(model, pairs(), whole.top(0), ablation="zero", saes=saes[:1])
    bias = saes[0].b_dec  # what is left of the stream without features and error
    want = [float(hooked.run(ids, {0: lambda x: bias.expand_as(x)}, pair)[0]) for pair, ids in enumerate(pairs().clean)]
    np.testing.assert_allclose(zero, want, atol=2e-5)


def test_integrated_gradients_end_where_patching_does() -> None:
    """All parts of a site together are its patch; along the path their effects add up to the change."""
    model, saes = loaded("llama_gqa"), dictionaries("llama_gqa")[2:]
    found = interp.discover(model, pairs(), "eap-ig", "feature", saes=saes, top=1000, steps=64)
    full = interp.patch(model, pairs(), interp.grid("resid_post", [2])).clean
    patched = interp.patch(model, pairs(), interp.sets({"all": ["L2.resid_post"]})).values[0]
    want = float((patched - full).mean())
    assert sum(found.nodes.values()) == pytest.approx(want, rel=0.1)


def test_on_a_server_it_is_the_same() -> None:
    here, saes = loaded("llama_gqa"), dictionaries("llama_gqa")[:2]
    there = interp.load_model(tiny("llama_gqa")[0], tokenizer=here.tokenizer, backend="simulated")
    one, other = (interp.discover(model, pairs(), "eap", "feature", saes=saes, top=9) for model in (here, there))
    assert other.nodes == pytest.approx(one.nodes, abs=1e-5) and other.edges == pytest.approx(one.edges, abs=1e-5)
    np.testing.assert_allclose(
        interp.run_circuit(there, pairs(), other), interp.run_circuit(here, pairs(), one), rtol=0, atol=1e-5
    )


def test_files_and_parts(tmp_path: Path) -> None:
    model, saes = loaded("gpt2"), dictionaries("gpt2")
    whole = interp.discover(model, pairs(), "eap", "feature", saes=saes, top=30)
    assert len(whole.nodes) == 30 and whole.graph.number_of_edges() == len(whole.edges)
    small = whole.top(5)
    assert list(small.nodes) == [name for name, _ in whole.ranking()[:5]]
    assert set(small.edges) == {edge for edge in whole.edges if set(edge) <= {*small.nodes, "logits"}}
    whole.to_json(tmp_path / "c.json")
    again = FeatureCircuit.from_json(tmp_path / "c.json", saes)
    assert again.nodes == whole.nodes and again.edges == whole.edges and again.meta == whole.meta
    np.testing.assert_array_equal(interp.run_circuit(model, pairs(), again), interp.run_circuit(model, pairs(), whole))
    (tmp_path / "torn.json").write_text('{"schema": "x"')
    with pytest.raises(CircuitError, match="is no circuit of features"):
        FeatureCircuit.from_json(tmp_path / "torn.json")


def test_what_cannot_be_found_says_so() -> None:
    model, saes = loaded("gpt2"), dictionaries("gpt2")
    elsewhere = random_dictionary("TopK", 32, site="L1.mlp_out")
    alone = PromptPairs(words(7), None, [3], [4])
    for options, error, message in (
        ({}, CircuitError, "needs dictionaries: give saes="),
        ({"saes": [elsewhere]}, PlanError, "at L1.mlp_out: circuits of features are of the residual stream"),
        ({"saes": [saes[0], saes[0]]}, PlanError, "two dictionaries are at one site"),
        ({"saes": saes, "method": "exact"}, CircuitError, "by 'eap' or 'eap-ig', not by 'exact'"),
        ({"saes": saes, "level": "edge"}, CircuitError, "saes= is of no use at level='edge'"),
    ):
        with pytest.raises(error, match=message):
            interp.discover(model, pairs(), **{"method": "eap", "level": "feature", **options})  # type: ignore[arg-type]
    with pytest.raises(CircuitError, match="give PromptPairs"):
        interp.discover(model, alone, "eap", "feature", saes=saes)
