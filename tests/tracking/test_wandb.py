"""wandb: whatever it does or does not do, the run goes on, waits for nothing, and says so once.

No account and no network: the server is one of this machine (`wandb_server.py`), and the packages that are wrong are files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import interp
from interp.tracking import Run, Tracker, live

from .wandb_server import KEY, Heard, wandb_server

#: What a person waits at most, with what a loaded machine adds.
HANG = 60.0
HF = "hf_" + "aB3" * 11 + "x"


@pytest.fixture
def server() -> Iterator[Heard]:
    with wandb_server() as heard:
        yield heard


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings and no login of this machine, and no process that outlives a test for long."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(live, "LINGER", 100.0)  # long enough for a loaded machine


def online(monkeypatch: pytest.MonkeyPatch, server: Heard) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def tracked(root: Path, steps: int = 3, meanwhile: object = None) -> tuple[Tracker, list[str], float]:
    """A short run, the warnings about wandb, and the longest that one call of it took, in seconds."""
    longest = 0.0

    def timed(act: object, *args: object, **more: object) -> object:
        nonlocal longest
        begun = time.monotonic()
        result = act(*args, **more)  # type: ignore[operator]
        longest = max(longest, time.monotonic() - begun)
        return result

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = {"lr": 1e-3, "hf_token": HF, "note": f"with {HF}"}
        tracker = timed(interp.track_experiment, "facts", config=config, use_wandb=True, root=root)
        assert isinstance(tracker, Tracker)
        for step in range(steps):
            timed(tracker.log, {"loss": 1 / (step + 1), "said": HF, "odd": float("inf")}, step=10 * step)
            if step == 0 and callable(meanwhile):
                meanwhile(tracker)
        timed(tracker.log_figure, "results", Shown())
        timed(tracker.finish)
    ours = [one for one in seen if str(one.message).startswith("wandb: ")]
    assert all(one.filename == __file__ for one in ours)
    run = Run(tracker.path)
    assert run.status == "finished" and run.metrics["step"].tolist() == [10 * step for step in range(steps)]
    assert run.figure("results").exists()
    return tracker, [str(one.message) for one in ours], longest


class Shown:
    """What is drawn without a library."""

    def _repr_html_(self) -> str:
        return f"<p>seen {HF}</p>"


def test_the_end_of_a_run_waits_less_than_five_seconds() -> None:
    """What is waited for is a constant; that nothing waits for ever is what the others show."""
    assert live.WAIT + 0.5 < 5  # what the end may add to it: the process's own end


def until(said: object, seconds: float = 120.0) -> bool:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not said():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def begun(tracker: Tracker) -> None:
    """Wait until wandb's process has said how it began, or that it cannot."""
    assert tracker._live is not None and until(lambda: tracker._live.facts.get("mode"))  # type: ignore[union-attr]


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A wandb in the place of the one that is installed."""
    (folder / "instead").mkdir()
    (folder / "instead" / "wandb.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder / "instead"))


def test_online_everything_arrives_and_no_secret_does(
    server: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, server)
    tracker, said, longest = tracked(tmp_path, meanwhile=begun)
    assert until(lambda: server.complete) and longest < HANG
    assert said == [] or "goes on for some minutes" in said[0]  # on a loaded machine it may not be through in 4 s
    rows = [(row["step"], row["loss"]) for row in server.history if "loss" in row]
    assert rows == [(0, 1), (10, 0.5), (20, pytest.approx(1 / 3))]
    assert server.history[0]["odd"] == float("inf")
    assert (
        any(name.startswith("media/html/results") for name in server.uploads)
        and "figures/results.html" in server.uploads
    )
    config = json.loads(server.upserts[0]["config"])
    assert config["lr"]["value"] == 1e-3 and config["hf_token"]["value"] == "[redacted]"
    assert config["environment"]["value"]["versions"]["torch"]
    assert tracker.url == f"{server.url}/me/interp/runs/{server.upserts[0]['name']}"
    for sent in server.raw:
        assert HF.encode() not in sent and KEY.encode() not in sent
    for path in (path for path in tracker.path.rglob("*") if path.is_file()):
        assert HF.encode() not in path.read_bytes() and KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("sent", [False, pytest.param(True, marks=pytest.mark.slow)])  # wandb sends every 15 s
def test_a_server_that_stops_answering_half_way(
    sent: bool, server: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, server)
    monkeypatch.setattr(live, "LINGER", 20.0)  # its copy is written in that time, too

    def stop(tracker: Tracker) -> None:
        begun(tracker)
        assert not sent or until(lambda: any("loss" in row for row in server.history))
        server.answers.clear()

    tracker, said, longest = tracked(tmp_path, steps=20, meanwhile=stop)
    assert longest < HANG
    assert len(said) == 1 and "has not taken everything yet" in said[0] and f"wandb sync {tracker.path}" in said[0]
    assert str(tracker.path) in said[0].split("Everything is kept in ")[1]
    process = tracker._live._process  # type: ignore[union-attr]
    assert process is not None and until(lambda: process.poll() is not None)  # it gives up by itself
    copying = tracker._live._copying  # type: ignore[union-attr]
    assert copying is not None and until(lambda: copying.poll() is not None)  # the copy is whole
    server.answers.set()
    server.history.clear()
    (place,) = (tracker.path / "wandb").glob("offline-run-*")
    sync(str(place))
    assert sorted({row["step"] for row in server.history if "loss" in row}) == [10 * step for step in range(20)]


@pytest.mark.parametrize("mode", ["offline", pytest.param("dryrun", marks=pytest.mark.slow)])
def test_offline_runs_are_accepted_by_wandb_sync(
    mode: str, server: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker, said, longest = tracked(tmp_path, meanwhile=begun)
    assert longest < HANG and len(said) == 1 and "to send the run later: wandb sync" in said[0]
    place = Path(said[0].split("wandb sync ")[1].split(". Everything")[0])
    assert place.parent == tracker.path / "wandb" and not server.raw
    process = tracker._live._process  # type: ignore[union-attr]
    assert process is not None and until(lambda: process.poll() is not None)
    online(monkeypatch, server)
    sync(str(place))
    rows = [(row["step"], row["loss"]) for row in server.history if "loss" in row]
    assert rows == [(0, 1), (10, 0.5), (20, pytest.approx(1 / 3))] and server.complete
    assert server.upserts[0]["project"] == "interp" and server.upserts[0]["displayName"] == "facts"
    assert "<p>seen [redacted]</p>" in server.uploads["figures/results.html"].decode()


def sync(*words: str) -> None:
    """`wandb sync`, as a person calls it; it logs to the folder where it is called."""
    Path(os.environ["WANDB_CONFIG_DIR"]).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "wandb", "sync", *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=os.environ["WANDB_CONFIG_DIR"],
        env={**os.environ, "WANDB_MODE": "online"},
    )
    assert done.returncode == 0 and "Finished syncing" in done.stderr + done.stdout, done.stderr


def test_without_a_login_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker, said, longest = tracked(tmp_path, meanwhile=begun)
    assert longest < HANG and len(said) == 1
    assert "could not reach its server or log in (UsageError" in said[0] and "wandb sync" in said[0]
    assert list((tracker.path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(live, "PATIENCE", 1.0)
    tracker, said, longest = tracked(tmp_path, meanwhile=begun)
    assert longest < HANG and len(said) == 1 and "could not reach its server or log in" in said[0]
    process = tracker._live._process  # type: ignore[union-attr]
    assert process is not None and until(lambda: process.poll() is not None)
    assert list((tracker.path / "wandb").glob("offline-run-*/*.wandb")) and KEY not in said[0]


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    _, said, longest = tracked(tmp_path, meanwhile=begun)
    assert longest < HANG and len(said) == 1 and "WANDB_MODE=disabled switches it off" in said[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')",
            "it is not installed: pip install wandb",
        ),
        ("import a_module_that_wandb_needs", "it needs a_module_that_wandb_needs"),
        ("", "it is not installed: pip install wandb"),  # a folder of that name
        ("raise ImportError('libfoo.so: cannot open')", r"cannot be imported (ImportError: libfoo.so: cannot open)"),
        ("raise SystemExit(3)", "cannot be imported (SystemExit: 3)"),
        ("import os; os._exit(9)", "its process ended before the run did"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended before the run did"),
    ],
)
def test_a_package_that_is_missing_or_broken(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, text)
    _, said, longest = tracked(tmp_path / "runs", meanwhile=lambda tracker: until(lambda: tracker._live.problems))
    assert longest < HANG and len(said) == 1 and why in said[0], said


HEAD = """
import sys, types, time
class Settings:
    model_fields = ()
    def __init__(self, **settings): self._offline = False
