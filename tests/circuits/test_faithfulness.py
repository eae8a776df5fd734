"""Circuits run with all else ablated, against plain hooks; curves, areas and comparisons against hand counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.circuits import Circuit, Evaluation, Facts, compare_circuits, discover, evaluate_circuit, stability
from interp.circuits.faithfulness import FRACTIONS
from interp.circuits.runs import reference_of, run_circuit, run_masks
from interp.errors import CircuitError

from ..families import allowed, loaded, oracle_of, words
from ..oracle.edges import all_edges, contributions, edges, senders
from ..oracle.hooks import Oracle
from .naive import cut, difference, in_double, two_pairs

NAMED = ("gpt2", "llama_gqa", "gemma2", "gemma3", "gpt_neox")
ABLATIONS = ("counterfactual", "mean", "zero")


def reference(oracle: Oracle, pairs: PromptPairs, ablation: str, pair: int) -> Mapping[str, Tensor]:
    """What each sender's cut edges carry, [position or 1, d_model], by reading every prompt with plain hooks."""
    if ablation == "counterfactual":
        return contributions(oracle, pairs.corrupted[pair])
    runs = [contributions(oracle, prompt) for prompt in pairs.clean]
    if ablation == "zero":  # the naive difference of a stream and its parts must not be rounding noise: use float64
        return {name: torch.zeros_like(part[:1]) for name, part in runs[0].items()}
    if ablation == "positional_mean":
        return {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}
    return {name: torch.cat([run[name] for run in runs]).mean(0, keepdim=True) for name in runs[0]}


def random_mask(facts: Facts, part: float, seed: int = 0) -> np.ndarray:
    """Each edge of a model kept with a probability."""
    return facts.mask & (np.random.default_rng(seed).random(facts.mask.shape) < part)


