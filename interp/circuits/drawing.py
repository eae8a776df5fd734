"""What is drawn of a graph whose nodes have a place of their own: rows from bottom to top, boxes in them, scored edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Box:
    """A node: its row, its place in it (None: beside the others, by score), its label and score, and what a hover says."""

    name: str
    row: int
    label: str
    score: float | None = None
    column: float | None = None
    says: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """Boxes, edges by name with their scores, the names of the rows, and of columns where nodes have one."""

    boxes: Sequence[Box]
    edges: Mapping[tuple[str, str], float]
    rows: Sequence[str]
    title: str
    about: str
    quantity: str
    columns: Sequence[str] = ()
