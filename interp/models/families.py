"""Architectures as data: where each kind of site lives in the modules of a HuggingFace family.

A `Family` is a row of strings. `block` lists the taps of one transformer block in the order in which its forward
pass reaches them: `(path below the block, side, kinds of site found there)`. To add a family, add a row (or derive
one with `replace`) and run `python -m interp.audit` on a model of it: the audit says whether the row is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Tap = tuple[str, str, tuple[str, ...]]

_NO_MID = "attention and MLP read the same stream in parallel, so there is no residual stream between them"
_NO_NEURON = "the experts of this MoE block are fused into one kernel that exposes no hidden units"
_NO_ROT = "the attention of this family exposes no point after the rotary embedding"


def _taps(
    qkv: tuple[Tap, ...],
    core: tuple[Tap, ...],
    o: str,
    mid: str | None,
    mlp: tuple[Tap, ...],
    attn_out: str | None = None,
) -> tuple[Tap, ...]:
    """The taps of one block, in forward order; `attn_out` names a norm that stands behind the output projection."""
    out: tuple[Tap, ...] = ((o, "output", ("head_out", "attn_out")),)
    if attn_out:
        out = ((o, "output", ("head_out",)), (attn_out, "output", ("attn_out",)))
    middle: tuple[Tap, ...] = ((mid, "input", ("resid_mid",)),) if mid else ()
    return (("", "inputs", ("resid_pre",)), *qkv, *core, (o, "input", ("z",)), *out, *middle, *mlp)


def _separate(attn: str) -> tuple[Tap, ...]:
    return tuple((f"{attn}.{kind}_proj", "output", (kind,)) for kind in "qkv")


def _fused(path: str) -> tuple[Tap, ...]:
    return ((path, "output", ("q", "k", "v")),)


def _mlp(pre: str, down: str, out: str = "mlp", enter: str = "mlp") -> tuple[Tap, ...]:
    return (
        (enter, "input", ("mlp_in",)),
        (pre, "output", ("mlp_pre",)),
        (down, "input", ("neuron",)),
        (out, "output", ("mlp_out",)),
    )


def _core(attn: str, call: str = "attention_interface_1") -> tuple[Tap, ...]:
    return ((f"{attn}.source.{call}", "inputs", ("q_rot", "k_rot", "pattern")),)


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are relative to the model (embed, layers, norm, head) or to a block (all others)."""

    name: str
    model_types: tuple[str, ...]
    block: tuple[Tap, ...]
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    #: what the q, k, v projections and the MLP read, below the block; None where they read the stream itself
    norm1: str | None = "input_layernorm"
    norm2: str | None = "post_attention_layernorm"
    qkv_layout: str = "separate"  # separate | split ([q|k|v]) | interleaved (per head) | grouped (per kv group)
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_pre: str | None = "mlp.gate_proj"
    down: str | None = "mlp.down_proj"
    post_attn: str | None = None  # a norm between the output projection and the residual stream
    post_mlp: str | None = None
    parallel: bool = False
    #: how attention probabilities are reached: "interface" recomputes them from q and k, otherwise a source label
    pattern: str = "interface"
    core_first: int = 1  # index of q among the positional arguments of the core call
    alibi: bool = False
    #: attribute of the configuration that multiplies what attention and MLP add to the stream; "1/…" divides
    branch: str = ""
    logit_scale: str = ""  # the same for the output of the head
    #: the block returns a tuple whose first item is the residual stream
    tuple_output: bool = False
    moe: bool = False
    joint_qk_norm: bool = False  # q and k are normalised over all heads together
    sinks: bool = False  # attention sinks: rows of the pattern sum to less than 1
    #: the config attribute that says how many positions have an embedding; None where there is no such table
    positions: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    #: why a model cannot be used at all; a variant says so
    unsupported: str = ""
    #: ({config attribute: value}, changes): all whose every attribute has that value are applied, one after the other
    variants: tuple[tuple[Mapping[str, object], Mapping[str, Any]], ...] = ()
    note: str = ""

    def for_config(self, config: object) -> Family:
        """This row with the variants applied that the model's configuration asks for."""
        row = self
        for wanted, changes in self.variants:
            if all(getattr(config, attribute, None) == value for attribute, value in wanted.items()):
                row = replace(row, **changes)
        return row


