"""The ledger of a job: one sqlite file that says of each request when it was sent, under which id, what came of it.

A request is known by the digest of what it asks, and by how many of the same were asked before it. What came back is kept
there too, so that the same call, made again after a kill, asks only for what is missing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import JobError
from .answers import digest_of

#: Version of the tables; another one is refused.
SCHEMA = 1
MARK = 0x696E7470  # "intp", sqlite's application id
TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS requests (
    key TEXT, number INTEGER, id TEXT, state TEXT, sends INTEGER, first_sent REAL, last_sent REAL, finished REAL,
    bytes_up INTEGER, bytes_down INTEGER, digest TEXT, answer BLOB, PRIMARY KEY (key, number)
);
CREATE TABLE IF NOT EXISTS events (time REAL, key TEXT, number INTEGER, id TEXT, what TEXT, said TEXT);
"""
#: What a request is known by: the digest of what it asks, and how many of the same came before it.
Key = tuple[str, int]


@dataclass(frozen=True)
class Entry:
    """What the ledger says of one request: `state` is "sent", "done" or "failed", `id` its name on the server."""

    id: str
    state: str
    sends: int
    last_sent: float


class Ledger:
    """One job's file, for several threads. Raises JobError: not such a file, of another version, or not writable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._base = self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if new:
                path.touch(mode=0o600)  # it holds prompts, and code that is run when it is loaded
            base = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            if path.stat().st_size and base.execute("PRAGMA application_id").fetchone()[0] != MARK:
                raise JobError(f"{path} is not a job of interp and is left as it is; give the file that job.save wrote")
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise JobError(f"{path} was written by another version of interp (tables {version}, not {SCHEMA})")
            base.execute(f"PRAGMA application_id = {MARK}")
            base.execute(f"PRAGMA user_version = {SCHEMA}")
            base.executescript(TABLES)
        except (sqlite3.Error, OSError) as error:
            raise JobError(f"cannot use {path} as the file of a job: {error}; give another path") from error
        return base

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._base.close()

    def move(self, path: Path) -> None:
        """Go on in another file, which gets all of this one; the old one is removed. JobError: there is a file already."""
        if path.exists():
            raise JobError(f"{path} is there already; give the path of a new file")
        with self._lock:
            new = self._open(path)
            try:
                self._base.backup(new)
            except sqlite3.Error as error:
                new.close()
                path.unlink(missing_ok=True)
                raise JobError(f"cannot write the job to {path}: {error}; give another path") from error
            self._base.close()
            self.path.unlink(missing_ok=True)
            self._base, self.path = new, path

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One change, whole or not at all."""
        with self._lock:
            try:
                self._base.execute("BEGIN IMMEDIATE")
                yield self._base
                self._base.execute("COMMIT")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise JobError(
                    f"cannot write {self.path}: {error}; free space there. What it holds stays whole"
                ) from error

    def _one(self, asked: str, *values: object) -> tuple[object, ...] | None:
        with self._lock:
            try:
                found = self._base.execute(asked, values).fetchone()
            except sqlite3.Error as error:
                raise JobError(f"cannot read {self.path}: {error}") from error
        return None if found is None else tuple(found)

    # facts

    def fact(self, name: str) -> object:
        """A fact of the job, or None."""
        found = self._one("SELECT value FROM facts WHERE name = ?", name)
        return None if found is None else found[0]

    def note(self, **facts: object) -> None:
        """Keep facts of the job: numbers, text or bytes."""
        with self._writing() as base:
            base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

    # requests

    def find(self, key: Key) -> Entry | None:
        """What is known of a request."""
        found = self._one("SELECT id, state, sends, last_sent FROM requests WHERE key = ? AND number = ?", *key)
        return None if found is None else Entry(str(found[0]), str(found[1]), int(str(found[2])), float(str(found[3])))

    def answer(self, key: Key) -> bytes | None:
        """What came back of a request that is done. JobError: it is not what was written."""
        found = self._one("SELECT answer, digest FROM requests WHERE key = ? AND number = ? AND state = 'done'", *key)
        if found is None or not isinstance(found[0], bytes):
            return None
        if digest_of(found[0]) != found[1]:
            raise JobError(
                f"{self.path} is damaged: an answer in it is not the one that was written; submit the job anew"
            )
        return found[0]

    def sent(self, key: Key, id: str, size: int) -> None:
        """A request is about to be sent under this id: known before, since a kill may come between."""
        now = time.time()
        with self._writing() as base:
            base.execute(
                "INSERT INTO requests VALUES (?, ?, ?, 'sent', 1, ?, ?, NULL, ?, NULL, NULL, NULL) ON CONFLICT DO UPDATE SET "
                "id = excluded.id, state = 'sent', sends = sends + 1, last_sent = excluded.last_sent",
                (*key, id, now, now, size),
            )
            base.execute("INSERT INTO events VALUES (?, ?, ?, ?, 'sent', ?)", (now, *key, id, f"{size} bytes"))

    def done(self, key: Key, id: str, blob: bytes) -> None:
        """A request is finished, and this came back."""
        now, digest = time.time(), digest_of(blob)
        with self._writing() as base:
            base.execute(
                "UPDATE requests SET state = 'done', id = ?, finished = ?, bytes_down = ?, digest = ?, answer = ? "
                "WHERE key = ? AND number = ?",
                (id, now, len(blob), digest, blob, *key),
            )
            base.execute("INSERT INTO events VALUES (?, ?, ?, ?, 'done', ?)", (now, *key, id, digest))

    def failed(self, key: Key, id: str, said: str) -> None:
        """A request failed for good."""
        with self._writing() as base:
            base.execute(
                "UPDATE requests SET state = 'failed', answer = ? WHERE key = ? AND number = ?", (said.encode(), *key)
            )
            base.execute("INSERT INTO events VALUES (?, ?, ?, ?, 'failed', ?)", (time.time(), *key, id, said))

    def failure(self, key: Key) -> str | None:
        """Why a request failed for good, if it did."""
        found = self._one("SELECT answer FROM requests WHERE key = ? AND number = ? AND state = 'failed'", *key)
        return found[0].decode() if found is not None and isinstance(found[0], bytes) else None

    def event(self, key: Key, id: str, what: str, said: str = "") -> None:
        """Something happened to a request."""
        with self._writing() as base:
            base.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (time.time(), *key, id, what, said))

    def counts(self) -> dict[str, int]:
        """How many requests are in each state, and under "sends" how often any was sent."""
        with self._lock:
            rows = self._base.execute("SELECT state, COUNT(*), SUM(sends) FROM requests GROUP BY state").fetchall()
        return {str(state): int(count) for state, count, _ in rows} | {"sends": sum(int(row[2]) for row in rows)}

    def events(self) -> list[tuple[float, str, str, str]]:
        """All that happened, in order: (time, id, what, what was said)."""
        with self._lock:
            rows = self._base.execute("SELECT time, id, what, said FROM events ORDER BY rowid").fetchall()
        return [(float(when), str(id), str(what), str(said)) for when, id, what, said in rows]
