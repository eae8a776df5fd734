"""Out of memory: chunks are divided until they fit, and the numbers are those of a run that never ran out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import Effects, Model, PromptPairs
from interp.engine.backends import Local
from interp.engine.backoff import out_of_memory
from interp.errors import BackendError, CheckpointError, MetricError
from tests.families import allowed, loaded, words

PLAN = interp.grid(["embed", "resid_mid"], layers=[0, 2])
SCHEDULES = ("naive", "rows", "growing", "prefix")
#: Unpatched runs of a pair, and one patched row.
SMALLEST = 3


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """All that these tests import is there before they begin; each collects garbage many times, as the engine does."""
    for family in ("gpt2", "llama_gqa", "bloom"):
        patch(loaded(family), some_pairs(6))
    gc.collect()
    gc.freeze()


def some_pairs(*lengths: int) -> PromptPairs:
    """Pairs that differ at their second position."""
    clean = words(*lengths)
    corrupted = [[prompt[0], 99 - prompt[1] % 50, *prompt[2:]] for prompt in clean]
    n = len(lengths)
    return PromptPairs(clean, corrupted, list(range(20, 20 + n)), list(range(40, 40 + n)))


def rows_of(program: dict[str, Any]) -> int:
    """How many rows a program ends with."""
    return program["inputs"]["input_ids"].shape[0] + len(program["origin"])


class Small(Local):
    """A device on which a forward pass takes `cost(program)` of the memory, and there is only so much."""

    def __init__(self, cost: Callable[[dict[str, Any]], float], capacity: float) -> None:
        self.cost, self.capacity = cost, capacity
        self.passed: list[float] = []
        self.failures = 0

    def run(self, model: Model, programs: list[dict[str, Any]], metric: Any, done: Any, function: Any) -> None:
        sizes = [self.cost(program) for program in programs]
        fitting = next((n for n, size in enumerate(sizes) if size > self.capacity), len(sizes))
        super().run(model, programs[:fitting], metric, done, function)
        self.passed += sizes[:fitting]
        if fitting < len(sizes):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none left.")


class Server(Small):
    """All or nothing: a request that fails reports no program, and its error is text from the other side."""

    def run(self, model: Model, programs: list[dict[str, Any]], metric: Any, done: Any, function: Any) -> None:
        found: list[tuple[int, torch.Tensor]] = []
        try:
            super().run(model, programs, metric, lambda *result: found.append(result), function)
        except torch.OutOfMemoryError as error:
            raise BackendError(f"the server failed in 'scores': OutOfMemoryError: {error}\n--- traceback ---") from None
        for result in found:
            done(*result)


def patch(model: Model, pairs: PromptPairs, **options: Any) -> Effects:
    """Chunks of many rows."""
    return interp.patch(model, pairs, options.pop("plan", PLAN), **{"max_tokens": 4000, **options})


def check(got: Effects, expected: Effects) -> None:
    """Equal within tolerance, with the same cells missing."""
    tolerance = allowed(torch.tensor([20.0]))
    for name in ("values", "clean", "corrupted"):
        one, other = (getattr(effects, name).values for effects in (got, expected))
        assert np.array_equal(np.isnan(one), np.isnan(other)), name
        assert np.nanmax(np.abs(one - other)) <= tolerance, name


@cache
def in_one_piece(schedule: str) -> Effects:
    """The numbers of `test_divided_until_it_fits`, nothing divided."""
    return patch(loaded("gpt2"), some_pairs(9, 9, 6), schedule=schedule)


@pytest.mark.parametrize("backend", [Small, Server])
@pytest.mark.parametrize(("schedule", "capacity"), [*((name, 7) for name in SCHEDULES), ("prefix", 3), ("prefix", 15)])
def test_divided_until_it_fits(schedule: str, capacity: int, backend: type[Small]) -> None:
    pairs, expected = some_pairs(9, 9, 6), in_one_piece(schedule)
    device = backend(rows_of, capacity)
    got = patch(replace(loaded("gpt2"), backend=device), pairs, schedule=schedule)
    check(got, expected)
    assert max(device.passed) <= capacity
    assert got.provenance.get("oom_backoff", False) == (schedule != "naive")
    assert (device.failures > 0) == (schedule != "naive")
    assert "oom_backoff" not in expected.provenance


def test_memory_counted_in_tokens_and_few_tries_for_many_chunks() -> None:
    """What did not fit is learnt once: later chunks are divided first."""
    pairs = some_pairs(*[8] * 14)
    device = Small(lambda program: rows_of(program) * program["inputs"]["input_ids"].shape[1], 70)
    expected = patch(loaded("gpt2"), pairs, max_tokens=150)
    got = patch(replace(loaded("gpt2"), backend=device), pairs, max_tokens=150)
    check(got, expected)
    assert expected.provenance["forwards"] > 20
    assert device.failures < 8 < len(device.passed)


def test_prepared_run_that_does_not_fit_is_done_without() -> None:
    pairs = some_pairs(9, 9, 9, 9)
    expected = patch(loaded("gpt2"), pairs, schedule="prefix")
    device = Small(lambda program: math.inf if "keep" in program else 0, 1)
    got = patch(replace(loaded("gpt2"), backend=device), pairs, schedule="prefix")
    check(got, expected)
    assert got.provenance["oom_backoff"] and device.failures == 2


@pytest.mark.parametrize("family", ["llama_gqa", "bloom"])
def test_paths_with_helper_rows_and_padded_prompts(family: str) -> None:
    plan = interp.plan.paths(["L0.H1", "L0.mlp"], ["L2.H0.q", "L2.mlp", "logits"], through_mlps=True)
    pairs = some_pairs(7, 5, 7)
    device = Small(rows_of, 4)  # the helper's row is one more
    for options in ({"plan": plan}, {"plan": PLAN, "schedule": "growing"}, {"direction": "denoising"}):
        expected = patch(loaded(family), pairs, **options)
        got = patch(replace(loaded(family), backend=device), pairs, **options)
        check(got, expected)
        assert got.provenance["oom_backoff"]


def test_pairs_without_rows_are_divided_by_pairs() -> None:
    """Pairs that differ behind the patched position alone need their unpatched runs, and no more."""
    clean = words(*[6] * 8)
    corrupted = [[*prompt[:-1], 99 - prompt[-1] % 50] for prompt in clean]
    pairs = PromptPairs(clean, corrupted, [20] * 8, [30] * 8)
    plan = interp.grid("resid_pre", positions=[0])
    expected = patch(loaded("gpt2"), pairs, plan=plan, schedule="prefix")
    device = Small(rows_of, 4)
    got = patch(replace(loaded("gpt2"), backend=device), pairs, plan=plan, schedule="prefix")
    check(got, expected)
    assert device.passed == [4] * 4 and got.provenance["oom_backoff"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_row_that_does_not_fit_is_an_error_with_its_tokens(schedule: str) -> None:
    model = replace(loaded("gpt2"), backend=Small(rows_of, SMALLEST - 1))
    with pytest.raises(BackendError, match=r"27 tokens \(3 rows of 9 positions\).*shorter prompts.*CUDA out of mem"):
        patch(model, some_pairs(9), schedule=schedule)


def test_memory_that_is_free_again_changes_nothing() -> None:
    """A failure that another process caused: the chunk is tried again as it is; the bits are the same."""
    pairs = some_pairs(9, 9)
    expected = patch(loaded("gpt2"), pairs, max_tokens=200)
    failures = iter([False, False, True])
    device = Small(lambda program: 0, 1)
    device.cost = lambda program: 2 if next(failures, False) else 0
    got = patch(replace(loaded("gpt2"), backend=device), pairs, max_tokens=200)
    assert device.failures == 1 and "oom_backoff" not in got.provenance
    assert np.array_equal(got.values, expected.values, equal_nan=True)


def test_errors_inside_the_model_leave_nothing_behind() -> None:
    """The error comes from inside a real trace, as on a GPU; nothing of that trace may stay."""
    model, pairs = loaded("gpt2"), some_pairs(9, 9)
    expected = patch(model, pairs)
    failures = []

    def full(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.shape[0] > 9:
            failures.append(output.shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.hf.transformer.h[1].mlp.register_forward_hook(full)
    try:
        got = patch(model, pairs)
    finally:
        handle.remove()
    check(got, expected)
    assert failures and got.provenance["oom_backoff"]
    assert np.array_equal(patch(model, pairs).values, expected.values, equal_nan=True)


def test_a_checkpoint_remembers_that_chunks_were_divided(tmp_path: Path) -> None:
    path, pairs = tmp_path / "sweep.ckpt", some_pairs(9, 9)
    device = Small(rows_of, 9)
    first = patch(replace(loaded("gpt2"), backend=device), pairs, checkpoint=path, max_tokens=200)
    data = path.read_bytes()
    device.capacity = math.inf
    path.write_bytes(data[:-1])  # the last chunk runs again, in one piece now
    again = patch(replace(loaded("gpt2"), backend=device), pairs, checkpoint=path, max_tokens=200)
    check(again, first)
    assert first.provenance["oom_backoff"] and again.provenance["oom_backoff"]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    device = Small(rows_of, math.inf)

    def fails(*_: Any) -> None:
        raise RuntimeError("expected scalar type Half but found Float")

    device.run = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="scalar type Half"):
        patch(replace(loaded("gpt2"), backend=device), some_pairs(9))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes."), True),
        (BackendError("NDIF failed in 'scores': torch.OutOfMemoryError: CUDA out of memory. Tried"), True),
        (
            BackendError("the server failed: KeyError: 'x'\n--- traceback\n# out of memory is handled here"),
            False,
        ),
        (CheckpointError("cannot write the checkpoint /runs/out of memory.ckpt: No space left"), False),
        (MetricError("metric 'out of memory' fails"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected
