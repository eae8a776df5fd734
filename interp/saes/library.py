"""SAELens, imported when it is first needed, and what this room asks of its dictionaries."""

from __future__ import annotations

import logging
import operator
import os
import sys
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import PlanError
from ..packages import require


class Metadata(Protocol):
    """What is known of a dictionary beside its weights: any name; None where nothing is known."""

    def get(self, key: str, default: Any = None) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...

    def __setitem__(self, key: str, value: Any) -> None: ...


class Config(Protocol):
    """What all configurations of SAELens have."""

    d_in: int
    d_sae: int
    normalize_activations: str
    metadata: Metadata

    def architecture(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]: ...


class Dictionary(Protocol):
    """An autoencoder or transcoder of SAELens, for training or for use. W_enc `[d_in, d_sae]`, W_dec `[d_sae, d_out]`.

    Those for training also have the last three.
    """

    cfg: Config
    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    device: torch.device
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...

    topk_threshold: Tensor

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Tensor]) -> None: ...


@cache
def sae_lens() -> ModuleType:
    """The package. Its import takes about 12 s, exchanges the process's stdout and stderr and sets a variable of the
    environment: both are put back. PackageError: it is missing or broken."""
    streams, environment = (sys.stdout, sys.stderr), dict(os.environ)
    said = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of what it could use and is not there
    try:
        return require("sae_lens", "dictionaries", "sae-lens")
    finally:
        logging.disable(said)
        sys.stdout, sys.stderr = streams
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def checked(sae: object) -> Dictionary:
    """The same, if it is a dictionary. PlanError: it is not."""
    if not (hasattr(sae, "cfg") and hasattr(sae, "W_dec") and hasattr(sae, "state_dict")):
        raise PlanError(
            f"a {type(sae).__name__} is no dictionary of SAELens; interp.SparseAutoencoder makes one, interp.load_sae loads one"
        )
    return cast(Dictionary, sae)


def whole(value: object, name: str) -> int:
    """A size as a number. PlanError: no whole number."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise PlanError(f"{name}={value!r}: it is a whole number") from None


def is_training(sae: Dictionary) -> bool:
    """Whether a dictionary is in the form that is trained."""
    return isinstance(sae, sae_lens().TrainingSAE)


def is_transcoder(sae: Dictionary) -> bool:
    """Whether it reads one site and writes another."""
    return "transcoder" in sae.cfg.architecture()
