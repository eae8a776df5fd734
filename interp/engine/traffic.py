"""What the requests that go to one server know together: whether it is there, and whether their answers are still wanted."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The wait was ended from outside."""


class Traffic:
    """What requests that go the same way know together: of the server, and whether their answers are still wanted.

    `within` is a part of it that can be stopped alone. `deadline` is monotonic time.
    """

    def __init__(self, deadline: float = math.inf, outer: Traffic | None = None) -> None:
        self.outer, self.deadline = outer, deadline
        self.server: Server = Server() if outer is None else outer.server
        self._stop = threading.Event()
        self.ready: threading.Event = (
            threading.Event() if outer is None else outer.ready
        )  # a request is made, not sent yet
        self.random = random.SystemRandom()  # the user's seeds stay as they are

    def within(self) -> Traffic:
        """A part of it."""
        return Traffic(self.deadline, self)

    def stop(self) -> None:
        """No answer is wanted any more."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether no answer is wanted any more, here or in the whole."""
        return self._stop.is_set() or (self.outer is not None and self.outer.stopped)

    def pause(self, seconds: float) -> None:
        """Wait. Raises Stopped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.stopped:
            self._stop.wait(min(left, 0.25) if self.outer is not None else left)
        if self.stopped:
            raise Stopped


class Server:
    """What is known of a server, by all requests to it."""

    def __init__(self) -> None:
        self.reached = False  # whether it ever answered
        self.away = 0.0  # when it was last seen not to be there
        self.latest = 0.0  # when the latest request was sent that is finished
        self.usual = 0.0  # seconds that requests take of late
        self.parked = 0  # requests that are asked after, and hold up no other
        self._lock = threading.Lock()

    def took(self, seconds: float) -> None:
        """A request was answered after so long."""
        with self._lock:
            self.usual = seconds if not self.usual else 0.8 * self.usual + 0.2 * seconds

    def park(self, count: int) -> None:
        """So many more requests hold up no other."""
        with self._lock:
            self.parked += count


def in_order(tasks: Iterator[Callable[[], T]], count: int, traffic: Traffic) -> Iterator[T]:
    """The results of calls, in their order; `count` of them run at once, each in a thread of its own."""
    if count <= 1:
        yield from (task() for task in tasks)
        return
    begun: deque[Future[T]] = deque()
    more = True
    try:
        while more or begun:
            if traffic.stopped:
                raise Stopped
            running = [future for future in begun if not future.done()]
            if begun and begun[0].done():
                yield begun.popleft().result()
            elif more and len(running) - traffic.server.parked < count and not any(map(failed, begun)):
                if (task := next(tasks, None)) is None:
                    more = False
                else:
                    begun.append(begin(task))
            else:
                wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
    finally:
        if begun:  # ended early
            traffic.stop()


def failed(future: Future[T]) -> bool:
    """Whether a call ended in an error: nothing more is begun then."""
    return future.done() and future.exception() is not None


def begin(task: Callable[[], T]) -> Future[T]:
    """Run a call in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="interp-request").start()
    return future
