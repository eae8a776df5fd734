"""Tiny random models of every family, weights so wide that no effect is near zero, and a tiny tokenizer."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_WORDS = """
    the a an and or but of to in on at with from by for as is was are were has had gave sold went said saw
    when then after before because while not no yes he she they it him her them his their who which that
    this these Mary John Tom Anna Paul Lisa Mark Rosa Peter Clara store park school house garden office
    station market book ball drink ring apple letter key ticket lamp red blue green old new big small happy
    city river king queen dog cat bird France Paris Rome Italy Spain Madrid capital country
    0 1 2 3 4 5 6 7 8 9 . , ? ! : ; ' -
""".split()  # noqa: SIM905
#: Size of the tokenizer's vocabulary and of every tiny model's.
D_VOCAB = len(_SPECIAL) + len(_WORDS)

_COMMON: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {key: value for key, value in _COMMON.items() if key != "intermediate_size"}
_FALCON["ffn_hidden_size"] = 48
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
#: A tower that no test looks through, beside the text model.
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

#: Name -> (transformers' model type, the configuration's arguments). Windows are smaller than the prompts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt_neo": (
        "gpt_neo",
        {
            **{key: _COMMON[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")},
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["local", "global", "local"], 1]],
            "window_size": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {**_COMMON, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "llama": ("llama", {**_COMMON, "num_key_value_heads": 4}),
    "llama_gqa": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "layer_types": _MIXED_WINDOWS,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 4,
            "layer_types": _MIXED_WINDOWS,
        },
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {
                **_GROUPED,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 4,
                "layer_types": _MIXED_WINDOWS,
            },
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "mm_tokens_per_image": 4,
            "image_token_index": 1000,
        },
    ),
    "phi": ("phi", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": None}),
    "olmo2": ("olmo2", _GROUPED),
    "opt": ("opt", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {**_GPT, "hidden_size": 32}),
    "falcon": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon_new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": (
        "falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "falcon_one_norm": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_sequential": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": False, "bias": True}),
    "stablelm": ("stablelm", {**_GROUPED, "partial_rotary_factor": 0.5, "use_parallel_residual": False}),
    "stablelm_parallel": (
        "stablelm",
        {**_GROUPED, "partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "mixtral": ("mixtral", {**_GROUPED, **_EXPERTS}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_GROUPED, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": _MIXED_WINDOWS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmo": ("olmo", _GROUPED),
    "olmo3": ("olmo3", {**_GROUPED, "sliding_window": 4, "layer_types": _MIXED_WINDOWS}),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": 4}),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {**_GROUPED, "logit_scale": 0.5, "sliding_window": 4, "layer_types": _MIXED_WINDOWS},
    ),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 1.5,
        },
    ),
    "glm": ("glm", {**_GROUPED, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 8, "partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 0, 1]}),
    "ministral": (
        "ministral",
        {**_GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": _MIXED_WINDOWS},
    ),
    "nemotron": ("nemotron", _GROUPED),
    "seed_oss": ("seed_oss", {**_GROUPED, "head_dim": 8}),
    "helium": ("helium", {**_GROUPED, "head_dim": 8}),
    "arcee": ("arcee", _GROUPED),
    "exaone4": ("exaone4", {**_GROUPED, "sliding_window": 4, "layer_types": _MIXED_WINDOWS}),
    "apertus": ("apertus", {**_GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "persimmon": ("persimmon", {**_COMMON, "partial_rotary_factor": 0.5}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh word-level tokenizer of `D_VOCAB` tokens: pads on the left and adds no special token."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny(family: str, seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random 3-layer model of a family (a key of `FAMILIES`) in fp32, eval mode, with the shared tokenizer.

    Attention is SDPA where the family supports it, else eager. The same seed gives the same weights.
    """
    model_type, arguments = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **arguments)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    widen(model, seed=zlib.crc32(family.encode()) + seed)
    return model.eval().requires_grad_(False), tokenizer()


@torch.no_grad()
def widen(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter in place: matrices ~ N(0, 1.5²/d), embeddings ~ N(0, 0.5²), biases ~ N(0, 0.2²).

    Norm weights vary around their neutral value: one, or zero where the norm adds one.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or name.endswith("bias"):
            neutral = 1.0 if "bias" not in name and bool((parameter == 1).all()) else 0.0
            parameter.copy_(neutral + 0.2 * noise)
        elif any(part in name for part in ("wte", "wpe", "embed_", "embeddings")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.5 * noise / min(parameter.shape[-2:]) ** 0.5)


def prompts(length: int = 9, first_difference: int = 2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Token ids of a clean and a corrupted prompt of one length.

    They differ at `first_difference` and, where there is room, at the last position but one.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(D_VOCAB - len(_SPECIAL), generator=generator)[: length + 2] + len(_SPECIAL)
    clean = words[:length].tolist()
    corrupted = list(clean)
    corrupted[first_difference] = int(words[length])
    if first_difference < length - 2:
        corrupted[length - 2] = int(words[length + 1])
    return clean, corrupted
