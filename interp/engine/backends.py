"""Backends: *run these programs, give back these floats*. `local` runs them in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import BackendError
from ..metrics import Metric
from ..models.steady import ordinary, steady
from .trace import Done, Function

if TYPE_CHECKING:
    from ..models.model import Model
    from .program import Program


class Backend(Protocol):
    """Runs programs in order and reports the result of each.

    `function` is one of `engine.trace`, and says what a result is. `weights_here`: whether the model on
    this machine has its weights.
    """

    weights_here: bool

    def run(
        self, model: Model, programs: list[Program], metric: Metric | None, done: Done, function: Function
    ) -> None: ...


class Local:
    """Runs in this process, on the model's own devices."""

    weights_here = True

    def run(self, model: Model, programs: list[Program], metric: Metric | None, done: Done, function: Function) -> None:
        """Every program in order; `done(index, result)` after each."""
        with steady(model):
            function(model.nn, model.taps, ordinary(programs), metric, done)


def make_backend(name: Any, source: Any, options: Mapping[str, Any] | None = None) -> Backend:
    """The backend that `load_model(backend=…)` names: a name, the address of a server, or a backend as it is.

    Args:
        options: those of `load_model` for `from_pretrained`; a process that reads the checkpoint itself needs them too.

    Raises:
        BackendError: no such backend, or one that cannot hold this model.
    """
    if name == "local":
        return Local()
    if name == "simulated":
        from .simulated import Simulated

        here = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
        return Simulated(
            here.resolve() if here is not None and here.is_dir() else source,  # the worker has a folder of its own
            options=options,
        )
    if name == "ndif" or str(name).startswith(("http://", "https://")):
        from .ndif import Ndif

        name = Ndif(None if name == "ndif" else str(name).rstrip("/"))
    if not hasattr(name, "run") or not hasattr(name, "weights_here"):
        raise BackendError(
            f"unknown backend {name!r}; it is 'local', 'simulated', 'ndif', or the address of an NDIF server "
            "('http://host:port')"
        )
    if isinstance(source, torch.nn.Module) and not name.weights_here:
        raise BackendError(
            f"a {type(source).__name__} in memory cannot run on a server, which has weights of its own: give "
            "load_model the hub id under which the server knows the model"
        )
    return name
