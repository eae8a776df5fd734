"""A sweep of 200 requests while workers, the API, connections and the client are killed: nothing is lost or run twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import interp
from interp.engine.ledger import Ledger

from .deployment import ROOT, Deployment
from .proxy import Proxy
from .sweep import OPTIONS, PAIRS, PLAN, begin, load

pytestmark = pytest.mark.ndif


class Client:
    """The client's process."""

    def __init__(self, path: Path, host: str) -> None:
        self.command = [sys.executable, "-m", "tests.ndif.sweep", str(path), host]
        self.path, self.kills = path, 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, cwd=ROOT)

    def kill(self) -> None:
        assert self.process.poll() is None, "it had ended"
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.start()


def test_a_sweep_survives(deployment: Deployment, tmp_path: Path) -> None:
    direct = interp.patch(load(deployment.host), PAIRS, PLAN, **OPTIONS).values
    before = deployment.executed()
    proxy, path = Proxy(deployment.host), tmp_path / "sweep.job"
    client = Client(path, proxy.host)

    def restart() -> None:
        deployment.kill_api()
        time.sleep(2)
        deployment.start_api()

    def killed() -> None:
        assert deployment.kill_actor() >= 1

    plan: list[tuple[int, str, Callable[[], object]]] = [
        (15, "cut", proxy.cut), (30, "worker", killed), (50, "client", client.kill), (70, "cut", proxy.cut),
        (85, "API", restart), (95, "cut", proxy.cut), (110, "client", client.kill), (125, "worker", killed),
        (140, "cut", proxy.cut), (155, "client", client.kill), (185, "cut", proxy.cut),
    ]  # fmt: skip
    for count, what, act in plan:
        until = time.monotonic() + 300
        while path.exists() is False or Ledger(path).counts().get("done", 0) < count:
            assert time.monotonic() < until and client.process.poll() is None, f"stuck before {count}, {what}"
            time.sleep(0.05)
        print(f"{count} done: {what}", flush=True)
        act()
    assert client.process.wait(600) == 0
    job = begin(path, deployment.host)
    assert job.status == "done"
    np.testing.assert_array_equal(job.result(60).values, direct)  # type: ignore[attr-defined]
    events = job.events
    done = [id for _, id, what, _ in events if what == "done"]
    ran = deployment.executed()
    ran.subtract(before)
    runs = Counter({id: count for id, count in ran.items() if count})
    said = Counter(what for _, _, what, _ in events)
    print(
        f"{len(done)} requests, {sum(runs.values())} runs to their end, {proxy.cuts} cuts, {client.kills} kills; {dict(said)}"
    )
    assert len(done) == len(set(done)) >= 200
    assert all(runs[id] == 1 for id in done), "a finished request was run again"
    lost = {id for _, id, what, _ in events if what == "lost"}
    assert set(runs) - set(done) <= lost, "a run that nobody knows of"
    assert proxy.cuts == 5 and client.kills == 3
    assert said["interrupted"] >= 5 and said["asked after again"] >= 1 and said["lost"] >= 1
    proxy.close()
