"""How a module must stand while an experiment runs; afterwards it stands as it did before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def steady(hf: Any) -> Iterator[None]:
    """The module's forward gives its outputs by name while the block runs, whatever `return_dict` its config says.

    The configuration is changed, not the call: transformers' models ask it again inside, where no argument reaches.
    """
    configs = {id(config): config for config in (hf.config, hf.config.get_text_config())}.values()
    asked = [config for config in configs if getattr(config, "return_dict", True) is False]
    for config in asked:
        config.return_dict = True
    try:
        yield
    finally:
        for config in asked:
            config.return_dict = False
