"""Whose a checkpoint is: another model, plan, prompts, metric or direction is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import PromptPairs
from interp.circuits.nodes import Facts
from interp.circuits.runs import run_masks
from interp.engine.identity import metric_digest, metric_name, weights_digest
from interp.errors import CheckpointError
from tests.engine.sweeps import PAIRS, run
from tests.families import loaded, words
from tests.oracle.configs import tiny


def shifted(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """A metric with the name and another number in it is another metric."""
    return interp.logit_diff(logits, batch) + 1


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model.name", {"model": "gpt_neox"}),
        ("dtype", {"model": torch.float64}),
        ("plan.layers", {"plan": interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=[0, 2])}),
        ("plan.edits", {"plan": interp.grid(["resid_pre", "attn_out", "mlp_out"]).with_edit("scale", 0.5)}),
        (
            "prompts.clean",
            {"pairs": PromptPairs(words(8, 8, seed=5), PAIRS.corrupted, PAIRS.answers, PAIRS.distractors)},
        ),
        (
            "prompts.answers",
            {"pairs": PromptPairs(PAIRS.clean, PAIRS.corrupted, [22, 23], PAIRS.distractors)},
        ),
        ("metric.name", {"metric": interp.prob}),
        ("metric.code", {"metric": shifted}),
        ("direction", {"direction": "denoising"}),
        ("schedule", {"schedule": "naive"}),
        ("budget", {"max_tokens": 49}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path, what: str, change: dict[str, Any]) -> None:
    path = tmp_path / "sweep.ckpt"
    run(path)
    data = path.read_bytes()
    if "model" in change:
        named = isinstance(change["model"], str)
        model = loaded(change["model"]) if named else loaded("gpt2", dtype=change["model"])
        change = {"model": model}
    with pytest.raises(CheckpointError) as caught:
        run(path, **change)
    assert f"{what} (expected" in str(caught.value) and str(path) in str(caught.value)
    others = {"model", "dtype", "plan", "prompts", "metric", "direction", "schedule", "budget"} - {what.split(".")[0]}
    named = {name for name in others if f"{name} (" in str(caught.value) or f"{name}." in str(caught.value)}
    assert named <= ({"model"} if what == "dtype" else {"attention"} if what == "model.name" else set())
    assert path.read_bytes() == data, "a refused checkpoint is left as it is"


def test_a_model_of_the_same_name_with_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    run(path)
    hf, tokenizer = tiny("gpt2")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"model\.weights \(expected") as caught:
        run(path, model=interp.load_model(hf, tokenizer=tokenizer))
    assert "model.name" not in str(caught.value)


def test_digest_of_weights_sees_one_number_an_order_and_a_type_but_not_a_layout() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(97, 130), torch.nn.BatchNorm1d(130))
    plain = weights_digest(module)
    assert plain == weights_digest(module)
    assert weights_digest(torch.nn.Linear(3, 2, device="meta"))
    seen = {plain}
    with torch.no_grad():
        weight = module[0].weight
        for change in (
            lambda: weight.index_copy_(0, torch.tensor([3]), weight[3:4] * 1.0001),
            lambda: weight.copy_(weight.flip(0)),
            lambda: weight.copy_(weight.flip(1)),
            lambda: module[1].running_mean.add_(1),
            lambda: module.double(),
        ):
            change()
            seen.add(weights_digest(module))
        assert len(seen) == 6
        now = weights_digest(module)
        module[0].weight.data = module[0].weight.data.t().contiguous().t()
        assert weights_digest(module) == now


def test_digest_of_a_metric_is_of_what_it_computes() -> None:
    def make(scale: Any, helper: Callable[..., Any]) -> Callable[..., Any]:
        def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            return helper(logits)[:, 0] * scale

        return metric

    class Probe:
        def __init__(self, weight: Any) -> None:
            self.weight = weight

        def __call__(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
            return logits @ self.weight

    def first(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    def part(k: int, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, k]

    makers: list[Callable[[], Any]] = [
        lambda: make(1, first),
        lambda: make(2, first),
        lambda: make(1, second),
        lambda: make(torch.ones(3), first),
        lambda: make(torch.zeros(3), first),
        lambda: Probe(torch.ones(2)),
        lambda: Probe(torch.zeros(2)),
        lambda: functools.partial(part, 1),
        lambda: functools.partial(part, 2),
        lambda: interp.logit_diff,
        lambda: interp.prob,
        lambda: shifted,
        lambda: lambda logits, batch: logits[:, 0],
        lambda: lambda logits, batch: logits[:, 1],
        lambda: torch.nn.Linear(3, 1, device="meta"),
    ]
    digests = [metric_digest(maker()) for maker in makers]
    assert digests == [metric_digest(maker()) for maker in makers], "two of a kind have one digest"
    assert len(set(digests)) == len(makers)
    assert [metric_name(makers[n]()).split(".")[-1] for n in (0, 5, 9)] == ["metric", "Probe", "logit_diff"]
    assert metric_name(makers[7]()).startswith("partial(")


@pytest.mark.parametrize("what", ["cut edges", "reference"])
def test_circuits_of_one_size_and_constants_of_one_shape_are_told_apart(tmp_path: Path, what: str) -> None:
    model, path = loaded("gpt2"), tmp_path / "circuit.ckpt"
    mask = Facts.of(model).mask
    edges = np.argwhere(mask)
    kept = [mask.copy(), mask.copy()]
    for one, edge in zip(kept, (edges[0], edges[-1]), strict=True):
        one[tuple(edge)] = False
    constants = [torch.full((mask.shape[0], 1, model.d_model), value) for value in (0.0, 1.0)]
    run_masks(model, PAIRS, kept[:1], "mean", reference=constants[0], checkpoint=path)
    other = (kept[1:], constants[0]) if what == "cut edges" else (kept[:1], constants[1])
    with pytest.raises(CheckpointError, match=r"differs in plan\.edits \([^;]*$"):
        run_masks(model, PAIRS, other[0], "mean", reference=other[1], checkpoint=path)
