"""Checkpoints: scores are added to a file as chunks finish, so that a run killed at any moment continues.

The file is a line of magic, a line of JSON behind its sha256 (who ran what: `head -2` shows it), and records:

    b"done", chunk number, count, flags (little-endian uint32), count × float32, 16 bytes of blake2b

A record that a kill or a full disk tore is known by its checksum, and dropped. Records are in chunk order.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import CheckpointError
from ..files import path_of

try:
    import fcntl
except ImportError:  # not a Unix: two runs on one checkpoint are then not kept apart
    fcntl = None  # type: ignore[assignment]

#: Version of the layout; another one is refused.
SCHEMA = 1
MAGIC = b"interp checkpoint "
HEAD = struct.Struct("<4sIII")
MARKER = b"done"
CHECK = 16
DIVIDED = 1  # flag: this chunk ran in parts after its device's memory was exhausted
SYNC_SECONDS = 1.0


class Checkpoint:
    """The checkpoint of one job, as a context: entering reads what is finished and opens the file for more.

    Args:
        path: the file; made where there is none, with its folder.
        identity: what the numbers depend on, see `interp.engine.identity`.
        digest: of the whole job, chunk boundaries included.
        sizes: how many scores each chunk has.

    `finished`: scores of the chunks 0, 1, … that need not run again; `divided`: whether any ran in parts.

    Raises:
        CheckpointError: of another run (it names what differs), not a checkpoint, in use, or not writable.
    """

    def __init__(self, path: Any, identity: dict[str, Any], digest: str, sizes: Sequence[int]) -> None:
        self.path = path_of(path, CheckpointError, "checkpoint")
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.digest, self.sizes = digest, list(sizes)
        self.finished: list[np.ndarray] = []
        self.divided = False
        self._file: IO[bytes] | None = None
        self._end = 0  # where the next record goes
        self._count = 0  # how many records there are
        self._synced = 0.0

    def __enter__(self) -> Checkpoint:
        self._read()
        if not self.complete:  # a finished one may lie in a folder that cannot be written
            try:
                self._open()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    @property
    def complete(self) -> bool:
        """Whether every chunk is finished."""
        return self._end > 0 and len(self.finished) == len(self.sizes)

    def add(self, scores: np.ndarray, divided: bool = False) -> None:
        """Append the scores of the next chunk; CheckpointError if that fails: the file keeps what it had."""
        self._write(record(self.digest, self._count, scores, divided))
        self._count += 1

    def _read(self) -> None:
        """Take over what the file holds, if it is there and this run's."""
        self.finished, self.divided, self._end, self._count = [], False, 0, 0
        with _reading(self.path) as file:
            found = read_header(self.path, file) if file is not None else None
            if file is None or found is None:
                return
            differs = list(differences(self.identity, found["identity"]))
            if not differs and found["digest"] != self.digest:
                differs = ["the division into forward passes (it was written by another version of interp)"]
            if differs:
                raise CheckpointError(
                    f"{self.path} is the checkpoint of another run, which differs in {'; '.join(differs)}. "
                    "Give another path, or delete the file to start over"
                )
            self._end = file.tell()
            for number, count in enumerate(self.sizes):
                size = HEAD.size + 4 * count + CHECK
                data = file.read(size)
                if len(data) < size:
                    return
                divided = data[HEAD.size - 4] == DIVIDED
                scores = np.frombuffer(data[HEAD.size : -CHECK], dtype="<f4")
                if data != record(self.digest, number, scores, divided):
                    return
                self.finished.append(scores)
                self._count = number + 1
                self.divided |= divided
                self._end += size

    def _open(self) -> None:
        """Open for appending behind the last whole record, alone; write the header of a new file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "x+b", buffering=0)
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path} is being written by another run; wait for it, or give another path"
            ) from None
        except OSError as error:
            if self._file is None or error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise self._refused(error) from error
        self._read()  # again, now that nobody else writes
        self._synced = time.monotonic()
        try:
            os.ftruncate(self._file.fileno(), self._end)
            self._file.seek(self._end)
        except OSError as error:
            raise self._refused(error) from error
        if not self._end:
            self._write(header(self.digest, self.identity, len(self.sizes)), sync=True)

    def _write(self, data: bytes, sync: bool = False) -> None:
        assert self._file is not None, "a checkpoint is written inside its context"
        descriptor, rest = self._file.fileno(), memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if sync or time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(descriptor)
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._end)
            raise self._refused(error) from error
        self._end += len(data)

    def _refused(self, error: OSError) -> CheckpointError:
        """The error for a file that cannot be written."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space there, or give another path" if full else "give a path that can be written"
        kept = f". It keeps {self._count} of {len(self.sizes)} chunks, from which the same call continues"
        return CheckpointError(
            f"cannot write the checkpoint {self.path}: {error.strerror or error}; {remedy}{kept if self._count else ''}"
        )