@pytest.mark.parametrize("family", [*NAMED, "gptj", "qwen3", "olmo2", "opt", "bloom", "falcon_new", "mixtral"])
def test_partly_cut_runs_are_those_of_plain_hooks(family: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs()
    facts = Facts.of(model)
    mask = random_mask(facts, 0.5)
    circuit = Circuit.from_matrix(np.zeros(mask.shape), mask, facts)
    found = run_circuit(model, pairs, circuit, progress=False)
    removed = sorted(set(all_edges(oracle)) - set(circuit.edges))
    assert 0 < len(removed) < facts.n_edges
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        logits = edges(oracle, clean, corrupted, removed)
        assert abs(found[i] - float(difference(logits, i))) <= allowed(logits)


@pytest.mark.parametrize("family", [*NAMED, "gptj", "opt", "olmo2", "cohere"])
@pytest.mark.parametrize("ablation", ["mean", "positional_mean", "zero"])
def test_constants_are_those_of_plain_hooks(family: str, ablation: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs(6, 6 if "pos" in ablation else 5)
    if ablation == "zero":
        oracle = Oracle(in_double(family)[0], copy_model=False)
    facts = Facts.of(model)
    for part in (0.0, 0.1, 0.5):
        mask = random_mask(facts, part)
        circuit = Circuit.from_matrix(np.zeros(mask.shape), mask, facts)
        removed = sorted(set(all_edges(oracle)) - set(circuit.edges))
        found = run_circuit(model, PromptPairs(pairs.clean, None, [5, 6], [8, 9]), circuit, ablation, progress=False)
        for i, clean in enumerate(pairs.clean):
            logits = cut(oracle, clean, reference(oracle, pairs, ablation, i), removed)
            assert abs(found[i] - float(difference(logits, i))) <= allowed(logits)


def test_means_can_be_over_other_prompts() -> None:
    model, oracle, pairs, others = loaded("gpt2"), oracle_of("gpt2"), two_pairs(), words(4, 7, seed=5)
    circuit = discover(model, pairs, "eap", progress=False).top(n_edges=60)
    removed = sorted(set(all_edges(oracle)) - set(circuit.edges))
    found = run_circuit(model, pairs, circuit, "mean", reference=others, progress=False)
    runs = [contributions(oracle, prompt) for prompt in others]
    means = {name: torch.cat([run[name] for run in runs]).mean(0, keepdim=True) for name in runs[0]}
    for i, clean in enumerate(pairs.clean):
        logits = cut(oracle, clean, means, removed)
        assert abs(found[i] - float(difference(logits, i))) <= allowed(logits)
    assert not np.allclose(found, run_circuit(model, pairs, circuit, "mean", progress=False), atol=1e-3)


def test_positional_means_can_be_over_longer_prompts() -> None:
    model, oracle, pairs, others = loaded("gpt2"), oracle_of("gpt2"), two_pairs(6, 6), words(8, 7, seed=5)
    circuit = discover(model, pairs, "eap", progress=False).top(n_edges=60)
    removed = sorted(set(all_edges(oracle)) - set(circuit.edges))
    found = run_circuit(model, pairs, circuit, "positional_mean", reference=others, progress=False)
    runs = [contributions(oracle, prompt) for prompt in others]
    means = {name: torch.stack([run[name][:6] for run in runs]).mean(0) for name in runs[0]}
    for i, clean in enumerate(pairs.clean):
        logits = cut(oracle, clean, means, removed)
        assert abs(found[i] - float(difference(logits, i))) <= allowed(logits)


def test_means_do_not_stop_growing_in_bf16() -> None:
    model, (prompt,) = loaded("gpt2", dtype=torch.bfloat16), words(6)
    pairs = PromptPairs([prompt], None, [5], [8])
    one, many = (reference_of(model, pairs, "mean", [prompt] * count) for count in (1, 400))
    assert one.dtype == torch.float32
    torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-3)


def test_fractions_in_any_order_give_the_same_areas() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    circuit = discover(model, pairs, "eap", progress=False)
    one, other = (
        evaluate_circuit(model, pairs, circuit, fractions=f, progress=False) for f in ([0.5, 0.1], [0.1, 0.5])
    )
    assert one.curve.equals(other.curve) and (one.cpr, one.cmd) == (other.cpr, other.cmd) and one.cmd >= 0


def test_a_circuit_can_be_a_list_of_heads() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    circuit = Circuit.from_nodes(["L0.H1", "L2.H0"], model)
    found = run_circuit(model, pairs, [(0, 1), (2, 0)], progress=False)
    np.testing.assert_array_equal(found, run_circuit(model, pairs, circuit, progress=False))


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_whole_model_is_faithful_and_the_empty_circuit_is_not(family: str, ablation: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), two_pairs()
    circuit = discover(model, pairs, "eap", progress=False)
    found = evaluate_circuit(model, pairs, circuit, ablation, fractions=(0.0, 1.0), progress=False)
    assert found.curve["n_edges"].tolist() == [0, Facts.of(model).n_edges]
    assert abs(found.curve["faithfulness"][0]) <= 1e-4 and abs(found.curve["faithfulness"][1] - 1) <= 1e-4
    full = [float(difference(oracle.run(prompt), i)) for i, prompt in enumerate(pairs.clean)]
    empty = []
    for i, prompt in enumerate(pairs.clean):
        logits = cut(oracle, prompt, reference(oracle, pairs, ablation, i), all_edges(oracle))
        empty.append(float(difference(logits, i)))
    assert found.full == pytest.approx(np.mean(full), abs=1e-4)
    assert found.empty == pytest.approx(np.mean(empty), abs=1e-4)
    assert abs(found.full - found.empty) > 0.05
    if ablation == "counterfactual":
        runs = [float(difference(oracle.run(prompt), i)) for i, prompt in enumerate(pairs.corrupted)]
        assert found.empty == pytest.approx(np.mean(runs), abs=1e-4)
    nothing = run_circuit(model, pairs, Circuit.from_edges({}, model), ablation, progress=False)
    whole = run_circuit(model, pairs, circuit, ablation, progress=False)
    assert nothing.tolist() == pytest.approx(empty, abs=1e-4) and whole.tolist() == pytest.approx(full, abs=1e-4)


def test_a_curve_has_a_row_per_size_and_its_areas_are_trapezoids() -> None:
    model, pairs = loaded("llama_gqa"), two_pairs()
    circuit = discover(model, pairs, "eap-ig", progress=False)
    found = evaluate_circuit(model, pairs, circuit, progress=False)
    curve, total = found.curve, Facts.of(model).n_edges
    assert list(curve) == ["n_edges", "fraction", "metric", "faithfulness", "low", "high"]
    assert curve["n_edges"].tolist() == [max(1, round(part * total)) for part in FRACTIONS]
    cpr = cmd = 0.0
    for (_, a), (_, b) in zip(curve[:-1].iterrows(), curve[1:].iterrows(), strict=True):
        width = (b["n_edges"] - a["n_edges"]) / total
        cpr += width * (a["faithfulness"] + b["faithfulness"]) / 2
        cmd += width * (abs(1 - a["faithfulness"]) + abs(1 - b["faithfulness"])) / 2
    assert found.cpr == pytest.approx(cpr, abs=1e-6) and found.cmd == pytest.approx(cmd, abs=1e-6)
    for _, row in curve.iterrows():
        alone = run_circuit(model, pairs, circuit.top(n_edges=int(row["n_edges"])), progress=False).mean()
        assert row["metric"] == pytest.approx(alone, abs=1e-5)
        wanted = (alone - found.empty) / (found.full - found.empty)
        assert row["faithfulness"] == pytest.approx(wanted, abs=1e-4)
    assert "cpr=" in repr(found) and "faithfulness" in repr(found)


def test_sizes_may_be_ranked_by_score_instead_of_magnitude() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    scores = {("embed", "logits"): -3.0, ("L0.H0", "logits"): 2.0, ("L1.mlp", "logits"): -1.0, ("L2.H3", "logits"): 0.5}
    circuit = Circuit.from_edges(scores, model)
    size = 2 / Facts.of(model).n_edges
    for absolute, names in ((True, ["embed", "L0.H0"]), (False, ["L0.H0", "L2.H3"])):
        found = evaluate_circuit(model, pairs, circuit, fractions=(size,), absolute=absolute, progress=False).curve
        kept = Circuit.from_edges([(name, "logits") for name in names], model)
        assert found["n_edges"].tolist() == [2, 4]  # and all that the circuit has
        assert found["metric"][0] == pytest.approx(run_circuit(model, pairs, kept, progress=False).mean(), abs=1e-5)


def test_a_circuit_without_scores_is_one_row() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    for circuit in (Circuit.from_edges(all_edges(oracle_of("gpt2"))[::3], model), Circuit.from_nodes([(0, 1)], model)):
        found = evaluate_circuit(model, pairs, circuit, completeness=True, minimality=3, progress=False)
        assert len(found.curve) == 1 and found.minimality is None
        assert found.curve["n_edges"][0] == circuit.n_edges
        alone = run_circuit(model, pairs, circuit, progress=False).mean()
        assert found.curve["metric"][0] == pytest.approx(alone, abs=1e-5)


def test_nodes_end_with_the_whole_model_too() -> None:
    model, pairs = loaded("llama_gqa"), two_pairs()
    circuit = discover(model, pairs, "exact", "node", progress=False)
    found = evaluate_circuit(model, pairs, circuit, fractions=(0.0, 0.2, 1.0), minimality=2, progress=False)
    curve, names = found.curve, [name for name, _ in circuit.ranking() if name != "embed"]
    assert curve["n_nodes"].tolist() == [0, 3, 15] and curve["n_edges"].tolist()[::2] == [1, Facts.of(model).n_edges]
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-4)
    three = run_circuit(model, pairs, Circuit.from_nodes(names[:3], model), progress=False).mean()
    assert curve["metric"][1] == pytest.approx(three, abs=1e-5)
    assert found.minimality is not None and found.minimality["part"].tolist() == names[:2]


