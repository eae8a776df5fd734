"""Checkpoints: a killed sweep continues bit for bit, another run's checkpoint is refused, a full disk says so."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import Effects, PromptPairs
from interp.engine import checkpoint as room
from interp.engine.checkpoint import Checkpoint, read_identity
from interp.engine.identity import metric_digest, metric_name, weights_digest
from interp.errors import CheckpointError
from tests.families import count_forwards, loaded, words
from tests.oracle.configs import tiny

PLAN = interp.grid(["resid_pre", "attn_out", "mlp_out"])


def pairs_of(n: int, length: int = 8) -> PromptPairs:
    """Pairs of equal length that differ at one position each."""
    clean = words(*[length] * n)
    corrupted = [list(prompt) for prompt in clean]
    for number, prompt in enumerate(corrupted):
        prompt[number % 3] = words(1, seed=number + 1)[0][0]
    return PromptPairs(clean, corrupted, [20 + n % 9 for n in range(n)], [41 + n % 9 for n in range(n)])


PAIRS = pairs_of(2)


def run(path: Any, **changes: Any) -> Effects:
    """The sweep of most tests here: some dozen chunks."""
    options = {"model": loaded("gpt2"), "pairs": PAIRS, "plan": PLAN, "max_tokens": 48, **changes}
    return interp.patch(**options, checkpoint=path)


def same(one: Effects, other: Effects) -> bool:
    """Whether two records hold the same bits."""
    parts = ((getattr(one, name), getattr(other, name)) for name in ("values", "clean", "corrupted"))
    return all(np.array_equal(a, b, equal_nan=True) and a.dims == b.dims for a, b in parts)


def chunks_in(path: Path) -> int:
    """How many whole records a file holds, by its markers."""
    return path.read_bytes().count(b"done")


def test_same_numbers_with_and_without_a_checkpoint_and_a_finished_one_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "sweep.ckpt"
    plain, written = run(None), run(path)
    seen, stop = count_forwards(loaded("gpt2"))
    again = run(path)
    stop()
    assert same(plain, written) and same(plain, again)
    assert not seen, "a finished checkpoint needs no forward pass"
    assert chunks_in(path) > 5 and "oom_backoff" not in again.provenance


# --- kill -9 ---------------------------------------------------------------------------------------------------


def sweep(folder: str, name: str) -> None:
    """What the processes below run and are killed in: hundreds of chunks of a tiny GPT-2."""
    torch.set_num_threads(1)
    hf, tokenizer = tiny("gpt2")
    model = interp.load_model(hf, tokenizer=tokenizer)
    path = Path(folder) / name
    effects = interp.patch(model, pairs_of(20), PLAN, max_tokens=36, checkpoint=path.with_suffix(".ckpt"))
    np.savez(path, values=effects.values, clean=effects.clean, corrupted=effects.corrupted)


def test_killed_at_ten_random_moments_the_sweep_ends_with_the_same_bits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # processes forked where all is imported and nothing has run
    context.set_forkserver_preload(["interp", "nnsight", "tests.families", "tests.oracle.configs"])

    def start(name: str) -> Any:
        process = context.Process(target=sweep, args=(str(tmp_path), name), daemon=True)
        process.start()
        return process

    whole, broken = start("whole.npz"), None
    whole.join(60)
    assert whole.exitcode == 0
    total, path = (tmp_path / "whole.ckpt").stat().st_size, tmp_path / "broken.ckpt"
    chance, counts = random.Random(0), []
    for kill in range(10):
        before = path.stat().st_size if path.exists() else 0
        wanted = before + chance.randint(1, (total - before) // (12 - kill))
        broken = start("broken.npz")
        deadline = time.monotonic() + 30
        while (path.stat().st_size if path.exists() else 0) < wanted:
            assert broken.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        broken.kill()
        broken.join(30)
        assert broken.exitcode == -9, "the sweep ended before it was killed"
        counts.append(chunks_in(path))
    assert counts == sorted(counts) and len(set(counts)) > 5, "each went on where the one before was killed"
    assert counts[-1] < chunks_in(tmp_path / "whole.ckpt")
    broken = start("broken.npz")
    broken.join(60)
    assert broken.exitcode == 0
    with np.load(tmp_path / "broken.npz") as resumed, np.load(tmp_path / "whole.npz") as expected:
        for name in ("values", "clean", "corrupted"):
            assert np.array_equal(resumed[name], expected[name], equal_nan=True), name
    records = [(tmp_path / f"{name}.ckpt").read_bytes().split(b"\n", 2)[2] for name in ("broken", "whole")]
    assert records[0] == records[1]


@pytest.mark.parametrize("schedule", ["naive", "rows", "growing", "prefix"])
def test_cut_at_any_byte_only_what_is_missing_runs_again(tmp_path: Path, schedule: str) -> None:
    path = tmp_path / "sweep.ckpt"
    pairs, options = pairs_of(2, 5), {"schedule": schedule, "plan": interp.grid("resid_pre", layers=[1, 2])}
    whole = run(path, pairs=pairs, **options)
    data = path.read_bytes()
    start = data.index(b"done")
    cuts = sorted({0, 5, start // 2, start - 1, start, len(data) - 1, *random.Random(1).sample(range(start, len(data)), 6)})
    for cut in cuts:
        path.write_bytes(data[:cut] + b"\0" * (cut % 7 if cut > start else 0))  # a crash may leave zeros behind
        assert same(run(path, pairs=pairs, **options), whole), cut
        assert path.read_bytes()[start:] == data[start:], cut


def test_a_damaged_record_and_all_behind_it_run_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    whole = run(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"done", len(data) // 2) + 20
    data[place] ^= 1  # one bit of one score
    path.write_bytes(data)
    assert same(run(path), whole)


def test_chunks_come_from_the_checkpoint_where_the_call_leaves_them_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.ckpt"
    first = run(path, schedule="rows", max_tokens=50)
    path.write_bytes(path.read_bytes()[:-70])
    assert read_identity(path)["budget"] == 50 and read_identity(path)["schedule"] == "rows"
    again = run(path, max_tokens=None)
    assert same(again, first)
    assert (again.provenance["schedule"], again.provenance["budget"]) == ("rows", 50)


# --- whose it is -------------------------------------------------------------------------------------------------


def shifted(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """A metric with the name and another number in it is another metric."""
    return interp.logit_diff(logits, batch) + 1


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("model.name", {"model": "gpt_neox"}),
        ("dtype", {"model": torch.float64}),
        ("plan.layers", {"plan": interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=[0, 2])}),
        ("plan.edits", {"plan": interp.grid(["resid_pre", "attn_out", "mlp_out"]).with_edit("scale", 0.5)}),
        ("prompts.clean", {"pairs": PromptPairs(words(8, 8, seed=5), PAIRS.corrupted, PAIRS.answers, PAIRS.distractors)}),
        ("prompts.answers", {"pairs": PromptPairs(PAIRS.clean, PAIRS.corrupted, [22, 23], PAIRS.distractors)}),
        ("metric.name", {"metric": interp.prob}),
        ("metric.code", {"metric": shifted}),
        ("direction", {"direction": "denoising"}),
        ("schedule", {"schedule": "naive"}),
        ("budget", {"max_tokens": 49}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path, what: str, change: dict[str, Any]) -> None:
    path = tmp_path / "sweep.ckpt"
    run(path)
    data = path.read_bytes()
    if "model" in change:
        named = isinstance(change["model"], str)
        model = loaded(change["model"]) if named else loaded("gpt2", dtype=change["model"])
        change = {"model": model}
    with pytest.raises(CheckpointError) as caught:
        run(path, **change)
    assert f"{what} (expected" in str(caught.value) and str(path) in str(caught.value)
    others = {"model", "dtype", "plan", "prompts", "metric", "direction", "schedule", "budget"} - {what.split(".")[0]}
    named = {name for name in others if f"{name} (" in str(caught.value) or f"{name}." in str(caught.value)}
    assert named <= ({"model"} if what == "dtype" else {"attention"} if what == "model.name" else set())
    assert path.read_bytes() == data, "a refused checkpoint is left as it is"


def test_a_model_of_the_same_name_with_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.ckpt"
    run(path)
    hf, tokenizer = tiny("gpt2")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"model\.weights \(expected") as caught:
        run(path, model=interp.load_model(hf, tokenizer=tokenizer))
    assert "model.name" not in str(caught.value)


def test_digest_of_weights_sees_one_number_an_order_and_a_type_but_not_a_layout() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(97, 130), torch.nn.BatchNorm1d(130))
    plain = weights_digest(module)
    assert plain == weights_digest(module)
    assert weights_digest(torch.nn.Linear(3, 2, device="meta"))
    seen = {plain}
    with torch.no_grad():
        weight = module[0].weight
        for change in (
            lambda: weight.index_copy_(0, torch.tensor([3]), weight[3:4] * 1.0001),
            lambda: weight.copy_(weight.flip(0)),
            lambda: weight.copy_(weight.flip(1)),
            lambda: module[1].running_mean.add_(1),
            lambda: module.double(),
        ):
            change()
            seen.add(weights_digest(module))
        assert len(seen) == 6
        now = weights_digest(module)
        module[0].weight.data = module[0].weight.data.t().contiguous().t()
        assert weights_digest(module) == now


def test_digest_of_a_metric_is_of_what_it_computes() -> None:
    def make(scale: Any, helper: Callable[..., Any]) -> Callable[..., Any]:
        def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            return helper(logits)[:, 0] * scale

        return metric

    class Probe:
        def __init__(self, weight: Any) -> None:
            self.weight = weight

        def __call__(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
            return logits @ self.weight

    def first(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    def part(k: int, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, k]

    makers: list[Callable[[], Any]] = [
        lambda: make(1, first),
        lambda: make(2, first),
        lambda: make(1, second),
        lambda: make(torch.ones(3), first),
        lambda: make(torch.zeros(3), first),
        lambda: Probe(torch.ones(2)),
        lambda: Probe(torch.zeros(2)),
        lambda: functools.partial(part, 1),
        lambda: functools.partial(part, 2),
        lambda: interp.logit_diff,
        lambda: interp.prob,
        lambda: shifted,
        lambda: lambda logits, batch: logits[:, 0],
        lambda: lambda logits, batch: logits[:, 1],
        lambda: torch.nn.Linear(3, 1, device="meta"),
    ]
    digests = [metric_digest(maker()) for maker in makers]
    assert digests == [metric_digest(maker()) for maker in makers], "two of a kind have one digest"
    assert len(set(digests)) == len(makers)
    assert [metric_name(makers[n]()).split(".")[-1] for n in (0, 5, 9)] == ["metric", "Probe", "logit_diff"]
    assert metric_name(makers[7]()).startswith("partial(")


# --- files that cannot be ----------------------------------------------------------------------------------------


def test_files_that_are_not_checkpoints_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        run(tmp_path / "folder")
    notes = tmp_path / "notes.txt"
    notes.write_text("remember the milk")
    with pytest.raises(CheckpointError, match="not a checkpoint of interp"):
        run(notes)
    assert notes.read_text() == "remember the milk"
    with pytest.raises(CheckpointError, match="cannot .* checkpoint"):
        run(notes / "below a file.ckpt")
    with pytest.raises(CheckpointError, match="not a plain file"):
        run("/dev/full")
    with pytest.raises(CheckpointError, match="not a path"):
        run(True)
    path = tmp_path / "sweep.ckpt"
    whole = run(path).values
    data = path.read_bytes()
    path.write_bytes(data.replace(b"interp checkpoint 1\n", b"interp checkpoint 99\n"))
    with pytest.raises(CheckpointError, match="another version of interp .*'99'"):
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
    """A folder that cannot be written by the user that the test runs as: root gives up its rights for a while."""
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
    with pytest.raises(CheckpointError, match="cannot write the checkpoint .*Permission denied"):
        run(nobody / "new.ckpt")
    with pytest.raises(CheckpointError, match="Permission denied.*keeps"):
        run(nobody / "begun.ckpt")
    assert same(run(nobody / "whole.ckpt"), whole)
    stop()
    assert not seen
    assert (nobody / "begun.ckpt").read_bytes() == data[:-10]