class Html:
    def __init__(self, *a, **k): pass
class Run:
    disabled, settings, dir, url = False, Settings(), "/tmp/x/files", "http://x"
    def define_metric(self, *a, **k): pass
    def log(self, *a, **k): pass
    def save(self, *a, **k): pass
    def finish(self, **k): pass
def init(**options): return Run()
"""


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("def init(**options): time.sleep(1000)", "has not taken everything yet"),
        ("def init(**options): raise RuntimeError('no')", "it could not begin a run (RuntimeError: no)"),
        ("def init(**options): sys.exit('no')", "it could not begin a run (SystemExit: no)"),
        (f"def init(**options): raise RuntimeError('bad key {KEY} of {HF}')", "bad key [redacted] of [redacted]"),
        ("Run.log = lambda *a, **k: 1/0", "it refused something (ZeroDivisionError: division by zero)"),
        ("Run.log = lambda *a, **k: time.sleep(1000)", "has not taken everything yet"),
        ("Run.finish = lambda *a, **k: time.sleep(1000)", "has not taken everything yet"),
        ("Run.finish = lambda *a, **k: 1/0", "its process ended before the run did"),
        ("import os\nRun.log = lambda *a, **k: os._exit(1)", "its process ended before the run did"),
        ("Html = None", "it refused something (TypeError"),
        ("", None),
    ],
)
def test_a_wandb_that_fails_in_other_places(
    more: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls = "sleep(" in more
    monkeypatch.setattr(live, "WAIT", 1.5 if stalls else 60.0)  # what does not stall is waited for, on any machine
    monkeypatch.setattr(live, "LINGER", 5.0 if stalls else 100.0)
    package(tmp_path, monkeypatch, HEAD + more)
    _, said, longest = tracked(tmp_path / "runs")
    assert longest < HANG and len(said) == (why is not None), said
    assert why is None or why in said[0]


def test_the_process_ends_with_a_run_that_is_killed(
    server: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online(monkeypatch, server)
    code = (
        "import interp, time\n"
        f"tracker = interp.track_experiment('x', root={str(tmp_path)!r}, use_wandb=True)\n"
        "tracker.log({'loss': 1.0}); print('logged', flush=True); time.sleep(100)\n"
    )
    source = Path(interp.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=source, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "logged\n"
    assert until(lambda: server.upserts)
    process.kill()
    process.wait()
    assert until(lambda: server.complete) and interp.runs(tmp_path)["status"].tolist() == ["unfinished"]


def test_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the person wrote it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    dataset, acc, fig = ["a", "b", "c"], 0.5, Shown()

    def run_experiment(prompt: str) -> float:
        return len(prompt) / 2

    from interp import track_experiment

    with (
        pytest.warns(UserWarning, match="WANDB_MODE=offline"),
        track_experiment(
            experiment_name="activation_patching_facts",
            config={"model": "smollm2-135m", "task": "fact_recall"},
            use_wandb=True,  # False: local only
        ) as tracker,
    ):
        for step, prompt in enumerate(dataset):
            loss = run_experiment(prompt)
            tracker.log({"loss": loss, "accuracy": acc}, step=step)
        tracker.log_figure("results", fig)
    run = interp.runs()[0]
    assert (
        run.name == "activation_patching_facts" and run.metrics["loss"].tolist() == [0.5] * 3 and run.figure("results")
    )
