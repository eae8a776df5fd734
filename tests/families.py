"""Tiny models of every family, loaded once for all tests, with the oracle of each and what it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

import interp
from interp import Model

from .oracle.configs import D_VOCAB, FAMILIES, tiny
from .oracle.hooks import DOT_PRODUCT_KINDS, KINDS, Oracle

#: Families of the oracle that the library must refuse, or parts of which its audit must refuse.
UNSUPPORTED = ("glm4", "apertus", "persimmon")
SUPPORTED = tuple(family for family in FAMILIES if family not in UNSUPPORTED)
PARALLEL = (
    "gptj",
    "gpt_neox",
    "phi",
    "falcon",
    "falcon_new",
    "falcon_one_norm",
    "stablelm_parallel",
    "cohere",
    "cohere2",
)
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
#: Falcon's pattern can be reached under eager attention only.
EAGER = ("falcon", "falcon_new", "falcon_one_norm", "falcon_sequential", "falcon_alibi")
#: Families whose attention exposes no point behind the rotary embedding.
NO_ROTATED = ("bloom", *EAGER)
HEAD_KINDS = ("q", "k", "v", "q_rot", "k_rot", "z", "head_out", "pattern")
UNIT_KINDS = ("mlp_pre", "neuron")


def has(family: str) -> tuple[str, ...]:
    """The kinds of sites that a family has, in the oracle's order."""
    absent: set[str] = set()
    absent |= {"resid_mid"} if family in PARALLEL else set()
    absent |= {"mlp_pre", "neuron"} if family in EXPERTS else set()
    absent |= {"q_rot", "k_rot"} if family in NO_ROTATED else set()
    return tuple(kind for kind in KINDS if kind not in absent)


@cache
def loaded(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """The tiny model of a family as the library loads it; attention is eager where the family needs that."""
    hf, tokenizer = tiny(family)
    attention = attention or ("eager" if family in EAGER else None)
    if attention is not None:
        hf.config._attn_implementation = attention  # set_attn_implementation refuses Falcon
    return interp.load_model(hf.to(dtype), tokenizer=tokenizer)


@cache
def oracle_of(family: str, attention: str | None = None) -> Oracle:
    """The oracle on a model of its own with the same weights, which nothing of the library has touched."""
    hf, _ = tiny(family)
    attention = attention or ("eager" if family in EAGER else None)
    if attention is not None:
        hf.config._attn_implementation = attention
    return Oracle(hf, copy_model=False)


@cache
def _read_alike(
    family: str, prompt: tuple[int, ...], dots: bool, attention: str | None
) -> dict[tuple[str, int], Tensor]:
    oracle = oracle_of(family, attention)
    kinds = [kind for kind in has(family) if (kind in DOT_PRODUCT_KINDS) is dots]
    return oracle.reads(prompt, [(kind, layer) for kind in kinds for layer in range(oracle.n_layers)])


def activation(family: str, prompt: Sequence[int], kind: str, layer: int, attention: str | None = None) -> Tensor:
    """What the oracle reads in the plain run of a prompt; not to be changed, as sites are read together and kept."""
    return _read_alike(family, tuple(prompt), kind in DOT_PRODUCT_KINDS, attention)[kind, layer]


def words(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, as ids of ordinary words."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, D_VOCAB, (n,), generator=generator).tolist() for n in lengths]


def allowed(logits: Tensor) -> float:
    """What may separate two numbers that count as equal in fp32."""
    return 1e-5 * max(1.0, float(logits.abs().max()))


def count_forwards(model: Model) -> tuple[list[int], Callable[[], None]]:
    """A list that grows with each forward pass of the embedding, and a function that stops counting."""
    seen: list[int] = []
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    return seen, handle.remove
