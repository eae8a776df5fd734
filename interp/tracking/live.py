"""The run's side of wandb: starts the process that speaks to it, hears what became of that, and waits a few seconds at most."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

#: Seconds: that the end of a run waits; that wandb's start may take; that its process goes on sending when the run is over.
WAIT, PATIENCE, LINGER = 4.0, 30.0, 600.0
CHILD = Path(__file__).with_name("child.py")


class Live:
    """What wandb makes of a run. `facts` is what its process has said: mode, url, folder."""

    def __init__(self, folder: Path, options: Mapping[str, object]) -> None:
        """Start it; nothing here waits for it.

        Args:
            folder: the run's.
            options: of `wandb.init`, as plain data.
        """
        self.facts: dict[str, object] = {}
        self.problems: list[str] = []
        self.id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._begun, self._over = threading.Event(), threading.Event()
        given = {**options, "id": self.id, "dir": str(folder)}
        self._asked: dict[str, object] = {"folder": str(folder), "options": given, "process": os.getpid()}
        self._asked |= {"patience": PATIENCE, "linger": LINGER}
        self._process = self._started()
        self._copying: subprocess.Popen[str] | None = None
        if self._process is not None:
            threading.Thread(target=self._hear, name="interp-wandb", daemon=True).start()

    def _started(self, heard: bool = True) -> subprocess.Popen[str] | None:
        quiet = {**os.environ, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "PYTHONIOENCODING": "utf-8"}
        for name in ("WANDB_SERVICE", "_WANDB_SERVICE"):  # of a run of wandb's that the person has in this process
            quiet.pop(name, None)
        try:
            return subprocess.Popen(
                [sys.executable or "python", "-P", str(CHILD)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if heard else subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet,
                encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.problems.append(f"its process cannot be started ({error.strerror or error})")
            return None

    def _hear(self) -> None:
        """Take what the process says until it ends."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(self._asked) + "\n")
                process.stdin.flush()
            self._begun.set()
            for text in process.stdout:
                with contextlib.suppress(ValueError):
                    said = json.loads(text)
                    if problem := said.pop("problem", ""):
                        self.problems.append(str(problem))
                    self.facts.update(said)
                    if said.get("done"):
                        self._over.set()
        finally:
            process.stdout.close()
            if not self.facts.get("done") and not self.problems:
                self.problems.append("its process ended before the run did")
            self._over.set()

    def finish(self, code: int) -> bool:
        """Tell it that the run is over, and wait a few seconds. Whether everything was handed on, or never will be."""
        process = self._process
        if process is None or process.stdin is None:
            return True
        deadline = time.monotonic() + WAIT
        self._begun.wait(WAIT)
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(json.dumps({"exit": code}) + "\n")
            process.stdin.close()
        over = self._over.wait(max(0.0, deadline - time.monotonic()))
        if over:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        if not self.facts.get("done") and self.facts.get("mode") not in ("none", "disabled"):
            self._copy(code)
        return over

    def _copy(self, code: int) -> None:
        """Begin to write the whole run once more as one of wandb's offline runs, which can be sent whenever its server is there.

        What wandb itself has on disk is not enough: it writes in blocks, and the last is lost with its process.
        """
        process = self._copying = self._started(heard=False)
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.write(
                    json.dumps({**self._asked, "copy": True}) + "\n" + json.dumps({"exit": code}) + "\n"
                )
                process.stdin.close()
