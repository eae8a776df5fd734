"""What goes wrong on a real server: each one clear error; and who cannot see what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import interp
from interp.errors import BackendError

from .deployment import REAL, TINY, Deployment
from .sweep import OPTIONS, PAIRS, PLAN

pytestmark = pytest.mark.ndif


def test_status(deployment: Deployment) -> None:
    status = interp.remote_status(deployment.host)
    assert {TINY, REAL} <= {row[0] for row in status.models} and not status.problems
    assert status.versions["transformers"][0] == status.versions["transformers"][1]


def failing(logits: Any, batch: Any) -> Any:
    if os.environ.get("INTERP_HERE") != "yes":
        raise ZeroDivisionError("a fault of the metric")
    return logits[:, 0]


def test_a_metric_that_fails_there(
    deployment: Deployment, tiny: interp.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INTERP_HERE", "yes")
    before = sum(deployment.executed("began").values())
    with pytest.raises(BackendError, match=r"failed in .*ZeroDivisionError: a fault of the metric"):
        interp.patch(tiny, PAIRS, PLAN, failing, **OPTIONS)
    with pytest.raises(BackendError, match="a fault of the metric"):
        interp.submit(interp.patch, tiny, PAIRS, PLAN, failing, root=tmp_path, **OPTIONS).result(300)
    assert sum(deployment.executed("began").values()) - before <= 16, "it was not tried again"


def test_a_model_that_nobody_has(deployment: Deployment) -> None:
    model = interp.load_model(TINY, backend=deployment.host)
    wrong = model.backend.address(model)[0].replace(TINY, "interp-tests/none")
    model.backend.address = lambda _: (wrong, {})
    with pytest.raises(BackendError, match=r"cannot run .*remote_status"):
        interp.patch(model, PAIRS, PLAN, **OPTIONS)


def test_versions_that_do_not_fit(deployment: Deployment, tiny: interp.Model) -> None:
    deployment.kill_api()
    deployment.start_api(NDIF_MIN_NNSIGHT_VERSION="99.0")
    try:
        with pytest.raises(BackendError, match=r"minimum supported 99\.0.*remote_status"):
            interp.patch(tiny, PAIRS, PLAN, **OPTIONS)
    finally:
        deployment.kill_api()
        deployment.start_api()


def test_nobody_there() -> None:
    model = interp.load_model(TINY, backend="http://127.0.0.1:9")
    with pytest.raises(BackendError, match="not reached once in 10 s"):
        interp.patch(model, PAIRS, PLAN, **OPTIONS)


def test_another_client_sees_nothing_by_guessing(deployment: Deployment, tiny: interp.Model, tmp_path: Path) -> None:
    """The server gives a result to whoever knows its id, 128 random bits; and has no call that lists or cancels requests."""
    import urllib.error
    import urllib.request

    job = interp.submit(interp.patch, tiny, PAIRS, PLAN, root=tmp_path, **OPTIONS)
    job.result(300)
    ids = [id for _, id, what, _ in job.events if what == "done"]
    wire = tiny.backend.wire()
    assert wire.look(ids[0]) is not None
    near = [f"{int(ids[0], 16) + step:032x}" for step in (-1, 1)]
    assert [wire.look(id) for id in [*near, *(os.urandom(16).hex() for _ in range(100))]] == [None] * 102
    for path in ("", "responses", "response/", "requests", "request", "queue", f"cancel/{ids[0]}", f"request/{ids[0]}"):
        for method in ("GET", "DELETE"):
            call = urllib.request.Request(f"{deployment.host}/{path}", method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(call, timeout=30)
            assert refused.value.code in (404, 405), (method, path)
