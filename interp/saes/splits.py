"""A dictionary's site split in nodes: its features, and what it does not explain. Some of them cut, the others left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PlanError
from ..sites import Site
from ..views import View
from .library import Dictionary
from .readers import read_cut
from .views import decoder_of, describe, inference, site_of, tensors_of


def cut_view(sae: Dictionary, units: Sequence[int], error: bool, name: str, site: Site | None = None) -> View | None:
    """Some features of a dictionary, with or without what it does not explain, as one part of a site; None for nothing.

    All of them together are the activation: replaced by another run's, the site holds that run's.
    """
    if not len(units) and not error:
        return None
    used = inference(sae)
    decoder = decoder_of(used)
    chosen = torch.tensor(list(units), dtype=torch.long)
    rows = [decoder[chosen], *([torch.eye(decoder.shape[1])] if error else [])]
    tensors = {
        **tensors_of(used)[0],
        "features": decoder,
        "offset": used.b_dec.detach().float(),
        "cut": chosen,
        "with_error": torch.tensor(int(error)),
    }
    return View(name, site or site_of(used), 1, read_cut, decoder=torch.cat(rows)[None], tensors=tensors)


def by_depth(saes: Sequence[Dictionary]) -> list[tuple[Site, Dictionary]]:
    """Dictionaries of the residual stream with their sites, in the order of the forward pass.

    Raises:
        PlanError: one of another site, or two of the same.
    """
    if not isinstance(saes, Sequence):
        raise PlanError(f"saes= is a list of dictionaries, not a {type(saes).__name__}")
    found = [(site_of(sae), sae) for sae in saes]
    for site, sae in found:
        if not site.kind.startswith("resid"):
            raise PlanError(
                f"{describe(sae)} is at {site}: circuits of features are of the residual stream, where what one "
                "dictionary's site holds is all that reaches the next"
            )
    if len({site for site, _ in found}) < len(found):
        raise PlanError(f"two dictionaries are at one site: {', '.join(str(site) for site, _ in found)}")
    depth = ("resid_pre", "resid_mid", "resid_post")
    return sorted(found, key=lambda pair: (pair[0].layer or 0, depth.index(pair[0].kind)))
