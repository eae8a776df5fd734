"""How a module must stand while an experiment runs; afterwards it stands as it did before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .layout import Envoy

_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


@contextmanager
def steady(model: Envoy) -> Iterator[None]:
    """Run a loaded model here, see `standing`. Layers exchanged since its last run (an adapter added, or merged and taken
    out) are the ones that are stopped at."""
    nn = model.nn
    with standing(model.hf):
        mounted = {envoy.path: envoy._module for envoy in nn.modules()}
        if any(
            mounted.get(".".join(filter(None, (nn.path, name)))) is not part for name, part in model.hf.named_modules()
        ):
            nn._update(model.hf)
        yield


@contextmanager
def standing(hf: torch.nn.Module) -> Iterator[None]:
    """Run a module here: one thread at a time, dropout off, gradients possible, outputs by name, positions of text alone.

    The configuration's `return_dict` is changed, not the call: transformers' models ask it again inside, where no argument
    reaches. Vision models keep the shift of positions behind their last picture and add it where keys are cached.
    """
    with _MAKING:
        lock = _LOCKS.setdefault(hf, threading.RLock())
    with lock, torch.inference_mode(False):
        training = [module for module in hf.modules() if module.training]
        both: Any = hf.config
        configs = {id(config): config for config in (both, both.get_text_config())}.values()
        asked = [config for config in configs if getattr(config, "return_dict", True) is False]
        shifts = {module: getattr(module, "rope_deltas", None) for module in (hf, getattr(hf, "base_model", hf))}
        shifted: dict[Any, Any] = {module: shift for module, shift in shifts.items() if shift is not None}
        for module in training:
            module.training = False
        for module in shifted:
            module.rope_deltas = None
        for config in asked:
            config.return_dict = True
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for module, shift in shifted.items():
                module.rope_deltas = shift
            for config in asked:
                config.return_dict = False


def ordinary(value: Any) -> Any:
    """The same plain data with every tensor that was made under `torch.inference_mode` copied: autograd refuses those."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: ordinary(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(ordinary(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(ordinary, value))
    return value