def test_completeness_and_minimality_are_circuits_of_their_own() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    circuit = discover(model, pairs, "eap-ig", progress=False).top(n_edges=80)
    found = evaluate_circuit(model, pairs, circuit, completeness=True, minimality=3, progress=False)

    def faithfulness(part: Circuit) -> float:
        value = run_circuit(model, pairs, part, progress=False).mean()
        return float((value - found.empty) / (found.full - found.empty))

    rest = sorted(set(all_edges(oracle_of("gpt2"))) - set(circuit.edges))
    outside = faithfulness(Circuit.from_edges(rest, model))
    assert found.completeness == pytest.approx(1 - abs(outside), abs=1e-4) and abs(outside) > 0.05
    assert found.minimality is not None and len(found.minimality) == 3
    whole = faithfulness(circuit)
    assert found.curve["faithfulness"].iloc[-1] == pytest.approx(whole, abs=1e-4)
    for (edge, _), (_, row) in zip(circuit.ranking(), found.minimality.iterrows(), strict=False):
        without = faithfulness(Circuit.from_edges([other for other in circuit.edges if other != edge], model))
        assert row["part"] == " -> ".join(edge)
        assert row["drop"] == pytest.approx(whole - without, abs=1e-4)


def test_intervals_are_percentiles_over_pairs() -> None:
    model = loaded("gpt2")
    pairs = two_pairs() + two_pairs(7, 6) + two_pairs(8, 4)
    circuit = discover(model, pairs, "eap-ig", progress=False)
    found = evaluate_circuit(model, pairs, circuit, fractions=(0.1, 0.5, 1.0), progress=False).curve
    assert (found["low"] <= found["faithfulness"]).all() and (found["faithfulness"] <= found["high"]).all()
    assert found["high"][0] - found["low"][0] > 1e-3 > found["high"][2] - found["low"][2]
    one = evaluate_circuit(model, pairs[0], circuit, fractions=(0.1,), progress=False).curve
    assert one[["low", "high"]].isna().all(axis=None)


