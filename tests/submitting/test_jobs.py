"""Jobs against a stand-in of a server: lost, cut, killed, found again; each request is run once, and the numbers are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import interp
from interp.engine.remote import Shipped
from interp.errors import BackendError, InterpError, JobError, MetricError, SiteError

from .stand_in import KILLED, StandIn

NUMBERS = [[3 + (7 * row + column * column) % 55 for column in range(7)] for row in range(6)]
PAIRS = interp.PromptPairs(
    NUMBERS, [[(token * 5 + 1) % 60 + 2 for token in row] for row in NUMBERS], [20] * 6, [25] * 6
)
PLAN = interp.grid("resid_pre", layers=[0, 1])
OPTIONS: dict[str, Any] = {"schedule": "growing", "max_tokens": 40}


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return np.asarray(interp.patch(interp.load_model(folder), PAIRS, PLAN, **OPTIONS).values)


def submit(model: interp.Model, root: Path, **options: Any) -> interp.Job:
    return interp.submit(interp.patch, model, PAIRS, PLAN, root=root, **OPTIONS, **options)


def same(job: interp.Job, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(job.result(300).values), expected)  # type: ignore[attr-defined]


def once(server: StandIn, job: interp.Job) -> int:
    """Every request was run to its end once; how many there were."""
    done = [id for _, id, what, _ in job.events if what == "done"]
    assert len(done) == len(set(done)) > 10
    assert server.ran == dict.fromkeys(done, 1), "a finished request was run again, or one was lost"
    return len(done)


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to this"
        time.sleep(0.01)


def test_a_job_gives_what_the_call_gives(
    there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    server.held.clear()
    job = submit(there, tmp_path)
    assert job.status == "running" and job.progress == 0 and job.method == "patch"
    wait_for(lambda: len(server.told) == 4)
    time.sleep(0.2)
    assert len(server.told) == 4, "no more are in flight than were allowed"
    listed = interp.jobs(tmp_path)
    assert list(listed["state"]) == ["running"] and listed["age"][0].total_seconds() < 300
    server.held.set()
    same(job, expected)
    assert (job.status, job.progress) == ("done", 1) and once(server, job) == job.progress.requests
    assert server.most <= 4
    listed = interp.jobs(tmp_path)
    assert [(row.state, row.share, row.method) for row in listed.itertuples()] == [("done", 1.0, "patch")]
    assert there.backend.ledger is None, "the model that was given is as it was"


def test_loaded_when_done_nothing_is_sent(
    there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    job = submit(there, tmp_path)
    same(job, expected)
    count = once(server, job)
    path = job.save(tmp_path / "elsewhere" / "mine.job")
    assert path == job.path and list(interp.jobs(tmp_path)["path"]) == [str(path)]
    server.stop()
    again = interp.Job.load(path)
    assert again.status == "done"
    same(again, expected)
    assert once(server, again) == count
    server.start()


def drop_posts(share: int, after: bool) -> Callable[[Any], bool]:
    """Cut every n-th request as it is posted: before it was read, or when it was taken and nothing was said yet."""
    count = iter(range(10**6))

    def fault(handler: Any) -> bool:
        if handler.command != "POST" or next(count) % share:
            return False
        if after:
            handler.wfile = type(
                "Nowhere",
                (),
                {
                    "write": lambda self, data: len(data),
                    "flush": lambda self: None,
                    "close": lambda self: None,
                    "closed": False,
                },
            )()
            handler.close_connection = True
            return False
        StandIn.cut(handler)
        return True

    return fault


def refuse(code: int, share: int, **headers: str) -> Callable[[Any], bool]:
    """Every n-th call is answered with an error of what stands before the server."""
    count = iter(range(1, 10**6))

    def fault(handler: Any) -> bool:
        if next(count) % share:
            return False
        handler.rfile.read(int(handler.headers.get("content-length", 0)))
        StandIn.reply(handler, code, {"detail": "not now"}, **headers)
        return True

    return fault


def cut(share: float) -> Callable[[Any], bool]:
    """A part of all connections break, whatever they are for."""
    draw = random.Random(0)

    def fault(handler: Any) -> bool:
        if draw.random() > share:
            return False
        StandIn.cut(handler)
        return True

    return fault


def half(handler: Any) -> bool:
    """Every third result ends in the middle."""
    if not handler.path.startswith("/result/") or time.monotonic_ns() % 3:
        return False
    handler.send_response(200)
    handler.send_header("content-length", "5000")
    handler.end_headers()
    handler.wfile.write(b"half")
    handler.wfile.flush()
    handler.close_connection = True
    return True


FAULTS = {
    "posts cut": lambda: drop_posts(3, after=False), "answers to posts cut": lambda: drop_posts(5, after=True),
    "502": lambda: refuse(502, 4), "503": lambda: refuse(503, 3), "429": lambda: refuse(429, 4, retry_after="0.05"),
    "connections cut": lambda: cut(0.2), "half a result": lambda: half,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_tried_again(
    name: str, there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    server.fault = FAULTS[name]()
    job = submit(there, tmp_path)
    same(job, expected)
    server.fault = None
    once(server, job)
    assert any(what == "interrupted" for _, _, what, _ in job.events), "the fault was none"


def test_a_killed_worker(there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path) -> None:
    """What the server says has failed by no fault of the request is sent again, under another id."""
    failed: set[str] = set()

    def error(id: str) -> str | None:
        if len(failed) < 5 and len(server.began) % 3 == 0:
            failed.add(id)
            return KILLED
        return None

    server.error = error
    job = submit(there, tmp_path)
    same(job, expected)
    assert len(failed) == 5 and once(server, job)
    assert [id for _, id, what, _ in job.events if what == "lost"] and not failed & set(server.ran)


def test_what_kills_its_worker_every_time_is_given_up(there: interp.Model, server: StandIn, tmp_path: Path) -> None:
    server.error = lambda id: KILLED
    job = submit(there, tmp_path)
    with pytest.raises(BackendError, match=r"lost the same request 6 times.*Please try again later.*max_tokens"):
        job.result(300)
    assert job.status == "failed"


def test_what_was_run_in_parts_is_run_in_the_same_parts_again(
    there: interp.Model, server: StandIn, tmp_path: Path
) -> None:
    """A request for which the server lacked memory is not sent again by whoever goes on."""
    there.backend.limit = 400
    count = iter(range(10**6))
    server.error = lambda id: "torch.OutOfMemoryError: CUDA out of memory." if next(count) == 1 else None
    job = interp.submit(interp.patch, there, PAIRS, PLAN, root=tmp_path, schedule="growing")
    values = job.result(300).values  # type: ignore[attr-defined]
    server.error = lambda id: None
    began = sum(server.began.values())
    again = interp.Job.load(job.path, there)
    assert again.result(300).values.equals(values)  # type: ignore[attr-defined]
    assert sum(server.began.values()) == began


@pytest.mark.parametrize("forget", [False, True], ids=["the queue survives", "the queue is lost"])
def test_a_server_that_is_restarted(
    forget: bool, there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    job = submit(there, tmp_path)
    wait_for(lambda: sum(server.ran.values()) >= 3)
    server.held.clear()
    wait_for(lambda: server.waiting() == 4)
    server.stop(forget)
    time.sleep(0.3)
    server.held.set()
    server.start()
    same(job, expected)
    once(server, job)


def test_it_goes_on_in_another_process_after_a_kill(
    there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    """SIGKILL three times, at whatever it is just doing; what finished meanwhile is fetched, not run again."""
    code = (
        "import sys, interp\nfrom pathlib import Path\nfrom tests.submitting import test_jobs as t\n"
        "model = interp.load_model(sys.argv[2], backend=sys.argv[3])\nmodel.backend.limit = 40\n"
        "path = Path(sys.argv[1])\n"
        "job = interp.Job.load(path, model) if path.exists() else t.submit(model, path.parent / 'jobs')\n"
        "path.exists() or job.save(path)\nprint('going', flush=True)\njob.result()\n"
    )
    path = tmp_path / "sweep.job"
    arguments = [sys.executable, "-c", code, str(path), str(there.name), server.host]
    for finished in (3, 8, 15):
        process = subprocess.Popen(arguments, cwd=Path(interp.__file__).parents[1])
        wait_for(lambda count=finished: sum(server.ran.values()) >= count and path.exists())  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert interp.jobs(tmp_path / "jobs")["state"].tolist() == ["stopped"]
    wait_for(lambda: server.waiting() == 0)
    ran = sum(server.ran.values())
    job = interp.Job.load(path, there)
    same(job, expected)
    assert once(server, job) >= ran


def test_one_process_runs_a_job_and_others_wait_for_it(
    there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    server.held.clear()
    job = submit(there, tmp_path)
    other = interp.Job.load(job.path, there)
    assert other.status == "running"
    with pytest.raises(JobError, match=r"no result after 1 s; it goes on"):
        other.result(1)
    server.held.set()
    same(job, expected)
    same(other, expected)
    once(server, job)


def test_cancelling(there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path) -> None:
    server.held.clear()
    job = submit(there, tmp_path)
    wait_for(lambda: server.waiting() == 4)
    job.cancel()
    assert job.status == "cancelled"
    with pytest.raises(JobError, match=r"was cancelled; interp.Job.load\("):
        job.result()
    time.sleep(0.2)
    server.held.set()
    wait_for(lambda: server.waiting() == 0)
    assert sum(server.ran.values()) == 4, "nothing more was sent"
    again = interp.Job.load(job.path, there)  # whoever loads it wants it
    same(again, expected)
    once(server, again)


def test_a_deadline_that_is_over_loses_nothing(
    there: interp.Model, server: StandIn, expected: np.ndarray, tmp_path: Path
) -> None:
    """What was on its way is asked after by whoever goes on, and is not sent again."""
    server.held.clear()
    job = submit(there, tmp_path, deadline=1.5)
    wait_for(lambda: server.waiting() == 4)
    with pytest.raises(
        BackendError, match=r"no result within the time allowed: the server said QUEUED.*interp.Job.load"
    ):
        job.result(60)
    assert job.status == "failed" and any(what == "given up" for _, _, what, _ in job.events)
    server.held.set()
    wait_for(lambda: server.waiting() == 0)
    job._ledger.note(deadline=300.0)
    again = interp.Job.load(job.path, there)
    same(again, expected)
    once(server, again)


def broken(logits: Any, batch: Any) -> Any:
    if logits.shape[-1] and os.environ.get("INTERP_HERE") != "yes":
        raise RuntimeError("a fault of mine")
    return logits[:, 0]


def test_a_fault_in_the_metric_is_told_once_and_not_tried_again(
    there: interp.Model, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERP_HERE", "yes")
    server.held.clear()
    job = interp.submit(interp.patch, there, PAIRS, PLAN, broken, root=tmp_path, **OPTIONS)
    server.held.set()
    with pytest.raises(BackendError, match=r"the server at .* failed in .*RuntimeError: a fault of mine"):
        job.result(300)
    assert job.status == "failed" and sum(what == "failed" for _, _, what, _ in job.events) >= 1
    assert max(server.began.values()) == 1 and not server.ran
    with pytest.raises(BackendError, match="a fault of mine"):
        interp.patch(there, PAIRS, PLAN, broken, **OPTIONS)


def test_what_is_wrong_is_refused_at_once(
    there: interp.Model, here: interp.Model, server: StandIn, tmp_path: Path
) -> None:
    lock = threading.Lock()

    def locked(logits: Any, batch: Any) -> Any:
        with lock:
            return logits[:, 0]

    def imports(logits: Any, batch: Any) -> Any:
        import interp.metrics

        return interp.metrics.logit_diff(logits, batch)

    cases: list[tuple[type[InterpError], str, Callable[[], object]]] = [
        (JobError, "runs in this process", lambda: submit(here, tmp_path)),
        (JobError, "was given no model", lambda: interp.submit(interp.patch, PAIRS, root=tmp_path)),
        (JobError, "was given a str", lambda: interp.submit("patch", there, root=tmp_path)),  # type: ignore[arg-type]
        (JobError, "at least 1 request", lambda: submit(there, tmp_path, in_flight=0)),
        (JobError, r"cannot be kept.*lock", lambda: interp.submit(interp.patch, there, PAIRS, PLAN, locked, root=tmp_path)),
        (BackendError, r"imports .*'interp'", lambda: interp.submit(interp.patch, there, PAIRS, PLAN, imports, root=tmp_path)),
        (MetricError, "metric", lambda: interp.submit(interp.patch, there, PAIRS, PLAN, lambda x, y: 1.0, root=tmp_path)),
        (SiteError, "layer 9", lambda: interp.submit(interp.patch, there, PAIRS, interp.grid("z", layers=[9]), root=tmp_path)),
        (JobError, "no job at", lambda: interp.Job.load(tmp_path / "none.job")),
    ]  # fmt: skip
    for kind, said, call in cases:
        with pytest.raises(kind, match=said):
            call()
    assert not server.told and not list(tmp_path.glob("*.job")), "nothing was sent or kept"
    assert interp.jobs(tmp_path).empty


def test_another_model_or_version_is_refused(
    there: interp.Model, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(there, tmp_path)
    job.result(300)
    other = interp.load_model(*_tiny(), backend="simulated")
    with pytest.raises(JobError, match=r"is about .*, and the model given is"):
        interp.Job.load(job.path, other)
    job._ledger.note(interp="0.0.1")
    with pytest.raises(JobError, match=r"submitted with interp 0\.0\.1"):
        interp.Job.load(job.path, there)


def _tiny() -> tuple[Any, Any]:
    from tests.oracle.configs import tiny

    return tiny("gpt2")


def test_nobody_finds_a_request_by_guessing(there: interp.Model, server: StandIn, tmp_path: Path) -> None:
    """Ids are 128 random bits; there is no call that lists, cancels or changes one."""
    job = submit(there, tmp_path)
    job.result(300)
    ids = [id for _, id, what, _ in job.events if what == "sent"]
    assert all(len(id) == 32 and set(id) <= set("0123456789abcdef") for id in ids)
    bits = np.array([[int(digit, 16) >> place & 1 for digit in id for place in range(4)] for id in ids])
    assert abs(bits.mean() - 0.5) < 0.1 and len(set(ids)) == len(ids)
    wire = there.backend.wire()
    near = [f"{int(ids[0], 16) + step:032x}" for step in (-2, -1, 1, 2)]
    assert [wire.look(id) for id in [*near, *(os.urandom(16).hex() for _ in range(200))]] == [None] * 204


def test_a_key_is_sent_and_never_kept(
    there: interp.Model,
    server: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import logging

    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret-123")
    caplog.set_level(logging.DEBUG)
    there.backend._wire = None
    with interp.track_experiment("keys", root=tmp_path / "runs") as tracker:
        job = submit(there, tmp_path)
        effects = job.result(300)
    assert set(server.keys) == {"secret-123"}
    kept = [*tmp_path.rglob("*")]
    assert len(kept) > 5
    for file in kept:
        assert not file.is_file() or b"secret-123" not in file.read_bytes(), file
    assert "secret-123" not in caplog.text + repr(effects.provenance) + repr(job)  # type: ignore[attr-defined]
    server.fault = lambda handler: StandIn.reply(handler, 400, {"detail": "the key secret-123 is none"}) is None
    with pytest.raises(BackendError, match="the key … is none"):
        there.backend.wire().look("0" * 32)
    server.fault = None
    assert tracker.path.exists()


def test_a_tracker_hears_of_the_job_and_of_its_method(there: interp.Model, server: StandIn, tmp_path: Path) -> None:
    with interp.track_experiment("jobs", root=tmp_path / "runs"):
        job = submit(there, tmp_path)
        job.result(300)
    told = interp.runs(tmp_path / "runs")[-1].experiments
    assert [event["name"] for event in told] == ["submit", "patch"]
    assert job.id in str(told[0])


def stages(model: interp.Model, pairs: interp.PromptPairs) -> list[float]:
    """A method of one's own, of several calls: the second depends on what the first gave."""
    first = interp.patch(model, pairs, PLAN, **OPTIONS)
    best = int(np.asarray(first.values.mean("pair")).argmax() % 2)
    second = interp.patch(model, pairs, interp.grid("mlp_out", layers=[best]), **OPTIONS)
    return [float(first.values.sum()), float(second.values.sum())]


