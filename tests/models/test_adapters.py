"""Models with PEFT's adapters: used whole, or refused with what to load instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import interp
from interp import PromptPairs
from interp.engine.identity import config_digest
from interp.errors import ArchitectureError, BackendError, ModelNotFoundError
from interp.models.adapters import adapter_layers
from tests.families import words
from tests.oracle.configs import tiny
from tests.oracle.hooks import Oracle

(BASE,), (SOURCE,) = words(6), words(6, seed=1)
PAIRS, PLAN = PromptPairs([BASE], [SOURCE], [20], [30]), interp.grid(["resid_mid", "mlp_out"], layers=[0, 1])
_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "lora everywhere": peft.LoraConfig(
        r=4, target_modules=[*_SEVEN, "embed_tokens", "lm_head"], init_lora_weights=False
    ),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "a head of its own": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    ),
    "an embedding of its own": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
BESIDE: dict[str, peft.PeftConfig] = {
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    "POLY": peft.PolyConfig(target_modules=["q_proj"], r=2, n_tasks=2),
}


def adapted(config: peft.PeftConfig) -> Any:
    """The tiny model in PEFT's wrapper, every weight of the adapter drawn at random."""
    hf, _ = tiny("llama_gqa")
    torch.manual_seed(0)
    wrapper = peft.get_peft_model(hf, config)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapper.eval()


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=torch.tensor([BASE])).logits


def right(hf: Any) -> np.ndarray:
    """Every cell of PLAN by plain hooks: `[kind, layer, position]`."""
    oracle = Oracle(hf)
    return np.array(
        [
            [
                [float(line[20] - line[30]) for place in range(6) for line in [
                    oracle.patched(BASE, SOURCE, kind, layer, positions=(place,))[-1]
                ]]
                for layer in (0, 1)
            ]
            for kind in ("resid_mid", "mlp_out")
        ]
    )  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_a_wrapper_is_loaded_whole(kind: str) -> None:
    wrapper = adapted(LAYERS[kind])
    assert float((logits(wrapper) - logits(tiny("llama_gqa")[0])).abs().max()) > 0.1
    parts = (wrapper.base_model, wrapper.get_base_model()) if kind == "lora" else ()
    for given in (wrapper, *parts):
        model = interp.load_model(given)
        assert model.hf is wrapper.get_base_model() and torch.equal(logits(model.hf), logits(wrapper))
        assert not model.refused
        effects = interp.patch(model, PAIRS, PLAN)
        np.testing.assert_allclose(effects.values[:, :, :, 0], right(model.hf), atol=1e-4)


def test_an_adapter_that_was_added_to_the_module() -> None:
    hf, _ = tiny("llama_gqa")
    torch.manual_seed(0)
    hf.add_adapter(LAYERS["lora"])
    hf.eval()
    effects = interp.patch(interp.load_model(hf), PAIRS, PLAN)
    np.testing.assert_allclose(effects.values[:, :, :, 0], right(hf), atol=1e-4)


def test_layers_that_are_exchanged_after_loading_are_followed() -> None:
    """Merged in place, switched off, merged and taken out, and a new one put in: each run is of the module as it is."""
    wrapper = adapted(LAYERS["lora"])
    model = interp.load_model(wrapper)
    before, seen = interp.patch(model, PAIRS, PLAN), {config_digest(model)}
    wrapper.merge_adapter()
    np.testing.assert_allclose(interp.patch(model, PAIRS, PLAN).values, before.values, atol=1e-4)
    seen.add(config_digest(model))
    wrapper.unmerge_adapter()
    with wrapper.disable_adapter():
        off = interp.patch(model, PAIRS, PLAN)
        seen.add(config_digest(model))
    np.testing.assert_allclose(off.values[:, :, :, 0], right(tiny("llama_gqa")[0]), atol=1e-4)
    merged = wrapper.merge_and_unload()
    assert merged is model.hf and not adapter_layers(merged)
    np.testing.assert_allclose(interp.patch(model, PAIRS, PLAN).values, before.values, atol=1e-4)
    assert len(seen | {config_digest(model)}) == 4, "a checkpoint of one is not taken for another's"
    merged.add_adapter(LAYERS["dora"])
    effects = interp.patch(model, PAIRS, PLAN)
    np.testing.assert_allclose(effects.values[:, :, :, 0], right(merged), atol=1e-4)


@pytest.mark.parametrize("kind", BESIDE)
def test_an_adapter_beside_the_layers_is_refused(kind: str) -> None:
    said = rf"with a {kind} adapter is more than the model inside it: .*peft_model\.base_model"
    with pytest.raises(ArchitectureError, match=said):
        interp.load_model(adapted(BESIDE[kind]))


def test_another_process_is_not_given_adapters() -> None:
    wrapper = adapted(LAYERS["lora"])
    model = interp.load_model(wrapper, backend="simulated")
    with pytest.raises(BackendError, match=r"holds adapters of PEFT.*merge_and_unload"):
        interp.patch(model, PAIRS, PLAN)


# --- adapters on disk --------------------------------------------------------------------------------------


def saved(folder: Path, base: str | None, kind: str = "lora") -> Any:
    """An adapter in a folder of its own, and the model that it is for in another."""
    hf, tokenizer = tiny("llama_gqa")
    hf.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    wrapper = adapted((LAYERS | BESIDE)[kind])
    wrapper.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    return wrapper


@pytest.mark.parametrize("kind", ["lora", "a head of its own", "ia3"])
def test_an_adapters_folder_brings_its_model(kind: str, tmp_path: Path) -> None:
    wrapper = saved(tmp_path, str(tmp_path / "base"), kind)
    model = interp.load_model(tmp_path / "adapter")
    assert torch.equal(logits(model.hf), logits(wrapper)) and model.tokenizer is not None
    assert type(model.hf) is type(wrapper.get_base_model())
    with pytest.raises(ArchitectureError, match=r"is an adapter for .*, and a server knows whole models"):
        interp.load_model(tmp_path / "adapter", backend="http://127.0.0.1:1")


def test_a_folder_with_both(tmp_path: Path) -> None:
    wrapper = saved(tmp_path, str(tmp_path / "elsewhere"))
    for file in (tmp_path / "adapter").iterdir():
        file.rename(tmp_path / "base" / file.name)
    model = interp.load_model(tmp_path / "base")
    assert torch.equal(logits(model.hf), logits(wrapper))


def test_adapters_that_cannot_be_put_on_say_why(tmp_path: Path) -> None:
    saved(tmp_path, str(tmp_path / "gone"))
    with pytest.raises(ModelNotFoundError, match=r"the adapter .* is for .*gone, which cannot be loaded: "):
        interp.load_model(tmp_path / "adapter")
    saved(tmp_path, None)
    with pytest.raises(ModelNotFoundError, match=r"does not say which model it is for.*PeftModel\.from_pretrained"):
        interp.load_model(tmp_path / "adapter")
    saved(tmp_path, str(tmp_path / "base"), "PREFIX_TUNING")
    with pytest.raises(ArchitectureError, match="with a PREFIX_TUNING adapter"):
        interp.load_model(tmp_path / "adapter")
    saved(tmp_path, str(tmp_path / "gpt2"))
    hf, tokenizer = tiny("gpt2")
    hf.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelNotFoundError, match=r"the adapter .* does not fit .*gpt2: .*q_proj"):
        interp.load_model(tmp_path / "adapter")
