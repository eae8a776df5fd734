"""The life of one request to a deployment: sent, asked after, fetched; sent again where it was lost, given up where it failed.

What passes is tried again, with pauses that grow and vary, until the deadline. What failed in the code that was sent is told
at once. No request whose result the ledger has is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import BackendError
from ..models.layout import Envoy
from .answers import read_answer
from .ledger import Key, Ledger
from .traffic import Stopped, Traffic
from .wire import Gone, Passed, Told, Wire, new_id

#: Seconds between two questions after one request: the first, and the most.
ASK, ASK_MOST = 0.02, 3.0
#: Seconds of the first pause after a failure, and of the longest.
PAUSE, PAUSE_MOST = 0.5, 30.0
#: Seconds after which a request is taken for lost that the server does not know: sent for certain, or perhaps never; in the
#: latter case the server must say so this many times.
UNKNOWN, UNSURE, LOOKS = 30.0, 4.0, 8
#: Seconds without news after which it is taken for lost once the server was away, or has done later ones; while it runs.
SILENT, SILENT_RUNNING = 15.0, 60.0
#: And where another process sent it, and nothing else is known.
SILENT_RESUMED = 300.0
#: Seconds in which a server must be reached for the first time.
FIRST_CONTACT = 10.0
#: How often one request may be lost: what kills its worker every time is not sent for ever.
LOSSES = 6
#: What servers say when it was no fault of the request.
EXCUSES = ("please try again later", "was evicted while processing")


@dataclass(frozen=True)
class Sealed:
    """A request that is ready to be sent: what it asks (its key), and its bytes."""

    key: Key
    model_key: str
    env: Mapping[str, object]
    blob: bytes


#: Where a request is: not sent, or not taken; perhaps with the server; with the server.
HERE, PERHAPS, THERE = "here", "perhaps there", "there"


class Lost(Exception):
    """The server has lost the request; `ended`: it says so itself, and keeps that under the id."""

    def __init__(self, said: str, ended: bool) -> None:
        super().__init__(said)
        self.ended = ended


class Errand:
    """One request on its way. `explain` makes the error of what a server says of a request that failed in what was sent."""

    def __init__(
        self,
        wire: Wire,
        traffic: Traffic,
        request: Sealed,
        ledger: Ledger | None,
        explain: Callable[[str], BackendError],
        timeout: float,
    ) -> None:
        self.wire, self.traffic, self.request, self.ledger, self.explain = wire, traffic, request, ledger, explain
        self.began = time.monotonic()
        self.until = min(traffic.deadline, self.began + timeout)
        known = ledger.find(request.key) if ledger is not None else None
        self.id = known.id if known is not None and known.state == "sent" else ""
        self.resumed, self.where = bool(self.id), PERHAPS if self.id else HERE
        self.sent_at = 0.0 if self.resumed else self.began  # of what another process sent nobody knows when
        self.told: Told | None = None  # what the server said last
        self.news = self.began  # when it said something new
        self.unknown = 0  # how often in a row it knew of no such request
        self.losses, self.received, self.parked, self.over = 0, 0, False, False
        self.last = "it was not sent yet"

    def tell(self, what: str, said: object = "") -> None:
        """Keep an event."""
        if self.ledger is not None:
            self.ledger.event(self.request.key, self.id, what, self.wire.said(said))

    def run(self) -> dict[str, Envoy]:
        """The values that came back.

        Raises:
            BackendError: it failed there, cannot be sent, was lost too often, or the deadline is over. Stopped.
        """
        if self.resumed:
            self.tell("asked after again")
        try:
            return self._try()
        finally:
            self.traffic.server.park(-self.parked)

    def _try(self) -> dict[str, Envoy]:
        pause = PAUSE
        while True:
            self._check()
            try:
                if self.where != THERE:
                    self._send()
                blob = self._follow()
                self.received = len(blob)
                answer = read_answer(blob, self.wire.largest)
                if self.ledger is not None:
                    self.ledger.done(self.request.key, self.id, blob)
                server = self.traffic.server
                if not self.resumed and not self.losses:
                    server.took(time.monotonic() - self.sent_at)
                server.latest = max(server.latest, self.sent_at)
                return answer
            except Lost as lost:
                self._lost(lost)
            except Passed as passed:
                self._interrupted(passed)
                pause = max(pause, passed.wait)
            except BackendError as error:
                if self.ledger is not None and self.over:
                    self.ledger.failed(self.request.key, self.id, str(error))
                else:  # it may be run there all the same: whoever goes on asks after it
                    self.tell("given up", str(error).split("\n")[0])
                raise
            self.traffic.pause(pause * self.traffic.random.uniform(0.5, 1.0))
            pause = min(2 * pause, PAUSE_MOST)

    def _interrupted(self, passed: Passed) -> None:
        """Note it; BackendError where the server was not there from the beginning."""
        self.last = str(passed)
        self.tell("interrupted", passed)
        if passed.restart:
            self.traffic.server.away = self.news = time.monotonic()
        if not self.traffic.server.reached and time.monotonic() - self.began > FIRST_CONTACT:
            raise BackendError(
                f"{passed}, and it was not reached once in {FIRST_CONTACT:.0f} s: is the server running, is the address right, "
                "and is this machine connected?"
            ) from passed

    def _check(self) -> None:
        if self.traffic.stopped:
            raise Stopped
        if time.monotonic() >= self.until:
            raise late(self.last)

    def _lost(self, lost: Lost) -> None:
        self.losses += 1
        self.last = str(lost)
        self.tell("lost", lost)
        if self.losses >= LOSSES:
            raise BackendError(
                f"the server lost the same request {self.losses} times, the last time: {lost}. It may need more memory there "
                "than there is: give it less at once (max_tokens=), or ask who runs the server"
            ) from lost
        self.where = HERE if lost.ended else PERHAPS
        if lost.ended:
            self.id = ""  # under the old one stands that it failed

    def _send(self) -> None:
        """Send the request, or see that it is there: one that was perhaps sent must be unknown for a while first."""
        if self.where == PERHAPS and self._there():
            self.where = THERE
            return
        self.id = self.id or new_id()
        if self.ledger is not None:
            self.ledger.sent(self.request.key, self.id, len(self.request.blob))
        self.where, self.resumed, self.unknown, self.told = PERHAPS, False, 0, None
        self.sent_at = time.monotonic()
        request = self.request
        try:
            self.id = self.wire.post(self.id, request.model_key, request.env, request.blob)
        except Passed as passed:
            self.where = HERE if passed.untaken else PERHAPS
            raise
        self.where, self.news, self.traffic.server.reached = THERE, time.monotonic(), True

    def _there(self) -> bool:
        """Whether the server knows of this request, and has news of it where it was silent."""
        while (told := self.wire.look(self.id)) is None:
            self.unknown += 1
            if self.unknown > LOOKS:
                return False
            self._check()
            self.traffic.pause(UNSURE / LOOKS)
        self.unknown, self.traffic.server.reached = 0, True
        return told != self.told

    def _follow(self) -> bytes:
        """Ask after the request until its result is here."""
        usual = self.traffic.server.usual
        ask = max(ASK, min(usual / 10, ASK_MOST))
        if self.told is None and usual:  # every question costs the server something: not before an answer may be there
            self.traffic.pause(min(max(0.0, 0.5 * usual - (time.monotonic() - self.sent_at)), ASK_MOST))
        while True:
            self._check()
            told = self.wire.look(self.id)
            if told != self.told:
                self.told, self.news = told, time.monotonic()
            if told is None:
                self.last = "the server does not know it"
            else:
                self.last = f"the server said {told.status} ({told.description})"
                if told.status == "COMPLETED":
                    return self._fetch(told)
                if told.status == "ERROR":
                    raise self._failed(told.description)
            self._silent(told, time.monotonic() - self.news)
            self.traffic.pause(ask)
            ask = min(1.3 * ask, ASK_MOST)

    def _silent(self, told: Told | None, silence: float) -> None:
        """Raises Lost where nothing more will be heard of the request."""
        server, status = self.traffic.server, told.status if told is not None else "not known"
        running = status == "RUNNING"
        if self.resumed and silence > SILENT and not self.parked:  # if later ones overtake it, it is lost
            self.parked = True
            server.park(1)
        for known, enough, why in (
            (told is None, UNKNOWN, "it is not known any more"),
            (server.away > self.sent_at, SILENT_RUNNING if running else SILENT, "the server was away"),
            (server.latest > self.sent_at and not running, SILENT, "later requests are done"),
            (self.resumed, SILENT_RESUMED, "another process sent it"),
        ):
            if known and silence > enough:
                if not self.wire.connected():  # it is not yet what it was
                    server.away = self.news = time.monotonic()
                    return
                raise Lost(f"no news for {silence:.0f} s of a request that was {status}: {why}", ended=False)

    def _fetch(self, told: Told) -> bytes:
        try:
            return self.wire.result(told.url)
        except Gone as error:
            raise Lost(str(error), ended=True) from error

    def _failed(self, said: str) -> Exception:
        """A request that the server says has failed: by no fault of its own, or in what was sent."""
        if "traceback" not in said.lower() and any(excuse in said.lower() for excuse in EXCUSES):
            return Lost(said.split("\n")[0], ended=True)
        self.over = True
        return self.explain(said)


def late(last: str) -> BackendError:
    """The error for a deadline that is over."""
    return BackendError(
        f"no result within the time allowed: {last}. The server may be full or away; a job goes on from its file "
        "(interp.Job.load), a call with more time (model.backend.timeout in seconds)"
    )
