"""Modules that are in memory already: which of them can be used, and what is said of the others before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model

import interp
from interp import PromptPairs, Site
from interp.errors import ArchitectureError, SiteUnavailableError
from tests.families import count_forwards, words
from tests.oracle.configs import tiny

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
NO_HEAD = ("LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification", "BertModel", "OPTModel")


def made(kind: str) -> Any:
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**(_T5 if kind.startswith("T5") else _SMALL))).eval()


@pytest.mark.parametrize("kind", [*NO_HEAD, "T5EncoderModel"])
def test_a_module_without_a_head_is_told_what_to_load(kind: str) -> None:
    said = rf"is a {kind}, which has no language-model head: .*AutoModelForCausalLM\.from_pretrained"
    with pytest.raises(ArchitectureError, match=said):
        interp.load_model(made(kind))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertLMHeadModel", "ModernBertForMaskedLM"])
def test_a_module_that_reads_both_ways(kind: str) -> None:
    with pytest.raises(ArchitectureError, match=f"is a {kind} whose tokens attend to later ones too"):
        interp.load_model(made(kind))


@pytest.mark.parametrize(
    ("family", "option"), [("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})]
)
def test_a_config_that_reads_both_ways(family: str, option: dict[str, bool]) -> None:
    config = tiny(family)[0].config
    for name, value in option.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    a, b = (model(torch.tensor([ids])).logits[0, 0] for ids in ([5, 6, 7], [5, 6, 8]))
    assert not torch.allclose(a, b), "the first token sees the last"
    with pytest.raises(ArchitectureError, match="attend to later ones too"):
        interp.load_model(model)


def test_an_encoder_and_a_decoder() -> None:
    with pytest.raises(ArchitectureError, match="is a T5ForConditionalGeneration, an encoder-decoder"):
        interp.load_model(made("T5ForConditionalGeneration"))


def test_a_second_head_is_no_hindrance() -> None:
    hf, tokenizer = tiny("gpt2")
    both = transformers.GPT2DoubleHeadsModel(hf.config).eval()
    both.load_state_dict(hf.state_dict(), strict=False)
    pairs, plan = PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.heads("z", layers=[1])
    values = [interp.patch(interp.load_model(one, tokenizer=tokenizer), pairs, plan).values for one in (hf, both)]
    assert values[0].equals(values[1])


# --- weights that are elsewhere ----------------------------------------------------------------------------

_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
_DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
OFFLOADED = r"18 of 30 parameters of .* are offloaded to disk .* backend='ndif'"


@pytest.mark.parametrize("backend", ["local", "simulated"])
def test_a_folder_that_is_offloaded(backend: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny("llama")
    hf.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ArchitectureError, match=OFFLOADED):
        interp.load_model(
            tmp_path / "model", device_map=_DISK, offload_folder=tmp_path / "offload", backend=backend, check=False
        )
    assert interp.load_model(tmp_path / "model", device_map={"": "cpu"}).audit().ok


def test_a_module_that_was_dispatched_to_disk(tmp_path: Path) -> None:
    hf = dispatch_model(tiny("llama")[0], _DISK, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ArchitectureError, match=OFFLOADED):
        interp.load_model(hf)


def test_a_module_whose_weights_were_never_loaded() -> None:
    with pytest.raises(ArchitectureError, match=r"30 of 30 parameters of .* are on the meta device.* load the weights"):
        interp.load_model(tiny("llama")[0].to("meta"))


# --- attention kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa", "paged|eager"])
def test_attention_whose_mask_is_no_tensor_is_refused(implementation: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny("llama")
    said = r"attn_implementation='.*', whose mask is no tensor .*'sdpa' or 'eager', or call set_attn_implementation"
    if implementation == "flex_attention":
        hf.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ArchitectureError, match=said):
            interp.load_model(tmp_path, attn_implementation=implementation)
    hf.config._attn_implementation = implementation
    with pytest.raises(ArchitectureError, match=said):
        interp.load_model(hf)
    hf.set_attn_implementation("sdpa")
    assert not interp.load_model(hf).refused


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_flash_attention_hides_what_goes_in_and_the_pattern(implementation: str) -> None:
    hf, _ = tiny("llama")
    hf.config._attn_implementation = implementation  # the kernels need a GPU: nothing is run
    model = interp.load_model(hf, check=False)
    forwards, stop = count_forwards(model)
    pairs = PromptPairs(words(6), words(6, seed=1), [20], [30])
    for kind in ("pattern", "q_rot", "k_rot"):
        with pytest.raises(SiteUnavailableError, match=rf"no {kind}: attention is one fused call .*'sdpa' or 'eager'"):
            interp.patch(model, pairs, interp.heads(kind))
    assert model.require(Site("z", 0)) and model.require(Site("q", 0))
    stop()
    assert not forwards


def test_falcons_pattern_needs_eager_attention() -> None:
    model = interp.load_model(tiny("falcon")[0])
    with pytest.raises(SiteUnavailableError, match=r"no pattern: attention is one fused call \('sdpa'\).*'eager'"):
        model.require(Site("pattern", 0))
