"""How a module must stand while an experiment runs; afterwards it stands as it did before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def steady(model: Any) -> Iterator[None]:
    """Outputs come by name while the block runs, whatever `return_dict` says, and positions are those of text alone.

    The configuration is changed, not the call: transformers' models ask it again inside, where no argument reaches.
    Vision models keep the shift of positions behind their last picture and add it where keys are cached. Layers that were
    exchanged since the last run (an adapter added, or merged and taken out) are the ones that are stopped at.
    """
    hf, nn = model.hf, model.nn
    mounted = {envoy.path: envoy._module for envoy in nn.modules()}
    if any(mounted.get(".".join(filter(None, (nn.path, name)))) is not part for name, part in hf.named_modules()):
        nn._update(hf)
    configs = {id(config): config for config in (hf.config, hf.config.get_text_config())}.values()
    asked = [config for config in configs if getattr(config, "return_dict", True) is False]
    shifts = {module: getattr(module, "rope_deltas", None) for module in (hf, getattr(hf, "base_model", hf))}
    shifted = {module: shift for module, shift in shifts.items() if shift is not None}
    for config in asked:
        config.return_dict = True
    for module in shifted:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, shift in shifted.items():
            module.rope_deltas = shift
        for config in asked:
            config.return_dict = False
