"""What experiments tell whoever listens: every public method that does work is an `@experiment`, and a tracker hears of it.

Nobody listens by default, and then a call is the plain call. The standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Characters of a summary, and how many entries of an argument are kept as they are.
LINE, FEW = 200, 12


@dataclass(frozen=True)
class Told:
    """One call of an experiment: what was asked, how long it took (seconds), and what came of it or went wrong.

    `arguments` has those that were given, plain values as they are and all others as one line. `provenance` is the result's
    own record, empty where it has none. `started` is in seconds since 1970.
    """

    name: str
    started: float
    seconds: float
    arguments: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    summary: str = ""
    error: str = ""


class Listener(Protocol):
    """Who wants to be told."""

    def hear(self, told: Told) -> None:
        """Take note of one call."""


#: Who listens to this thread's calls (and those of tasks begun here), and everybody who listens.
_HERE: ContextVar[tuple[Listener, ...]] = ContextVar("interp_listeners", default=())
_ALL: list[Listener] = []
_INSIDE: ContextVar[bool] = ContextVar("interp_inside", default=False)
_LOCK = threading.Lock()


def listen(listener: Listener) -> None:
    """Tell `listener` of every experiment from now on; `leave` ends that."""
    with _LOCK:
        _ALL.append(listener)
    _HERE.set((*_HERE.get(), listener))


def leave(listener: Listener) -> None:
    """Tell `listener` no more."""
    with _LOCK:
        if listener in _ALL:
            _ALL.remove(listener)
    _HERE.set(tuple(other for other in _HERE.get() if other is not listener))


def listeners() -> tuple[Listener, ...]:
    """Who is told of a call made here.

    A thread, or a notebook's cell, in which nobody began to listen is heard by the only listener there is. Where there are
    several, nobody can say whose it is.
    """
    here = tuple(listener for listener in _HERE.get() if listener in _ALL)
    return here or (tuple(_ALL) if len(_ALL) == 1 else ())


def experiment(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function as an experiment: listeners are told of its outermost calls. Warnings count one frame more for it."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _ALL or _INSIDE.get() or not (who := listeners()):
            return function(*args, **kwargs)
        started, clock, mark = time.time(), time.perf_counter(), _INSIDE.set(True)
        result, problem = None, ""
        try:
            result = function(*args, **kwargs)
            return result
        except BaseException as error:
            problem = last_line(error)  # the error itself would keep its frames, and their tensors, alive
            raise
        finally:
            _INSIDE.reset(mark)
            seconds = time.perf_counter() - clock
            _tell(who, lambda: _record(function, args, kwargs, (started, seconds), result, problem))

    return told


@contextlib.contextmanager
def outermost() -> Iterator[None]:
    """Calls within are outermost ones, whatever call they are made from: work that another thread does later."""
    mark = _INSIDE.set(False)
    try:
        yield
    finally:
        _INSIDE.reset(mark)


def tell(name: str, arguments: Mapping[str, object], summary: str) -> None:
    """Tell whoever listens here of something that is no call of an experiment."""
    _tell(listeners(), lambda: Told(name, time.time(), 0.0, arguments, summary=summary))


def _tell(who: tuple[Listener, ...], record: Callable[[], Told]) -> None:
    """Tell each; what fails here, or in a listener, is no fault of the experiment."""
    try:
        told = record()
    except Exception as error:
        told = Told("?", time.time(), 0.0, error=f"no record could be made: {type(error).__name__}: {error}")
    for listener in who:
        try:
            listener.hear(told)
        except Exception as error:
            with warnings.catch_warnings():
                warnings.simplefilter("default")  # as an error it would end the experiment
                warnings.warn(
                    f"a record of {told.name} could not be kept: {type(error).__name__}: {error}", stacklevel=2
                )


def _record(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    when: tuple[float, float],
    result: object,
    problem: str,
) -> Told:
    given = _arguments(function, args, kwargs)
    name = getattr(function, "__name__", "?")
    if problem:
        return Told(name, *when, given, error=problem)
    record = next(
        (r for r in (getattr(result, n, None) for n in ("provenance", "meta", "attrs")) if isinstance(r, Mapping)), {}
    )
    return Told(name, *when, given, record, one_line(result))


def _arguments(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The arguments that were given, by name."""
    signature = inspect.signature(function)
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # the call was wrong; its error says so
        return {name: plain(value) for name, value in kwargs.items()}
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    for name in rest:
        given |= given.pop(name, {})
    return {name: plain(value) for name, value in given.items()}


def last_line(error: BaseException) -> str:
    """An exception in the line that stands last under its traceback."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])


def plain(value: object) -> object:
    """A value as JSON has it, where it is short; else one line about it."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= LINE else value[: LINE - 1] + "…"
    if isinstance(value, Mapping) and len(value) <= FEW:
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and len(value) <= FEW:
        return [plain(item) for item in value]
    return one_line(value)


def one_line(value: object) -> str:
    """What a value is, in one short line: of arrays their size, of other things the first line that they print."""
    kind = type(value).__name__
    shape, sizes = getattr(value, "shape", None), getattr(value, "sizes", None)
    if isinstance(sizes, Mapping) and hasattr(value, "coords"):
        return f"{kind} of {' × '.join(f'{dim} {size}' for dim, size in sizes.items())}"
    if shape is not None and hasattr(value, "dtype"):
        return f"{kind} {list(shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple | set | frozenset | Mapping):
        return f"{kind} of {len(value)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    line = next(iter(str(value).strip().splitlines()), kind)
    if line.endswith("("):  # the head of a module's many lines
        return kind
    return line if len(line) <= LINE else line[: LINE - 1] + "…"
