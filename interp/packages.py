"""Packages that one room needs: imported when that room is first used; where one is missing or broken, all else works."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

from .errors import PackageError


def require(name: str, what: str, package: str = "") -> ModuleType:
    """Import a module for something; `package` is what it is installed by, where that has another name.

    Raises:
        PackageError: it is missing or fails while it is imported, with the command that installs it.
    """
    try:
        return import_module(name)
    except Exception as error:  # a broken installation fails in as many ways as it has files
        root = name.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == root
        state = "is not installed" if missing else f"cannot be imported ({type(error).__name__}: {error})"
        again = "" if missing else "--force-reinstall "
        raise PackageError(
            f"{what} need {package or root}, which {state}: pip install {again}{wanted(package or root)!r}; "
            "everything else works without it"
        ) from error


def wanted(package: str) -> str:
    """A package with the versions that this one asks for, as pip takes them."""
    try:
        asked = requires("interp") or []
    except PackageNotFoundError:  # run from its sources
        asked = []
    own = (line.split(";")[0].replace(" ", "") for line in asked)
    return next((line for line in own if re.split(r"[<>=!~\[]", line)[0].lower() == package.lower()), package)
