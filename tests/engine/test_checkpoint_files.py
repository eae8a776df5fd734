"""Files that are no checkpoints, full disks, read-only folders: an error that says so, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp.engine import checkpoint as room
from interp.engine.checkpoint import Checkpoint
from interp.errors import CheckpointError
from tests.engine.sweeps import chunks_in, pairs_of, run, same
from tests.families import count_forwards, loaded


def test_files_that_are_not_checkpoints_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        run(tmp_path / "folder")
    notes = tmp_path / "notes.txt"
    notes.write_text("remember the milk")
    with pytest.raises(CheckpointError, match="not a checkpoint of interp"):
        run(notes)
    assert notes.read_text() == "remember the milk"
    with pytest.raises(CheckpointError, match=r"cannot .* checkpoint"):
        run(notes / "below a file.ckpt")
    with pytest.raises(CheckpointError, match="not a plain file"):
        run("/dev/full")
    with pytest.raises(CheckpointError, match="not a path"):
        run(True)
    path = tmp_path / "sweep.ckpt"
    whole = run(path).values
    data = path.read_bytes()
    path.write_bytes(data.replace(b"interp checkpoint 1\n", b"interp checkpoint 99\n"))
    with pytest.raises(CheckpointError, match=r"another version of interp .*'99'"):
        run(path)
    path.write_bytes(data.replace(b"noising", b"NOISING", 1))
    with pytest.raises(CheckpointError, match="damaged"):
        run(path)
    path.write_bytes(b"")  # a temporary file of the user's that is empty is taken
    assert np.array_equal(run(path).values, whole, equal_nan=True)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    with Checkpoint(path, {"model": "a"}, "digest", [2, 3]) as first:
        first.add(np.zeros(2, dtype=np.float32))
        with pytest.raises(CheckpointError, match="being written by another run"):
            Checkpoint(path, {"model": "a"}, "digest", [2, 3]).__enter__()
        first.add(np.ones(3, dtype=np.float32))
    with Checkpoint(path, {"model": "a"}, "digest", [2, 3]) as second:
        assert second.complete and [len(scores) for scores in second.finished] == [2, 3]
    with pytest.raises(CheckpointError, match="division into forward passes"):
        Checkpoint(path, {"model": "a"}, "another", [2, 3]).__enter__()


@contextlib.contextmanager
def limit_of_file_size(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the kernel writes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fails_then_continues(path: Path, failing: Callable[[], contextlib.AbstractContextManager[Any]], say: str) -> None:
    """A sweep whose file cannot grow says so, keeps what it has, and goes on when it can."""
    with failing(), pytest.raises(CheckpointError, match=say) as caught:
        run(path, pairs=pairs_of(6, 12))
    said = str(caught.value)
    kept = chunks_in(path)
    assert kept > 1 and f"keeps {kept} of" in said and "continues" in said, said
    seen, stop = count_forwards(loaded("gpt2"))
    after = run(path, pairs=pairs_of(6, 12))
    stop()
    assert chunks_in(path) > kept and len(seen) < after.provenance["forwards"], "what was kept is not run again"
    assert same(after, run(None, pairs=pairs_of(6, 12)))


def test_a_file_that_may_not_grow_says_so_and_continues_later(tmp_path: Path) -> None:
    fails_then_continues(tmp_path / "sweep.ckpt", lambda: limit_of_file_size(4000), "File too large; free space")


def test_a_full_disk_says_so_and_continues_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "sweep.ckpt", os.write

    def half(descriptor: int, data: Any) -> int:
        if os.fstat(descriptor).st_size + len(data) > 4000:
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(room.os, "write", half)
            yield

    fails_then_continues(path, full, "No space left on device; free space")


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    path = tiny_disk / "sweep.ckpt"
    blob = tiny_disk / "other"
    blob.write_bytes(bytes(4096))
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(path, pairs=pairs_of(12, 16))
    kept = chunks_in(path)
    assert kept > 1
    with pytest.raises(CheckpointError, match=f"keeps {kept} of"):
        run(path, pairs=pairs_of(12, 16))
    assert chunks_in(path) == kept


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that the test cannot write to: root gives up its rights for a while."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_read_only_folder_says_so_before_the_model_runs_and_gives_what_is_finished(nobody: Path) -> None:
    loaded("gpt2")
    nobody.chmod(0o755)
    whole = run(nobody / "whole.ckpt")
    run(nobody / "begun.ckpt")
    data = (nobody / "begun.ckpt").read_bytes()
    (nobody / "begun.ckpt").write_bytes(data[:-10])
    for file in nobody.iterdir():
        file.chmod(0o444)
    nobody.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    seen, stop = count_forwards(loaded("gpt2"))
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*Permission denied"):
        run(nobody / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"Permission denied.*keeps"):
        run(nobody / "begun.ckpt")
    assert same(run(nobody / "whole.ckpt"), whole)
    stop()
    assert not seen
    assert (nobody / "begun.ckpt").read_bytes() == data[:-10]