def record(digest: str, number: int, scores: np.ndarray, divided: bool) -> bytes:
    """One finished chunk as bytes; the checksum covers the job's digest too."""
    data = HEAD.pack(MARKER, number, len(scores), DIVIDED * divided) + scores.astype("<f4").tobytes()
    return data + hashlib.blake2b(digest.encode() + data, digest_size=CHECK).digest()


def header(digest: str, identity: dict[str, Any], chunks: int) -> bytes:
    """The two lines that a file begins with."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"created": created, "chunks": chunks, "digest": digest, "identity": identity}, sort_keys=True)
    return MAGIC + b"%d\n" % SCHEMA + f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n".encode()


def read_header(path: Path, file: IO[bytes]) -> dict[str, Any] | None:
    """The JSON of an open file, which then stands at its first record; None where nothing was written yet.

    Raises CheckpointError for a file that is not ours, of another version, or damaged.
    """
    first = file.read(len(MAGIC))
    if not MAGIC.startswith(first):
        raise CheckpointError(f"{path} is not a checkpoint of interp and is left as it is; give another path")
    first += file.readline(32)
    second = file.readline()
    if not second.endswith(b"\n"):  # killed while it was made: no record can follow
        return None
    if first != MAGIC + b"%d\n" % SCHEMA:
        found = first[len(MAGIC) :].decode(errors="replace").strip()
        raise CheckpointError(
            f"{path} was written by another version of interp (layout {found!r}, this one reads {SCHEMA}); "
            "give another path"
        )
    checksum, _, text = second[:-1].partition(b" ")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise CheckpointError(f"{path} is damaged: its header does not match its checksum; delete it to start over")
    found_header: dict[str, Any] = json.loads(text)
    return found_header


def read_identity(path: Any) -> dict[str, Any]:
    """The identity in a checkpoint's header; empty where there is no path, no file, or an empty one.

    A run that leaves its schedule or budget open takes them from here, so that its chunks are the same again.

    Raises:
        CheckpointError: not a checkpoint, a folder, or not to be read.
    """
    if path is None:
        return {}
    path = path_of(path, CheckpointError, "checkpoint")
    with _reading(path) as file:
        found = read_header(path, file) if file is not None else None
    return {} if found is None else found["identity"]


@contextlib.contextmanager
def _reading(path: Path) -> Any:
    """The open file, or None where there is none."""
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "not a plain file"
        raise CheckpointError(f"checkpoint {path} is {what}; give the path of a file, such as {path / 'sweep.ckpt'}")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    with file:
        yield file


def differences(expected: Any, found: Any, name: str = "") -> list[str]:
    """Which parts of two identities differ, each with both values."""
    if isinstance(expected, dict) and isinstance(found, dict) and name.count(".") < 1:
        keys = [*expected, *(key for key in found if key not in expected)]
        parts = (differences(expected.get(key), found.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return [text for part in parts for text in part]
    if expected == found:
        return []
    return [f"{name} (expected {_short(expected)}, found {_short(found)})"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} … {text[-16:]}"
