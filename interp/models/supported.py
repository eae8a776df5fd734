"""What a module must be for experiments on it; each refusal names what to load instead, before anything has run."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from ..errors import ArchitectureError
from .families import Family
from .layout import Envoy

_WHOLE = "AutoModelForCausalLM.from_pretrained(...), or load_model with its folder or hub id"


def refuse_unsupported(name: str, hf: Envoy, weights_here: bool) -> None:
    """Check a module before its architecture is looked up.

    Raises:
        ArchitectureError: it has no head over the vocabulary, an encoder before it, attention to later tokens, weights
            that are elsewhere, or attention whose mask is no tensor.
    """
    config, kind = hf.config.get_text_config(), type(hf).__name__
    if getattr(hf.config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{name} is a {kind}, an encoder-decoder: what its decoder reads of the encoder has no sites here; load a "
            f"decoder-only language model ({_WHOLE})"
        )
    needed = [
        parameter.name
        for parameter in inspect.signature(type(hf).forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in ("self", "input_ids")
    ]
    if needed:
        raise ArchitectureError(
            f"{name} is a {kind}, whose forward does not run on token ids alone: it needs {', '.join(needed)} too; load a "
            f"language model ({_WHOLE})"
        )
    if getattr(hf, "get_output_embeddings", lambda: None)() is None:
        raise ArchitectureError(
            f"{name} is a {kind}, which has no language-model head: it gives no logits over the vocabulary; load the "
            f"model with its head ({_WHOLE})"
        )
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):
        raise ArchitectureError(both_ways(name, kind))
    if weights_here:
        _refuse_without_weights(name, hf)
    implementation = str(getattr(config, "_attn_implementation", None))
    if "flex" in implementation or implementation.startswith("paged"):
        raise ArchitectureError(
            f"{name} computes attention with attn_implementation={implementation!r}, whose mask is no tensor with an entry "
            "for each row, so that rows cannot join a forward pass: load it with attn_implementation='sdpa' or 'eager', or "
            "call set_attn_implementation('sdpa') on the module"
        )


def both_ways(name: str, kind: str) -> str:
    """The refusal of a model that reads in both directions."""
    return (
        f"{name} is a {kind} whose tokens attend to later ones too, so that it predicts no next token and a change reaches "
        f"backwards; load a causal language model ({_WHOLE})"
    )


def _refuse_without_weights(name: str, hf: Envoy) -> None:
    """Weights that a hook fetches when their module runs, or that were never loaded, have no values to be looked at."""
    absent = sum(parameter.is_meta for parameter in hf.parameters())
    if not absent:
        return
    total = sum(1 for _ in hf.parameters())
    if any(hasattr(module, "_hf_hook") for module in hf.modules()):
        raise ArchitectureError(
            f"{absent} of {total} parameters of {name} are offloaded to disk or to another device's memory, and experiments "
            "need them where they are used: give a device_map without 'disk' and 'cpu' beside a GPU (device_map='auto' with "
            "enough memory), a smaller dtype='bfloat16', a quantization_config, or backend='ndif'"
        )
    raise ArchitectureError(
        f"{absent} of {total} parameters of {name} are on the meta device, so they have no values: load the weights "
        f"({_WHOLE})"
    )


def without_fused(family: Family, implementation: Any) -> Family:
    """The row without the sites that a fused attention kernel hides, each with its reason."""
    fused, said = str(implementation), f"attention is one fused call ({implementation!r}) that has none"
    if (
        "flash" in fused or "/" in fused
    ):  # flash attention, or a kernel from a hub: their masks are not by query and key
        hidden = dict.fromkeys(
            ("pattern", "q_rot", "k_rot"), f"{said}; load it with attn_implementation='sdpa' or 'eager'"
        )
    elif family.name == "falcon" and fused != "eager":
        hidden = {"pattern": f"{said}; load it with attn_implementation='eager'"}
    else:
        return family
    return replace(family, missing={**hidden, **family.missing})
