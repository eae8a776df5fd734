"""A run's folder: what is in it, however the run ends, and that no secret is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.errors import InterpError, TrackerError
from interp.tracking import Run, Tracker
from interp.tracking.folder import Folder, free, read_status, safe
from interp.tracking.lines import Lines
from interp.tracking.values import read_lines

from ..families import loaded
from ..saes.made import random_dictionary

SOURCE = Path(interp.__file__).parents[1]
SECRETS = {
    "HF_TOKEN": "hf_" + "aB3" * 11 + "x",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "NDIF_API_KEY": "3f2b8c1e-0d4a-4e6f-9a7b-1c2d3e4f5a6b",
    "MY_PASSWORD": "swordfish swordfish",
}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Tracker]:
    return lambda name="a run", **more: interp.track_experiment(name, root=tmp_path, **more)


def effects_of(model: interp.Model) -> interp.Effects:
    return interp.comprehensive_activation_patching(
        model, clean_prompt="the city of Paris", corrupted_prompt="the city of London", answer_tokens=[20, 33]
    )


def test_what_a_folder_holds(start: Callable[..., Tracker]) -> None:
    with start(config={"lr": 1e-3, "n": {"layers": [1, 2]}}, tags=["x"], notes="why") as tracker:
        tracker.log({"loss": 0.5, "eval": {"accuracy": torch.tensor(0.25)}}, step=3)
        tracker.log({"loss": np.float32(0.125)})
        assert read_lines(tracker.path / "metrics.jsonl")[0]["loss"] == 0.5  # while it runs
        assert read_status(tracker.path)["status"] == "running"
        effects_of(loaded("gpt2"))
    run = Run(tracker.path)
    assert run.status == "finished" and run.config == {"lr": 1e-3, "n": {"layers": [1, 2]}}
    assert run.metrics["step"].tolist() == [3, 4] and run.metrics["eval/accuracy"].tolist()[0] == 0.25
    assert {"torch", "transformers", "nnsight"} <= set(run.environment["versions"])  # type: ignore[call-overload]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path.cwd(), capture_output=True, text=True)
    if head.returncode == 0:
        assert run.environment["git"]["commit"] == head.stdout.strip()  # type: ignore[index]
    told = run.experiments[-1]
    assert told["name"] == "comprehensive_activation_patching" and told["provenance"]["method"] == "patch"  # type: ignore[index]
    assert str(told["summary"]).startswith("Effects(")
    status = json.loads((tracker.path / "status.json").read_text())
    assert (
        status["tags"] == ["x"]
        and status["notes"] == "why"
        and status["metrics"] == {"loss": 0.125, "eval/accuracy": 0.25}
    )


def test_load_model_is_noted_with_its_provenance_and_without_its_token(
    start: Callable[..., Tracker], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    loaded("gpt2").hf.save_pretrained(folder)
    loaded("gpt2").tokenizer.save_pretrained(folder)
    with start() as tracker:
        interp.load_model(str(folder), token="a-word-of-mine")
        with pytest.raises(InterpError):
            interp.load_model(str(tmp_path / "none"), token="a-word-of-mine")
    first, second = Run(tracker.path).experiments
    assert first["provenance"]["family"] == "gpt2" and first["provenance"]["n_layers"] == 3  # type: ignore[index]
    assert first["arguments"]["token"] == "[redacted]" and str(second["error"]).startswith("ModelNotFoundError")  # type: ignore[index]
    assert "a-word-of-mine" not in (tracker.path / "events.jsonl").read_text()


def test_things_are_kept_and_come_back(start: Callable[..., Tracker], tmp_path: Path) -> None:
    model = loaded("gpt2")
    sae = random_dictionary("TopK", model.d_model)
    (tmp_path / "notes.txt").write_text("seen")
    with start() as tracker:
        effects = effects_of(model)
        circuit = interp.iterative_pruning(model, "the city of", [20, 33], threshold=0.1)
        assert tracker.log_figure("a/b results", interp.plot_activation_patching_results(effects)).suffix == ".html"
        tracker.log_effects("ioi", effects)
        tracker.log_circuit("ioi", circuit)
        tracker.log_sae("l1", sae)
        tracker.log_table("curve", pd.DataFrame({"x": [1, 2], "y": [0.5, np.nan]}))
        tracker.log_artifact(tmp_path / "notes.txt")
        tracker.log_effects("ioi", effects)  # again: both are kept
    run = Run(tracker.path)
    np.testing.assert_array_equal(run.effects("ioi").values, effects.values)
    assert run.effects("ioi").provenance == effects.provenance
    assert run.circuit("ioi").nodes() == circuit.nodes()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(run.sae("l1", model).W_dec, sae.W_dec)
    pd.testing.assert_frame_equal(run.table("curve"), pd.DataFrame({"x": [1, 2], "y": [0.5, np.nan]}))
    assert run.artifact("notes.txt").read_text() == "seen"
    assert "<html" in run.figure("a/b results").read_text() and list(run.figures) == ["a/b results"]
    assert sorted(path.name for path in (tracker.path / "effects").iterdir()) == ["ioi-2.nc", "ioi.nc"]
    with pytest.raises(TrackerError, match="has no effects 'nothing': it kept 'ioi'"):
        run.effects("nothing")
    with pytest.raises(TrackerError, match="has no artifact 'x'"):
        run.artifact("x")


def test_circuits_of_features_and_graphs_come_back(start: Callable[..., Tracker]) -> None:
    from interp.circuits import AttributionGraph, FeatureCircuit

    features = FeatureCircuit({"L1.sae1[3]": 0.5}, {("L1.sae1[3]", "logits"): 0.5}, {"model": "m"})
    graph = AttributionGraph(("emb@0", "logit:a"), torch.eye(2), torch.zeros(2), ("a",), (1,), {"logit:a": 1.0})
    with start() as tracker:
        tracker.log_circuit("f", features)
        tracker.log_circuit("g", graph)
    run = Run(tracker.path)
    assert run.circuit("f").nodes == features.nodes and run.circuit("g").nodes == graph.nodes  # type: ignore[union-attr]


def test_figures_of_other_libraries(start: Callable[..., Tracker], tmp_path: Path) -> None:
    from bokeh.plotting import figure

    plot = figure(width=100, height=100)
    plot.line([1, 2], [1, 2])

    class Axes:  # as matplotlib's
        def savefig(self, file: object, **options: object) -> None:
            file.write(b"\x89PNG")  # type: ignore[attr-defined]

    class Shown:
        def _repr_html_(self) -> str:
            return "<p>shown</p>"

    class Broken:
        def html(self) -> str:
            raise ZeroDivisionError("no scale")

    (tmp_path / "seen.svg").write_text("<svg/>")
    with start() as tracker:
        assert "Bokeh" in tracker.log_figure("bokeh", plot).read_text()
        assert tracker.log_figure("axes", Axes()).read_bytes() == b"\x89PNG"
        assert "<p>shown</p>" in tracker.log_figure("shown", Shown()).read_text()
        assert tracker.log_figure("file", tmp_path / "seen.svg").name == "file.svg"
        for thing, said in (
            (np.zeros((2, 2)), "is a ndarray; log_figure takes what interp.plot_"),
            (Broken(), "cannot be drawn: ZeroDivisionError: no scale"),
            (tmp_path / "none.svg", "there is no file"),
        ):
            with pytest.raises(TrackerError, match=said):
                tracker.log_figure("wrong", thing)
    assert len(Run(tracker.path).figures) == 4


@pytest.mark.parametrize(
    ("method", "said"),
    [("log_effects", "give what interp.patch"), ("log_circuit", "give what interp.discover"), ("log_sae", "SparseAutoencoder"),
     ("log_table", "makes no DataFrame"), ("log_artifact", "is not a path")],
)  # fmt: skip
def test_things_of_another_kind_are_refused(method: str, said: str, start: Callable[..., Tracker]) -> None:
    with start() as tracker, pytest.raises(InterpError, match=said):
        if method == "log_artifact":
            tracker.log_artifact(3)  # type: ignore[arg-type]
        else:
            getattr(tracker, method)("x", 3)
    assert Run(tracker.path).status == "finished"


def test_what_cannot_begin_says_why(start: Callable[..., Tracker], tmp_path: Path) -> None:
    for arguments, said in (
        ({"name": ""}, "give a name"),
        ({"config": 3}, "config is a int"),
    ):
        with pytest.raises(TrackerError, match=said):
            start(**arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match=r"cannot make a run's folder under .*give root="):
        interp.track_experiment("x", root=tmp_path / "file" / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left behind


def test_steps(start: Callable[..., Tracker]) -> None:
    with start() as tracker:
        tracker.log({"x": 1})
        tracker.log({"x": 2}, step=10)
        tracker.log({"x": 3})
        tracker.log({"x": 4}, step=2)  # may go back
        tracker.log({"x": 5, "step": 7.0}, step=7)
        tracker.log({"x": 6, "step": 9})
        for step in ("a", 1.5, float("nan")):
            with pytest.raises(TrackerError, match="whole number"):
                tracker.log({"x": 0}, step=step)  # type: ignore[arg-type]
        with pytest.raises(TrackerError, match="give it once"):
            tracker.log({"x": 0, "step": 1}, step=2)
    assert Run(tracker.path).metrics["step"].tolist() == [0, 10, 11, 2, 7, 9]


def test_a_metric_may_be_called_time(start: Callable[..., Tracker]) -> None:
    with start() as tracker:
        tracker.log({"time": 2.5})
    metrics = Run(tracker.path).metrics
    assert metrics.columns.tolist() == ["step", "_time", "time"] and metrics["time"][0] == 2.5
    assert abs(metrics["_time"][0] - pd.Timestamp.now(tz="UTC")) < pd.Timedelta(minutes=5)


def test_a_token_that_is_logged_is_a_word_of_the_text(start: Callable[..., Tracker]) -> None:
    with start() as tracker:
        tracker.log({"token": " Paris", "at": {"token": " is"}, "hf_token": " Paris"})
    (row,) = read_lines(tracker.path / "metrics.jsonl")
    assert (row["token"], row["at/token"], row["hf_token"]) == (" Paris", " is", "[redacted]")


def test_it_is_the_tracker_of_a_training(start: Callable[..., Tracker]) -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    sae = interp.SparseAutoencoder(d_model=8, d_hidden=16, sparsity_coef=1e-3)
    with start() as tracker:
        trained = interp.train_sae(sae, rows, n_epochs=2, batch_size=32, tracker=tracker, progress=False)
    run = Run(tracker.path)
    kept = run.metrics.drop(columns="time").astype(float)
    pd.testing.assert_frame_equal(kept[trained.history.columns], trained.history, check_exact=True)
    assert [event["name"] for event in run.experiments] == ["train_sae"]


def test_an_exception_ends_it_as_failed_and_goes_on(start: Callable[..., Tracker]) -> None:
    with pytest.raises(ZeroDivisionError), start() as tracker:
        tracker.log({"x": 1})
        raise ZeroDivisionError("first\nthe last line, token=abcdefgh")
    run = Run(tracker.path)
    assert run.status == "failed" and run.error == "ZeroDivisionError: the last line, token=[redacted]"
    with pytest.raises(TrackerError, match="is over; begin another"):
        tracker.log({"x": 2})
    tracker.finish()  # a second time changes nothing
    assert run.status == "failed" and len(run.metrics) == 1
    with pytest.raises(KeyboardInterrupt), start() as tracker:
        raise KeyboardInterrupt
    assert Run(tracker.path).error == "KeyboardInterrupt"
    with pytest.raises(SystemExit), start() as tracker:
        sys.exit(0)
    assert Run(tracker.path).status == "finished"


def script(folder: Path, body: str, **environment: str) -> subprocess.Popen[str]:
    """A process that tracks a run in `folder`, and says what `body` prints."""
    code = f"import interp, os, sys, time\nroot = {str(folder)!r}\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=SOURCE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_killed_without_warning_every_line_is_there_and_the_run_is_unfinished(tmp_path: Path) -> None:
    process = script(
        tmp_path,
        "with interp.track_experiment('killed', root=root) as tracker:\n"
        "    for i in range(10**9):\n"
        "        tracker.log({'i': i})\n"
        "        print(i, flush=True)\n",
    )
    assert process.stdout is not None
    printed = "".join(process.stdout.readline() for _ in range(500))
    assert interp.runs(tmp_path)["status"].tolist() == ["running"]
    process.send_signal(signal.SIGKILL)
    printed += process.stdout.read()
    logged = int(printed[: printed.rfind("\n")].split()[-1])  # the last that was printed whole
    process.wait()
    table = interp.runs(tmp_path)
    assert table["status"].tolist() == ["unfinished"] and table["metrics.i"][0] >= logged
    assert table[0].metrics["i"].tolist()[: logged + 1] == list(range(logged + 1))
    with (table[0].path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 12, "i"')  # as a process that was killed while it wrote leaves it
    assert len(table[0].metrics) == table["metrics.i"][0] + 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_processes_at_once_do_not_collide(tmp_path: Path) -> None:
    body = (
        "open(os.path.join(root, f'ready{os.getpid()}'), 'w')\n"
        "while len(os.listdir(root)) < 2: time.sleep(0.001)\n"
        "for i in range(20):\n"
        "    with interp.track_experiment('same', root=os.path.join(root, 'runs'), config={'i': i}) as tracker:\n"
        "        tracker.log({'pid': os.getpid()})\n"
    )
    both = [script(tmp_path, body) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    table = interp.runs(tmp_path / "runs")
    assert len(table) == 40 and set(table["status"]) == {"finished"}
    assert sorted(table["metrics.pid"].value_counts().tolist()) == [20, 20]


def test_threads_at_once(start: Callable[..., Tracker]) -> None:
    with ThreadPoolExecutor(8) as pool:
        trackers = list(pool.map(lambda _: start("same"), range(16)))
    assert len({tracker.path for tracker in trackers}) == 16
    with trackers[0] as tracker, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: tracker.log({"i": i, "x": {"y": i}}), range(200)))
    assert sorted(Run(tracker.path).metrics["i"]) == list(range(200))
    for tracker in trackers[1:]:
        tracker.finish()


def test_a_run_that_nobody_ended_ends_with_python(tmp_path: Path) -> None:
    for body, status in (("", "finished"), ("raise ValueError('no')", "failed")):
        root = tmp_path / status
        script(root, f"t = interp.track_experiment('x', root=root)\nt.log({{'a': 1}})\n{body}").wait()
        assert interp.runs(root)["status"].tolist() == [status]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_is_not_the_run(tmp_path: Path) -> None:
    process = script(
        tmp_path,
        "tracker = interp.track_experiment('x', root=root)\n"
        "if not os.fork():\n"
        "    tracker.finish(ValueError('in the worker')); time.sleep(60); os._exit(0)\n"
        "time.sleep(0.5); print(interp.runs(root)['status'][0], flush=True); os.kill(os.getpid(), 9)\n",
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "running"
    process.wait()
    assert interp.runs(tmp_path)["status"].tolist() == ["unfinished"]  # though its worker lives


def test_no_wrong_guesses(start: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start()
    assert read_status(tracker.path)["status"] == "running"
    status = json.loads((tracker.path / "status.json").read_text())
    tracker._folder.release()  # as the system does when the process dies
    assert read_status(tracker.path)["status"] == "unfinished"
    for change, said in (
        ({"host": "elsewhere", "boot": "another"}, "unknown"),  # a lock may not reach over machines
        ({"host": "elsewhere"}, "unfinished"),  # a container on this machine
        ({"boot": "earlier"}, "unfinished"),  # this machine, before it was started again
        ({"locked": False}, "unknown"),  # a file system without locks
    ):
        (tracker.path / "status.json").write_text(json.dumps(status | change))
        assert read_status(tracker.path)["status"] == said, change
    for text in ("", "{", "[]", '{"status": "odd"}'):
        (tracker.path / "status.json").write_text(text)
        assert read_status(tracker.path)["status"] == "damaged"
    tracker.finish()


def test_names_of_files(tmp_path: Path) -> None:
    assert (
        safe("a/b: c?") == "a_b_c" and safe("..") == "run" and safe("größe") == "größe" and len(safe("x" * 300)) == 80
    )
    assert len(safe("ß" * 100).encode()) <= 80
    first = Folder(tmp_path, "../../x", {})
    assert first.path.parent == tmp_path
    first.release()
    (tmp_path / "a.nc").write_text("")
    assert free(tmp_path, "a", ".nc").name == "a-2.nc"


def test_a_full_disk_is_said_once_and_lines_wait(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    lines = Lines(tmp_path / "lines.jsonl")
    room, full = lines._file, os.open("/dev/full", os.O_WRONLY)
    lines.write({"a": 1})
    lines._file = full
    with pytest.warns(UserWarning, match="cannot be written .*: lines wait in memory") as seen:
        lines.write({"a": 2})
        lines.write({"a": 3})
    assert len(seen) == 1 and seen[0].filename == __file__
    lines._file = room
    lines.write({"a": 4})
    assert [row["a"] for row in read_lines(tmp_path / "lines.jsonl")] == [1, 2, 3, 4]
    lines._file = full
    lines.write({"a": 5})
    with pytest.warns(UserWarning, match="1 lines are lost"):
        lines.close()
    os.close(room)


def test_nothing_secret_is_written_anywhere(
    start: Callable[..., Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    model, words = loaded("gpt2"), list(SECRETS.values())
    monkeypatch.setattr(sys, "orig_argv", ["python", "run.py", "--token", words[2], f"--x={words[0]}"])
    effects = effects_of(model)
    leaky = interp.Effects(
        effects.values, effects.clean, effects.corrupted, effects.provenance | {"key": words[1], "x": words}
    )
    circuit = interp.iterative_pruning(model, "the city of", [20, 33], threshold=0.1)
    circuit.meta["note"] = words
    sae = random_dictionary("TopK", model.d_model)
    sae.cfg.metadata["made_by"] = {"hf_token": "a-word-of-mine", "said": words}
    config = {
        "hf_token": "a-word-of-mine",
        "deep": [{"x": words, words[0]: 1}],
        "url": f"https://me:{words[2]}@x.example/",
    }
    with pytest.raises(RuntimeError), start(f"with {words[0]}", config=config, notes=words[1], tags=words) as tracker:
        tracker.log({"said": words[2], "wandb_key": "a-word-of-mine", "loss": 0.5})
        tracker.log_effects(words[0], leaky)
        tracker.log_circuit("c", circuit)
        tracker.log_sae("s", sae)
        tracker.log_table("t", [{"x": words[2]}])
        tracker.log_figure(
            "f", interp.plots.Figure(interp.plot_activation_patching_results(effects).layout, words[0], words[2])
        )
        raise RuntimeError(f"refused {words[0]}: password='{words[3]}'")
    files = [path for path in tracker.path.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        data = path.read_bytes()
        for word in (*words, "a-word-of-mine"):
            assert word.encode() not in data, f"{path.name} holds {word}"
        assert words[0] not in str(path)
    run = Run(tracker.path)
    assert (
        run.metrics["loss"][0] == 0.5 and run.effects(next(iter(run._kept("effects")))).provenance["method"] == "patch"
    )


def test_larger_records_are_lightened(start: Callable[..., Tracker]) -> None:
    from interp.journal import Told

    big = {"model": "m", "prompts": {"clean": [[1] * 100] * 10000}, "tokens": [["x"] * 100] * 10000}
    with start() as tracker:
        tracker.hear(Told("patch", 0.0, 1.0, {}, big, "Effects"))
        tracker.hear(Told("patch", 0.0, 1.0, {}, {"model": "m", "other": "x" * (1 << 21)}, "Effects"))
    first, second = Run(tracker.path).experiments
    assert first["provenance"] == {"model": "m", "left_out": ["prompts", "tokens"]} and second["provenance"] == {
        "model": "m"
    }


def test_off_it_starts_nothing(tmp_path: Path) -> None:
    """Neither a process nor a thread, and wandb is not imported."""
    body = (
        "import threading, subprocess\n"
        "with interp.track_experiment('x', root=root) as tracker: tracker.log({'a': 1})\n"
        "print('wandb' in sys.modules, threading.active_count())\n"
    )
    process = script(tmp_path, body)
    assert process.stdout is not None and process.stdout.read().split() == ["False", "1"]


def test_warnings_of_a_closed_run_are_none(start: Callable[..., Tracker]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = start()
        tracker.log({"x": 1})
        tracker.finish()
        interp.runs(tracker.path.parent)
    assert repr(tracker).startswith("Tracker('a run', finished, ") and threading.active_count() >= 1
