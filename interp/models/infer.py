"""What module names say of a row: where its paths lead in a model, and which row an architecture without one resembles.

The audit then decides whether a guess is right.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from .families import FAMILIES, Family
from .layout import Envoy, at


def infer_family(hf: Envoy) -> Family | None:
    """A known row whose every path exists in this model, with nothing left over; None when none fits.

    Only rows whose block has exactly the same weight-bearing modules are candidates: a module that the row does not
    know would do something to the stream that no tap sees. All blocks must have the same.
    """
    config = hf.config.get_text_config()
    for row in FAMILIES:
        try:
            family = placed(row.for_config(config), hf)
            blocks = at(hf, family.layers)
            at(hf, family.embed), at(hf, family.norm), at(hf, family.head)
            for path, _, _ in family.block:
                at(blocks[0], path.split(".source")[0])
            named, *others = (_weighted(block) for block in blocks)
        except (AttributeError, IndexError, TypeError, ValueError):
            continue
        paths = [family.norm1, family.norm2, family.post_attn, family.post_mlp, *family.qkv, family.o, family.down]
        known = {path for path in paths if path}
        known |= {path for path, side, _ in family.block if side == "output" and path in named}
        known |= {name for name in named if name.endswith(("up_proj", "q_norm", "k_norm"))}
        if named == known and all(other == named for other in others):
            name = f"{family.name} (inferred for {config.model_type})"
            return replace(family, name=name, joint_qk_norm=_joint_qk_norm(blocks[0], config))
    return None


def placed(family: Family, hf: Envoy) -> Family:
    """The row with the paths that the text model has inside `hf`, where a vision or audio model is built around it.

    The module says where its decoder and its output head are; blocks are the same inside.
    """
    names = {id(module): name for name, module in hf.named_modules()}
    if family.layers in names.values() or not hasattr(hf, "get_decoder"):
        return family
    decoder, head = (names.get(id(part)) for part in (hf.get_decoder(), hf.get_output_embeddings()))
    paths = [path.split(".") for path in (family.embed, family.layers, family.norm)]
    own = ".".join(part for part, *others in zip(*paths, strict=False) if [part] * 2 == others)
    if decoder is None or head is None:
        return family
    moved = {name: decoder + getattr(family, name).removeprefix(own) for name in ("embed", "layers", "norm")}
    # What follows the head is the wrapper's own: Aya Vision leaves out its text model's factor, Granite Vision does not.
    factor = family.logit_scale.removeprefix("1/")
    scale = family.logit_scale if factor and factor in inspect.getsource(type(hf).forward) else ""
    return replace(family, head=head, logit_scale=scale, **moved)


def _weighted(block: Envoy) -> set[str]:
    """The names of a block's modules that have weights."""
    return {name for name, module in block.named_modules() if getattr(module, "weight", None) is not None}


def _joint_qk_norm(block: Envoy, config: Envoy) -> bool:
    """Whether queries are normalised over all heads together: their norm is then as wide as all heads."""
    norm = next((module for name, module in block.named_modules() if name.endswith("q_norm")), None)
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads > 1 and getattr(getattr(norm, "weight", None), "shape", None) == (heads * d_head,)
