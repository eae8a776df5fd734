"""How an experiment runs, whatever it is: one value, checked when it is made, for every method."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from .errors import InterpError, PlanError

#: From the reference to the fastest; "auto" takes the fastest that is exact on the model at hand.
SCHEDULES = ("naive", "rows", "growing", "prefix")
Path = str | os.PathLike[str]


class RunOptions(TypedDict, total=False):
    """The same as keyword arguments of a method."""

    schedule: str
    max_tokens: int | None
    progress: bool | None
    checkpoint: Path | None


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """TypeError: a keyword argument that a method does not have."""
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"unexpected option {unknown[0]!r}; the options are {', '.join(known)}")


@dataclass(frozen=True)
class Options:
    """How an experiment runs.

    Args:
        schedule: "auto", or one of "naive", "rows", "growing", "prefix"; all give the same numbers.
        max_tokens: tokens in one forward pass; None is what the device takes.
        progress: show a bar; None is for long work on a terminal.
        checkpoint: a path; what is finished is written there and a later call with the same arguments continues.

    Raises:
        PlanError: an unknown schedule, or less than one token.
    """

    schedule: str = "auto"
    max_tokens: int | None = None
    progress: bool | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("auto", *SCHEDULES):
            raise PlanError(f"unknown schedule {self.schedule!r}; the schedules are: auto, {', '.join(SCHEDULES)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PlanError(
                f"max_tokens={self.max_tokens}: a forward pass holds 1 token or more; leave it out for the default"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any], *others: str, error: type[InterpError] = PlanError) -> Options:
        """From a method's keyword arguments, of which it has taken `others` for itself.

        Raises:
            TypeError: one that nobody knows. `error`: one that cannot be.
        """
        names = [part.name for part in fields(cls)]
        refuse_unknown(given, (*names, *others))
        try:
            return cls(**{name: value for name, value in given.items() if name in names})
        except PlanError as refused:
            raise error(str(refused)) from None
