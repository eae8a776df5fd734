"""Out of memory: how it is known, here or on a server. What is done about it stands in `interp.engine.door`."""

from __future__ import annotations

import torch

from ..errors import BackendError, InterpError

#: How memory failures read where they come as text from a server, or from a library below torch.
PHRASES = ("outofmemoryerror", "out of memory", "alloc_failed", "can't allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is exhausted, here or on a server."""
    if isinstance(error, InterpError) and not isinstance(error, BackendError):
        return False
    said = str(error).strip().split("\n")[0].lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in said for phrase in PHRASES)
    )
