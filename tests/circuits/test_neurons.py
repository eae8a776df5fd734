"""Graphs of neurons: effects and edges are autograd's on the model frozen by hand, sums of finer edges are those of coarser ones,
and a hundred neurons carry agreement."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import interp
from interp.circuits import NeuronCircuit
from interp.errors import CircuitError, SiteUnavailableError

from ..families import loaded
from ..oracle.configs import tiny
from ..oracle.relevance import forward, small_llama

CLEAN, CORRUPTED = [[3, 9, 31, 42, 17, 8], [6, 8, 30, 41, 12, 2]], [[3, 9, 33, 12, 17, 8], [6, 8, 35, 41, 50, 2]]
PAIRS = interp.PromptPairs(CLEAN, CORRUPTED, [20, 21], [25, 26])
ALL = 10_000


@cache
def small() -> LlamaForCausalLM:
    return small_llama(3, 10)


@cache
def found(family: str, method: str, **options: object) -> NeuronCircuit:
    return interp.discover(loaded(family), PAIRS, method, "neuron", top=ALL, progress=False, **options)


def by_hand(receiver: tuple[int, str, int], clean: Tensor, corrupted: Tensor) -> tuple[float, dict[str, float]]:
    """A receiver's effect on the frozen model, and its edges from the units of earlier layers, by autograd alone."""
    (layer, kind, number), hf = receiver, small()
    logits, blocks = forward(hf, clean)
    others = forward(hf, corrupted)[1]
    part = slice(number, number + 1) if kind == "neuron" else slice(number * 6, number * 6 + 6)
    live = [block["neuron"] for block in blocks]
    (slope,) = torch.autograd.grad(logits[0, 20] - logits[0, 25], blocks[layer][kind], retain_graph=True)
    own = ((others[layer][kind] - blocks[layer][kind]) * slope)[..., part].sum()
    does = (blocks[layer][kind] * slope.detach())[..., part].sum()
    (read,) = torch.autograd.grad(
        does, blocks[layer]["resid_mid" if kind == "neuron" else "resid_pre"], retain_graph=True
    )
    edges = {}
    for before in range(layer):
        change = others[before]["neuron"] - live[before]
        into = hf.model.layers[before].mlp.down_proj.weight
        wrote = torch.einsum("rpu,mu->rpum", change, into)
        for unit, score in enumerate((wrote * read.unsqueeze(2)).sum((0, 1, 3)).tolist()):
            edges[f"L{before}.neuron[{unit}]"] = score
    return float(own.detach()), edges


@pytest.mark.parametrize("receiver", [(1, "neuron", 4), (2, "neuron", 7), (1, "z", 2), (2, "z", 3)])
def test_edges_are_autograds_on_the_frozen_model(receiver: tuple[int, str, int]) -> None:
    pairs = interp.PromptPairs(CLEAN[:1], CORRUPTED[:1], [20], [25])
    with pytest.warns(UserWarning, match="add up to"):
        circuit = interp.discover(interp.load_model(small()), pairs, "relp", "neuron", top=ALL, progress=False)
    layer, kind, number = receiver
    name = f"L{layer}.neuron[{number}]" if kind == "neuron" else f"L{layer}.H{number}"
    effect, edges = by_hand(receiver, torch.tensor(CLEAN[:1]), torch.tensor(CORRUPTED[:1]))
    assert circuit.nodes[name] == pytest.approx(effect, rel=1e-4, abs=1e-6)
    largest = max(map(abs, edges.values()))
    assert largest > 1e-4
    for sender, want in edges.items():
        assert circuit.edges.get((sender, name), 0.0) == pytest.approx(want, abs=1e-4 * largest), sender


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gptj", "phi3"])
@pytest.mark.parametrize("method", ["secant", "eap"])
def test_finer_edges_add_up_to_those_of_whole_mlps_and_heads(family: str, method: str) -> None:
    """All neurons together are their MLP, up to its output bias, which does not change."""
    fine, coarse = found(family, method), interp.discover(loaded(family), PAIRS, method, progress=False).scores()
    size = max(map(abs, coarse.values()))
    for layer, later in ((0, 1), (0, 2), (1, 2)):
        units = [(f"L{layer}.neuron[{i}]", f"L{later}.neuron[{j}]") for i in range(48) for j in range(48)]
        assert sum(fine.edges.get(edge, 0) for edge in units) == pytest.approx(
            coarse[f"L{layer}.mlp", f"L{later}.mlp"], abs=1e-4 * size
        )
        out = sum(fine.edges.get((f"L{layer}.neuron[{i}]", "logits"), 0) for i in range(48))
        assert out == pytest.approx(coarse[f"L{layer}.mlp", "logits"], abs=1e-4 * size)
        for head in range(4):
            edge = (f"L{layer}.H1", f"L{later}.H{head}")
            assert fine.reads[(*edge, "q")] == pytest.approx(coarse[edge[0], f"{edge[1]}.q"], abs=1e-4 * size)
    assert fine.edges.get(("embed", "logits"), 0.0) == pytest.approx(coarse["embed", "logits"], abs=1e-4 * size)


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3"])
def test_what_arrives_at_a_node_is_its_effect(family: str) -> None:
    """By secants, with all nodes in the graph, each neuron's effect is the sum over its senders: no gradient gives that."""
    circuit = found(family, "secant", points=())  # averages of several parts add up at the embeddings alone
    assert circuit.meta["completeness"] <= 1e-4
    size = max(map(abs, circuit.nodes.values()))
    arrives = dict.fromkeys(circuit.nodes, 0.0)
    for (_, receiver), score in circuit.edges.items():
        if receiver in arrives:
            arrives[receiver] += score
    for name, effect in circuit.nodes.items():
        if name != "embed":
            assert arrives[name] == pytest.approx(effect, abs=1e-4 * size), name
    model = loaded(family)
    change = float(
        (lambda f: (f.corrupted - f.clean).mean())(interp.patch(model, PAIRS, interp.heads("z", layers=[0])))
    )
    direct = sum(score for (_, receiver), score in circuit.edges.items() if receiver == "logits")
    assert direct == pytest.approx(change, abs=1e-4 * abs(change) + 1e-5)


