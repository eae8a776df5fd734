"""Labels: tokens and positions as a reader tells them apart. Nothing here imports bokeh."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from unicodedata import east_asian_width

import xarray as xr

from ..effects import Effects

VARYING = "∗"  # marks a position whose token differs between pairs


def position_labels(effects: Effects) -> tuple[list[str], list[str]]:
    """Short and full labels of the position axis: tokens where all pairs agree, told apart where they repeat.

    A token that stands at several positions carries its index (`12 ·John`). A position whose token differs between
    pairs has the name that the pairs give it (`11 S2`), else a mark (`12 ∗`). Named positions keep their names.
    """
    prompts = effects.provenance.get("tokens") or []
    names = _names(effects)
    positions = coordinate(effects.values, "position")
    short, full = [], []
    for p in positions:
        seen = Counter(t[p] for t in prompts if -len(t) <= p < len(t)) if isinstance(p, int) else Counter()
        if len(seen) == 1:
            token = next(iter(seen))
            short.append(visible(token))
            full.append(f"position {p} “{visible(token, 200)}”")
        elif seen:
            most = ", ".join(f"“{visible(token, 40)}”" for token, _ in seen.most_common(4))
            short.append(f"{p} {visible(names[p]) if p in names else VARYING}")
            more = ", …" if len(seen) > 4 else ""
            called = f" ({visible(names[p])})" if p in names else ""
            full.append(f"position {p}{called}, {len(seen)} different tokens: {most}{more}")
        else:
            short.append(visible(str(p), 18))
            full.append(f"position {p}")
    return told_apart(short, positions), full


def _names(effects: Effects) -> dict[int, str]:
    """What the pairs call a position, where that is the same one in every pair."""
    named = (effects.provenance.get("prompts") or {}).get("positions") or {}
    return {at[0]: name for name, (at, *others) in named.items() if len(at) == 1 and all(o == at for o in others)}


def coordinate(values: xr.DataArray, dim: str) -> list[int | str]:
    """The labels of a dim, or their numbers where it has none; numbers among names are strings that say them."""
    labels = values[dim].values.tolist() if dim in values.coords else list(range(values.sizes[dim]))
    return [int(at) if isinstance(at, str) and at.removeprefix("-").isdecimal() else at for at in labels]


def extent(text: str) -> float:
    """About how many px a label of 11 px type is wide, rather too many than too few."""
    wide = [12 if east_asian_width(c) in "WF" else 11 if c in "mwMW@%…" else 0 for c in text]
    return sum(w or (8.5 if c.isupper() else 6.5) for w, c in zip(wide, text, strict=True))


def told_apart(labels: list[str], indices: Sequence[object] | None = None) -> list[str]:
    """Labels that occur more than once get their index in front: `12 ·John`."""
    count = Counter(labels)
    named = zip(range(len(labels)) if indices is None else indices, labels, strict=True)
    return [f"{i} {label}" if count[label] > 1 else label for i, label in named]


def plain(text: str) -> str:
    """`text` with zero-width spaces where Bokeh would otherwise read TeX: `$$…$$`, `\\(…\\)`, `\\[…\\]`."""
    return re.sub(r"\$(?=\$)|\\(?=[\[\]()])", lambda found: found[0] + "\u200b", text)


def visible(token: str, length: int = 14) -> str:
    """A token as a label: whitespace and control characters visible, no longer than `length`."""
    token = token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    token = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in token) or "∅"
    return plain(token if len(token) <= length else token[: length - 1] + "…")
