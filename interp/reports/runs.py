"""A tracked run in a report: its configuration, its last metrics, and what it kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from .parts import Section, Table, table_of

if TYPE_CHECKING:
    from ..tracking import Run


def of_run(item: object, title: str) -> Section:
    """The run itself; its effects and circuits are items of their own (`run.effects(name)`)."""
    run = cast("Run", item)
    tables = [Table(["setting", "value"], [[name, str(value)] for name, value in run.config.items()], "Configuration")]
    if len(run.metrics):
        tables.append(table_of(run.metrics.tail(20), "The last metrics"))
    return Section(title or f"Run {run.path.name}", [repr(run).splitlines()[0]], tables=tables)
