"""`interp.runs()`: a table that filters as any DataFrame, and the runs behind its rows."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import interp
from interp.errors import TrackerError
from interp.tracking import Run, Runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: three finished with different settings, one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    for i, lr in enumerate((0.1, 0.01, 0.001)):
        with interp.track_experiment(f"run {i}", config={"lr": lr, "n": {"layers": [i]}}, root=folder) as tracker:
            tracker.log({"loss": lr * 10, "odd": math.inf})
            tracker.log({"loss": lr})
    with pytest.raises(ValueError), interp.track_experiment("bad", config={"other": "x"}, root=folder):
        raise ValueError("no")
    return folder


def test_the_table(root: Path) -> None:
    table = interp.runs(root)
    assert isinstance(table, pd.DataFrame)
    assert table["name"].tolist() == ["run 0", "run 1", "run 2", "bad"]  # the oldest first
    assert table["status"].tolist() == ["finished"] * 3 + ["failed"] and table["error"].tolist()[3] == "ValueError: no"
    assert table["config.lr"].tolist()[:3] == [0.1, 0.01, 0.001] and math.isnan(table["config.lr"][3])
    assert table["config.n.layers"].tolist()[:3] == ["[0]", "[1]", "[2]"] and table["config.other"][3] == "x"
    assert table["metrics.loss"].tolist()[:3] == [0.1, 0.01, 0.001] and table["metrics.odd"][0] == math.inf
    assert table["started"].is_monotonic_increasing and (table["seconds"] >= 0).all()
    assert str(table["started"].dtype).startswith("datetime64") and table["started"].dt.tz is not None


def test_rows_are_runs_by_their_place_also_of_a_part(root: Path) -> None:
    table = interp.runs(root)
    assert (
        isinstance(table[0], Run)
        and table[0].name == "run 0"
        and table[-1].name == "bad"
        and table[np.int64(1)].name == "run 1"
    )
    best = table[table["status"] == "finished"].sort_values("metrics.loss")
    assert isinstance(best, Runs) and best[0].name == "run 2" and best[0].config == {"lr": 0.001, "n": {"layers": [2]}}
    assert [best[i].name for i in range(len(best))] == ["run 2", "run 1", "run 0"]
    assert table.query("`config.lr` < 0.05")[0].name == "run 1" and table.head(1)[-1].name == "run 0"
    with pytest.raises(IndexError, match="there is no run 4: there are 4"):
        table[4]
    with pytest.raises(TrackerError, match="no column 'path'"):
        table[["name"]][0]
    with pytest.raises(KeyError):
        table["none"]


def test_what_pandas_does_with_a_table(root: Path) -> None:
    table = interp.runs(root)
    assert table.groupby("status")["metrics.loss"].mean()["finished"] == pytest.approx(0.037)
    assert len(table.describe()) and len(table.T) and len(table.copy()) == 4
    assert [row.name for row in table.itertuples()] == table["name"].tolist()
    joined = pd.concat([table, table], ignore_index=True)
    assert joined[5].name == "run 1"  # type: ignore[union-attr, operator]
    pd.testing.assert_frame_equal(table.drop(columns="path"), interp.runs(root).drop(columns="path"))
    assert "run 0" in table.to_csv() and len(table.to_dict("records")) == 4


def test_it_is_shown(root: Path) -> None:
    table = interp.runs(root)
    assert "run 0" in repr(table) and str(root) not in repr(table) and "<table" in table._repr_html_()
    assert repr(table[["name"]]).split() == ["name", "0", "run", "0", "1", "run", "1", "2", "run", "2", "3", "bad"]
    shown = repr(table[3])
    assert shown.startswith("Run('bad'; status: failed: ValueError: no; started: 2") and str(root) in shown
    assert "<table" in table[0]._repr_html_()
    table["config.lr"] = 5.0  # a table is one's own to change
    assert "5.0" in repr(table)


def test_no_runs(tmp_path: Path) -> None:
    table = interp.runs(tmp_path / "none")
    assert (
        len(table) == 0 and "path" in table and repr(table).startswith("no runs") and "no runs" in table._repr_html_()
    )
    with pytest.raises(IndexError, match="there is no run 0: there are 0"):
        table[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match="is a file; give the folder"):
        interp.runs(tmp_path / "file")


def test_the_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with interp.track_experiment("here") as tracker:
        pass
    assert tracker.path.parent == tmp_path / "artifacts" / "runs" and len(interp.runs()) == 1
    assert interp.runs()[0].metrics.empty and interp.runs()[0].metrics.columns.tolist() == ["step", "time"]


def test_what_is_damaged_is_shown_and_the_rest_can_be_read(tmp_path: Path) -> None:
    with interp.track_experiment("whole", root=tmp_path) as tracker:
        tracker.log({"x": 1})
    for name, files in {
        "empty": {"status.json": ""},
        "torn": {"status.json": '{"status": "finished", "name": "torn", "sta'},
        "bare": {"status.json": json.dumps({"status": "finished"})},
        "wrong": {"status.json": json.dumps({"status": "running", "started": "yesterday"}), "metrics.jsonl": "{}\nx\n"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "other").mkdir()
    (tmp_path / "a file").write_text("")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    table = interp.runs(tmp_path).set_index("name", drop=False)
    assert table["status"].to_dict() == {
        "whole": "finished", "empty": "damaged", "torn": "damaged", "bare": "finished", "wrong": "unknown"
    }  # fmt: skip
    broken = Run(tmp_path / "empty")
    assert "status.json cannot be read" in broken.error and broken.events == [] and repr(broken)
    with pytest.raises(TrackerError, match=r"config.json cannot be read"):
        _ = broken.config


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with interp.track_experiment("x", root=tmp_path) as tracker:
        tracker.log_table("t", {"a": [1]})
    next((tracker.path / "tables").iterdir()).unlink()
    with pytest.raises(TrackerError, match="is gone"):
        interp.runs(tmp_path)[0].table("t")
