"""`runs`: all runs of a folder as a table, and each of them with what it kept."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, overload

import pandas as pd

from ..effects import Effects
from ..errors import TrackerError
from ..files import path_of
from ..markup import definitions
from .folder import STATUS, read_status
from .keep import read_circuit, read_table
from .values import ODD, model_of, read_lines

if TYPE_CHECKING:
    import os

    from ..circuits import AttributionGraph, Circuit, FeatureCircuit
    from ..models.model import Model
    from ..saes.library import Dictionary

#: Columns that a printed table leaves out.
UNSHOWN = ("path", "error")


@dataclass(frozen=True, repr=False)
class Run:
    """One run, read from its folder `path`; what it kept is read when it is asked for."""

    path: Path

    @property
    def name(self) -> str:
        """What it was called."""
        return str(self._status.get("name") or self.path.name)

    @property
    def status(self) -> str:
        """ "running", "finished", "failed", "unfinished" (its process died), "unknown" (of another machine) or "damaged"."""
        return str(read_status(self.path)["status"])

    @property
    def error(self) -> str:
        """The last line of the exception that ended it; empty without one."""
        return str(self._status.get("error", ""))

    @property
    def config(self) -> dict[str, object]:
        """What it was begun with."""
        return self._json("config.json")

    @property
    def environment(self) -> dict[str, object]:
        """Versions, git state, command, python and platform."""
        return self._json("environment.json")

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each `log`, with `step`, `time` (UTC) and a column for each metric."""
        rows = [row for row in read_lines(self.path / "metrics.jsonl") if {"step", "_time"} <= set(row)]
        frame = pd.DataFrame([{name: _odd(value) for name, value in row.items()} for row in rows])
        if frame.empty:
            return pd.DataFrame({"step": pd.Series(dtype="int64"), "time": pd.Series(dtype="datetime64[ns, UTC]")})
        when = "_time" if "time" in frame else "time"  # a metric may have that name
        frame = frame.assign(**{when: pd.to_datetime(frame["_time"], unit="s", utc=True)})
        return frame[["step", when, *(name for name in frame if name not in ("step", "_time", when))]]

    @property
    def events(self) -> list[dict[str, object]]:
        """What happened, in order: experiments with their provenance, and what was kept."""
        return read_lines(self.path / "events.jsonl")

    @property
    def experiments(self) -> list[dict[str, object]]:
        """The experiments alone: name, time, seconds, arguments, summary or error, provenance."""
        return [event for event in self.events if event.get("event") == "experiment"]

    @property
    def figures(self) -> dict[str, Path]:
        """The files of its figures by name."""
        return self._kept("figure")

    def figure(self, name: str) -> Path:
        """The file of a figure. TrackerError: it kept none of that name."""
        return self._one("figure", name)

    def effects(self, name: str) -> Effects:
        """Effects that it kept. TrackerError: none of that name."""
        return Effects.load(self._one("effects", name))

    def circuit(self, name: str) -> Circuit | FeatureCircuit | AttributionGraph:
        """A circuit or graph that it kept. TrackerError: none of that name."""
        return read_circuit(self._one("circuit", name))

    def sae(self, name: str, model: Model | None = None) -> Dictionary:
        """A dictionary that it kept, in the form that is used. TrackerError: none of that name."""
        from ..saes import load_sae

        return load_sae(self._one("sae", name), model)

    def table(self, name: str) -> pd.DataFrame:
        """A table that it kept. TrackerError: none of that name."""
        return read_table(self._one("table", name))

    def artifact(self, name: str) -> Path:
        """The copy of a file or folder. TrackerError: none of that name."""
        return self._one("artifact", name)

    @property
    def _status(self) -> dict[str, object]:
        return read_status(self.path)

    def _json(self, file: str) -> dict[str, object]:
        try:
            found = json.loads((self.path / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrackerError(f"{self.path / file} cannot be read: {error}") from error
        return dict(found)

    def _kept(self, kind: str) -> dict[str, Path]:
        """Files of a kind by name; of a name that was given twice, the last."""
        return {
            str(event["name"]): self.path / str(event["path"]) for event in self.events if event.get("event") == kind
        }

    def _one(self, kind: str, name: str) -> Path:
        kept = self._kept(kind)
        if name not in kept:
            known = f"it kept {', '.join(map(repr, kept))}" if kept else f"it kept none (tracker.log_{kind})"
            raise TrackerError(f"the run {self.path.name} has no {kind} {name!r}: {known}")
        if not kept[name].exists():
            raise TrackerError(f"{kind} {name!r} of the run {self.path.name} is gone: {kept[name]} is not there")
        return kept[name]

    def _facts(self) -> dict[str, str]:
        """What is shown of it."""
        said = self._status
        kept = Counter(str(event["event"]) for event in self.events if "path" in event)
        return {
            "status": str(said["status"]) + (f": {said['error']}" if said.get("error") else ""),
            "started": str(said.get("started", ""))[:19].replace("T", " "),
            "experiments": counted(event["name"] for event in self.experiments),
            "kept": counted(kept.elements()),
            "path": str(self.path),
        }

    def __repr__(self) -> str:
        return f"Run({self.name!r}; {'; '.join(f'{k}: {v}' for k, v in self._facts().items() if v)})"

    def _repr_html_(self) -> str:
        return definitions({name: said for name, said in self._facts().items() if said}, self.name)


class Runs(pd.DataFrame):
    """A table of runs, the oldest first, to filter and sort as any other; `runs[i]` is the run in row i, and `runs[-1]` the last.

    Columns: name, started (UTC), status, seconds, `config.…`, `metrics.…` (the last value of each), models, experiments, error,
    path.
    """

    @property
    def _constructor(self) -> type[Runs]:
        return Runs

    @overload
    def __getitem__(self, key: int) -> Run: ...
    @overload
    def __getitem__(self, key: str) -> pd.Series: ...
    @overload
    def __getitem__(self, key: pd.Series | list[str]) -> Runs: ...
    def __getitem__(self, key: object) -> object:
        if isinstance(key, bool) or not hasattr(key, "__index__") or getattr(key, "shape", None):
            return super().__getitem__(key)
        if "path" not in self.columns:
            raise TrackerError(
                "this table has no column 'path' any more, which says where its runs are; keep it, or ask runs()"
            )
        row = key.__index__()
        if not -len(self) <= row < len(self):
            raise IndexError(f"there is no run {row}: there are {len(self)}")
        return Run(Path(super().__getitem__("path").iloc[row]))

    def _table(self) -> pd.DataFrame:
        columns = [name for name in self.columns if name not in UNSHOWN]
        frame = pd.DataFrame({name: super(Runs, self).__getitem__(name).array for name in columns})
        if "started" in frame:
            frame["started"] = frame["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
        return frame

    def __repr__(self) -> str:
        if not len(self):
            return "no runs; interp.track_experiment(…) begins one"
        width = shutil.get_terminal_size((120, 24)).columns
        with pd.option_context("display.max_columns", None, "display.width", width, "display.max_colwidth", 40):
            return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_() if len(self) else f"<p>{self!r}</p>"  # type: ignore[operator]


def runs(root: str | os.PathLike[str] = "artifacts/runs") -> Runs:
    """All runs under a folder, as a table to filter and compare; `runs()[i]` is one of them, `runs()[-1]` the last.

    Returns:
        Runs, a DataFrame with one row for each, the oldest first.

    Raises:
        TrackerError: `root` is a file.

    Examples:
        >>> with interp.track_experiment("example", config={"lr": 1e-3}, root="runs") as tracker:
        ...     tracker.log({"loss": 0.5}, step=1)
        >>> kept = interp.runs("runs")
        >>> kept[kept["config.lr"] < 0.01][-1].metrics["loss"].tolist()
        [0.5]
    """
    folder = path_of(root, TrackerError, "root").absolute()
    if folder.is_file():
        raise TrackerError(f"root={str(root)!r} is a file; give the folder of runs")
    paths = sorted(path.parent for path in folder.glob(f"*/{STATUS}") if not path.parent.name.startswith("."))
    rows = [row_of(path) for path in paths]
    first = ["name", "started", "status", "seconds"]
    last = ["models", "experiments", "error", "path"]
    between = dict.fromkeys(name for row in rows for name in row if name not in {*first, *last})
    ordered = sorted(between, key=lambda name: not name.startswith("config."))
    frame = Runs(rows, columns=[*first, *ordered, *last])
    frame["started"] = pd.to_datetime(frame["started"], utc=True, errors="coerce", format="ISO8601")
    return frame.sort_values(["started", "path"], kind="stable").reset_index(drop=True)  # type: ignore[return-value]


def row_of(path: Path) -> dict[str, object]:
    """What the table says of one run."""
    said, run = read_status(path), Run(path)
    metrics = said.get("metrics")
    if not isinstance(metrics, dict):  # it did not end
        last: dict[str, object] = {}
        for line in read_lines(path / "metrics.jsonl"):
            last |= {name: value for name, value in line.items() if name not in ("step", "_time")}
        metrics = last
    try:
        config = run.config
    except TrackerError:
        config = {}
    told, models = said.get("experiments"), said.get("models")
    if not isinstance(told, dict) or not isinstance(models, list):  # likewise
        events = run.experiments
        told, models = Counter(str(event["name"]) for event in events), list(dict.fromkeys(map(model_of, events)))
    return {
        "name": str(said.get("name") or path.name),
        "started": said.get("started"),
        "status": said["status"],
        "seconds": said.get("seconds", lasted(path, said)),
        **{f"config.{name}": value for name, value in dotted(config).items()},
        **{f"metrics.{name}": _odd(value) for name, value in metrics.items()},
        "models": ", ".join(str(model) for model in models if model),
        "experiments": counted(Counter(told).elements()),
        "error": str(said.get("error", "")),
        "path": str(path),
    }


def lasted(path: Path, said: Mapping[str, object]) -> float | None:
    """Seconds from the start of a run that did not end to the last line that it wrote."""
    times = [file.stat().st_mtime for file in path.glob("*.jsonl")]
    try:
        return round(max(times) - datetime.fromisoformat(str(said["started"])).timestamp(), 3) if times else None
    except (KeyError, ValueError):
        return None


def counted(names: Iterable[object]) -> str:
    """Names with how often each stands there: "load_model, patch ×3"."""
    return ", ".join(f"{name} ×{n}" if n > 1 else str(name) for name, n in Counter(map(str, names)).items())


def dotted(config: Mapping[str, object], before: str = "") -> dict[str, object]:
    """A configuration in one level: "optimizer.lr". Lists are shown as their text, so that rows can be compared."""
    out: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            out |= dotted(value, f"{before}{name}.")
        else:
            out[f"{before}{name}"] = json.dumps(value) if isinstance(value, list | dict) else _odd(value)
    return out


def _odd(value: object) -> object:
    return ODD.get(value, value) if isinstance(value, str) else value