_LLAMA_QKV = _separate("self_attn")
_LLAMA_CORE = _core("self_attn")
_GATED = _mlp("mlp.gate_proj", "mlp.down_proj")
_LLAMA = Family(
    "llama",
    (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "ministral", "smollm3", "olmo", "seed_oss", "helium"),
        *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
    ),
    _taps(_LLAMA_QKV, _LLAMA_CORE, "self_attn.o_proj", "post_attention_layernorm", _GATED),
)
_MOE: dict[str, Any] = {
    "block": _taps(
        _LLAMA_QKV,
        _LLAMA_CORE,
        "self_attn.o_proj",
        "post_attention_layernorm",
        (("mlp", "input", ("mlp_in",)), ("mlp", "output", ("mlp_out",))),
    ),
    "mlp_pre": None,
    "down": None,
    "moe": True,
    "missing": {"mlp_pre": _NO_NEURON, "neuron": _NO_NEURON},
}
_SANDWICH: dict[str, Any] = {
    "norm2": "pre_feedforward_layernorm",
    "post_attn": "post_attention_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}
_NEOX_MLP = _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    _taps(
        _fused("attention.query_key_value"),
        _core("attention"),
        "attention.dense",
        "post_attention_layernorm",
        _NEOX_MLP,
    ),
    embed="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    qkv_layout="interleaved",
    qkv=("attention.query_key_value",) * 3,
    o="attention.dense",
    mlp_pre="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    variants=(
        (
            {"use_parallel_residual": True},
            {
                "parallel": True,
                "missing": {"resid_mid": _NO_MID},
                "block": _taps(
                    _fused("attention.query_key_value"), _core("attention"), "attention.dense", None, _NEOX_MLP
                ),
            },
        ),
    ),
)
_BLOOM_CORE: tuple[Tap, ...] = (("self_attention.source.self_attention_dropout_0", "output", ("pattern",)),)
_BLOOM_QKV = _fused("self_attention.query_key_value")
_FALCON_ROT = {"q_rot": _NO_ROT, "k_rot": _NO_ROT}
_FALCON_SOFTMAX: tuple[Tap, ...] = (("self_attention.source.F_softmax_0", "output", ("pattern",)),)
_FALCON_UNBUILT = "the forward of this variant asks for modules that transformers does not build for it: {}"


def _falcon_block(core: tuple[Tap, ...], mid: str | None) -> tuple[Tap, ...]:
    return _taps(_BLOOM_QKV, core, "self_attention.dense", mid, _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))


