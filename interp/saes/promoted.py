"""What features say about the next token by the direct path: decoder rows through the final norm and the unembedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AuditError
from ..models.layout import affine, affine_parts, at
from ..models.model import Model
from ..models.steady import standing
from ..sites import KIND
from ..views import View

#: Numbers of logits that are held at once.
LOGITS = 2**24


class Promoted(NamedTuple):
    """Tokens that features raise and lower most `[feature, rank]`, and by how many logits for an activation of 1."""

    raised: Tensor
    raised_by: Tensor
    lowered: Tensor
    lowered_by: Tensor


def why_not(model: Model, view: View) -> str:
    """Why there is no direct path from a view's features to the logits here; empty where there is one."""
    kind = KIND[view.tap.kind]
    if view.decoder is None:
        return f"{view.name} has no decoder"
    if kind.axis or kind.width != "d_model" or not (kind.sends or kind.branch or kind.name.startswith("resid")):
        return f"{view.tap} is no part of the residual stream"
    if "head" in model.refused:
        return f"the audit refused the law of the head: {model.refused['head']}"
    if next(model.hf.parameters()).is_meta:
        return "the model's weights are on a server"
    return ""


def promoted(model: Model, view: View, features: Tensor, final: Tensor, count: int) -> Promoted | str:
    """The `count` tokens that each of `features` raises and lowers most by itself, or why that is not known.

    What the modules compute is asked of them: the final norm at the stream `final [token, d_model]`, with its scale frozen at
    the mean over these tokens, then the head; before a softcap. What later layers make of a feature is not in it.
    """
    assert view.decoder is not None
    decoder = view.decoder.flatten(1)[features]
    with standing(model.hf), torch.no_grad():
        norm, head = at(model.hf, model.family.norm), at(model.hf, model.family.head)
        place = next(norm.parameters(), final).device
        final = final.to(place, model.dtype)
        scale, weight, _, centred = affine_parts(norm, final)
        try:
            unembedding, _ = affine(head, norm(final))
        except AuditError as error:
            return str(error)
        read = decoder.to(weight.device, torch.float32)
        read = (read - read.mean(-1, keepdim=True) if centred else read) * weight * scale.float().mean()
        found: list[tuple[Tensor, ...]] = []
        count = min(count, len(unembedding))
        for rows in read.to(unembedding.device).split(max(1, LOGITS // len(unembedding))):
            logits = rows @ unembedding.float().T * model.taps["logit_scale"]
            high, low = logits.topk(count, dim=-1), logits.topk(count, dim=-1, largest=False)
            found.append(tuple(part.cpu() for part in (high.indices, high.values, low.indices, low.values)))
    return Promoted(*(torch.cat(part) for part in zip(*found, strict=True)))
