"""A run's folder: made whole, under a name that no other process takes; and whether the process that made it still lives.

A run holds a lock on a file of its folder for as long as its process lives. The system lets go of it when the process dies,
however it dies, so nobody has to guess from process numbers, which are given out again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import TrackerError
from ..files import write_atomically
from .environment import machine
from .values import line

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

STATUS, LOCK = "status.json", ".lock"
#: What a run can be. "unfinished": its process died; "unknown": it runs, or died, on a machine that cannot be asked from here.
STATES = ("running", "finished", "failed", "unfinished", "unknown", "damaged")
#: Bytes of a name in a file's name.
LONGEST = 80


def safe(name: str) -> str:
    """A name as a file's name: letters, digits, "-", "_" and "." of it."""
    text = re.sub(r"[^\w.-]+", "_", name.strip()).strip("._-") or "run"
    return text.encode()[:LONGEST].decode(errors="ignore")


def free(folder: Path, stem: str, suffix: str) -> Path:
    """The first path of this name, or of "name-2" and so on, at which nothing stands."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10**6):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffix}"
        if not os.path.lexists(path):
            return path
    raise TrackerError(f"{folder} holds a million files named {stem}")


class Folder:
    """The folder of a run of this process, with its lock; `path` is where it is."""

    def __init__(self, root: Path, name: str, files: Mapping[str, Mapping[str, object]]) -> None:
        """Make it, with these files of JSON in it, at root/<time>-<name>: whole, or not at all.

        Raises:
            TrackerError: it cannot be made.
        """
        made = root / f".{secrets.token_hex(6)}.new"
        try:
            made.mkdir(parents=True)
            for file, data in files.items():
                (made / file).write_bytes(pretty(data))
            self._lock = os.open(made / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self.locked = _take(self._lock)
            self.path = _placed(made, root / f"{time.strftime('%Y%m%d-%H%M%S')}-{safe(name)}")
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise TrackerError(
                f"cannot make a run's folder under {root}: {error.strerror or error}; give root= a folder that can be written"
            ) from error
        if hasattr(os, "register_at_fork"):  # a worker that outlives its parent is not the run
            os.register_at_fork(after_in_child=self.release)

    def write(self, data: Mapping[str, object]) -> None:
        """Write the status."""
        write_atomically(self.path / STATUS, pretty(data))

    def release(self) -> None:
        """Let go of the lock."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            with contextlib.suppress(OSError):
                os.close(lock)


def _placed(made: Path, wanted: Path) -> Path:
    """Rename a folder to the first name that is free: of two processes one gets it and the other the next."""
    for number in range(1, 10**4):
        place = wanted.with_name(f"{wanted.name}{f'-{number}' if number > 1 else ''}")
        if os.path.lexists(place):
            continue
        try:
            made.rename(place)  # refused where a folder with something in it has come to stand meanwhile
            return place
        except OSError:
            if not os.path.lexists(place):
                raise
    raise OSError(f"{wanted} is taken ten thousand times")


def pretty(data: Mapping[str, object]) -> bytes:
    """Plain data as JSON that a person reads."""
    return json.dumps(json.loads(line(data)), indent=1, ensure_ascii=False).encode() + b"\n"


def _take(descriptor: int, shared: bool = False) -> bool | None:
    """Try to lock a file; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without
        return None


def read_status(path: Path) -> dict[str, object]:
    """What a run's status file says, with what became of its process: "status" is one of STATES. Nothing is raised."""
    try:
        said = json.loads((path / STATUS).read_text(encoding="utf-8"))
        assert isinstance(said, dict) and said["status"] in STATES
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return {"status": "damaged", "error": f"{STATUS} cannot be read: {type(error).__name__}"}
    if said["status"] == "running":
        said["status"] = _living(path, said)
    return said


def _living(path: Path, said: Mapping[str, object]) -> str:
    """Whether the process of a run that has not ended still holds its lock."""
    if not said.get("locked"):
        return "unknown"
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return "unknown"
    try:
        taken = _take(descriptor, shared=True)
    finally:
        os.close(descriptor)
    if taken is False:
        return "running"
    here = machine()
    same = any(here[key] and here[key] == said.get(key) for key in ("boot", "host"))
    return "unfinished" if taken and same else "unknown"
