"""Where a run runs: versions, git, the command, the machine. No value of the environment, no user and no secret."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Packages that numbers and pictures depend on.
PACKAGES = (
    "interp", "torch", "transformers", "tokenizers", "nnsight", "numpy", "xarray", "pandas", "safetensors", "accelerate",
    "bitsandbytes", "peft", "datasets", "sae-lens", "transformer-lens", "networkx", "bokeh", "wandb",
)  # fmt: skip
#: Seconds that git may take: a repository may be on a slow disk.
PATIENCE = 3.0
FEW = 50
#: Characters of a word of the command: `python -c` has a whole program in one.
LONGEST = 200


def environment() -> dict[str, object]:
    """Versions, git state, command, python and platform."""
    return {
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git": git_state(Path.cwd()),
        "command": [
            Path(sys.executable).name,
            *(word if len(word) <= LONGEST else word[:LONGEST] + "…" for word in sys.orig_argv[1:]),
        ],
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "devices": _devices(),
    }


def git_state(folder: Path) -> dict[str, object] | None:
    """Commit, branch, and which files differ from it; None outside a repository, or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    if changed is None:
        return {"commit": commit, "branch": _git(folder, "branch", "--show-current"), "dirty": None}
    files = changed.splitlines()
    more = {"more": len(files) - FEW} if len(files) > FEW else {}
    branch = _git(folder, "branch", "--show-current")
    return {"commit": commit, "branch": branch, "dirty": bool(files), "changed": files[:FEW], **more}


def _git(folder: Path, *words: str) -> str | None:
    """What git answers; None where there is no git, no repository, or no answer in time."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, env=quiet, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").rstrip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """The graphics cards that torch sees, where it has been imported and used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def machine() -> dict[str, str]:
    """What tells this machine, since it was started, from others: its name, and the mark of its start where it has one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}
