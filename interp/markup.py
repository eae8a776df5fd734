"""HTML of small tables, for what a notebook shows and for reports. Standard library alone; styles are the page's own.

A table that stands on a page of `interp.reports` can be sorted; in a notebook it is a plain one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

__all__ = ["definitions", "escape", "said", "table"]


def said(value: object) -> str:
    """A value in a cell: numbers with four digits, nothing for None, text as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}".replace("-", "−") if value == value else "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", cls: str = "") -> str:
    """A table; columns whose cells are numbers are set to the right, each cell with its number for sorting."""
    body, numeric = [], [True] * len(columns)
    for row in rows:
        cells = []
        for place, given in enumerate(row):
            value = given.item() if hasattr(given, "item") else given  # numpy's numbers
            number = isinstance(value, int | float) and not isinstance(value, bool)
            numeric[place] &= number or value is None
            key = f' data-value="{value!r}"' if number else ""
            right = " style='text-align:right'" if number else " style='text-align:left'"
            cells.append(f"<td{right}{key}>{escape(said(value))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    sides = ["right" if number and body else "left" for number in numeric]
    heads = "".join(
        f"<th scope='col' style='text-align:{side}'>{escape(name)}</th>"
        for name, side in zip(columns, sides, strict=True)
    )
    title = f"<caption style='text-align:left'>{escape(caption)}</caption>" if caption else ""
    kind = f" class='{cls}'" if cls else ""
    return f"<table{kind}>{title}<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def definitions(entries: Mapping[str, object], caption: str = "") -> str:
    """Names and values, values that are mappings or long lists folded."""
    rows = "".join(
        f"<tr><th scope='row' style='text-align:left;vertical-align:top'>{escape(str(name))}</th>"
        f"<td style='text-align:left'>{_value(value)}</td></tr>"
        for name, value in entries.items()
    )
    title = f"<caption style='text-align:left'>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<tbody>{rows}</tbody></table>"


def _value(value: object) -> str:
    """A value of a definition as HTML."""
    if isinstance(value, Mapping) and value:
        return definitions({str(name): part for name, part in value.items()})
    if isinstance(value, list | tuple) and value:
        listed = str(list(value))
        if len(listed) <= 120:
            return escape(listed)
        lines = "<br>".join(escape(str(part)) for part in value)
        return f"<details><summary>{len(value)} entries</summary>{lines}</details>"
    return escape(said(value)) if value is not None else "none"
