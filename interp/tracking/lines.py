"""A file that grows by whole lines of JSON: a line that was written is there, however the process ends."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from .values import line

#: Bytes that wait, on a full disk, for room.
MOST = 1 << 24
#: Bytes of one record; of a larger one prompts and tokens are left out, which hold most of it.
LARGEST = 1 << 20
PACKAGE = str(Path(__file__).parents[1]) + os.sep


def warn(said: str) -> None:
    """A warning at the line of the person's own code that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(said, stacklevel=level)


class Lines:
    """Each line is handed to the system as it comes, in one piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b""
        self._warned = False

    def write(self, values: Mapping[str, object]) -> None:
        """Add a line. Where the disk is full it waits, with a warning, for the next that can be written."""
        self._waiting += line(values)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(f"{self.path} cannot be written ({error.strerror}): lines wait in memory until it can")
            if len(self._waiting) > MOST:
                self._waiting = self._waiting[self._waiting.find(b"\n", len(self._waiting) - MOST) + 1 :]

    def close(self) -> None:
        """Close the file; what still waits is tried once more."""
        self._flush()
        if self._waiting:
            warn(f"{self.path} could not be written: {self._waiting.count(bytes([10]))} lines are lost")
        file, self._file = self._file, -1
        if file >= 0:
            with contextlib.suppress(OSError):
                os.close(file)


def lightened(record: dict[str, object]) -> dict[str, object]:
    """A record with less in it where it would fill a megabyte: prompts and tokens are left out of its provenance."""
    provenance = record.get("provenance")
    if isinstance(provenance, dict) and len(line(record)) > LARGEST:
        kept = {key: value for key, value in provenance.items() if key not in ("prompts", "tokens")}
        record = {**record, "provenance": {**kept, "left_out": ["prompts", "tokens"]}}
        if len(line(record)) > LARGEST:
            record["provenance"] = {
                key: value for key, value in kept.items() if len(line({key: value})) < LARGEST // 16
            }
    return record
