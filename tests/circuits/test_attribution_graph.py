"""Attribution graphs against autograd on a model frozen by plain PyTorch, and against exact ablation where all is linear."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.circuits import AttributionGraph, attribution_graph
from interp.errors import CircuitError, PairsError, PlanError, SiteError
from interp.saes.library import Dictionary, sae_lens
from tests.families import loaded, words
from tests.oracle.configs import tiny
from tests.oracle.frozen import Frozen
from tests.saes.made import random_dictionary

FAMILIES = ("gpt2", "llama_gqa", "gemma3", "gpt_neox", "qwen3")
PROMPT = words(6)[0]
every = pytest.mark.parametrize("family", FAMILIES)


def transcoder(width: int, features: int = 20, seed: int = 1, form: str = "JumpReLUTranscoder") -> Dictionary:
    library = sae_lens()
    config = getattr(library, f"{form}Config")(d_in=width, d_sae=features, d_out=width, apply_b_dec_to_input=False)
    made = getattr(library, form)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (width**0.5 if name[0] == "W" else 2))
        if hasattr(made, "threshold"):
            made.threshold.abs_().mul_(0.3)
    found: Dictionary = made
    return found


@cache
def transcoders(family: str, form: str = "JumpReLUTranscoder") -> dict[int, Dictionary]:
    return {layer: transcoder(loaded(family).d_model, seed=layer + 1, form=form) for layer in (0, 1, 2)}


def expected(
    family: str, given: dict[int, Dictionary], targets: list[str]
) -> tuple[dict[tuple[str, str], float], Frozen]:
    """Every edge into some targets: autograd on the frozen model, times what each source wrote."""
    skips = {layer: one.W_skip.detach() for layer, one in given.items() if hasattr(one, "W_skip")}
    frozen = Frozen(family, PROMPT, skips)
    edges: dict[tuple[str, str], float] = {}
    writes: dict[str, tuple[int, int, Tensor]] = {}
    for position in range(len(PROMPT)):
        writes[f"emb@{position}"] = (-1, position, frozen.leaves[-1][0, position].detach())
    with torch.no_grad():
        for layer in range(len(frozen.blocks)):
            out = frozen.leaves[layer][0]
            x = frozen.entered[layer][0]
            one = given.get(layer)
            error = out if one is None else out - one(x)
            for position in range(len(PROMPT)):
                writes[f"L{layer}.error@{position}"] = (layer, position, error[position])
            if one is not None:
                acts = one.encode(x)
                for position, number in acts.nonzero().tolist():
                    name = f"L{layer}.f{number}@{position}"
                    writes[name] = (layer, position, acts[position, number] * one.W_dec[number])
    for target in targets:
        if target.startswith("logit:"):
            token = LOGITS[family][target]
            slopes = frozen.slopes(lambda f, token=token: f.logits[token] - f.logits.mean())
        else:
            body, position = target.split("@")
            layer, number = int(body[1 : body.index(".")]), int(body[body.index(".f") + 2 :])
            vector = given[layer].W_enc[:, number].detach()
            slopes = frozen.slopes(lambda f, l=layer, p=int(position), v=vector: f.entered[l][0, p] @ v)  # noqa: E741
        for source, (layer, position, wrote) in writes.items():
            edges[target, source] = float(slopes[layer][position] @ wrote)
    return edges, frozen


LOGITS: dict[str, dict[str, int]] = {}


def graph_of(family: str, given: dict[int, Dictionary], **options: Any) -> AttributionGraph:
    model = loaded(family)
    found = attribution_graph(model, PROMPT, given, **options)
    logits = torch.as_tensor(tiny(family)[0].eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1])
    order = logits.softmax(-1)
    named = [name for name in found.nodes if name.startswith("logit:")]
    LOGITS[family] = {}
    for name in named:
        token = int((order - found.logits[name]).abs().argmin())
        assert float(order[token]) == pytest.approx(found.logits[name], abs=1e-5)
        LOGITS[family][name] = token
    return found


@every
@pytest.mark.parametrize("form", ["JumpReLUTranscoder", "SkipTranscoder"])
def test_every_edge_is_autograds_on_the_frozen_model(family: str, form: str) -> None:
    given = transcoders(family, form)
    found = graph_of(family, given, logits=3)
    targets = [name for name in found.nodes if ".f" in name or name.startswith("logit:")]
    want, frozen = expected(family, given, targets)
    assert {source for _, source in want} == {name for name in found.nodes if not name.startswith("logit:")}
    index = {name: number for number, name in enumerate(found.nodes)}
    got = torch.tensor([float(found.adjacency[index[target], index[source]]) for target, source in want])
    values = torch.tensor(list(want.values()))
    assert float(values.abs().max()) > 1e-2 and int((values != 0).sum()) > 100
    assert float((got - values).abs().max()) <= 1e-5 * max(1.0, float(values.abs().max()))
    plain = tiny(family)[0].eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    assert float((frozen.logits - plain).abs().max()) <= 1e-4, "freezing moves no value"


@every
def test_layers_without_a_transcoder_are_error_nodes_alone(family: str) -> None:
    given = {1: transcoders(family)[1]}
    found = graph_of(family, given, logits=2)
    assert {name.split(".")[0] for name in found.nodes if ".f" in name} == {"L1"}
    targets = [name for name in found.nodes if ".f" in name or name.startswith("logit:")]
    want, _ = expected(family, given, targets)
    index = {name: number for number, name in enumerate(found.nodes)}
    for (target, source), value in want.items():
        assert float(found.adjacency[index[target], index[source]]) == pytest.approx(value, abs=2e-5)


def linear_gpt2() -> tuple[Any, dict[int, Dictionary]]:
    """No norm, uniform attention, MLPs whose ReLU is always on, and transcoders that are those MLPs."""
    hf = tiny("gpt2")[0].eval()
    given: dict[int, Dictionary] = {}
    with torch.no_grad():
        hf.transformer.ln_f = torch.nn.Identity()
        for layer, block in enumerate(hf.transformer.h):
            block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
            d = hf.config.hidden_size
            block.attn.c_attn.weight[:, : 2 * d] = 0
            block.attn.c_attn.bias[: 2 * d] = 0
            block.mlp.act = torch.nn.ReLU()
            block.mlp.c_fc.weight.mul_(0.3)
            block.mlp.c_fc.bias.fill_(50.0)
            block.mlp.c_proj.weight.mul_(0.02)
            one = transcoder(d, block.mlp.c_fc.weight.shape[1], form="Transcoder")
            one.W_enc.copy_(block.mlp.c_fc.weight)
            one.b_enc.copy_(block.mlp.c_fc.bias)  # type: ignore[attr-defined]
            one.W_dec.copy_(block.mlp.c_proj.weight)
            one.b_dec.copy_(block.mlp.c_proj.bias)
            given[layer] = one
    return hf, given


def test_where_all_is_linear_attribution_is_exact_ablation() -> None:
    """The sum over all paths from a feature to a logit is what zeroing its hidden unit there takes from it."""
    hf, given = linear_gpt2()
    prompt = PROMPT[:3]
    model = interp.load_model(hf)
    found = attribution_graph(model, prompt, given, logits=1, max_features=10**6)
    features = [number for number, name in enumerate(found.nodes) if ".f" in name]
    between = found.adjacency[features][:, features].double()
    direct = found.adjacency[-1, features].double()
    total = direct.clone()
    # an edge is what a source adds to a reading; always on, a reading is an activation, so a share of it goes on
    acts = found.activations[features].double()
    step = between / acts[:, None]  # the share of a target's activation that comes from a source
    current = direct
    for _ in range(3):
        current = current @ step
        total = total + current
    token = int(hf(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())

    def centred(logits: Tensor) -> float:
        return float(logits[token] - logits.mean())

    plain = centred(hf(input_ids=torch.tensor([prompt])).logits[0, -1])
    for place in (0, 40, len(features) // 2, len(features) - 1):
        layer, number, position = interp.circuits.tracer.parsed(found.nodes[features[place]])

        def hook(_: Any, args: Any, position: int = position, number: str = number) -> Any:
            x = args[0].clone()
            x[0, position, int(number)] = 0
            return (x,)

        handle = hf.transformer.h[layer].mlp.c_proj.register_forward_pre_hook(hook)
        without = centred(hf(input_ids=torch.tensor([prompt])).logits[0, -1])
        handle.remove()
        assert float(total[place]) == pytest.approx(plain - without, abs=2e-4 * max(1.0, abs(plain)))


def test_the_most_influential_are_computed_first() -> None:
    given = transcoders("llama_gqa")
    whole = graph_of("llama_gqa", given)
    some = attribution_graph(loaded("llama_gqa"), PROMPT, given, max_features=7)
    rows = [name for number, name in enumerate(some.nodes) if ".f" in name and bool(some.adjacency[number].any())]
    assert len(rows) <= 7 and some.meta["rows"] == 7
    index = {name: number for number, name in enumerate(whole.nodes)}
    for name in rows:
        torch.testing.assert_close(
            some.adjacency[some.nodes.index(name)], whole.adjacency[index[name]], rtol=1e-4, atol=1e-5
        )


def test_pruning_keeps_what_influences_most() -> None:
    whole = graph_of("llama_gqa", transcoders("llama_gqa"))
    small = whole.prune(0.6, 0.8)
    assert len(small.nodes) < len(whole.nodes)
    assert {name for name in whole.nodes if name.startswith(("emb@", "logit:"))} <= set(small.nodes)
    inner = {name for name in small.nodes if not name.startswith(("emb@", "logit:"))}
    score = dict(zip(whole.nodes, whole.influence.tolist(), strict=True))
    rest = [name for name in whole.nodes if not name.startswith(("emb@", "logit:")) and name not in inner]
    assert min(score[name] for name in inner) >= max(score[name] for name in rest)
    index = {name: number for number, name in enumerate(whole.nodes)}
    for start, end, weight in small.graph.edges(data="weight"):
        assert weight == float(whole.adjacency[index[end], index[start]])
    with pytest.raises(CircuitError, match=r"node_threshold=0: it is a share"):
        whole.prune(0)


def test_on_a_server_it_is_the_same() -> None:
    here = loaded("llama_gqa")
    there = interp.load_model(tiny("llama_gqa")[0], tokenizer=here.tokenizer, backend="simulated")
    given = {1: transcoders("llama_gqa")[1]}
    a, b = (attribution_graph(model, PROMPT, given, logits=2) for model in (here, there))
    assert a.nodes == b.nodes
    torch.testing.assert_close(a.adjacency, b.adjacency, rtol=1e-4, atol=1e-5)


def test_files_and_circuit_tracers_json(tmp_path: Path) -> None:
    whole = graph_of("gpt2", transcoders("gpt2"), logits=2)
    whole.save(tmp_path / "graph.json")
    again = AttributionGraph.load(tmp_path / "graph.json")
    assert again.nodes == whole.nodes and torch.equal(again.adjacency, whole.adjacency) and again.logits == whole.logits
    whole.to_json(tmp_path / "tracer.json", slug="mine")
    data = json.loads((tmp_path / "tracer.json").read_text())
    assert set(data) == {"metadata", "qParams", "nodes", "links"} and data["metadata"]["slug"] == "mine"
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids) == len(whole.nodes)
    assert all(link["source"] in ids and link["target"] in ids for link in data["links"])
    assert {"embedding", "logit", "mlp reconstruction error", "cross layer transcoder"} == {
        node["feature_type"] for node in data["nodes"]
    }
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(CircuitError, match="is no attribution graph"):
        AttributionGraph.load(tmp_path / "torn.json")


def test_it_is_drawn(tmp_path: Path) -> None:
    small = graph_of("llama_gqa", transcoders("llama_gqa"), logits=2).prune(0.6, 0.8)
    figure = interp.plot_circuit_graph(small)
    path = figure.save(tmp_path / "graph.html")
    text = path.read_text()
    assert "Attribution graph" in text and len(text) < 5_000_000
    drawing = small.drawing()
    assert len({box.name for box in drawing.boxes}) == len(small.nodes) and len(drawing.columns) == len(PROMPT)
    assert set(drawing.edges) == set(small.graph.edges)


def test_what_cannot_be_made_says_so() -> None:
    model = loaded("gpt2")
    good = transcoders("gpt2")
    broken = transcoder(32)
    with torch.no_grad():
        broken.W_enc[0, 0] = float("nan")
    for given, error, message in (
        ({}, PlanError, "was given no transcoder"),
        ({1: random_dictionary("TopK", 32)}, PlanError, "a graph needs transcoders"),
        ({1: transcoder(40)}, PlanError, "writes 40; the MLPs of .* read and write 32"),
        ({1: broken}, PlanError, "holds NaN"),
        ({9: good[1]}, SiteError, "layer 9"),
    ):
        with pytest.raises(error, match=message):
            attribution_graph(model, PROMPT, given)
    with pytest.raises(PairsError):
        attribution_graph(model, [], good)
    with pytest.raises(PlanError, match="logits=0"):
        attribution_graph(model, PROMPT, good, logits=0)
