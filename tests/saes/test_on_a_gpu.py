"""On a CUDA device: dictionaries, their features, circuits of them, graphs and generation give the CPU's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp import Edit, Model, PromptPairs, Site
from interp.circuits import attribution_graph
from tests.circuits.test_attribution_graph import transcoder
from tests.oracle.configs import tiny

from .made import FEATURES, WIDTH, K, random_dictionary, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 9, 31, 42, 17, 23], [6, 8, 30, 41, 12]]
PAIRS = PromptPairs(PROMPTS, [[5, 9, 33, 40, 17, 22], [6, 8, 35, 41, 13]], [20, 21], [25, 26])
FAMILIES = ("gpt2", "llama_gqa", "gemma3")


def both(family: str) -> tuple[Model, Model]:
    hf, tokenizer = tiny(family)
    here = interp.load_model(copy.deepcopy(hf), tokenizer=tokenizer)
    there = interp.load_model(hf.cuda(), tokenizer=tokenizer)
    assert (here.device.type, there.device.type) == ("cpu", "cuda")
    return here, there


def alike(family: str, run: Callable[[Model], object]) -> None:
    here, there = (np.asarray(run(model), dtype=np.float64) for model in both(family))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * max(1.0, float(np.nanmax(np.abs(here)))))


@pytest.mark.parametrize("form", ["TopK", "JumpReLU", "Gated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features(family: str, form: str) -> None:
    sae = random_dictionary(form, 32)
    plan = interp.features(sae, [0, 3, 5, 9])
    for method in (interp.patch, interp.ablate, interp.attribute):
        alike(family, lambda model, method=method: method(model, PAIRS, plan).values.values)
    alike(family, lambda model: interp.collect_activations(model, PROMPTS, 1, interp.saes.view_of(sae)))
    alike(family, lambda model: list(interp.evaluate_sae(model, sae, PROMPTS, context=8).loss.values()))
    moved = copy.deepcopy(sae).to("cuda")  # type: ignore[attr-defined]
    alike(family, lambda model: interp.patch(model, PAIRS, interp.features(moved, [0, 3])).values.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_graphs_and_generation(family: str) -> None:
    saes = [random_dictionary("TopK", 32, 24, "L0.resid_post"), random_dictionary("JumpReLU", 32, 24, "L1.resid_post")]

    def circuit(model: Model) -> list[float]:
        found = interp.discover(model, PAIRS, "eap", "feature", saes=saes, top=50)
        scores = [found.nodes[name] for name in sorted(found.nodes)] + [
            found.edges[edge] for edge in sorted(found.edges)
        ]
        return [*scores, *interp.run_circuit(model, PAIRS, found.top(9))]

    alike(family, circuit)
    alike(family, lambda model: attribution_graph(model, PROMPTS[0], {1: transcoder(32)}, logits=2).adjacency)
    feature = interp.saes.view_of(saes[1]).site(unit=3)
    edits = [Edit(feature, "set", 2.0), Edit(Site("resid_post", layer=0), "add", torch.ones(32))]
    alike(family, lambda model: model.generate(PROMPTS, edits, 5, logits=True, stop=False).logits)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_training(architecture: str, tmp_path: Path) -> None:
    own = {} if architecture == "standard" else {"k": K}
    sae = interp.SparseAutoencoder(d_model=WIDTH, architecture=architecture, d_sae=FEATURES, device="cuda", **own)
    options = {"tokens": 25_600, "batch_size": 128, "checkpoint": tmp_path / "run", "progress": False}
    interp.train_sae(sae, rows(), **options)
    assert sae.W_enc.device.type == "cuda" and bool(sae.W_enc.isfinite().all())
    loaded = interp.load_sae(interp.save_sae(sae, tmp_path / "sae", {"site": "L1.resid_post"}))
    used = interp.saes.inference(sae)
    torch.testing.assert_close(loaded.encode(rows()), used.encode(rows().cuda()).cpu(), rtol=1e-3, atol=1e-3)
