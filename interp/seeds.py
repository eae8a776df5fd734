"""One seed for every source of randomness, remembered for provenance."""

from __future__ import annotations

import random

import numpy as np
import torch

_STATE: dict[str, int | None] = {"seed": None}


def set_seed(seed: int) -> None:
    """Seed python, numpy, torch and every CUDA device; later records carry the seed.

    Examples:
        >>> interp.set_seed(0)
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    _STATE["seed"] = seed


def current_seed() -> int | None:
    """The seed last given to `set_seed`, or None."""
    return _STATE["seed"]