def test_stability_is_the_jaccard_of_resampled_circuits() -> None:
    model, pairs = loaded("gpt2"), two_pairs() + two_pairs(7, 6)
    found = stability(model, pairs, 30, "eap", samples=4, seed=3, progress=False)
    generator, circuits = np.random.default_rng(3), []
    for _ in range(4):
        drawn = sorted(generator.integers(0, 4, size=4).tolist())
        circuits.append(set(discover(model, pairs[drawn], "eap", progress=False).top(n_edges=30).edges))
    wanted = [len(a & b) / len(a | b) for i, a in enumerate(circuits) for b in circuits[i + 1 :]]
    assert found.tolist() == pytest.approx(wanted) and len(found) == 6 and 0 < min(found) < 1
    assert (stability(model, pairs[0], 30, "eap", samples=2, progress=False) == 1).all()


def naive_auroc(scores: Mapping[tuple[str, str], float], truth: set, possible: list) -> float:
    """The chance that an edge of the truth has a larger |score| than another one, ties half."""
    inside = [abs(scores.get(edge, 0.0)) for edge in possible if edge in truth]
    outside = [abs(scores.get(edge, 0.0)) for edge in possible if edge not in truth]
    wins = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    return sum(wins) / len(wins)


def test_circuits_are_compared_by_precision_recall_and_auroc() -> None:
    model, oracle, pairs = loaded("llama_gqa"), oracle_of("llama_gqa"), two_pairs()
    every, possible = discover(model, pairs, "eap", progress=False), all_edges(oracle)
    truth = set(discover(model, pairs, "exact", progress=False).top(n_edges=25).edges)
    for circuit in (every, every.top(n_edges=40)):
        found = compare_circuits(circuit, sorted(truth))
        hits = len(truth & set(circuit.edges))
        assert found["precision"] == pytest.approx(hits / circuit.n_edges)
        assert found["recall"] == pytest.approx(hits / 25)
        assert found["auroc"] == pytest.approx(naive_auroc(circuit.scores(), truth, possible)) != 0.5
    unscored = Circuit.from_edges(sorted(truth)[:10], model)
    assert compare_circuits(unscored, Circuit.from_edges(sorted(truth), model))["auroc"] == pytest.approx(0.7)
    assert compare_circuits(every.top(n_edges=1), Circuit.from_edges({("L0.H0", "L1.mlp"): 1.0}, model))["recall"] == 0


