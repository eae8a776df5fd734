"""A session as bytes, in nnsight's own form: what does not change from one request to the next is worked out once."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import lru_cache

from nnsight.intervention import serialization
from nnsight.schema.request import RequestModel

from ..errors import BackendError
from ..models.layout import Envoy

_names = serialization._function_referenced_names


class Sources:
    """Stands for `inspect` where nnsight reads what is sent: each function's source is found once, not for every request."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[list[str], int]] = {}

    def __getattr__(self, name: str) -> Envoy:
        return getattr(inspect, name)

    def getsourcelines(self, function: Envoy) -> tuple[list[str], int]:
        """As inspect's; OSError where there is no source."""
        code = getattr(function, "__code__", None)
        if code is None or hasattr(function, "__wrapped__"):
            return inspect.getsourcelines(function)
        if code not in self._known:
            self._known[code] = inspect.getsourcelines(function)
        return self._known[code]

    def getsource(self, function: Envoy) -> str:
        """As inspect's; OSError where there is no source."""
        return "".join(self.getsourcelines(function)[0])


_SOURCES = Sources()


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """nnsight finds sources, and the names that they use, once for each function, not for every request."""
    before = serialization.inspect, serialization._function_referenced_names
    serialization.inspect, serialization._function_referenced_names = _SOURCES, names_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        serialization.inspect, serialization._function_referenced_names = before  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def names_in(source: str) -> frozenset[str]:
    """The names that a function's source uses and does not bind."""
    return frozenset(_names(source))


def serialise(tracer: Envoy) -> bytes:
    """A session as it travels. Raises BackendError where something in it has no form that can be sent."""
    try:
        with remembered():
            return RequestModel.serialize(tracer, compress=True)
    except Exception as error:
        raise BackendError(
            f"this cannot be sent to a server: {type(error).__name__}: {error}. A metric must be a plain "
            "function of (logits, batch) that uses torch alone and holds no lock, file, model or other "
            "object of this process"
        ) from error