_POST_NORM: dict[str, Any] = {
    "block": _taps(
        _LLAMA_QKV,
        _LLAMA_CORE,
        "self_attn.o_proj",
        "mlp",
        _mlp("mlp.gate_proj", "mlp.down_proj", "post_feedforward_layernorm"),
        attn_out="post_attention_layernorm",
    ),
    "norm1": None,
    "norm2": None,
    "post_attn": "post_attention_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}
_PARALLEL_LLAMA = _taps(_LLAMA_QKV, _LLAMA_CORE, "self_attn.o_proj", None, _GATED)
_PARALLEL: dict[str, Any] = {"parallel": True, "missing": {"resid_mid": _NO_MID}}

#: Every known architecture. The order is that of the README's table.
FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        ("gpt2",),
        _taps(_fused("attn.c_attn"), _core("attn"), "attn.c_proj", "ln_2", _mlp("mlp.c_fc", "mlp.c_proj")),
        embed="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        norm1="ln_1",
        norm2="ln_2",
        qkv_layout="split",
        qkv=("attn.c_attn",) * 3,
        o="attn.c_proj",
        mlp_pre="mlp.c_fc",
        down="mlp.c_proj",
        positions="max_position_embeddings",
    ),
    Family(
        "gpt_neo",
        ("gpt_neo",),
        _taps(
            tuple((f"attn.attention.{kind}_proj", "output", (kind,)) for kind in "qkv"),
            (
                ("attn.attention.source.self__attn_0", "inputs", ("q_rot", "k_rot")),
                ("attn.attention.source.self__attn_0.source.self_attn_dropout_0", "output", ("pattern",)),
            ),
            "attn.attention.out_proj",
            "ln_2",
            _mlp("mlp.c_fc", "mlp.c_proj"),
        ),
        tuple_output=True,
        embed="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        norm1="ln_1",
        norm2="ln_2",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        o="attn.attention.out_proj",
        mlp_pre="mlp.c_fc",
        down="mlp.c_proj",
        pattern="source",
        core_first=0,
        positions="max_position_embeddings",
    ),
    Family(
        "gptj",
        ("gptj",),
        _taps(
            tuple((f"attn.{kind}_proj", "output", (kind,)) for kind in "qkv"),
            (
                ("attn.source.self__attn_0", "inputs", ("q_rot", "k_rot")),
                ("attn.source.self__attn_0.source.self_attn_dropout_0", "output", ("pattern",)),
            ),
            "attn.out_proj",
            None,
            _mlp("mlp.fc_in", "mlp.fc_out"),
        ),
        tuple_output=True,
        embed="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        norm1="ln_1",
        norm2="ln_1",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        o="attn.out_proj",
        mlp_pre="mlp.fc_in",
        down="mlp.fc_out",
        pattern="source",
        core_first=0,
        positions="max_position_embeddings",
        **_PARALLEL,
    ),
    _NEOX,
    _LLAMA,
    replace(
        _LLAMA,
        name="gemma2",
        model_types=("gemma2", "gemma3_text"),
        block=_taps(
            _LLAMA_QKV,
            _LLAMA_CORE,
            "self_attn.o_proj",
            "pre_feedforward_layernorm",
            _mlp("mlp.gate_proj", "mlp.down_proj", "post_feedforward_layernorm"),
            attn_out="post_attention_layernorm",
        ),
        **_SANDWICH,
    ),
    Family(
        "phi",
        ("phi",),
        _taps(_LLAMA_QKV, _LLAMA_CORE, "self_attn.dense", None, _mlp("mlp.fc1", "mlp.fc2")),
        norm="model.final_layernorm",
        norm2="input_layernorm",
        o="self_attn.dense",
        mlp_pre="mlp.fc1",
        down="mlp.fc2",
        **_PARALLEL,
    ),
    Family(
        "phi3",
        ("phi3",),
        _taps(
            _fused("self_attn.qkv_proj"),
            _LLAMA_CORE,
            "self_attn.o_proj",
            "post_attention_layernorm",
            _mlp("mlp.gate_up_proj", "mlp.down_proj"),
        ),
        qkv_layout="split",
        qkv=("self_attn.qkv_proj",) * 3,
        mlp_pre="mlp.gate_up_proj",
    ),
    replace(_LLAMA, name="olmo2", model_types=("olmo2", "olmo3"), joint_qk_norm=True, **_POST_NORM),
    replace(_LLAMA, name="exaone4", model_types=("exaone4",), **_POST_NORM),
    Family(
        "opt",
        ("opt",),
        _taps(
            _LLAMA_QKV,
            _LLAMA_CORE,
            "self_attn.out_proj",
            "final_layer_norm",
            _mlp("fc1", "fc2", "fc2", enter="fc1"),
        ),
        embed="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
        o="self_attn.out_proj",
        mlp="",
        mlp_pre="fc1",
        down="fc2",
        variants=(
            (
                {"do_layer_norm_before": False},
                {
                    "unsupported": "with do_layer_norm_before=False it normalises the stream itself after each block, so it "
                    "has no residual stream to patch; use a pre-norm checkpoint"
                },
            ),
        ),
        positions="max_position_embeddings",
    ),
    Family(
        "bloom",
        ("bloom",),
        _taps(
            _BLOOM_QKV,
            _BLOOM_CORE,
            "self_attention.dense",
            "post_attention_layernorm",
            _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
        ),
        tuple_output=True,
        embed="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        qkv_layout="interleaved",
        qkv=("self_attention.query_key_value",) * 3,
        o="self_attention.dense",
        mlp_pre="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        pattern="source",
        alibi=True,
        missing={"q_rot": _NO_ROT, "k_rot": _NO_ROT},
    ),
    Family(
        "falcon",
        ("falcon",),
        _falcon_block(_FALCON_SOFTMAX, None),
        tuple_output=True,
        embed="transformer.word_embeddings",
        layers="transformer.h",
        norm="transformer.ln_f",
        norm2="input_layernorm",
        qkv_layout="split",
        qkv=("self_attention.query_key_value",) * 3,
        o="self_attention.dense",
        mlp_pre="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        pattern="source",
        parallel=True,
        missing={"resid_mid": _NO_MID, **_FALCON_ROT},
        variants=(
            ({"multi_query": False}, {"qkv_layout": "interleaved"}),
            ({"new_decoder_architecture": True}, {"qkv_layout": "grouped"}),
            (
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
                {"norm1": "ln_attn", "norm2": "ln_mlp"},
            ),
            ({"alibi": True}, {"block": _falcon_block(_BLOOM_CORE, None), "alibi": True}),
            (
                {"parallel_attn": False},
                {
                    "block": _falcon_block(_FALCON_SOFTMAX, "post_attention_layernorm"),
                    "norm2": "post_attention_layernorm",
                    "parallel": False,
                    "missing": _FALCON_ROT,
                },
            ),
            (
                {"parallel_attn": False, "alibi": True},
                {"block": _falcon_block(_BLOOM_CORE, "post_attention_layernorm")},
            ),
            (
                {"parallel_attn": False, "new_decoder_architecture": True},
                {"unsupported": _FALCON_UNBUILT.format("new_decoder_architecture needs parallel_attn=True")},
            ),
            (
                {"parallel_attn": True, "new_decoder_architecture": False, "num_ln_in_parallel_attn": 2},
                {
                    "unsupported": _FALCON_UNBUILT.format(
                        "num_ln_in_parallel_attn=2 needs new_decoder_architecture=True"
                    )
                },
            ),
        ),
    ),
    replace(
        _LLAMA,
        name="stablelm",
        model_types=("stablelm",),
        variants=(
            ({"use_parallel_residual": True}, {"block": _PARALLEL_LLAMA, "norm2": "input_layernorm", **_PARALLEL}),
        ),
    ),
    replace(
        _LLAMA,
        name="cohere",
        model_types=("cohere", "cohere2"),
        logit_scale="logit_scale",
        block=_PARALLEL_LLAMA,
        norm2="input_layernorm",
        **_PARALLEL,
    ),
    replace(_LLAMA, name="mixtral", model_types=("mixtral",), **_MOE),
    replace(_LLAMA, name="qwen3_moe", model_types=("qwen3_moe",), **_MOE),
    replace(_LLAMA, name="olmoe", model_types=("olmoe",), joint_qk_norm=True, **_MOE),
    replace(_LLAMA, name="gpt_oss", model_types=("gpt_oss",), sinks=True, **_MOE),
    replace(
        _LLAMA,
        name="granite",
        model_types=("granite", "granite_swa"),
        branch="residual_multiplier",
        logit_scale="1/logits_scaling",
    ),
    replace(
        _LLAMA,
        name="starcoder2",
        model_types=("starcoder2",),
        block=_taps(
            _LLAMA_QKV,
            _LLAMA_CORE,
            "self_attn.o_proj",
            "post_attention_layernorm",
            _mlp("mlp.c_fc", "mlp.c_proj"),
        ),
        mlp_pre="mlp.c_fc",
        down="mlp.c_proj",
    ),
    replace(
        _LLAMA,
        name="nemotron",
        model_types=("nemotron", "arcee"),
        block=_taps(
            _LLAMA_QKV,
            _LLAMA_CORE,
            "self_attn.o_proj",
            "post_attention_layernorm",
            _mlp("mlp.up_proj", "mlp.down_proj"),
        ),
        mlp_pre="mlp.up_proj",
    ),
    replace(
        _LLAMA,
        name="glm",
        model_types=("glm",),
        block=_taps(
            _LLAMA_QKV,
            _LLAMA_CORE,
            "self_attn.o_proj",
            "post_attention_layernorm",
            _mlp("mlp.gate_up_proj", "mlp.down_proj"),
        ),
        mlp_pre="mlp.gate_up_proj",
    ),
)


def find_family(model_type: str) -> Family | None:
    """The row for a HuggingFace `model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
