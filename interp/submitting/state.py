"""What a job's file says of how it is and how far it has come."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from ..engine.ledger import Ledger

#: What a job can be. "stopped": begun by a process that is no more.
STATES = ("running", "done", "failed", "cancelled", "stopped")
#: Beside the place of a job's file that was moved: where it went.
POINTER = ".at"


class Progress(float):
    """The share of a job's present work that is done, 0 to 1: `done` of `total` units; `requests` are answered so far."""

    def __new__(cls, share: float, done: int = 0, total: int = 0, name: str = "", requests: int = 0) -> Progress:
        made = super().__new__(cls, share)
        made.done, made.total, made.name, made.requests = done, total, name, requests
        return made

    done: int
    total: int
    name: str
    requests: int

    def __repr__(self) -> str:
        said = f", {self.name}: {self.done:,} of {self.total:,}" if self.total else ""
        return f"{float(self):.0%}{said}, {self.requests} requests answered"


def lock_of(path: Path) -> FileLock:
    """The lock that the process holds which runs the job of this file."""
    return FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)


def state_of(ledger: Ledger) -> str:
    """What a job's ledger says of it; one that is running in no process is "stopped"."""
    state = str(ledger.fact("state"))
    if state != "running":
        return state
    lock = lock_of(ledger.path)
    try:
        with lock.acquire(timeout=0):
            pass
    except Timeout:
        return "running"
    except OSError:  # a folder that cannot be written: nobody can run it there
        pass
    state = str(ledger.fact("state"))
    return "stopped" if state == "running" else state


def progress_of(ledger: Ledger) -> Progress:
    """How far a job is, from its ledger."""
    number = {name: float(str(ledger.fact(name) or 0)) for name in ("share", "part_done", "part_total")}
    return Progress(
        number["share"],
        int(number["part_done"]),
        int(number["part_total"]),
        str(ledger.fact("part") or ""),
        ledger.counts().get("done", 0),
    )