def test_nodes_are_compared_without_embed() -> None:
    model = loaded("gpt2")
    reference = Circuit.from_nodes(["L0.H0", "L1.mlp"], model)
    scores = {"embed": 9.0, "L0.H0": -3.0, "L1.mlp": 1.0, "L2.H1": 2.0}
    found = compare_circuits(Circuit.from_nodes(scores, model), reference)
    others = len(senders(oracle_of("gpt2"))) - 1 - 2
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == 1
    assert found["auroc"] == pytest.approx((2 * others - 1) / (2 * others))


def test_what_cannot_be_evaluated_is_refused() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    circuit = discover(model, pairs, "eap", progress=False).top(n_edges=5)
    with pytest.raises(CircuitError, match=r"unknown ablation 'median'.*zero"):
        run_circuit(model, pairs, circuit, "median")
    with pytest.raises(CircuitError, match="corrupted"):
        evaluate_circuit(model, PromptPairs(pairs.clean, None, [5, 6], [8, 9]), circuit)
    with pytest.raises(CircuitError, match=r"one length.*pairs of \[5, 6\] tokens"):
        run_circuit(model, pairs, circuit, "positional_mean")
    with pytest.raises(CircuitError, match="a reference prompt of 4 tokens for pairs of 6"):
        run_circuit(model, two_pairs(6, 6), circuit, "positional_mean", reference=words(7, 4))
    with pytest.raises(CircuitError, match=r"2 key/value heads; it does not fit one with"):
        run_circuit(model, pairs, discover(loaded("llama_gqa"), pairs, "eap", progress=False))
    for fractions in ([1.5], [-0.2, 0.5], []):
        with pytest.raises(CircuitError, match="between 0 and 1"):
            evaluate_circuit(model, pairs, circuit, fractions=fractions)
    same = PromptPairs(pairs.clean, pairs.clean, [5, 6], [8, 9])
    with pytest.raises(CircuitError, match="no scale"):
        evaluate_circuit(model, same, circuit, progress=False)
    with pytest.raises(CircuitError, match="facts"):
        compare_circuits(Circuit.from_edges({("embed", "logits"): 1.0}), [("embed", "logits")])
    with pytest.raises(CircuitError, match="nothing to tell apart"):
        compare_circuits(circuit, Circuit.from_edges({}, model))
    with pytest.raises(CircuitError, match="cannot be compared"):
        compare_circuits(circuit, Circuit.from_nodes(["L0.H0"], model))


def test_masks_run_together_are_those_run_alone() -> None:
    model, pairs = loaded("gemma2"), two_pairs()
    masks = [random_mask(Facts.of(model), part, seed) for seed, part in enumerate((0.0, 0.2, 0.8, 1.0))]
    together = run_masks(model, pairs, masks, progress=False)
    alone = [run_masks(model, pairs, [mask], progress=False).values.values[0] for mask in masks]
    assert np.abs(together.values.values - alone).max() <= 1e-5
    assert isinstance(evaluate_circuit(model, pairs, discover(model, pairs, "eap"), progress=False), Evaluation)
    assert interp.evaluate_circuit is evaluate_circuit and interp.run_circuit is run_circuit