def test_held_patterns_pass_values_alone() -> None:
    held = found("llama_gqa", "secant", patterns="held")
    assert held.meta["patterns"] == "held" and "completeness" not in held.meta
    assert all(read == "v" for _, _, read in held.reads)
    moving = found("llama_gqa", "secant")
    assert {read for _, _, read in moving.reads} == {"q", "k", "v"}
    why = moving.why("L2.H1")
    assert list(why.columns) == ["q", "k", "v"] and "embed" in why.index
    for sender in why.index[:5]:
        assert why.loc[sender].sum() == pytest.approx(moving.edges[sender, "L2.H1"], abs=1e-6)
    with pytest.raises(CircuitError, match="no head of this circuit"):
        moving.why("L2.neuron[3]")


def test_the_strongest_are_kept_and_can_be_patched() -> None:
    model = loaded("gpt2")
    circuit = interp.discover(model, PAIRS, "secant", "neuron", top=20, progress=False)
    whole = found("gpt2", "secant")
    expected = [name for name, _ in whole.ranking() if name != "embed"][:20]
    assert set(circuit.nodes) == {"embed", *expected}
    for edge, score in circuit.edges.items():
        assert score == pytest.approx(whole.edges[edge], rel=1e-3, abs=1e-6)
    sites = circuit.sites(5)
    assert [str(site) for site in sites] == [str(site) for site in circuit.top(100).sites(5)]
    plan = interp.sets({str(site): [site] for site in sites})
    exact = interp.patch(model, PAIRS, plan)
    assert exact.values.shape[0] == 5


def test_files_and_pictures(tmp_path: Path) -> None:
    circuit = interp.discover(loaded("gpt2"), PAIRS, "secant", "neuron", top=12, progress=False)
    circuit.to_json(tmp_path / "c.json")
    again = NeuronCircuit.from_json(tmp_path / "c.json")
    assert (again.nodes, again.edges, again.reads) == (circuit.nodes, circuit.edges, circuit.reads)
    with pytest.raises(CircuitError, match="no circuit of features"):
        interp.circuits.FeatureCircuit.from_json(tmp_path / "c.json")
    circuit.to_tracer(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    ids = {node["node_id"] for node in data["nodes"]}
    assert len(ids) == len(circuit.nodes) + 1
    assert all({link["source"], link["target"]} <= ids for link in data["links"]) and data["links"]
    weights = sorted(link["weight"] for link in data["links"])
    assert weights == sorted(circuit.edges.values())
    figure = interp.plot_circuit_graph(circuit)
    html = figure.save(tmp_path / "c.html")
    assert Path(html).stat().st_size > 1000


def test_what_cannot_be_asked() -> None:
    model = loaded("gpt2")
    for options, said in (
        ({"method": "exact"}, "neurons are scored by 'eap' or 'eap-ig' or 'secant' or 'relp', not by 'exact'"),
        ({"patterns": "frozen"}, "it is 'moving' or 'held'"),
        ({"patterns": "held", "method": "eap"}, "goes with method='secant'"),
        ({"top": 0}, "top=0"),
        ({"saes": []}, "saes= is of no use at level='neuron'"),
    ):
        with pytest.raises(CircuitError, match=said):
            interp.discover(model, PAIRS, level="neuron", **{"method": "secant", **options})
    with pytest.raises(CircuitError, match="patterns= is of no use at level='edge'"):
        interp.discover(model, PAIRS, patterns="held")
    with pytest.raises(SiteUnavailableError):
        interp.discover(loaded("mixtral"), PAIRS, "secant", "neuron")


def test_the_simulated_backend_gives_the_same() -> None:
    hf, tokenizer = tiny("llama_gqa")
    there = interp.load_model(hf, tokenizer=tokenizer, backend="simulated")
    got = interp.discover(there, PAIRS, "secant", "neuron", top=15, progress=False)
    want = interp.discover(loaded("llama_gqa"), PAIRS, "secant", "neuron", top=15, progress=False)
    assert got.nodes == pytest.approx(want.nodes, abs=1e-5) and got.edges == pytest.approx(want.edges, abs=1e-5)


@pytest.mark.slow
def test_a_hundred_neurons_carry_agreement(bundled: interp.Model) -> None:
    """Of 46,080, found on 32 pairs, on 32 others; random ones do nothing."""
    pairs = interp.tasks.agreement(bundled.tokenizer, n=64)
    circuit = interp.discover(bundled, pairs[:32], "secant", "neuron", top=200, progress=False)
    assert circuit.meta["completeness"] <= 1e-4
    names = [site for site in circuit.sites() if site.kind == "neuron"][:100]
    rng = np.random.default_rng(0)
    drawn = [
        interp.Site("neuron", layer=int(layer), unit=int(unit))
        for layer, unit in zip(rng.integers(0, 30, 100), rng.integers(0, 1536, 100), strict=True)
    ]
    found = interp.patch(bundled, pairs[32:], interp.sets({"best": names, "random": drawn}), progress=False)
    recovered = (found.values - found.clean).mean("pair") / float((found.corrupted - found.clean).mean())
    assert float(recovered[0]) >= 0.75 > 0.1 > abs(float(recovered[1]))
