"""The deployment itself: it answers, on loopback alone; what is killed comes back; what it ran is counted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

import interp
from interp.errors import BackendError

from .deployment import SERVICES, TINY, Deployment

pytestmark = pytest.mark.ndif

PAIRS = interp.PromptPairs(
    [[5, 9, 31, 42, 17], [6, 8, 30, 41, 12]], [[5, 9, 33, 42, 17], [6, 8, 35, 41, 12]], [20, 21], [25, 26]
)
PLAN = interp.grid(["resid_pre", "mlp_out"])


def patched(model: interp.Model) -> np.ndarray:
    return interp.patch(model, PAIRS, PLAN).values.values


def test_a_patch_is_that_of_a_local_run(deployment: Deployment) -> None:
    before = deployment.executed()
    there = patched(interp.load_model(TINY, backend=deployment.host))
    here = patched(interp.load_model(deployment.models / TINY))
    assert np.nanstd(here) > 1e-4
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)
    ran = deployment.executed()
    assert sum(ran.values()) > sum(before.values()) and deployment.executed("began") == ran


def test_a_killed_actor_comes_back(deployment: Deployment) -> None:
    model = interp.load_model(TINY, backend=deployment.host)
    before, old = patched(model), set(deployment.actors())
    assert deployment.kill_actor() == len(old) >= 1
    until = time.monotonic() + 120
    while True:
        try:
            again = patched(model)
            break
        except BackendError:
            assert time.monotonic() < until
            time.sleep(1)
    np.testing.assert_array_equal(again, before)
    assert not old & set(deployment.actors())


def test_a_killed_api_comes_back(deployment: Deployment) -> None:
    model = interp.load_model(TINY, backend=deployment.host)
    before = patched(model)
    deployment.kill_api()
    assert not deployment.session("api") and not deployment.is_up()
    deployment.start_api()
    deployment.wait("api", deployment.is_up, 60)
    np.testing.assert_array_equal(patched(model), before)


def sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(link.readlink())
        except OSError:  # closed meanwhile
            continue
        if name.startswith("socket:["):
            found.add(name[8:-1])
    return found


def listening() -> dict[str, str]:
    """Addresses that something listens at, as Linux writes them, by the inode of the socket."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: row[1].partition(":")[0] for row in rows if row[3] == "0A"}


def test_nothing_listens_beyond_loopback(deployment: Deployment) -> None:
    """Whoever reaches Ray's ports runs code here."""
    loopback = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
    at = listening()
    open_to_all = {}
    for name in SERVICES:
        for pid in deployment.session(name):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()[:60]
            if out := {at[one] for one in sockets(pid) if one in at} - loopback:
                open_to_all[f"{name} {pid} {command!r}"] = out
    assert not open_to_all


def test_a_number_that_another_process_has_is_not_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a state file from before: `down` stops what it started, and nobody else."""
    monkeypatch.setenv("INTERP_NDIF_WORK", str(tmp_path))
    other = Deployment()
    other.spawn("hub", "sleep", "60")
    (pid,) = other.session("hub")
    born = other.services()["hub"][1]
    other.note(services={"hub": [pid, born - 1]})
    assert other.session("hub") == []
    other.signal("hub", signal.SIGKILL)
    other.note(services={"hub": [pid, born]})
    assert other.session("hub") == [pid]
    other.down()
    other.note(services={"hub": [pid, born]})
    assert other.session("hub") == []
