"""`jobs`: those known here."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pandas as pd

from ..engine.ledger import Ledger
from ..errors import JobError
from ..files import path_of
from .state import POINTER, progress_of, state_of

COLUMNS = ("id", "method", "model", "state", "share", "answered", "sent", "age", "path")


def jobs(root: str | Path = "artifacts/jobs") -> pd.DataFrame:
    """The jobs that were submitted from here, the oldest first.

    Args:
        root: the folder that they were submitted to; those that were saved elsewhere are followed there.

    Returns:
        A table: id, method, model, state ("running", "done", "failed", "cancelled", "stopped"), share (of the method's present
        work that is done, 0 to 1), requests answered and sent, age (since it was submitted), path. `interp.Job.load(path)`
        goes on with one.

    Examples:
        >>> there = interp.load_model("smollm2-135m", backend="simulated")
        >>> job = interp.submit(interp.logit_lens, there, list(pairs.clean), root="my_jobs")
        >>> lens = job.result()
        >>> interp.jobs("my_jobs")[["method", "state", "share"]].values.tolist()
        [['logit_lens', 'done', 1.0]]
    """
    folder = path_of(root, JobError, "root")
    files = [*folder.glob("*.job"), *(Path(file.read_text()) for file in folder.glob(f"*{POINTER}"))]
    rows = []
    for file in sorted(set(files), key=lambda file: file.name):
        if not file.is_file():
            continue
        with contextlib.suppress(JobError):  # not a job, or damaged: Job.load says so
            rows.append(row_of(file))
    rows.sort(key=lambda row: -float(str(row["seconds"])))
    for row in rows:
        row["age"] = pd.Timedelta(seconds=round(float(str(row.pop("seconds")))))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def row_of(path: Path) -> dict[str, object]:
    """What the table says of one job."""
    ledger = Ledger(path)
    try:
        counts = ledger.counts()
        return {
            **{name: str(ledger.fact(name)) for name in ("id", "method", "model")},
            "state": state_of(ledger),
            "share": float(progress_of(ledger)),
            "answered": counts.get("done", 0),
            "sent": counts["sends"],
            "seconds": time.time() - float(str(ledger.fact("created"))),
            "path": str(path),
        }
    finally:
        ledger.close()
