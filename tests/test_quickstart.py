"""A quick start as a person wrote it, more arguments than the calls need: on a tiny model, and (slowly) on the bundled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, TensorDataset

import interp
from interp.errors import PlotError

from .families import loaded

COMPONENTS = ["resid_post", "attn_out", "mlp_out"]


def quick_start(model: interp.Model, answer_tokens: list[int], threshold: float, folder: Path) -> None:
    interp.set_seed(42)
    results = interp.comprehensive_activation_patching(
        model,
        clean_prompt="The Eiffel Tower is located in the city of Paris",
        corrupted_prompt="The Eiffel Tower is located in the city of London",
        answer_tokens=answer_tokens,
        components=COMPONENTS,
    )
    fig = interp.plot_activation_patching_results(results, n_layers=model.cfg.n_layers, components=COMPONENTS)
    fig.show()
    with pytest.raises(PlotError, match=f"n_layers=1, but the result is of a model with {model.n_layers} layers"):
        interp.plot_activation_patching_results(results, n_layers=1, components=COMPONENTS)
    assert results.values.dims == ("component", "layer", "position", "pair") and np.isfinite(results.values).all()
    # the last position of the last layer is what the logits are read from: patched there, the run is the corrupted one
    end = results.values.sel(component="resid_post", layer=model.n_layers - 1)[-1]
    np.testing.assert_allclose(end, results.corrupted, rtol=1e-4, atol=1e-4)

    activations = interp.collect_activations(model, ["your", "prompts", "here"], layer=1, component="mlp_out")
    (batch,) = next(iter(DataLoader(TensorDataset(activations), batch_size=32, shuffle=True)))
    assert batch.shape == activations.shape and batch.shape[1] == model.cfg.d_model
    sae = interp.SparseAutoencoder(d_model=model.cfg.d_model, d_hidden=model.cfg.d_model * 4, sparsity_coef=1e-3)
    train_loader = DataLoader(TensorDataset(activations), batch_size=32, shuffle=True)
    interp.train_sae(sae, train_loader, n_epochs=10, lr=1e-3)
    interp.save_sae(sae, folder / "saes" / "l6_mlp", metadata={"layer": 1, "component": "mlp_out"})
    plan = interp.features(interp.load_sae(folder / "saes" / "l6_mlp", model), [0, 1])
    assert plan.components[0].tap == interp.Site("mlp_out", layer=1)

    important_heads = interp.iterative_pruning(
        model,
        prompt="The Eiffel Tower is located in",
        answer_tokens=answer_tokens,
        threshold=threshold,
        ablation_type="mean",
    )
    assert f"Important heads: {important_heads}".startswith("Important heads: Circuit(iterative_pruning")
    sizes: dict[str, Any] = {"n_layers": model.cfg.n_layers, "n_heads": model.cfg.n_heads}
    for heads in (important_heads, list(important_heads)):
        interp.plot_circuit_graph(heads, **sizes).show()
        if len(heads):
            with pytest.raises(PlotError, match="n_heads=0"):
                interp.plot_circuit_graph(heads, **sizes | {"n_heads": 0})


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that were opened."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    return opened


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa"])
def test_the_quick_start_on_a_tiny_model(family: str, pages: list[str], tmp_path: Path) -> None:
    quick_start(loaded(family), [20, 33], 0.1, tmp_path)
    assert len(pages) == 3


@pytest.mark.slow
def test_the_quick_start_on_the_bundled_model(bundled: interp.Model, pages: list[str], tmp_path: Path) -> None:
    quick_start(bundled, [3000, 3576], 0.5, tmp_path)
    assert len(pages) == 3
