"""Cells: what a plan becomes for one model and one set of pairs. The engine runs cells and knows no plan."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .edits import Edge, Edit
from .errors import PairsError, PlanError
from .pairs import EncodedPairs
from .sites import Site


def integers(values: Any, what: str) -> tuple[int, ...]:
    """One whole number or several, numpy's and torch's too, as a tuple. PlanError: anything else, or one given twice."""
    values = values.tolist() if hasattr(values, "tolist") else values
    listed = values if hasattr(values, "__iter__") and not isinstance(values, str) else [values]
    try:
        made = tuple(operator.index(value) for value in listed)
    except TypeError:
        raise PlanError(f"{what} must be whole numbers, not {values!r}") from None
    if len(set(made)) < len(made):
        raise PlanError(f"{what} are given twice: {made}")
    return made


class SiteFacts(Protocol):
    """What a plan asks of a model; `Model` fulfils it."""

    @property
    def n_layers(self) -> int: ...

    @property
    def parallel(self) -> bool: ...
    def heads_of(self, kind: str) -> int: ...
    def units_of(self, kind: str) -> int: ...
    def require(self, site: Site) -> Site: ...


@dataclass(frozen=True)
class Place:
    """Where along the prompt an edit acts: all positions, one position, fixed positions, or a named position of the pairs."""

    name: str | None = None
    at: tuple[int, ...] | None = None

    def columns(self, encoded: EncodedPairs, pair: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(clean positions, corrupted positions) in one pair, or None where the pair is too short."""
        if self.name is not None:
            clean, corrupted = encoded.positions[self.name][pair]
            return clean, clean if encoded.corrupted is None else corrupted
        assert self.at is not None
        length = len(encoded.clean[pair])
        if any(not -length <= position < length for position in self.at):
            return None
        places = tuple(position % length for position in self.at)
        return places, places


EVERYWHERE = Place()


@dataclass(frozen=True)
class Cell:
    """One entry of a result: its index along the plan's dims, and the edits that are made together for it."""

    index: tuple[int, ...]
    edits: tuple[tuple[Edit, Place], ...] = ()
    edges: tuple[Edge, ...] = ()
    #: edges whose difference also passes through the MLPs between sender and receiver
    through_mlps: bool = False
    #: edges that are cut, bool [receiver, sender] in the order of `interp.order`, or None
    cut: np.ndarray | None = None
    #: the cut edges of another run, which this cell's run equals below the first layer where the two differ: that run is made
    #: once for all cells that name it, and each branches off from it there; or None
    trunk: np.ndarray | None = None


@dataclass(frozen=True)
class Resolved:
    """A plan for one model and one set of pairs: dims with their labels (pairs excluded), and cells."""

    dims: tuple[tuple[str, tuple[Any, ...]], ...]
    cells: tuple[Cell, ...]
    spec: dict[str, Any]


def checked(resolved: Resolved, encoded: EncodedPairs) -> Resolved:
    """The same, if there is something to do and every position has its counterpart. Raises PlanError, PairsError."""
    if not resolved.cells:
        raise PlanError("the plan has no cells: no layer, head, unit or position is left to patch")
    if encoded.corrupted is None:
        return resolved
    edits = {
        (edit.site.facts.view == "mixture", edit.op, place.name)
        for cell in resolved.cells
        for edit, place in cell.edits
    }
    if any(mixes and op == "replace" for mixes, op, _ in edits):
        encoded.require_aligned("patching a pattern")
    for mixes, _, name in sorted(edits, key=str):
        for pair, (clean, corrupted) in enumerate(encoded.positions[name] if name is not None else ()):
            if len(clean) != len(corrupted):
                raise PairsError(
                    f"position {name!r} of pair {pair} is {len(clean)} tokens in the clean prompt {clean} and "
                    f"{len(corrupted)} in the corrupted one {corrupted}; patching needs as many in both"
                )
            if mixes and clean != corrupted:
                raise PlanError(
                    f"a pattern's row attends to the positions before it, so it is patched at one position in both "
                    f"prompts, but {name!r} of pair {pair} is at {clean} and at {corrupted}"
                )
    return resolved


def longest(encoded: EncodedPairs) -> str:
    """How far positions reach, for messages."""
    return f"the longest prompt has positions 0 to {max(len(prompt) for prompt in encoded.clean) - 1}"


def overlap(site: Site, place: Place, other: Site, at: Place, encoded: EncodedPairs) -> bool:
    """Whether two edits change the same numbers of some pair; -1 and the last position are one."""
    if not site.at(position=None).overlaps(other.at(position=None)):
        return False
    if EVERYWHERE in (place, at):
        return True
    columns = [(place.columns(encoded, pair), at.columns(encoded, pair)) for pair in range(len(encoded.clean))]
    return any(one and two and set(one[0]) & set(two[0]) for one, two in columns)
