"""Every method beside patching with `backend="simulated"`: the same numbers as here, and requests that stay small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interp
from interp import Model, PromptPairs, grid, heads
from interp.ablation import ablate
from interp.collect import collect_activations
from interp.lens import direct_effects, logit_lens
from interp.tracing import causal_trace
from tests.families import words
from tests.oracle.configs import tiny

PAIRS = PromptPairs(words(9, 6), None, [20, 41], [33, 12], positions={"subject": [{"clean": [2, 3]}, {"clean": [1]}]})
SAME_LENGTH = PromptPairs(words(9, 9), None, [20, 41], [33, 12])
PLAN = grid(["resid_pre", "z", "mlp_out"])
METHODS: dict[str, Callable[[Model], Any]] = {
    "zero": lambda model: ablate(model, PAIRS, heads(["z", "pattern"])).values,
    "mean": lambda model: ablate(model, PAIRS, PLAN, "mean").values,
    "positional_mean": lambda model: ablate(model, PAIRS, PLAN, "positional_mean").values,
    "resample": lambda model: ablate(model, SAME_LENGTH, PLAN, "resample").values,
    "causal_trace": lambda model: causal_trace(model, PAIRS, samples=3).values,
    "logit_lens": lambda model: logit_lens(model, PAIRS).logit,
    "component": lambda model: direct_effects(model, PAIRS).values,
    "position": lambda model: direct_effects(model, PAIRS, by="position").values,
    "collect": lambda model: collect_activations(model, words(9, 4), 1, "mlp_out"),
}


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """One checkpoint, run here and in a worker process that has no `interp`."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    hf, tokenizer = tiny(request.param)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return interp.load_model(folder), interp.load_model(folder, backend="simulated")


@pytest.mark.parametrize("name", METHODS)
def test_values_equal_local_ones(both: tuple[Model, Model], name: str) -> None:
    here, there = (np.asarray(METHODS[name](model)) for model in both)
    assert here.shape == there.shape and np.isfinite(here).any()
    assert np.allclose(here, there, atol=1e-5, equal_nan=True)
    backend = both[1].backend
    assert 0 < backend.sent < 100_000 and 0 < backend.received < 10_000
