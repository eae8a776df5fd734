"""Paths as people write them, and files that are written whole or not at all. Standard library and `errors` only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from .errors import InterpError


def path_of(given: Any, error: type[InterpError], name: str = "path") -> Path:
    """A path with `~` as the home folder; every place that reads or writes takes its paths through here.

    Raises:
        `error`: what is not a path, or the home folder of somebody who has none; `name` says which argument it is.
    """
    try:
        path = Path(given).expanduser()
    except TypeError:
        raise error(
            f"{name}={given!r} is not a path; give the path of a file or folder, text or pathlib.Path"
        ) from None
    except RuntimeError as problem:  # ~somebody
        raise error(f"{name}={str(given)!r}: {problem}; write the folder in full, or ~ for your own") from None
    if "\0" in str(path):
        raise error(f"{name}={given!r} holds a null byte, which no file's name has; give another path")
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file beside `path`, making parent folders; OSError on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
