"""The door: all work that runs a model goes through here, as forward passes that a backend runs in their order.

1. A method makes `Work`: pieces (one forward pass each), the function of `interp.engine.trace` that runs them, and where
   their results are put.
2. `do` sends the pieces, those that share a prepared run behind it, and puts each result as it comes.
3. A piece that does not fit the device's memory is run in halves, down to one row; later pieces are made no larger than
   what fitted.

Results are placed by piece, not by call: what a submitted job would send, keep and fetch later is this same `Work`.
"""

from __future__ import annotations

import gc
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from ..errors import BackendError
from ..metrics import Metric
from ..models.model import Model
from .backoff import out_of_memory
from .program import Program
from .trace import Function, scores

#: Work of more units than this shows a bar on a terminal.
LONG = 200


#: How far some work is: its name, the units done, and all.
Watcher = Callable[[str, int, int], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("interp_watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """All work that is begun within, in this thread, tells `watcher` how far it is, and shows no bar of its own accord."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class Piece(Protocol):
    """One forward pass that is asked for."""

    @property
    def program(self) -> Program: ...

    @property
    def prepared(self) -> Program | None:
        """The prepared run that it needs."""

    @property
    def what(self) -> str:
        """What the smallest piece of its kind holds, for messages."""

    def halves(self) -> Sequence[Any]:
        """Two pieces that ask for the same; none where it cannot be divided."""

    def alone(self) -> Any:
        """The same without the prepared run, which takes memory too."""


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True)
class Work(Generic[P]):
    """What a method wants run. `place(piece, result)` puts one result, and says how many units of the work that was.

    `function` is one of `interp.engine.trace`; `total` counts units, called `unit`, for the bar.
    """

    pieces: Sequence[P]
    place: Callable[[P, Any], int]
    function: Function = scores
    metric: Metric | None = None
    total: int = 0
    unit: str = "piece"
    name: str = ""
    note: Callable[[P], str] | None = None  # what the bar says behind a piece


def shape_of(program: Program) -> tuple[int, int]:
    """(rows, positions) that a program runs."""
    rows, positions = program["inputs"]["input_ids"].shape
    return rows + len(program["origin"]), positions


def tokens_of(piece: Piece) -> int:
    """How many tokens a piece runs."""
    return math.prod(shape_of(piece.program))


def do(model: Model, work: Work[P], progress: bool | None = False, done: int = 0) -> None:
    """Run all pieces; `done` units are finished already.

    Raises:
        BackendError: a piece that cannot be divided does not fit; or the backend failed.
    """
    watcher = _WATCHER.get()
    shown = work.total > LONG and sys.stderr.isatty() and watcher is None if progress is None else progress
    if watcher is not None:
        watcher(work.name, done, work.total)
    with tqdm(total=work.total, initial=done, disable=not shown, unit=work.unit, desc=work.name) as bar:

        def put(piece: P, result: Any) -> None:
            nonlocal done
            units = work.place(piece, result)
            done += units
            bar.update(units)
            if watcher is not None:
                watcher(work.name, done, work.total)
            if work.note is not None and (said := work.note(piece)):
                bar.set_postfix_str(said)

        send_all(model, work, put)


def send_all(model: Model, work: Work[P], put: Callable[[P, Any], None]) -> None:
    """Send pieces in their order, and again in halves what did not fit."""
    waiting = deque(work.pieces)
    limit, count = math.inf, len(waiting)
    unprepared: set[int] = set()

    def done(piece: P, result: Any) -> None:
        if waiting.popleft() is not piece:
            raise BackendError(f"{type(model.backend).__name__} did not report programs in their order")
        put(piece, result)

    while waiting:
        sent = list(waiting)[:count]
        said, prepared = send(model, work, sent, done)
        if said is None:
            count *= 4  # more at once again: it was one, since a server that fails repeats all that was sent
            continue
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        count = 1
        if len(sent) > 1:
            continue  # the first alone: a server does not say which program of a request it was
        piece = waiting[0]
        if piece.prepared is not None and (not prepared or not piece.halves()):
            unprepared.add(id(piece.prepared))
        elif piece.halves():
            limit = min(limit, tokens_of(piece) // 2)
        else:
            raise BackendError(too_long(model, piece, said))
        fitting: list[P] = []
        for item in waiting:
            fitting += fit(item.alone() if id(item.prepared) in unprepared else item, limit)
        waiting = deque(fitting)


def send(model: Model, work: Work[P], pieces: Sequence[P], done: Callable[[P, Any], None]) -> tuple[str | None, bool]:
    """Run pieces, prepared runs before those that use them.

    Returns what an out-of-memory error said (None: all went well), and whether it was not in a prepared run.
    """
    programs: list[Program] = []
    owners: list[P | None] = []
    ready: Program | None = None
    for piece in pieces:
        if piece.prepared is not None and piece.prepared is not ready:
            ready = piece.prepared
            programs.append(ready)
            owners.append(None)
        programs.append(piece.program)
        owners.append(piece)
    following = 0  # the program behind the last one that was reported

    def report(number: int, result: Any) -> None:
        nonlocal following
        following = number + 1
        owner = owners[number]
        if owner is not None:
            done(owner, result)

    try:
        model.backend.run(model, programs, work.metric, report, work.function)
    except Exception as error:
        if not out_of_memory(error):
            raise
        said = str(error).strip().split("\n")[0] or type(error).__name__
    else:
        return None, True
    # Behind the except block: the error holds the frames, and with them the tensors, of what failed.
    return said, following == len(owners) or owners[following] is not None


def fit(piece: P, limit: float) -> Iterator[P]:
    """The pieces of at most `limit` tokens that one is divided into, as far as it can be."""
    divided = piece.halves() if tokens_of(piece) > limit else ()
    if not divided:
        yield piece
    for half in divided:
        yield from fit(half, limit)


def too_long(model: Model, piece: Piece, said: str) -> str:
    """The message for a piece that does not fit and cannot be divided."""
    rows, positions = shape_of(piece.program)
    return (
        f"out of memory: {piece.what} does not fit: {tokens_of(piece)} tokens ({rows} rows of {positions} positions) "
        f"through {model.name} ({model.dtype}, {model.device}); give it shorter prompts, load the model in "
        f"bfloat16 or over more devices (device_map='auto'), or free memory there. It said: {said}"
    )
