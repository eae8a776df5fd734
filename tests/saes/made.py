"""Dictionaries for tests: of every architecture, trained for a moment, or random."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import interp
from interp.saes.library import Dictionary, sae_lens

WIDTH, FEATURES, K = 16, 48, 6
#: What `SparseAutoencoder` makes of autoencoders.
AUTOENCODERS = ("topk", "batchtopk", "matryoshka", "gated", "standard", "jumprelu")


@cache
def rows(count: int = 3000, width: int = WIDTH) -> Tensor:
    """Activations with a mean, and directions of very different size."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed + 3 * torch.randn(width, generator=generator)


def untrained(architecture: str, **options: object) -> Dictionary:
    """One to train, of the width of `rows`."""
    own: dict[str, float] = (
        {"k": K} if interp.saes.ARCHITECTURES[architecture].sparsity == "k" else {"sparsity_coef": 0.5}
    )
    interp.set_seed(1)
    return interp.SparseAutoencoder(d_model=WIDTH, architecture=architecture, d_sae=FEATURES, **own, **options)


def pairs_of(architecture: str, count: int = 3000) -> Tensor:
    """What an architecture is trained on: rows, of a transcoder with what a fixed map makes of them behind them."""
    x = rows(count)
    if architecture != "transcoder":
        return x
    weights = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    return torch.cat([x, torch.relu(x @ weights)], dim=1)


@cache
def trained(architecture: str) -> Dictionary:
    """The same after 200 steps."""
    sae = untrained(architecture)
    interp.train_sae(sae, pairs_of(architecture), tokens=25_600, batch_size=128, progress=False)
    return sae


def random_dictionary(form: str, width: int, features: int = 64, site: str = "L1.resid_post") -> Dictionary:
    """A dictionary in use, of SAELens's own class, most of whose features are active on some token."""
    library = sae_lens()
    own = {"k": 8} if form == "TopK" else {}
    made = getattr(library, f"{form}SAE")(getattr(library, f"{form}SAEConfig")(d_in=width, d_sae=features, **own))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / (width**0.5 if name.startswith("W") else 2))
        if hasattr(made, "threshold"):
            made.threshold.abs_()
    made.cfg.metadata.site = site
    found: Dictionary = made
    return found
