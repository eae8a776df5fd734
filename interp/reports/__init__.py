"""Reports: one standalone page of anything that experiments give, in words, pictures and tables, with code that does it again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import PlotError
from ..files import path_of, write_atomically
from .page import page_of
from .parts import Section
from .sections import section_of

__all__ = ["Section", "report", "section_of"]

Item = object


def report(items: Iterable[Item] | Item, path: str | os.PathLike[str], title: str = "Report") -> Path:
    """Write one page of results: contents, sentences made from the records, pictures, sortable tables, provenance, code.

    Args:
        items: one thing or several, each by itself or as (heading, thing): `Effects`, circuits, what `evaluate_circuit` and
            `evaluate_sae` give, audits, lenses and attention patterns, dictionaries, figures, tables (pandas), what was
            generated, tracked runs, and text, which is a paragraph.
        path: an .html file.
        title: the heading of the page.

    Returns:
        The path. The page stands alone, opens with no network, in light and dark, on a phone, and can be printed.

    Raises:
        PlotError: nothing to show, a thing that a report cannot show, or a place that cannot be written; before the page is.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[20, 23]))
        >>> interp.report([effects, "What I make of it."], "ioi.html", title="Indirect objects").name
        'ioi.html'
    """
    where = path_of(path, PlotError)
    if where.suffix != ".html":
        raise PlotError(f"a report is a page: {where.name!r} must end in .html")
    single = isinstance(items, str) or not isinstance(items, list | tuple) or _is_named(items)
    given = [items] if single else list(items)  # type: ignore[arg-type]
    if not given:
        raise PlotError("a report was given nothing to show")
    sections = [section_of(item[1], str(item[0])) if _is_named(item) else section_of(item) for item in given]  # type: ignore[index]
    page = page_of(title, told_apart(sections))
    try:
        write_atomically(where, page.encode())
    except OSError as error:
        raise PlotError(f"cannot write {where}: {error.strerror or error}") from error
    return where


def told_apart(sections: list[Section]) -> list[Section]:
    """Headings that come again get a number, so that contents lead where they say."""
    seen: dict[str, int] = {}
    made = []
    for section in sections:
        seen[section.title] = count = seen.get(section.title, 0) + 1
        made.append(replace(section, title=f"{section.title} ({count})") if section.title and count > 1 else section)
    return made


def _is_named(item: object) -> bool:
    """Whether it is (heading, thing)."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
