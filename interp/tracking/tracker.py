"""`track_experiment`: a run's folder, what is logged to it, and what the experiments within it did."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import TrackerError
from ..files import path_of
from ..journal import Told, last_line, leave, listen
from .environment import environment, machine
from .folder import Folder
from .keep import KEEPERS, PLACES
from .lines import Lines, lightened, warn
from .live import Live
from .redact import Redactor
from .values import Plain, flat, model_of, settings


def track_experiment(
    experiment_name: str = "experiment",
    config: object = None,
    use_wandb: bool = False,
    root: str | os.PathLike[str] = "artifacts/runs",
    *,
    project: str = "interp",
    entity: str | None = None,
    tags: Sequence[str] = (),
    notes: str = "",
) -> Tracker:
    """Keep what is logged, and what experiments do, in a folder of its own, `root/<time>-<name>`.

    Use it as a context manager, or call `finish()` at the end. From here on every experiment of `interp` in this thread, and in
    threads that track nothing else, is noted with its arguments, time and provenance. Keys, tokens and passwords are left out.

    Args:
        config: a dictionary, a dataclass or what argparse gives; kept as plain data.
        use_wandb: also send everything to Weights & Biases. Where that cannot be (not installed, no login, offline, a server that
            stops answering), one warning says so and the run goes on: all of it is in the folder either way.
        root: the folder of all runs, made where it is missing.
        project, entity, tags, notes: of the run at wandb; tags and notes are kept here too.

    Raises:
        TrackerError: a name or configuration that is none, or a folder that cannot be made.

    Examples:
        >>> with interp.track_experiment("example", config={"lr": 1e-3}, root="runs") as tracker:
        ...     tracker.log({"loss": 0.5}, step=1)
        >>> interp.runs("runs")[-1].status
        'finished'
    """
    if not isinstance(experiment_name, str) or not experiment_name.strip():
        raise TrackerError(f"experiment_name={experiment_name!r}: give a name, a text that says what is tried")
    if isinstance(tags, str):
        tags = (tags,)
    hide = Redactor()
    told = hide.data(settings(config))
    assert isinstance(told, dict)
    where = hide.data(environment())
    assert isinstance(where, dict)
    about = {"name": hide.text(experiment_name), "tags": hide.data(list(tags)), "notes": hide.text(notes)}
    tracker = Tracker(path_of(root, TrackerError, "root").absolute(), about, told, where)
    if use_wandb:
        options = {"project": project, "entity": entity, **about, "config": {**told, "environment": where}}
        tracker.send(options)
    return tracker


class Tracker:
    """A run in progress: `path` is its folder, `name` and `config` what it was begun with. Made by `track_experiment`."""

    def __init__(
        self, root: Path, about: Mapping[str, object], config: dict[str, object], where: Mapping[str, object]
    ) -> None:
        self.name, self.config = str(about["name"]), config
        self._status: dict[str, object] = {**about, "status": "running", "started": now(), "process": os.getpid()}
        self._status |= {**machine(), "locked": True}
        files = {"config.json": config, "environment.json": where, "status.json": self._status}
        self._folder = Folder(root, self.name, files)
        self.path = self._folder.path
        if not self._folder.locked:
            self._note(locked=False)
        self._metrics, self._events = Lines(self.path / "metrics.jsonl"), Lines(self.path / "events.jsonl")
        self._last: dict[str, Plain] = {}
        self._told: Counter[str] = Counter()
        self._models: dict[str, None] = {}
        self._step, self._clock, self._lock = -1, time.monotonic(), threading.RLock()
        self._live: Live | None = None
        self._warned = False
        self._open = True
        atexit.register(self._at_exit)
        listen(self)

    def send(self, options: Mapping[str, object]) -> None:
        """Send this run to wandb too; `options` are those of `wandb.init`."""
        self._live = Live(self.path, options)

    @property
    def url(self) -> str | None:
        """The run's page at wandb; None without one, and in the first seconds."""
        return None if self._live is None else self._live.facts.get("url")  # type: ignore[return-value]

    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        """Add a line of metrics: numbers and texts by name, those of dictionaries within as "outer/inner".

        Args:
            values: numbers of Python, numpy or torch (of one element), texts, or dictionaries of them.
            step: a whole number; by default one more than the last.

        Raises:
            TrackerError: a value that is no single number, or the run is over.
        """
        found = flat(values)
        with self._lock:
            self._check_open()
            step = self._step_of(found, step)
            hide = Redactor() if any(isinstance(value, str) for value in found.values()) else None
            # a metric of the name "token" is a word of a vocabulary
            kept = {n: hide.data(v, "" if n.split("/")[-1] == "token" else n) if hide else v for n, v in found.items()}
            self._metrics.write({"step": step, "_time": time.time(), **{n: v for n, v in kept.items() if n != "step"}})
            self._last |= kept  # type: ignore[arg-type]
            self._step = step
        self._warn_of_wandb()

    def log_figure(self, name: str, figure: object) -> Path:
        """Keep a picture: what `interp.plot_…` gives, a figure of bokeh, plotly, altair or matplotlib, or the path of a file.

        Returns:
            Its file, as of the other methods here. A name may be given again; each is kept, and the last is what reading gives.

        Raises:
            TrackerError: no picture, or the run is over.
        """
        return self._keep("figure", name, figure)

    def log_effects(self, name: str, effects: object) -> Path:
        """Keep effects, as a NetCDF file. TrackerError: they are none, or the run is over."""
        return self._keep("effects", name, effects)

    def log_circuit(self, name: str, circuit: object) -> Path:
        """Keep a circuit, of features too, or an attribution graph, as JSON. TrackerError: it is none, or the run is over."""
        return self._keep("circuit", name, circuit)

    def log_sae(self, name: str, sae: object) -> Path:
        """Keep a dictionary, as the folder that `interp.save_sae` writes. TrackerError: it is none, or the run is over."""
        return self._keep("sae", name, sae)

    def log_table(self, name: str, table: object) -> Path:
        """Keep a DataFrame, or what makes one, as a .csv file. TrackerError: it makes none, or the run is over."""
        return self._keep("table", name, table)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> Path:
        """Keep a copy of a file or folder, as it is: what it holds is not looked at. TrackerError: it is not there."""
        return self._keep("artifact", name or path_of(path, TrackerError).name, path)

    def hear(self, told: Told) -> None:
        """Note a call of an experiment; the journal calls this."""
        fields = {"name": told.name, "time": told.started, "seconds": round(told.seconds, 4)}
        more = {
            key: getattr(told, key) for key in ("summary", "error", "arguments", "provenance") if getattr(told, key)
        }
        with self._lock:
            if self._open:
                record = _hidden(lightened({"event": "experiment", **fields, **more}))
                self._events.write(record)
                self._told[told.name] += 1
                if model := model_of(record):
                    self._models[model] = None

    def finish(self, error: BaseException | None = None) -> None:
        """End the run, "finished", or "failed" with the last line of `error`. Waits for wandb a few seconds at most."""
        with self._lock:
            if not self._open or os.getpid() != self._status["process"]:  # a forked worker's copy is not the run
                return
            self._open = False
        leave(self)
        atexit.unregister(self._at_exit)
        said = "" if error is None else Redactor().text(last_line(error))
        ended = {"ended": now(), "seconds": round(time.monotonic() - self._clock, 3), "metrics": self._last}
        ended |= {"experiments": dict(self._told), "models": list(self._models)}
        ended |= {"status": "failed", "error": said} if error is not None else {"status": "finished"}
        self._note(**ended)
        over = True
        if self._live is not None:
            over = self._live.finish(1 if error is not None else 0)
            self._note(wandb=_hidden({**self._live.facts, "problems": self._live.problems}))
        self._folder.release()
        for lines in (self._metrics, self._events):
            lines.close()
        self._warn_of_wandb(over)  # last: a warning may be made an error

    def _keep(self, kind: str, name: str, thing: object) -> Path:
        """Write a thing as a file, and then note that it is there."""
        if not isinstance(name, str) or not name.strip():
            raise TrackerError(f"the name of what is kept is a text, not {name!r}: tracker.log_{kind}('name', …)")
        with self._lock:
            self._check_open()
            name = Redactor().text(name)
            try:
                path = KEEPERS[kind](self.path / PLACES[kind], name, thing)
            except OSError as error:
                raise TrackerError(
                    f"{kind} {name!r} cannot be written to {self.path}: {error.strerror or error}"
                ) from error
            where = path.relative_to(self.path).as_posix()
            self._events.write({"event": kind, "name": name, "path": where, "time": time.time(), "step": self._step})
        self._warn_of_wandb()
        return path

    def _step_of(self, found: Mapping[str, Plain], step: int | None) -> int:
        """The step of a line: the one given, the one among its values, or one more than the last."""
        inside = found.get("step")
        if step is None:
            step = self._step + 1 if inside is None else inside  # type: ignore[assignment]
        try:
            whole = int(step)  # type: ignore[arg-type]
            assert whole == step and not isinstance(step, str)
        except (TypeError, ValueError, AssertionError):
            raise TrackerError(f"step={step!r}: it is a whole number") from None
        if inside is not None and inside != whole:
            raise TrackerError(f"step={whole}, and the values say 'step': {inside!r}; give it once")
        return whole

    def _check_open(self) -> None:
        if not self._open:
            raise TrackerError(
                f"the run {self.path.name} is over; begin another: interp.track_experiment({self.name!r})"
            )

    def _note(self, **facts: object) -> None:
        """Write the status; on a full disk the run goes on."""
        self._status |= facts
        try:
            self._folder.write(self._status)
        except OSError as error:
            warn(f"the status of {self.path} cannot be written: {error.strerror or error}")

    def _warn_of_wandb(self, over: bool = True) -> None:
        """Say once what keeps this run from wandb."""
        if self._live is None or self._warned or (over and not self._live.problems):
            return
        self._warned = True
        copy = f"{self.path / 'wandb'}/offline-run-*-{self._live.id}"
        slow = (
            f"it has not taken everything yet, and goes on for some minutes by itself; if it cannot: wandb sync {copy}"
        )
        why = Redactor().text((self._live.problems or [slow])[0])
        warn(f"wandb: {why}. Everything is kept in {self.path}")

    def _at_exit(self) -> None:
        """A run that nobody ended ends with Python: failed by the error that ended that, which in a notebook none does."""
        by_hand = hasattr(sys, "ps1") or "IPython" in sys.modules
        self.finish(None if by_hand else getattr(sys, "last_value", None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(None if isinstance(error, SystemExit) and not error.code else error)

    def __repr__(self) -> str:
        state = "running" if self._open else str(self._status["status"])
        return f"Tracker({self.name!r}, {state}, {self.path})"


def _hidden(record: Mapping[str, object]) -> dict[str, object]:
    found = Redactor().data(record)
    assert isinstance(found, dict)
    return found


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
