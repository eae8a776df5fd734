"""Bundled models: small real language models from a package registry, so that no model hub is needed.

The one function that hands out a folder to load; the table of models is in `packages.py`, how 4-bit weights become
that folder in `conversion.py`. Imports the standard library, filelock (lazily) and rooms above.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import ModelNotFoundError
from ..files import path_of
from .conversion import convert, damage
from .packages import BUNDLED


def cache_root() -> Path:
    """The folder that holds converted models: `INTERP_CACHE`, or `interp` in the platform's user cache."""
    if given := os.environ.get("INTERP_CACHE"):
        return path_of(given, ModelNotFoundError, "INTERP_CACHE")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return path_of(base, ModelNotFoundError, "the user's cache") / "interp"


def ensure_bundled(name: str, *, progress: bool = True, accept_license: bool = False) -> Path:
    """The folder of a bundled model as plain fp32 HuggingFace files; made on first use, checked on every one.

    The first use installs the model's package into the running environment (after saying so), and converts it
    within about a minute. Safe when several processes ask at once: one converts, the others wait for it.

    Args:
        name: a key of `BUNDLED`.
        progress: say on stderr what is being done. Installing a package is said in any case.
        accept_license: the caller has read and accepts the model's licence, where one asks for it.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Raises:
        ModelNotFoundError: an unknown name, a licence not accepted, a package that cannot be installed, a
            weight file that is not the expected one, or no room for the converted model; with the remedy.
    """
    row = BUNDLED.get(name)
    if row is None:
        raise ModelNotFoundError(f"no bundled model {name!r}; the bundled models are: {', '.join(BUNDLED)}")
    home = cache_root() / "models"
    folder = home / row.name
    if folder.is_dir() and damage(folder, row) is None:
        return folder

    if row.accept_env and not accept_license and os.environ.get(row.accept_env) != "1":
        raise ModelNotFoundError(
            f"{row.display_name} comes under the {row.license}, which you must accept first. "
            f"{row.license_note} To accept: set {row.accept_env}=1, or pass accept_license=True."
        )
    from filelock import FileLock

    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{row.name}.lock"):
            # Another process may have converted while this one waited.
            problem = damage(folder, row) if folder.is_dir() else "not converted yet"
            if problem is not None:
                if progress and folder.is_dir():
                    print(f"interp: {folder} cannot be used ({problem}); converting again", file=sys.stderr)
                convert(row, home, progress)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(
            f"cannot write the converted {row.display_name} ({row.disk_mb} MB) under {home}: {error}. "
            "Make room there, or set INTERP_CACHE to another folder."
        ) from error
    return folder
