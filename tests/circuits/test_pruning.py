"""Iterative pruning against a loop of one node at a time in plain hooks, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.circuits import Circuit, greedy, iterative_pruning, pruning
from interp.engine.run import run_cells
from interp.errors import AnswerError, CheckpointError, CircuitError

from ..families import count_forwards, loaded, oracle_of, words
from ..oracle.edges import senders
from ..oracle.hooks import Oracle, Patch
from .naive import ANSWERS, DISTRACTORS, difference, two_pairs

Test = tuple[int, str, float, bool]


def site(name: str) -> tuple[str, int, int | None]:
    """Kind, layer and head of the activation that a node is ablated at."""
    layer, part = name.split(".")
    return ("mlp_out", int(layer[1:]), None) if part == "mlp" else ("z", int(layer[1:]), int(part[1:]))


def constants(
    oracle: Oracle, prompts: Sequence[Sequence[int]], ablation: str, pair: int
) -> dict[tuple[str, int], Tensor]:
    """What ablated nodes of a pair hold, by kind and layer: zeros, means over prompts and positions, another run."""
    found = {}
    for kind in ("z", "mlp_out"):
        for layer in range(oracle.n_layers):
            read = [oracle.read(prompt, kind, layer) for prompt in prompts]
            if ablation == "mean":
                found[kind, layer] = torch.cat(read).mean(0, keepdim=True)
            else:
                found[kind, layer] = read[pair] if ablation == "resample" else torch.zeros_like(read[0][:1])
    return found


def naive(
    oracle: Oracle,
    pairs: PromptPairs,
    threshold: float,
    ablation: str,
    components: Sequence[str] = ("head", "mlp"),
    means_over: Sequence[Sequence[int]] | None = None,
) -> tuple[set[str], list[Test]]:
    """The nodes that stay, and every test (pass, node, change, dropped), one forward pass per pair and test."""
    prompts = pairs.corrupted if ablation == "resample" else means_over or pairs.clean
    values = [constants(oracle, prompts, ablation, pair) for pair in range(len(pairs))]

    def metric(dropped: set[str]) -> float:
        total = 0.0
        for pair, prompt in enumerate(pairs.clean):
            patches = [Patch(*site(name)[:2], values[pair][site(name)[:2]], head=site(name)[2]) for name in dropped]
            total += float(difference(oracle.run(prompt, patches), pair))
        return total / len(pairs)

    nodes = [name for name in senders(oracle)[:0:-1] if ("mlp" if name.endswith("mlp") else "head") in components]
    dropped, tests, number = set[str](), list[Test](), 0
    current = metric(dropped)
    while True:
        number, before = number + 1, len(dropped)
        for name in [name for name in nodes if name not in dropped]:
            value = metric(dropped | {name})
            tests.append((number, name, value - current, abs(value - current) < threshold))
            if tests[-1][-1]:
                dropped.add(name)
                current = value
        if len(dropped) == before:
            return set(nodes) - dropped, tests


def check(circuit: Circuit, kept: set[str], tests: list[Test]) -> None:
    """A pruned circuit is that of the naive loop, test by test."""
    assert set(circuit.nodes()) - {"embed", "logits"} == kept
    found = [(t["pass"], t["node"], t["change"], t["dropped"]) for t in circuit.trajectory]
    assert [(t[0], t[1], t[3]) for t in found] == [(t[0], t[1], t[3]) for t in tests]
    assert [t[2] for t in found] == pytest.approx([t[2] for t in tests], abs=3e-5)
    last = {name: change for _, name, change, _ in tests}
    assert circuit.scores() == pytest.approx({name: last[name] for name in kept}, abs=3e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_pruning_is_the_loop_of_one_at_a_time(family: str, ablation: str) -> None:
    pairs = two_pairs()
    kept, tests = naive(oracle_of(family), pairs, 0.3, ablation)
    assert 0 < len(kept) < 15 and tests[-1][0] > 1  # something goes, something stays, and a second pass is made
    check(
        iterative_pruning(loaded(family), pairs=pairs, threshold=0.3, ablation_type=ablation, progress=False),
        kept,
        tests,
    )


def test_passes_repeat_until_one_drops_nothing() -> None:
    """A node that was needed may be dropped once others are gone."""
    repeated = 0
    for family in ("gpt2", "llama_gqa", "gemma2", "gpt_neox"):
        circuit = iterative_pruning(
            loaded(family), pairs=two_pairs(), threshold=0.5, ablation_type="zero", progress=False
        )
        passes = [t["pass"] for t in circuit.trajectory]
        late = [t for t in circuit.trajectory if t["pass"] == passes[-1]]
        assert passes == sorted(passes) and not any(t["dropped"] for t in late)
        assert {t["node"] for t in late} == set(circuit.nodes()) - {"embed", "logits"}
        repeated += sum(t["dropped"] for t in circuit.trajectory if t["pass"] > 1)
    assert repeated > 0


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", "counterfactual"])
def test_the_batch_does_not_matter(ablation: str) -> None:
    model, pairs = loaded("llama_gqa"), two_pairs()
    seen, stop = count_forwards(model)
    single = iterative_pruning(model, pairs=pairs, threshold=0.3, ablation_type=ablation, ahead=1, progress=False)
    passes = len(seen)
    for ahead in (5, 64):
        seen.clear()
        found = iterative_pruning(
            model, pairs=pairs, threshold=0.3, ablation_type=ablation, ahead=ahead, progress=False
        )
        assert list(found) == list(single) and found.nodes() == single.nodes()
        assert found.scores() == pytest.approx(single.scores(), abs=3e-5)
        assert [t["node"] for t in found.trajectory] == [t["node"] for t in single.trajectory]
        assert len(seen) < passes
    stop()


def test_resample_and_counterfactual_are_the_corrupted_run() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    both = [
        iterative_pruning(model, pairs=pairs, threshold=0.3, ablation_type=kind, progress=False).scores()
        for kind in ("resample", "counterfactual")
    ]
    assert both[0] == both[1]


def test_one_prompt_and_answers_read_as_a_list_of_heads() -> None:
    model, oracle = loaded("gpt2"), oracle_of("gpt2")
    prompt = words(7, seed=3)[0]
    circuit = interp.iterative_pruning(
        model,
        prompt=prompt,
        answer_tokens=[ANSWERS[0], DISTRACTORS[0]],
        threshold=0.3,
        ablation_type="zero",
        progress=False,
    )
    kept, tests = naive(oracle, PromptPairs([prompt], None, [ANSWERS[0]], [DISTRACTORS[0]]), 0.3, "zero")
    check(circuit, kept, tests)
    heads = sorted(site(name)[1:] for name in kept if not name.endswith("mlp"))
    assert list(circuit) == heads and len(heads) > 0
    assert circuit.level == "node" and circuit.meta["ablation"] == "zero" and circuit.meta["threshold"] == 0.3
    assert interp.iterative_pruning is iterative_pruning


def test_threshold_is_in_the_units_of_the_metric() -> None:
    model, pairs = loaded("gpt2"), two_pairs()

    def pruned(metric: object, threshold: float) -> Circuit:
        return iterative_pruning(model, pairs=pairs, threshold=threshold, metric=metric, progress=False)

    def tenfold(logits: Tensor, batch: object) -> Tensor:
        return 10 * interp.logit_diff(logits, batch)

    same = pruned(tenfold, 3.0)
    assert same.nodes() == pruned(interp.logit_diff, 0.3).nodes() != pruned(tenfold, 0.3).nodes()
    assert pruned(interp.logit_diff, 1e9).n_nodes == 0
    assert pruned(interp.logit_diff, 0.0).n_nodes == 15
    probabilities = pruned(interp.prob, 0.001)
    assert probabilities.meta["metric"] == "prob" and probabilities.n_nodes > 0


def test_metric_value_is_that_of_the_pruned_model() -> None:
    model, oracle, pairs = loaded("gpt2"), oracle_of("gpt2"), two_pairs()
    circuit = iterative_pruning(model, pairs=pairs, threshold=0.3, ablation_type="zero", progress=False)
    gone = [t["node"] for t in circuit.trajectory if t["dropped"]]
    patches = [Patch(*site(name)[:2], 0.0, head=site(name)[2], op="zero") for name in gone]
    runs = [float(difference(oracle.run(prompt, patches), i)) for i, prompt in enumerate(pairs.clean)]
    assert circuit.meta["metric_value"] == pytest.approx(sum(runs) / 2, abs=3e-5)


@pytest.mark.parametrize("components", [("head",), ("mlp",)])
def test_components_limit_what_is_tried(components: tuple[str, ...]) -> None:
    model, oracle, pairs = loaded("gpt2"), oracle_of("gpt2"), two_pairs()
    circuit = iterative_pruning(model, pairs=pairs, threshold=0.4, components=components, progress=False)
    check(circuit, *naive(oracle, pairs, 0.4, "mean", components))
    assert {t["node"].endswith("mlp") for t in circuit.trajectory} == {components == ("mlp",)}


def test_means_can_be_over_other_prompts() -> None:
    pairs, others = two_pairs(), words(4, 8, seed=9)
    circuit = iterative_pruning(loaded("gpt2"), pairs=pairs, threshold=0.3, reference=others, progress=False)
    check(circuit, *naive(oracle_of("gpt2"), pairs, 0.3, "mean", means_over=others))


def test_pruning_continues_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = loaded("gpt2"), tmp_path / "nodes"
    options = {"pairs": two_pairs(), "threshold": 0.3, "ahead": 4, "progress": False}
    whole, left = iterative_pruning(model, **options), iter(range(4))

    def broken(*arguments: Any, **more: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_cells(*arguments, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pruning, "run_cells", broken)
        iterative_pruning(model, checkpoint=path, **options)
    seen, stop = count_forwards(model)
    again = iterative_pruning(model, checkpoint=path, **options)
    stop()
    assert list(again) == list(whole) and again.scores() == pytest.approx(whole.scores(), abs=1e-5)
    assert [(test["node"], test["dropped"]) for test in again.trajectory] == [
        (test["node"], test["dropped"]) for test in whole.trajectory
    ]
    once, stop = count_forwards(model)
    iterative_pruning(model, checkpoint=path, **options)
    stop()
    assert len(once) < len(seen)
    monkeypatch.setattr(greedy, "token_budget", lambda _: 12345)  # as a GPU's free memory may have it
    assert list(iterative_pruning(model, checkpoint=path, **options)) == list(whole)
    with pytest.raises(CheckpointError, match=r"another run, which differs in .*ablation"):
        iterative_pruning(model, checkpoint=path, ablation_type="zero", **options)


def test_what_cannot_be_pruned_is_refused_before_the_model_runs() -> None:
    model, pairs = loaded("gpt2"), two_pairs()
    seen, stop = count_forwards(model)
    alone = PromptPairs(pairs.clean, None, [5, 6], [8, 9])
    for options, message in [
        ({}, "prompt and answer_tokens"),
        ({"prompt": pairs.clean[0]}, "answer_tokens"),
        ({"pairs": pairs, "ablation_type": "median"}, "unknown ablation_type 'median'"),
        ({"pairs": alone, "ablation_type": "resample"}, "corrupted"),
        ({"pairs": pairs, "components": ("neuron",)}, "neuron"),
        ({"pairs": pairs, "components": ()}, "components"),
        ({"pairs": pairs, "components": "neuron"}, r"components \['neuron'\]"),
        ({"pairs": pairs, "ahead": 0}, "ahead=0"),
    ]:
        with pytest.raises(CircuitError, match=message):
            iterative_pruning(model, **options)
    with pytest.raises(AnswerError, match=r"answer_tokens='John'; give \[right, wrong\]"):
        iterative_pruning(model, pairs.clean[0], "John")
    with pytest.raises(AnswerError, match="'no such word' is not one token"):
        iterative_pruning(model, pairs.clean[0], ["no such word"])  # before a mean is taken
    stop()
    assert not seen
