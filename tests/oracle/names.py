"""Where the oracle finds the parts of each architecture: module names written by hand, nothing inferred."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Names:
    """Module names of one architecture; block parts are relative to the block, "" means that there is none.

    `qkv` is the fused projection and `layout` how its output splits: "joined" (q, then k, then v),
    "interleaved" (q, k, v of head 0, then of head 1, …), "grouped" (per kv head: its queries, its key, its
    value) or "one_kv" (all queries, one key, one value). `attn_out` and `mlp_out` are the modules whose
    output is added to the stream.
    """

    blocks: str = "model.layers"
    final: str = "model.norm"
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    layout: str = "joined"
    o: str = "self_attn.o_proj"
    mlp: str = "mlp"
    act: str = "mlp.act_fn"
    down: str = "mlp.down_proj"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    post1: str = ""
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    parallel: bool = False

    @property
    def mid(self) -> str:
        """The module that reads resid_mid from the residual stream."""
        return self.norm2 or self.mlp


_LLAMA = Names()
_MOE = replace(_LLAMA, act="", down="")
_POST_ONLY = replace(
    _LLAMA,
    norm1="",
    norm2="",
    post1="post_attention_layernorm",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_SANDWICH = replace(
    _LLAMA,
    norm2="pre_feedforward_layernorm",
    post1="post_attention_layernorm",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_PHI3 = replace(_LLAMA, q="", k="", v="", qkv="self_attn.qkv_proj", act="mlp.activation_fn")
_GPT2 = Names(
    blocks="transformer.h",
    final="transformer.ln_f",
    attn="attn",
    q="",
    k="",
    v="",
    qkv="attn.c_attn",
    o="attn.c_proj",
    act="mlp.act",
    down="mlp.c_proj",
    norm1="ln_1",
    norm2="ln_2",
    attn_out="attn",
)
_NEOX = Names(
    blocks="gpt_neox.layers",
    final="gpt_neox.final_layer_norm",
    attn="attention",
    q="",
    k="",
    v="",
    qkv="attention.query_key_value",
    layout="interleaved",
    o="attention.dense",
    act="mlp.act",
    down="mlp.dense_4h_to_h",
    attn_out="attention",
)
_BLOOM = replace(
    _NEOX,
    blocks="transformer.h",
    final="transformer.ln_f",
    attn="self_attention",
    qkv="self_attention.query_key_value",
    o="self_attention.dense",
    attn_out="self_attention.dense",  # the attention and MLP modules add the residual themselves
    mlp_out="mlp.dense_4h_to_h",
    act="mlp.gelu_impl",
)

_NAMES: dict[str, Names] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "granite", "smollm3"), _LLAMA),
    **dict.fromkeys(("ministral", "nemotron", "seed_oss", "helium", "arcee"), _LLAMA),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), _MOE),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _POST_ONLY),
    **dict.fromkeys(("cohere", "cohere2"), replace(_LLAMA, norm2="input_layernorm", parallel=True)),
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        q="attn.attention.q_proj",
        k="attn.attention.k_proj",
        v="attn.attention.v_proj",
        qkv="",
        o="attn.attention.out_proj",
    ),
    "gptj": replace(
        _GPT2,
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        qkv="",
        o="attn.out_proj",
        down="mlp.fc_out",
        norm2="ln_1",
        parallel=True,
    ),
    "gpt_neox": _NEOX,
    "phi": replace(
        _LLAMA,
        final="model.final_layernorm",
        o="self_attn.dense",
        act="mlp.activation_fn",
        down="mlp.fc2",
        norm2="input_layernorm",
        parallel=True,
    ),
    "phi3": _PHI3,
    "opt": replace(
        _LLAMA,
        blocks="model.decoder.layers",
        final="model.decoder.final_layer_norm",
        o="self_attn.out_proj",
        mlp="fc1",
        mlp_out="fc2",
        act="activation_fn",
        down="fc2",
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, act="mlp.act", attn_out="self_attention", mlp_out="mlp"),
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, act="mlp.act", down="mlp.c_proj"),
    "glm": replace(_LLAMA, act="mlp.activation_fn"),
    "glm4": replace(
        _LLAMA,
        act="mlp.activation_fn",
        post1="post_self_attn_layernorm",
        attn_out="post_self_attn_layernorm",
        mlp_out="post_mlp_layernorm",
    ),
    "apertus": replace(_LLAMA, norm1="attention_layernorm", norm2="feedforward_layernorm"),
    "persimmon": replace(
        _NEOX,
        blocks="model.layers",
        final="model.final_layernorm",
        attn="self_attn",
        qkv="self_attn.query_key_value",
        o="self_attn.dense",
        attn_out="self_attn",
    ),
}


#: Where vision models hold their text model, unless under "model.language_model".
TEXT_MODELS = {"idefics3": "model.text_model", "smolvlm": "model.text_model"}


def names_of(config: Any) -> Names:
    """The module names for a configuration; a vision model's are those of its text model, which it holds in a place of its own.

    Raises:
        LookupError: an architecture the oracle has no names for.
    """
    text = config.get_text_config()
    if text is not config:
        place = TEXT_MODELS.get(config.model_type, "model.language_model")
        return replace(names_of(text), blocks=f"{place}.layers", final=f"{place}.norm")
    if config.model_type not in _NAMES:
        raise LookupError(f"the oracle knows no architecture {config.model_type!r}")
    names = _NAMES[config.model_type]
    if config.model_type == "gpt_neox":
        return replace(names, parallel=config.use_parallel_residual)
    if config.model_type == "stablelm" and config.use_parallel_residual:
        return replace(names, parallel=True, norm2="input_layernorm")
    if config.model_type == "falcon" and config.new_decoder_architecture:
        if config.num_ln_in_parallel_attn == 1:
            return replace(names, layout="grouped", norm2="input_layernorm", parallel=True)
        return replace(names, layout="grouped", norm1="ln_attn", norm2="ln_mlp", parallel=True)
    if config.model_type == "falcon":
        layout = "one_kv" if config.multi_query else "interleaved"
        names = replace(names, layout=layout, parallel=config.parallel_attn)
        return replace(names, norm2="input_layernorm") if config.parallel_attn else names
    return names


def kv_heads(config: Any) -> int:
    """How many key/value heads an attention layer has."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return kv or config.num_attention_heads


def columns(names: Names, kind: str, heads: int, kv: int, d_head: int) -> Tensor:
    """The output features of the projection that make up q, k or v: indices [head, d_head]."""
    if not names.qkv:
        return torch.arange((heads if kind == "q" else kv) * d_head).view(-1, d_head)
    slot = "qkv".index(kind)
    if names.layout == "interleaved":
        return torch.arange(3 * heads * d_head).view(heads, 3, d_head)[:, slot]
    if names.layout == "grouped":
        index = torch.arange((heads + 2 * kv) * d_head).view(kv, heads // kv + 2, d_head)
        return index[:, :-2].reshape(heads, d_head) if kind == "q" else index[:, slot - 3]
    index = torch.arange((heads + 2 * kv) * d_head).view(-1, d_head)
    return index.split([heads, kv, kv])[slot]


def output_matrix(projection: Any, heads: int) -> Tensor:
    """The output projection's weight by head: [head, d_head, d_model]."""
    weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
    return weight.reshape(heads, -1, weight.shape[-1])
