"""The ledger of a job: what it says, and that nothing in it is lost or taken for something else."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from interp.engine.ledger import Ledger
from interp.errors import JobError

KEY, OTHER = ("abc", 0), ("abc", 1)


def test_a_request_is_known_before_it_is_sent_and_kept_when_it_is_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.job")
    assert ledger.find(KEY) is None and ledger.answer(KEY) is None
    ledger.sent(KEY, "id-1", 10)
    entry = ledger.find(KEY)
    assert entry is not None and (entry.id, entry.state, entry.sends) == ("id-1", "sent", 1)
    ledger.event(KEY, "id-1", "interrupted", "the connection broke")
    ledger.sent(KEY, "id-2", 10)
    ledger.done(KEY, "id-2", b"answer")
    ledger.sent(OTHER, "id-3", 5)
    ledger.failed(OTHER, "id-3", "NameError")
    assert ledger.answer(KEY) == b"answer" and ledger.answer(OTHER) is None
    assert ledger.counts() == {"done": 1, "failed": 1, "sends": 3}
    again = Ledger(tmp_path / "a.job")
    assert again.answer(KEY) == b"answer"
    assert [what for _, _, what, _ in again.events()] == ["sent", "interrupted", "sent", "done", "sent", "failed"]
    assert stat.S_IMODE((tmp_path / "a.job").stat().st_mode) == 0o600


def test_facts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.job")
    ledger.note(method="patch", share=0.5, call=b"\x00\x01")
    ledger.note(share=0.75)
    assert (ledger.fact("method"), ledger.fact("share"), ledger.fact("call")) == ("patch", 0.75, b"\x00\x01")
    assert ledger.fact("nothing") is None


def test_it_moves_with_all_that_it_holds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.job")
    ledger.note(method="patch")
    ledger.sent(KEY, "id", 1)
    ledger.move(tmp_path / "there" / "b.job")
    ledger.done(KEY, "id", b"x")
    assert not (tmp_path / "a.job").exists()
    assert Ledger(tmp_path / "there" / "b.job").answer(KEY) == b"x"
    with pytest.raises(JobError, match="is there already"):
        ledger.move(tmp_path / "there" / "b.job")


def test_what_is_no_ledger_is_left_as_it_is(tmp_path: Path) -> None:
    text, base = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("my notes\n" * 100)
    sqlite3.connect(base).executescript("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);")
    for path in (text, base):
        before = path.read_bytes()
        with pytest.raises(JobError):
            Ledger(path)
        assert path.read_bytes() == before
    with pytest.raises(JobError, match="cannot use"):
        Ledger(tmp_path)


def test_a_changed_answer_is_not_given_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.job")
    ledger.sent(KEY, "id", 1)
    ledger.done(KEY, "id", b"answer")
    sqlite3.connect(tmp_path / "a.job", isolation_level=None).execute("UPDATE requests SET answer = x'00'")
    with pytest.raises(JobError, match="damaged"):
        ledger.answer(KEY)


def test_what_was_written_outlives_a_kill(tmp_path: Path) -> None:
    """Killed at once behind each write: every one that returned is there."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom interp.engine.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\nfor n in range(int(sys.argv[2])):\n"
        "    ledger.sent(('k', n), f'id{n}', 1)\n    ledger.done(('k', n), f'id{n}', bytes(1000))\n"
        "print(n, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    for count in (1, 7):
        path = tmp_path / f"{count}.job"
        ran = subprocess.run([sys.executable, "-c", code, str(path), str(count)], capture_output=True, timeout=300)
        assert ran.returncode == -9, ran.stderr
        assert Ledger(path).counts() == {"done": count, "sends": count}
