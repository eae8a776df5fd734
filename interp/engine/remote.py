"""Running elsewhere: a request is the source of what it calls and plain data, and floats come back.

What `simulated.py` (a worker process on this machine) and `ndif.py` (a deployment of NDIF) share. Both speak
nnsight's own format: the serialised block of one session.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import nnsight
import torch
from nnsight.tracing.backend import Backend as Transport

from ..errors import BackendError
from ..metrics import Metric
from ..models.layout import Envoy, Taps
from ..views import Seen
from .answers import LARGEST, read_answer
from .backoff import out_of_memory
from .errand import Sealed
from .identity import metric_digest, text_digest, value_digest
from .ledger import Key, Ledger
from .sealing import serialise
from .trace import Done, Function
from .traffic import Traffic, in_order
from .travels import by_source, refuse_imports

if TYPE_CHECKING:
    from ..models.model import Model
    from .program import Program

#: What a function of `interp.engine.trace` is called with, behind the model: taps, programs, metric.
Args: TypeAlias = "tuple[Taps, list[Program], Metric | None]"

#: Tokens that one request may hold, a forward pass counting as LEAST at least: servers end long requests, and
#: progress is reported by request.
REQUEST = 9600
LEAST = 40


def unpack(data: bytes, stored: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that a `Packed` was; travels with it."""
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    numbers = torch.frombuffer(bytearray(data), dtype=getattr(torch, stored))
    return numbers.to(getattr(torch, dtype)).reshape(shape)


