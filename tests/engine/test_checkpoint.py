"""Checkpoints: a sweep that is killed, cut or damaged continues, and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.engine.checkpoint import read_identity
from tests.engine.sweeps import PLAN, chunks_in, pairs_of, run, same
from tests.families import count_forwards, loaded
from tests.oracle.configs import tiny


def test_same_numbers_with_and_without_a_checkpoint_and_a_finished_one_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "sweep.ckpt"
    plain, written = run(None), run(path)
    seen, stop = count_forwards(loaded("gpt2"))
    again = run(path)
    stop()
    assert same(plain, written) and same(plain, again)
    assert not seen, "a finished checkpoint needs no forward pass"
    assert chunks_in(path) > 5 and "oom_backoff" not in again.provenance


# --- kill -9 ---


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
    context.set_forkserver_preload(["transformers.models.gpt2.modeling_gpt2", "nnsight", "torch._dynamo", __name__])

    def start(name: str) -> Any:
        process = context.Process(target=sweep, args=(str(tmp_path), name), daemon=True)
        process.start()
        return process

    whole, broken = start("whole.npz"), None
    whole.join(300)
    assert whole.exitcode == 0
    total, path = (tmp_path / "whole.ckpt").stat().st_size, tmp_path / "broken.ckpt"
    chance, counts = random.Random(0), []
    for kill in range(10):
        before = path.stat().st_size if path.exists() else 0
        wanted = before + chance.randint(1, (total - before) // (12 - kill))
        broken = start("broken.npz")
        deadline = time.monotonic() + 300
        while (path.stat().st_size if path.exists() else 0) < wanted:
            assert broken.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        broken.kill()
        broken.join(300)
        assert broken.exitcode == -9, "the sweep ended before it was killed"
        counts.append(chunks_in(path))
    assert counts == sorted(counts) and len(set(counts)) > 5, "each went on where the one before was killed"
    assert counts[-1] < chunks_in(tmp_path / "whole.ckpt")
    broken = start("broken.npz")
    broken.join(300)
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
    cuts = sorted(
        {
            0,
            5,
            start // 2,
            start - 1,
            start,
            len(data) - 1,
            *random.Random(1).sample(range(start, len(data)), 6),
        }
    )
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
