"""Too much at once: how it is known, here or on a server. What is done about it stands in `interp.engine.door`."""

from __future__ import annotations

import torch

from ..errors import BackendError, InterpError

#: How memory failures read where they come as text from a server, or from a library below torch.
PHRASES = ("outofmemoryerror", "out of memory", "alloc_failed", "can't allocate memory")
#: And of a server that ends what takes long.
TOO_LONG = "exceeded the execution timeout"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is exhausted, here or on a server, or that a server ended what took long."""
    if isinstance(error, InterpError) and not isinstance(error, BackendError):
        return False
    said = str(error).strip().split("\n")[0].lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in said for phrase in (*PHRASES, TOO_LONG))
    )
