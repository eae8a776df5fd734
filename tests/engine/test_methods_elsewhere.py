"""Patches, paths, attributions and circuits: the same numbers in a worker process that has no `interp` as here.

The other methods are in tests/test_methods_simulated.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import interp
from tests.oracle.configs import tiny

PAIRS = interp.PromptPairs(
    [[5, 9, 31, 42, 17, 23], [6, 8, 30, 41, 12]],
    [[5, 9, 33, 40, 17, 22], [6, 8, 35, 41, 13]],
    [20, 21],
    [25, 26],
    positions={"subject": [2, 2]},
)
GRID = interp.grid(["resid_pre", "mlp_out"])
METHODS: dict[str, Callable[[Any], Any]] = {
    "patch": lambda m: interp.patch(m, PAIRS, GRID, direction="denoising"),
    "patch heads": lambda m: interp.patch(m, PAIRS, interp.heads(["z", "pattern"])),
    "path_patch": lambda m: interp.path_patch(m, PAIRS, ["embed", "L0.H1"], ["L1.H0.q", "L2.mlp", "logits"]),
    "path_patch through MLPs": lambda m: interp.path_patch(m, PAIRS, ["L0.H1"], ["L2.H0.q"], through_mlps=True),
    "atp": lambda m: interp.attribute(m, PAIRS, GRID),
    "atp*": lambda m: interp.attribute(m, PAIRS, interp.heads(["q", "k"]), method="atp*"),
    "ig": lambda m: interp.attribute(m, PAIRS, GRID, method="ig", steps=2),
    "ig-activations": lambda m: interp.attribute(m, PAIRS, GRID, method="ig-activations", steps=2),
    "eap-ig": lambda m: interp.discover(m, PAIRS, "eap-ig", steps=2),
    "run_circuit": lambda m: interp.run_circuit(m, PAIRS, interp.discover(m, PAIRS, "eap").top(n_edges=40), "mean"),
    "pruning": lambda m: interp.iterative_pruning(m, pairs=PAIRS, threshold=0.1),
}


def numbers(found: Any) -> np.ndarray:
    """A method's result as one array of numbers."""
    if isinstance(found, interp.Effects):
        return np.concatenate([found.values.values.ravel(), found.clean.values.ravel()])
    if isinstance(found, interp.Circuit):
        return np.array([score for _, score in sorted(found.scores().items(), key=lambda item: str(item[0]))])
    return np.asarray(found, dtype=float).ravel()


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_elsewhere(method: str, family: str) -> None:
    """Serialised, run by the worker, returned: equal to the local run, and not all alike."""
    hf, tokenizer = tiny(family)
    here = interp.load_model(hf, tokenizer=tokenizer)
    there = interp.load_model(hf, tokenizer=tokenizer, backend="simulated")
    one, other = (numbers(METHODS[method](model)) for model in (here, there))
    assert one.shape == other.shape
    assert np.nanstd(one) > 1e-4
    scale = max(1.0, float(np.nanmax(np.abs(one))))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * scale)
