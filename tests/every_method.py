"""Every public method that runs a model, as a call that gives numbers: for what must hold of all of them.

A method that is added to `interp` and not here fails `test_every_method_is_here` (tests/submitting/test_every_method.py).
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr

import interp
from interp.generation import generate
from interp.lens import attention_patterns
from interp.running import run
from tests.circuits.test_attribution_graph import transcoder
from tests.saes.made import random_dictionary

IDS = [[5, 9, 31, 42, 17, 23], [6, 8, 30, 41, 12]]
PAIRS = interp.PromptPairs(
    IDS, [[5, 9, 33, 40, 17, 22], [6, 8, 35, 41, 13]], [20, 21], [25, 26], positions={"subject": [[2, 3], [1]]}
)
GRID = interp.grid(["resid_pre", "mlp_out"], layers=[0, 1])
#: What runs no model by itself: it makes one, or trains on what was collected.
RUNS_NONE = {"load_model", "train_sae"}


@cache
def dictionary(width: int) -> Any:
    return random_dictionary("TopK", width, site="L1.resid_post")


def stored(model: interp.Model) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        kept = interp.collect_activations(model, IDS, 1, "mlp_out", to_disk=folder, dtype=torch.float16)
        return kept.load().float()


def graph(model: interp.Model) -> np.ndarray:
    made = interp.attribution_graph(model, IDS[0], {1: transcoder(model.d_model)}, logits=2, max_features=10)
    return np.array([score for _, _, score in sorted(made.graph.edges(data="weight"), key=str)])


def pruned(model: interp.Model) -> list[float]:
    found = interp.iterative_pruning(model, pairs=PAIRS, threshold=0.5, components="mlp")
    return [float(test["change"]) for test in found.trajectory]  # type: ignore[union-attr]


def neurons(model: interp.Model) -> np.ndarray:
    found = interp.discover(model, PAIRS, level="neuron", top=8)
    return np.array([score for _, score in sorted((*found.nodes.items(), *found.edges.items()), key=str)])


def evaluated(model: interp.Model) -> np.ndarray:
    made = interp.evaluate_circuit(model, PAIRS, interp.discover(model, PAIRS, "eap"), fractions=(0.0, 0.2, 1.0))
    return np.array([made.cpr, made.cmd, made.full, made.empty, *made.curve["metric"]])


def audited(model: interp.Model) -> np.ndarray:
    """What the audit says of the reads and writes of each kind: from afar where the weights are there, else with them."""
    report = model.audit(layers=[0])
    asked = [
        ("z", "read"),
        ("resid_pre", "read"),
        ("logits", "read"),
        ("v", "write"),
        ("mlp_out", "write"),
        ("z", "self-patch"),
    ]
    said = {(finding.kind, finding.what) for finding in report.findings if finding.ok}
    return np.array([1.0 * (check in said) for check in asked] + [0.0 * len(report.failed)])


METHODS: dict[str, Callable[[interp.Model], Any]] = {
    "ablate": lambda m: interp.ablate(m, PAIRS, interp.heads(["z"], layers=[0, 1]), "mean"),
    "attribute": lambda m: interp.attribute(m, PAIRS, GRID),
    "attribute by integrated gradients": lambda m: interp.attribute(m, PAIRS, GRID, method="ig", steps=2),
    "attribute by secants": lambda m: interp.attribute(m, PAIRS, GRID, method="secant"),
    "attention_patterns": lambda m: attention_patterns(m, IDS[0], layers=[1], values=False),
    "attribution_graph": graph,
    "audit": audited,
    "causal_trace": lambda m: interp.causal_trace(m, PAIRS, samples=2, window=1),
    "collect_activations": lambda m: interp.collect_activations(m, IDS, 1, "mlp_out"),
    "collect_activations to disk": stored,
    "comprehensive_activation_patching": lambda m: interp.comprehensive_activation_patching(
        m,
        IDS[0],
        PAIRS.corrupted[0],
        [20, 25],
        ["resid_pre"],  # type: ignore[index]
    ),
    "direct_effects": lambda m: interp.direct_effects(m, PAIRS),
    "discover": lambda m: interp.discover(m, PAIRS, "eap"),
    "discover by secants": lambda m: interp.discover(m, PAIRS),
    "discover neurons": neurons,
    "evaluate_circuit": evaluated,
    "evaluate_sae": lambda m: interp.evaluate_sae(m, dictionary(m.d_model), IDS, context=5, loss_tokens=10),
    "generate": lambda m: (
        generate(m, IDS[0], [interp.Edit(interp.Site.parse("L1.mlp_out"), "scale", 0.5)], steps=3, logits=True).logits
    ),
    "iterative_pruning": pruned,
    "logit_lens": lambda m: interp.logit_lens(m, IDS, layers=[0, 1]).logit,
    "patch": lambda m: interp.patch(m, PAIRS, GRID, direction="denoising"),
    "patch features": lambda m: interp.patch(m, PAIRS, interp.features(dictionary(m.d_model), units=[0, 3, 7])),
    "path_patch": lambda m: interp.path_patch(m, PAIRS, ["embed", "L0.H1"], ["L1.H0.q", "logits"]),
    "run": lambda m: run(m, IDS[0], "L1.resid_post").cache["L1.resid_post"],
    "run_circuit": lambda m: interp.run_circuit(m, PAIRS, ["L0.H0", "L1.mlp"], "mean"),
    "steer": lambda m: interp.steer(m, IDS[0], torch.ones(m.d_model), 2.0, site="L1.resid_post", steps=3).after.tokens,
    "steering_vector": lambda m: interp.steering_vector(m, IDS, PAIRS.corrupted, "L1.resid_post"),  # type: ignore[arg-type]
}


def methods() -> set[str]:
    """The names of all public methods that do work, as `interp.journal` marks them."""
    from interp import audit as audits

    named = [(name, getattr(interp, name)) for name in interp.__all__]
    beside = [generate, attention_patterns, audits.audit]
    marked = {name for name, made in named if inspect.isfunction(made) and hasattr(made, "__wrapped__")}
    return marked | {made.__name__ for made in beside} | {"run"}


def numbers(found: Any) -> np.ndarray:
    """A method's result as one array of numbers."""
    if isinstance(found, interp.Effects):
        parts = [found.values, found.clean, *([] if found.corrupted is None else [found.corrupted])]
        return np.concatenate([np.ravel(part.values) for part in parts])
    if isinstance(found, interp.Circuit):
        return np.array([score for _, score in sorted(found.scores().items(), key=lambda item: str(item[0]))])
    if isinstance(found, xr.DataArray):
        return np.ravel(found.values)
    if hasattr(found, "to_dict") and not hasattr(found, "sizes"):
        return np.array([value for value in found.to_dict().values() if isinstance(value, float)])
    return np.ravel(np.asarray(found, dtype=float))
