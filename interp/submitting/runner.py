"""The thread in which a job's method runs, on models whose backends keep every answer in the job's ledger.

1. The call is pickled in the job's file. What runs is what was pickled, here as after a reboot.
2. The method runs as always; its model's backend is one that asks the ledger first, and keeps what comes back there.
3. Begun again, the method runs from its beginning: answers in the ledger are taken from it, and only what is missing is sent.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import Timeout

from ..engine.door import watched
from ..engine.ledger import Ledger
from ..engine.remote import Shipped
from ..engine.traffic import Stopped, Traffic
from ..errors import InterpError, JobError
from ..journal import last_line, outermost
from ..models.model import Model
from .asked import load_models, unpack_call
from .state import lock_of

#: Seconds between two notes of how far a job has come.
NOTED = 1.0


class Runner:
    """Runs one job, where no other process does. `result` or `error` is there once `finished` is set."""

    def __init__(self, ledger: Ledger, models: Sequence[Model] | None = None) -> None:
        self.ledger, self.models, self.lock = ledger, models, lock_of(ledger.path)
        self.traffic = Traffic()
        self.finished = threading.Event()
        self.thread: threading.Thread | None = None
        self.result: object = None
        self.error: BaseException | None = None
        self._noted = 0.0

    def begin(self) -> None:
        """Run in a thread; nothing where another process runs it. JobError: its folder cannot be written."""
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            return
        except OSError as error:
            raise JobError(f"cannot hold {self.lock.lock_file}: {error}; put the job where you can write") from error
        if self.ledger.fact("state") != "done":
            self.ledger.note(state="running", error="")
        name = str(self.ledger.fact("id"))
        context = contextvars.copy_context()  # whoever listens here is told of the method
        self.thread = threading.Thread(target=context.run, args=(self._work,), daemon=True, name=name)
        self.thread.start()

    def refusal(self, seconds: float) -> BaseException | None:
        """What the method refused before it made a request; None where it made one, or is still busy after `seconds`."""
        until = time.monotonic() + seconds
        while not self.traffic.ready.is_set() and time.monotonic() < until and not self.finished.wait(0.02):
            pass
        return None if self.traffic.ready.is_set() else self.error

    def cancel(self) -> None:
        """Send nothing more, and wait for nothing more."""
        self.traffic.stop()
        if self.thread is not None:
            self.thread.join()
        elif self.ledger.fact("state") != "done":
            self.ledger.note(state="cancelled")
        self.finished.set()

    def move(self, path: Path) -> None:
        """Go on with the ledger at another place. JobError: there is a file, or none can be written."""
        lock = lock_of(path)
        if self.lock.is_locked:
            lock.acquire(timeout=0)
        self.ledger.move(path)
        before, self.lock = self.lock, lock
        before.release(force=True)
        Path(before.lock_file).unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove the files of a job that was refused."""
        self.ledger.close()
        for file in (self.ledger.path, Path(self.lock.lock_file)):
            file.unlink(missing_ok=True)

    def _work(self) -> None:
        """The method, from its beginning, and what came of it."""
        facts: dict[str, object] = {"state": "cancelled"}
        try:
            with watched(self._progressed), outermost():
                self.result = self._call()
            facts = {"state": "done", "share": 1.0}
        except Stopped:
            pass
        except BaseException as error:
            if not self.traffic.stopped:
                self.error = error
                facts = {"state": "failed", "error": last_line(error)}
        finally:
            with contextlib.suppress(InterpError):
                self.ledger.note(finished=time.time(), **facts)
            self.lock.release(force=True)
            self.finished.set()

    def _call(self) -> object:
        ledger = self.ledger
        models = self.models or load_models(_bytes(ledger, "models"))
        in_flight, deadline = int(str(ledger.fact("in_flight"))), float(str(ledger.fact("deadline")))
        self.traffic.deadline = time.monotonic() + deadline
        self.traffic.server.reached = bool(ledger.counts()["sends"])  # a server that was there once is waited for
        limit = int(str(ledger.fact("limit")))  # other requests would be others to the ledger
        ours = [
            replace(model, backend=elsewhere(model).for_job(ledger, self.traffic, in_flight, limit)) for model in models
        ]
        method, args, kwargs = unpack_call(_bytes(ledger, "call"), ours)
        result = method(*args, **kwargs)
        if isinstance(result, Iterator):
            raise JobError("this gives its results one after another, and a job needs the whole: leave stream= out")
        return result

    def _progressed(self, name: str, done: int, total: int) -> None:
        """Note how far it is, not too often."""
        now = time.monotonic()
        if now - self._noted > NOTED or done >= total:
            self._noted = now
            self.ledger.note(share=done / total if total else 0.0, part_done=done, part_total=total, part=name)


def elsewhere(model: Model) -> Shipped:
    """A model's backend, which must be one that sends requests. JobError."""
    if not isinstance(model.backend, Shipped):
        raise JobError(
            f"{model.name} runs in this process, which a job would not outlive: load it with backend='simulated', 'ndif' or the "
            "address of a server; what runs here goes on with checkpoint=path"
        )
    return model.backend


def _bytes(ledger: Ledger, name: str) -> bytes:
    found = ledger.fact(name)
    if not isinstance(found, bytes):
        raise JobError(f"{ledger.path} lacks what the job was asked; submit it anew")
    return found
