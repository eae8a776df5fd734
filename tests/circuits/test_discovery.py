"""Scores of edges and nodes against plain hooks: exact ones, their first-order terms, ACDC one at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import PromptPairs
from interp.cells import Resolved
from interp.circuits import Circuit, Facts, compare_circuits, discover, discovery
from interp.circuits import acdc as acdc_module
from interp.circuits.acdc import acdc
from interp.engine.context import Experiment, Runs
from interp.errors import CheckpointError, CircuitError, MetricError, PairsError
from interp.options import Options

from ..families import allowed, count_forwards, loaded, oracle_of, words
from ..oracle.edges import all_edges, edges, receivers, senders
from ..oracle.hooks import Oracle
from .known import linear
from .naive import Edge, difference, greedy, in_double, slope, two_pairs, with_edge

NAMED = ("gpt2", "llama_gqa", "gemma2", "gemma3", "gpt_neox")
#: Also one norm for attention and MLP (gptj, cohere), none before them (olmo2), MLPs and adds of other shapes.
FAMILIES = (*NAMED, "gptj", "qwen3", "olmo2", "opt", "bloom", "falcon", "cohere", "mixtral")


def mean_over_pairs(value: Any) -> float:
    """The mean of value(pair, clean ids, corrupted ids) over `two_pairs`."""
    pairs = two_pairs()
    found = [value(i, a, b) for i, (a, b) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True))]
    return sum(found) / len(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_edges_are_those_of_plain_hooks(family: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs()
    facts = Facts.of(model)
    assert [site.node for site in facts.senders] == senders(oracle)
    assert [site.node for site in facts.receivers] == receivers(oracle)
    scores = discover(model, pairs, "exact", progress=False).scores()
    assert set(scores) == set(all_edges(oracle))
    clean = [oracle.run(prompt) for prompt in pairs.clean]
    chosen = all_edges(oracle)[:: 5 if family in NAMED else 11]
    assert {receiver.split(".")[-1] for _, receiver in chosen} == {*"qkv", "mlp", "logits"}
    for edge in chosen:
        change = mean_over_pairs(
            lambda i, a, b, e=edge: float(difference(edges(oracle, a, b, [e]), i) - difference(clean[i], i))
        )
        assert abs(scores[edge] - change) <= allowed(clean[0]), edge
    assert max(map(abs, scores.values())) > 0.3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations"])
def test_gradient_scores_are_first_order_terms_of_exact_edges(family: str, method: str) -> None:
    """Slopes by automatic differentiation of the naive edge, at the points that each method goes through."""
    model, oracle, pairs, points = loaded(family), oracle_of(family), two_pairs(), (0.25, 1.0)
    options = {} if method == "eap" else {"points": points}
    scores = discover(model, pairs, method, progress=False, **options).scores()
    bound = 1e-5 * max(1.0, *map(abs, scores.values()))
    for edge in all_edges(oracle)[3 :: 29 if method == "eap" else 47]:
        mixed: list[Any] = [None]
        if method == "eap-ig" or (method == "eap-ig-activations" and edge[0] == "embed"):
            mixed = [("resid_pre", 0, point) for point in points]
        elif method == "eap-ig-activations":  # the heads of a layer move together
            kind = "mlp_out" if edge[0].endswith("mlp") else "z"
            mixed = [(kind, int(edge[0][1:].split(".")[0]), point) for point in points]
        wanted = mean_over_pairs(
            lambda i, a, b, e=edge, m=mixed: sum(slope(oracle, a, b, e, i, at) for at in m) / len(m)
        )
        assert abs(scores[edge] - wanted) <= bound, edge


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama_gqa", "gemma3"])
def test_eap_is_the_finite_difference_of_the_exact_edge(family: str) -> None:
    model, tokenizer = in_double(family)
    oracle = Oracle(model)  # a copy
    model = interp.load_model(model, tokenizer=tokenizer)
    scores, h = discover(model, two_pairs(), "eap", progress=False).scores(), 1e-5
    assert model.dtype == torch.float64
    for edge in all_edges(oracle)[::13]:

        def value(pair: int, a: list[int], b: list[int], size: float, edge: Edge = edge) -> float:
            return float(difference(with_edge(oracle, a, b, edge, size), pair))

        wanted = mean_over_pairs(lambda i, a, b: (value(i, a, b, h) - value(i, a, b, -h)) / (2 * h))
        assert abs(scores[edge] - wanted) <= 1e-6 * max(1e-2, abs(wanted)), (family, edge)


def test_in_a_linear_model_every_method_gives_the_exact_scores() -> None:
    known = linear()
    model = interp.load_model(known.model, tokenizer=known.tokenizer)
    exact = discover(model, known.pairs, "exact", progress=False).scores()
    assert max(map(abs, exact.values())) > 0.5
    for method in ("eap", "eap-ig", "eap-ig-activations"):
        scores = discover(model, known.pairs, method, progress=False).scores()
        assert set(scores) == set(exact)
        assert max(abs(scores[edge] - exact[edge]) for edge in exact) <= 1e-5, method
    nodes = discover(model, known.pairs, "exact", "node", progress=False).scores()
    for method in ("eap", "eap-ig", "eap-ig-activations"):
        scores = discover(model, known.pairs, method, "node", progress=False).scores()
        assert max(abs(scores[name] - nodes[name]) for name in nodes) <= 1e-5, method


def test_points_default_to_midpoints_and_zero_is_eap() -> None:
    model, pairs = loaded("gpt2"), two_pairs()

    def matrix(*arguments: Any, **options: Any) -> np.ndarray:
        return discover(model, pairs, *arguments, progress=False, **options).score_matrix()

    same = {"atol": 1e-6, "equal_nan": True}
    middle = matrix("eap-ig", points=(0.25, 0.75))
    assert np.allclose(matrix("eap-ig", steps=2), middle, **same)
    assert np.allclose(matrix("eap-ig", points=(0.0,)), matrix("eap"), **same)
    assert not np.allclose(middle, matrix("eap"), atol=1e-2, equal_nan=True)
    circuit = discover(model, pairs, "eap-ig", steps=4, progress=False)
    assert circuit.meta["points"] == [0.125, 0.375, 0.625, 0.875] and circuit.meta["pairs"] == 2


@pytest.mark.parametrize("family", NAMED)
def test_exact_nodes_are_those_of_plain_hooks(family: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs()
    scores = discover(model, pairs, "exact", "node", progress=False).scores()
    assert list(scores) == senders(oracle)
    clean = [oracle.run(prompt) for prompt in pairs.clean]
    for name, score in scores.items():
        layer = 0 if name == "embed" else int(name[1:].split(".")[0])
        kind = "resid_pre" if name == "embed" else "mlp_out" if name.endswith("mlp") else "z"
        head = int(name.split("H")[1]) if kind == "z" else None
        change = mean_over_pairs(
            lambda i, a, b, k=kind, at=layer, h=head: float(
                difference(oracle.patched(a, b, k, at, head=h), i) - difference(clean[i], i)
            )
        )
        assert abs(score - change) <= allowed(clean[0]), name


def test_node_scores_of_gradients_are_sums_over_what_a_node_writes() -> None:
    model, pairs = loaded("llama_gqa"), two_pairs()
    by_edge = discover(model, pairs, "eap", progress=False).score_matrix()
    nodes = discover(model, pairs, "eap", "node", progress=False).scores()
    assert list(nodes.values()) == pytest.approx(np.nansum(by_edge, 1).tolist(), abs=1e-5)
    one = discover(model, pairs, "exact", "node", within=Circuit.from_nodes(["L1.H2"], model), progress=False)
    assert set(one.scores()) == {"embed", "L1.H2"}


@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "exact"])
def test_pairs_together_are_the_mean_of_pairs_alone(method: str) -> None:
    model = loaded("llama_gqa")
    pairs = two_pairs(6, 5) + two_pairs(7, 6)
    options: dict[str, Any] = {"progress": False}
    if method == "exact":  # a run for each edge
        options["within"] = discover(model, pairs, "eap", progress=False).top(n_edges=40)
    every = discover(model, pairs, method, **options).score_matrix()
    alone = [discover(model, pairs[i], method, **options).score_matrix() for i in range(len(pairs))]
    assert np.nanmax(np.abs(every - np.mean(alone, 0))) <= 1e-5
    cramped = discover(model, pairs, method, max_tokens=20, **options).score_matrix()
    assert np.nanmax(np.abs(every - cramped)) <= 1e-5


def candidates(circuit: Circuit) -> list[Edge]:
    """A circuit's edges in ACDC's order: receivers from the logits down, the senders of each from last to first."""
    facts = circuit.facts
    kept = circuit.matrix()
    return [
        (facts.senders[s].node, facts.receivers[r].node)
        for r in reversed(range(len(facts.receivers)))
        for s in reversed(range(len(facts.senders)))
        if kept[s, r]
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox"])
def test_acdc_is_the_loop_of_one_at_a_time(family: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs()
    within = discover(model, pairs, "eap-ig", progress=False).top(n_edges=40)
    order = candidates(within)
    assert order[0][1] == "logits" and len(order) == 40
    kept, changes = greedy(oracle, pairs, order, 0.05)
    assert 5 < len(kept) < 39
    found = discover(model, pairs, "acdc", within=within, threshold=0.05, progress=False)
    assert set(found.scores()) == kept
    assert all(abs(score - changes[edge]) <= 2e-5 for edge, score in found.scores().items())
    assert found.meta["tested"] == 40 and found.meta["threshold"] == 0.05


def test_acdc_is_the_same_whatever_the_batch_and_batches_save_passes() -> None:
    model, pairs, metric = loaded("gpt2"), two_pairs(), interp.logit_diff
    within = discover(model, pairs, "eap", progress=False).top(n_edges=50)
    asked = Experiment(model, Runs(model.encode(pairs)), Resolved((), (), {}), metric, "acdc")
    seen, stop = count_forwards(model)
    batched = acdc(asked, within, 0.3, {}, Options(progress=False))
    together = len(seen)
    single = acdc(asked, within, 0.3, {}, Options(progress=False), ahead=1)
    stop()
    assert batched.edges == single.edges and 5 < batched.n_edges < 40
    assert list(batched.scores().values()) == pytest.approx(list(single.scores().values()), abs=2e-5)
    assert single.meta["trials"] == single.meta["tested"] == 50 <= batched.meta["trials"]
    assert together < (len(seen) - together) / 2


def test_acdc_threshold_defaults_to_a_hundredth_of_the_difference() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    found = discover(model, pairs, "acdc", progress=False, within=discover(model, pairs, "eap").top(n_edges=9))
    runs = interp.patch(model, pairs, interp.grid(["mlp_out"], layers=[0], positions=[-1]))
    assert found.meta["threshold"] == pytest.approx(0.01 * abs(float((runs.clean - runs.corrupted).mean())))


def test_within_limits_exact_scores_to_its_edges() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    every = discover(model, pairs, "exact", progress=False).scores()
    part = discover(model, pairs, "eap", progress=False).top(n_edges=25)
    found = discover(model, pairs, "exact", within=part, progress=False)
    assert found.edges == part.edges
    assert list(found.scores().values()) == pytest.approx([every[edge] for edge in found.edges], abs=1e-5)


def test_exact_edges_continue_from_a_checkpoint(tmp_path: Path) -> None:
    model, pairs, options = loaded("gpt2"), two_pairs(), {"max_tokens": 200, "progress": False}
    seen, stop = count_forwards(model)
    first = discover(model, pairs, "exact", checkpoint=tmp_path / "edges", **options)
    passes = len(seen)
    again = discover(model, pairs, "exact", checkpoint=tmp_path / "edges", **options)
    stop()
    assert first.scores() == again.scores() and passes > 10
    assert len(seen) - passes <= 4  # those that the estimate of the time takes


def test_acdc_continues_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs, path = loaded("gpt2"), two_pairs(), tmp_path / "edges"
    within = discover(model, pairs, "eap", progress=False).top(n_edges=60)
    options = {"within": within, "threshold": 0.05, "max_tokens": 200, "progress": False}
    whole = discover(model, pairs, "acdc", **options)
    left, run = iter(range(4)), acdc_module.Masks.run

    def broken(*arguments: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(*arguments, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(acdc_module.Masks, "run", broken)
        discover(model, pairs, "acdc", checkpoint=path, **options)
    again = discover(model, pairs, "acdc", checkpoint=path, **options)
    assert again.edges == whole.edges and again.scores() == pytest.approx(whole.scores(), abs=1e-5)
    assert 0 < again.meta["trials"] < whole.meta["trials"]
    assert discover(model, pairs, "acdc", checkpoint=path, **options).meta["trials"] == 0
    with pytest.raises(CheckpointError, match=r"another run, which differs in .*threshold"):
        discover(model, pairs, "acdc", checkpoint=path, **{**options, "threshold": 0.06})


@pytest.mark.parametrize("method", ["exact", "acdc"])
def test_long_runs_say_so_beforehand(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    within = discover(model, pairs, "eap", progress=False).top(n_edges=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discover(model, pairs, method, within=within, progress=False)
    monkeypatch.setattr(discovery, "expected_seconds", lambda *_: 7260.0)
    with pytest.warns(UserWarning, match=r"4 × 2 pairs will take about 121 minutes.*within=circuit"):
        discover(model, pairs, method, within=within, progress=False)


def test_what_cannot_be_discovered_is_refused_before_the_model_runs() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    seen, stop = count_forwards(model)
    for arguments, message in [
        (("gradients",), "unknown method 'gradients'.*eap-ig-activations"),
        (("eap", "head"), "unknown level 'head'"),
        (("acdc", "node"), "acdc removes edges.*iterative_pruning"),
    ]:
        with pytest.raises(CircuitError, match=message):
            discover(model, pairs, *arguments)
    few = Circuit.from_edges([("embed", "logits")], model)
    for options, message in [
        ({"method": "eap-ig", "steps": 0}, "eap-ig needs interpolation points: steps=0"),
        ({"method": "eap-ig-activations", "points": []}, "needs interpolation points"),
        ({"method": "eap", "within": few}, "within= is of no use to method='eap'; it goes with exact and acdc"),
        ({"method": "exact", "threshold": 0.1}, "threshold= is of no use.*acdc"),
        ({"method": "eap", "checkpoint": "x"}, "checkpoint= is of no use.*exact and acdc"),
        ({"method": "eap", "max_tokens": 0}, "max_tokens=0"),
        ({"method": "exact", "within": Circuit.from_edges([("embed", "logits")], loaded("llama_gqa"))}, "does not fit"),
    ]:
        with pytest.raises(CircuitError, match=message):
            discover(model, pairs, **options)
    with pytest.raises(MetricError, match="gradient"):
        discover(model, pairs, "eap", metric=interp.rank)
    short, long = words(5, 6)
    with pytest.raises(PairsError, match="length"):
        discover(model, PromptPairs([short], [long], [5], [8]))
    with pytest.raises(CircuitError, match="corrupted"):
        discover(model, PromptPairs([short], None, [5], [8]))
    with pytest.raises(MetricError):
        discover(model, PromptPairs([short], [short[::-1]], [5]))
    stop()
    assert not seen


def test_kl_has_no_gradient_at_the_clean_run_and_says_so() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    with pytest.warns(UserWarning, match="gradient of kl vanishes where eap takes it"):
        discover(model, pairs, "eap", metric=interp.kl, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discover(model, pairs, "eap-ig", metric=interp.kl, progress=False)
        discover(model, pairs, "eap", progress=False)


def test_gradients_find_the_strongest_edges_of_a_random_model() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    best = list(discover(model, pairs, "exact", progress=False).top(n_edges=40).scores())
    for method in ("eap", "eap-ig", "eap-ig-activations"):
        found = compare_circuits(discover(model, pairs, method, progress=False), best)
        assert found["auroc"] > 0.9, method
