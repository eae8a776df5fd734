"""Functions of the user's that travel: by their source, and without what a server does not have."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import CodeType

import nnsight

from ..errors import BackendError
from ..metrics import Metric

#: Packages that a server has; a function of any other one travels by its source.
ON_SERVER = {"torch", "numpy", "transformers", "nnsight", "builtins", "__main__", *sys.stdlib_module_names}


def by_source(function: Callable[..., object]) -> None:
    """Have the package of a function or of its class travel by source, unless every server has it."""
    inner: object = function
    while hasattr(inner, "func"):
        inner = inner.func
    module = str(getattr(inner, "__module__", None) or type(inner).__module__)
    if (root := module.split(".")[0]) not in ON_SERVER:
        nnsight.register(root)


def imported(code: CodeType) -> Iterator[str]:
    """Packages that a function imports as it runs, the functions within it too."""
    yield from (str(step.argval).split(".")[0] for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from imported(item)


def refuse_imports(metric: Metric | None) -> None:
    """Refuse a metric that imports, as it runs, a package that no server has. BackendError."""
    inner: object = metric
    while hasattr(inner, "func"):
        inner = inner.func
    called = inner if hasattr(inner, "__code__") else vars(type(inner)).get("__call__")
    code = getattr(called, "__code__", None)
    if not isinstance(code, CodeType):
        return
    if missing := sorted(set(imported(code)) - ON_SERVER):
        raise BackendError(
            f"metric {getattr(inner, '__name__', type(inner).__name__)!r} imports {', '.join(map(repr, missing))} as it runs, "
            "which a server does not have: use torch alone, or import it at the head of your file and have it travel with "
            "nnsight.register('its_name')"
        )
