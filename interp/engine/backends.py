"""Backends: *run these programs, give back these floats*. `local` runs them in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import BackendError
from ..metrics import Metric
from .trace import execute

Done = Callable[[int, torch.Tensor], None]


class Backend(Protocol):
    """Runs programs in order and reports the metric `[scored]` of each."""

    def run(self, model: Any, programs: list[dict[str, Any]], metric: Metric, done: Done) -> None: ...


class Local:
    """Runs in this process, on the model's own devices."""

    def run(self, model: Any, programs: list[dict[str, Any]], metric: Metric, done: Done) -> None:
        execute(model.nn, model.taps, programs, metric, lambda index, found: done(index, found["metric"]))


def make_backend(name: Any, source: Any) -> Backend:
    """The backend that `load_model(backend=…)` names."""
    if name == "local":
        return Local()
    raise BackendError(f"unknown backend {name!r}; the backends are: local")
