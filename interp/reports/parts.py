"""What a section of a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from ..plots import Figure


@dataclass(frozen=True)
class Table:
    """Rows under names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of a report. Words are paragraphs; a picture that could not be drawn is a word of why."""

    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)
    code: str = ""
    html: str = ""  # what a notebook shows of a thing of ours
    text: Sequence[str] = ()  # kept as it is written, in a block of its own


def table_of(frame: pd.DataFrame, caption: str, rows: int = 200) -> Table:
    """The first rows of a table; the caption says how many are left out."""
    shown = frame.head(rows)
    more = f"{caption} (the first {rows} of {len(frame):,} rows)" if len(frame) > rows else caption
    return Table([str(name) for name in frame.columns], list(shown.itertuples(index=False)), more)