def test_a_method_of_ones_own(there: interp.Model, here: interp.Model, server: StandIn, tmp_path: Path) -> None:
    job = interp.submit(stages, there, PAIRS, root=tmp_path)
    assert job.result(300) == stages(here, PAIRS)
    count = once(server, job)
    assert interp.Job.load(job.path, there).result(300) == stages(here, PAIRS)
    assert sum(server.ran.values()) == count
    run = interp.submit(there.run, NUMBERS[0], "resid_pre", root=tmp_path)
    assert run.method == "run" and run.result(300).logits.shape == here.run(NUMBERS[0]).logits.shape  # type: ignore[attr-defined]


def test_a_job_on_the_simulated_server(folder: Path, here: interp.Model, tmp_path: Path) -> None:
    model = interp.load_model(folder, backend="simulated")
    assert isinstance(model.backend, Shipped)
    model.backend.limit = 40
    job = submit(model, tmp_path)
    np.testing.assert_array_equal(
        np.asarray(job.result(300).values),  # type: ignore[attr-defined]
        np.asarray(interp.patch(here, PAIRS, PLAN, **OPTIONS).values),
    )
    again = interp.Job.load(job.path)  # the model by its folder
    assert again.result(300).values.equals(job.result().values)  # type: ignore[attr-defined]
    assert sum(what == "sent" for _, _, what, _ in again.events) == job.progress.requests


@pytest.fixture(autouse=True)
def in_the_end_nothing_is_held(server: StandIn) -> Iterator[None]:
    yield
    server.fault = None
    server.held.set()
