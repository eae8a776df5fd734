"""What a run here must not depend on: other threads, training mode, and the grad mode around the call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def undisturbed(hf: torch.nn.Module) -> Iterator[None]:
    """Run a model here: one thread at a time, dropout off, gradients possible. It is left in the mode that it was in."""
    with _MAKING:
        lock = _LOCKS.setdefault(hf, threading.RLock())
    with lock, torch.inference_mode(False):
        training = [module for module in hf.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def ordinary(value: Any) -> Any:
    """The same plain data with every tensor that was made under `torch.inference_mode` copied: autograd refuses those."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: ordinary(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(ordinary(item) for item in value)
    return value