class Packed:
    """A tensor on its way: no device, no graph, integers in the fewest bytes. It arrives as what it was."""

    def __init__(self, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().reshape(-1)
        self.dtype, self.shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if flat.dtype in (torch.int64, torch.int32) and len(flat):
            low, high = int(flat.min()), int(flat.max())
            for narrow in (torch.int8, torch.int16, torch.int32):
                if torch.iinfo(narrow).min <= low and high <= torch.iinfo(narrow).max:
                    flat = flat.to(narrow)
                    break
        self.stored = str(flat.dtype).removeprefix("torch.")
        self.data = flat.contiguous().view(torch.uint8).numpy().tobytes() if len(flat) else b""

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        return unpack, (self.data, self.stored, self.dtype, self.shape)


def pack(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """The same plain data with every tensor packed. What is shared stays shared, so that it is sent once."""
    seen = {} if seen is None else seen
    if id(value) not in seen:
        made = value
        if isinstance(value, torch.Tensor):
            made = Packed(value)
        elif type(value) is dict:
            made = {key: pack(item, seen) for key, item in value.items()}
        elif type(value) in (list, tuple):
            made = type(value)(pack(item, seen) for item in value)
        elif isinstance(value, Seen):
            made = Seen(*(pack(item, seen) for item in value))
        seen[id(value)] = made
    return seen[id(value)]


def requests(programs: Sequence[Program], limit: int) -> list[list[int]]:
    """Which programs go into each request, by number.

    A program that uses a prepared run is in one request with it: the prepared run is done again where a
    request ends between the programs that use it.
    """
    tokens = [len(program["scored"]) * program["inputs"]["input_ids"].shape[1] for program in programs]
    sizes = [max(count, LEAST) for count in tokens]
    made: list[list[int]] = [[]]
    ready = -1
    for number, program in enumerate(programs):
        full = sum(sizes[member] for member in made[-1]) + sizes[number] > limit
        if full and made[-1] and made[-1] != [ready]:
            made.append([])
        if "use" in program and ready not in made[-1]:
            made[-1].append(ready)
        made[-1].append(number)
        if program.get("keep") is not None:
            ready = number
    return [group for group in made if group]


class Envelope(Transport):
    """Stands where a session would be run: what it would run becomes bytes."""

    blob = b""

    def __call__(self, tracer: Envoy) -> None:
        self.blob = serialise(tracer)


#: nnsight captures one session at a time, whichever threads have any.
_SEALING = threading.RLock()


class Shipped:
    """What both have in common.

    `sent` and `received` are the bytes of all `requests` of the last run or call; `timeout` the seconds that
    one may take, `limit` the tokens that one may hold, `in_flight` how many are on their way at once, `largest` the bytes
    that an answer may have. A job gives a copy of this a `ledger`, and a `traffic` that it can stop.
    """

    weights_here = True

    def __init__(self, timeout: float, in_flight: int = 1) -> None:
        self.timeout, self.limit, self.in_flight, self.largest = timeout, REQUEST, in_flight, LARGEST
        self.sent = self.received = self.requests = 0
        self.ledger: Ledger | None = None
        self.traffic: Traffic | None = None
        self._asked: Counter[str] = Counter()  # how often the same was asked in one run of a job

    def address(self, model: Model) -> tuple[str, Mapping[str, object]]:
        """The name under which the other side knows the model, and what it must do to it before a request."""
        raise NotImplementedError

    def fetch(self, model: Model, request: Sealed, traffic: Traffic, function: Function) -> dict[str, Envoy]:
        """Hand one request over and wait for its values. Raises BackendError."""
        raise NotImplementedError

    def for_job(self, ledger: Ledger, traffic: Traffic, in_flight: int, limit: int) -> Shipped:
        """The same backend for a job of its own."""
        made = copy.copy(self)
        made.ledger, made.traffic, made.limit, made._asked = ledger, traffic, limit, Counter()
        made.in_flight = min(in_flight, self.in_flight) if self.in_flight == 1 else in_flight
        return made

    def key_of(self, model: Model, function: Function, args: Args) -> Key:
        """What a request is known by in the ledger: all that its numbers depend on, and how often it was asked before."""
        if self.ledger is None:
            return ("", 0)
        _, programs, metric = args
        name = f"{function.__module__}.{function.__qualname__}"
        told = [model.name, model.revision, name, value_digest(programs), metric_digest(metric) if metric else ""]
        digest = text_digest(repr(told))
        self._asked[digest] += 1
        return digest, self._asked[digest] - 1

    def seal(self, model: Model, function: Function, args: Args, key: Key) -> Sealed:
        """A request as bytes. Raises BackendError where something in it has no form that can be sent."""
        nnsight.register(__name__.split(".")[0])
        _, programs, metric = args
        refuse_imports(metric)
        views = {id(seen): seen for program in programs for seen in (program.get("views") or {}).values()}
        for item in (function, metric, *(part for seen in views.values() for part in seen)):
            if callable(item):
                by_source(item)
        envelope = Envelope()
        with _SEALING:
            nnsight.ndif.pull_env()  # modules that lie beside the user's script
            nn, arguments = model.nn, pack(args)
            with nn.session(backend=envelope):  # noqa: SIM117 -- what follows is shipped
                # Servers with half-precision weights cast fp32 products down, which a run here does not.
                with torch.autocast("cuda", enabled=False):
                    result = nnsight.save(function(nn, *arguments))  # noqa: F841 -- the name under which it comes back
        return Sealed(key, *self.address(model), envelope.blob)

    def _tasks(
        self, model: Model, function: Function, parts: Iterable[Args], traffic: Traffic
    ) -> Iterator[Callable[[], dict[str, Envoy]]]:
        """For each request a call that gives its result; made here, in their order."""
        for args in parts:
            key = self.key_of(model, function, args)
            if self.ledger is not None and (known := self.ledger.answer(key)) is not None:
                yield partial(read_answer, known, self.largest)
                continue
            if self.ledger is not None and (said := self.ledger.failure(key)) and out_of_memory(BackendError(said)):
                yield partial(fail, said)  # as before: what was run in parts is run in the same parts
                continue
            request = self.seal(model, function, args, key)
            traffic.ready.set()
            self.requests += 1
            self.sent += len(request.blob)
            yield partial(self.fetch, model, request, traffic, function)

    def run(self, model: Model, programs: list[Program], metric: Metric | None, done: Done, function: Function) -> None:
        """Run programs in as few requests as let progress be seen; only what `function` gives of them comes back.

        Raises:
            BackendError: a request could not be sent, failed there, or the other side was lost.
        """
        self.sent = self.received = self.requests = 0
        groups = requests(programs, self.limit)
        parts = ((model.taps, [programs[number] for number in group], metric) for group in groups)
        traffic = self.traffic.within() if self.traffic is not None else Traffic()
        tasks = self._tasks(model, function, parts, traffic)
        finished = 0
        for group, values in zip(groups, in_order(tasks, self.in_flight, traffic), strict=True):
            answer = values["result"]
            if isinstance(answer, torch.Tensor):  # one number for each scored row, behind one another
                answer = answer.split([len(programs[number]["scored"]) for number in group])
            for number, result in zip(group, answer, strict=True):
                if number >= finished:  # else a prepared run, done again
                    done(number, result)
            finished = group[-1] + 1


def fail(said: str) -> dict[str, Envoy]:
    """Raises BackendError."""
    raise BackendError(said)


def failure(text: str, function: Function, where: str) -> BackendError:
    """The error for a traceback text from the other side."""
    last = next((line for line in reversed(text.strip().splitlines()) if line.strip()), "no reason given")
    hint = ""
    if "No module named" in last:
        hint = (
            "; a server has torch, numpy, transformers and nnsight: use these alone, or have your own module "
            "travel with nnsight.register('its_name')"
        )
    if "Could not find function" in last:
        hint = "; a source file was changed after it was imported: start this process again"
    name = getattr(function, "__name__", "request")
    said = f"{where} failed in {name!r}: {last.strip()}{hint}"
    return BackendError(f"{said}\n--- traceback from there ---\n{text}")
