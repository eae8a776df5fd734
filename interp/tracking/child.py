"""The process that speaks to wandb: it reads a run's folder as the run writes it, and hands on what it finds.

It is a process of its own so that nothing wandb does, or waits for, holds the experiment up: not its import, not a login, not a
server that stops answering, not its work as Python ends. Run by its path, it imports the standard library and wandb alone.

    stdin   a line of JSON that says what to do; later {"exit": code}, or the end where the run's process died
    stdout  lines of JSON: "mode", "url", "folder", "problem", "done"
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

ODD = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
#: Seconds between two looks at the folder.
EVERY = 0.2
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg")


def say(**facts: object) -> None:
    """Tell the run's process, if it is still there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


class Tail:
    """The whole lines that a growing file has got since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, 0

    def lines(self) -> Iterator[dict[str, object]]:
        """Each line that is JSON."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.place)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.place += len(whole)
            for part in whole.split(b"\n"):
                with contextlib.suppress(ValueError):
                    yield json.loads(part)


def main() -> None:
    """Import wandb, begin a run of it, follow the folder, end it."""
    asked = json.loads(sys.stdin.readline())
    ended: list[int] = []
    threading.Thread(target=wait_for_end, args=(ended, float(asked["linger"])), daemon=True).start()
    try:
        import wandb

        wandb.init  # noqa: B018  # a folder named wandb, of earlier runs, can be imported too
    except ModuleNotFoundError as error:
        missing = f"it needs {error.name}" if error.name != "wandb" else "it is not installed: pip install wandb"
        return say(problem=missing, mode="none")
    except AttributeError:
        return say(problem="it is not installed: pip install wandb", mode="none")
    except BaseException as error:
        return say(problem=f"it cannot be imported ({line_of(error)}): pip install -U wandb", mode="none")
    folder = Path(asked["folder"])
    run = begin(wandb, asked)
    if run is not None:
        follow(wandb, run, folder, ended)
        tidy(folder / "wandb", asked, bool(run.settings._offline))  # type: ignore[attr-defined]


def begin(wandb: ModuleType, asked: Mapping[str, object]) -> object | None:
    """A run of wandb's: as the person's settings say, and offline where that fails."""
    options = dict(asked["options"])  # type: ignore[call-overload]
    # Nothing of the machine goes by itself: the command and the console may show keys, and are kept without them by the run.
    known = set(getattr(wandb.Settings, "model_fields", ()))
    quiet = {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "init_timeout": asked["patience"],
    }
    quiet |= {"x_disable_meta": True, "x_stats_pid": asked["process"]}
    options["settings"] = wandb.Settings(**{name: value for name, value in quiet.items() if name in known})
    problem = ""
    offline, other = (
        {"mode": "offline"},
        {"mode": "offline", "id": f"{options['id']}-2"},
    )  # the first id is taken by what failed
    for more in ({}, other) if not asked.get("copy") else (offline,):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                run = wandb.init(**{**options, **more})
            break
        except BaseException as error:  # also SystemExit, by which it refuses some settings
            problem = problem or line_of(error)
    else:
        say(problem=f"it could not begin a run ({problem})", mode="none")
        return None
    kind = "disabled" if getattr(run, "disabled", False) else "offline" if run.settings._offline else "online"
    if kind == "disabled":
        say(mode=kind, problem="WANDB_MODE=disabled switches it off")
        return None
    place = str(Path(run.dir).parent)
    if kind == "offline":
        why = f"it could not reach its server or log in ({problem})" if problem else "WANDB_MODE=offline"
        say(mode=kind, folder=place, problem=f"{why}; to send the run later: wandb sync {place}")
    else:
        say(mode=kind, folder=place, url=run.url)
    return run


def follow(wandb: ModuleType, run: object, folder: Path, ended: list[int]) -> None:
    """Hand on every line and file until the run ends."""
    metrics, events = Tail(folder / "metrics.jsonl"), Tail(folder / "events.jsonl")
    run.define_metric("step")  # type: ignore[attr-defined]
    run.define_metric("*", step_metric="step")  # type: ignore[attr-defined]
    while True:
        last = bool(ended)  # what was written before the end is read after it was heard
        for row in metrics.lines():
            guarded(log, run, row)
        for event in events.lines():
            guarded(hand_on, wandb, run, folder, event)
        if last:
            break
        time.sleep(EVERY)
    guarded(run.save, str(folder / "events.jsonl"), base_path=str(folder), policy="now")  # type: ignore[attr-defined]
    run.finish(exit_code=ended[0])  # type: ignore[attr-defined]
    say(done=True)


def tidy(place: Path, asked: Mapping[str, object], offline: bool) -> None:
    """Where all was sent, no copy is left to send by hand: whichever of the two processes ends last takes it away."""
    sent = place / ".sent"
    if not offline:
        sent.touch()
    if sent.exists():
        for copy in place.glob(f"offline-run-*-{asked['options']['id']}"):  # type: ignore[index]
            shutil.rmtree(copy, ignore_errors=True)


def guarded(act: object, *args: object, **more: object) -> None:
    """Do one thing; where it fails the others are still done."""
    try:
        act(*args, **more)  # type: ignore[operator]
    except Exception as error:
        say(problem=f"it refused something ({line_of(error)})")


def log(run: object, row: Mapping[str, object]) -> None:
    """A line of metrics; NaN and infinities are numbers again."""
    values = {name: ODD.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    values["_timestamp"] = values.pop("_time", time.time())
    run.log(values)  # type: ignore[attr-defined]


def hand_on(wandb: ModuleType, run: object, folder: Path, event: Mapping[str, object]) -> None:
    """A figure as wandb shows it, and every file that was kept."""
    if not event.get("path"):
        return
    path = folder / str(event["path"])
    if event["event"] == "figure":
        suffix = path.suffix.lower()
        if suffix == ".html":
            run.log({str(event["name"]): wandb.Html(str(path), inject=False)})  # type: ignore[attr-defined]
        elif suffix in PICTURES and suffix != ".svg":
            run.log({str(event["name"]): wandb.Image(str(path))})  # type: ignore[attr-defined]
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            run.save(str(file), base_path=str(folder), policy="now")  # type: ignore[attr-defined]


def wait_for_end(ended: list[int], linger: float) -> None:
    """Hear how the run ended; so many seconds later this process ends too, sent or not."""
    code = 1  # the run's process died
    for text in sys.stdin:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            code = int(json.loads(text)["exit"])
            break
    ended.append(code)
    time.sleep(linger)
    os._exit(1)


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:300]


if __name__ == "__main__":
    main()
