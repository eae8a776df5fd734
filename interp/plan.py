"""Plans: which edits make up an experiment, as labelled cells. `grid`, `heads`, `neurons`, `sets` describe; a model decides.

A plan names its axes before any model is known; `resolve` turns it into cells of edits for one model and one set of
pairs, and refuses what cannot be before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cells import EVERYWHERE, Cell, Place, Resolved, SiteFacts, checked, integers, longest, overlap
from .edits import Edge, Edit
from .errors import PlanError, SiteError
from .pairs import EncodedPairs
from .sites import HEAD_KINDS, KINDS, KV_KINDS, UNIT_KINDS, Site

Positions = Sequence[int | str] | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class Plan:
    """Components × layers × (positions | heads | units), or named sets of sites. Made by `grid`, `heads`, `neurons`, `sets`."""

    components: tuple[str, ...]
    axis: str  # "position" | "head" | "unit" | "set" | "path"
    layers: tuple[int, ...] | None = None
    items: tuple[int, ...] | None = None  # heads or units; None = all
    positions: Any = None  # tuple of ints and names; None = each position (grid) or all at once (heads, units)
    named: tuple[tuple[str, tuple[int, ...]], ...] = ()
    members: tuple[tuple[str, tuple[Edit, ...]], ...] = ()
    edit: Edit | None = None  # template of the operation; None = replace by the source run
    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = ()
    together: bool = False
    through_mlps: bool = False

    def with_edit(self, op: str, value: Any = None) -> Plan:
        """The same cells with another operation in every edit."""
        return replace(self, edit=Edit(Site("embed"), op, value))

    def spec(self) -> dict[str, Any]:
        """The plan as plain data, for provenance and checkpoints."""
        return {
            "components": list(self.components),
            "axis": self.axis,
            "layers": None if self.layers is None else list(self.layers),
            "items": None if self.items is None else list(self.items),
            "positions": None if self.positions is None else list(self.positions),
            "named": {name: list(at) for name, at in self.named},
            "members": {name: [f"{edit.op} {edit.site}" for edit in edits] for name, edits in self.members},
            "edit": None if self.edit is None else self.edit.op,
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "together": self.together,
            "through_mlps": self.through_mlps,
        }

    def resolve(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        """Cells for this model and these pairs.

        Raises:
            SiteError, SiteUnavailableError, AuditError: a site that this model does not have.
            PairsError: a position-wise plan on pairs whose prompts differ in length.
            PlanError: a named position that the pairs do not have, or nothing left to do.
        """
        if self.axis == "set":
            return self._resolve_sets(model, encoded)
        if self.axis == "path":
            return self._resolve_paths(model, encoded)
        layers = tuple(range(model.n_layers)) if self.layers is None else self.layers
        layerless = [kind for kind in self.components if kind == "embed"]
        layers = tuple(
            model.require(Site("resid_pre" if kind in layerless else kind, layer=layer)).layer or 0
            for kind in self.components[:1]
            for layer in layers
        )
        integers(layers, "layers")  # -1 and the last may be the same
        places, labels = self._places(encoded)
        sizes = {kind: self._size(model, kind) for kind in self.components}
        if self.axis == "position":
            items: tuple[Any, ...] = tuple(range(len(places)))
            item_labels: tuple[Any, ...] = labels
        else:
            items = tuple(range(max(sizes.values()))) if self.items is None else self.items
            item_labels = items
        dims = [("component", self.components), ("layer", layers), (self.axis, item_labels)]
        crossed = self.axis != "position" and self.positions is not None
        if crossed:
            dims.append(("position", labels))
        cells = []
        for c, kind in enumerate(self.components):
            for la, layer in enumerate(layers):
                if kind == "embed" and la:
                    continue
                for it, item in enumerate(items):
                    if self.axis != "position" and self.items is None and item >= sizes[kind]:
                        continue
                    part = {} if self.axis == "position" else {self.axis: item}
                    site = model.require(Site(kind, layer=None if kind == "embed" else layer, **part))
                    edit = self._edit(site)
                    if self.axis == "position":
                        cells.append(Cell((c, la, it), ((edit, places[item]),)))
                    elif crossed:
                        cells += [Cell((c, la, it, p), ((edit, place),)) for p, place in enumerate(places)]
                    else:
                        cells.append(Cell((c, la, it), ((edit, EVERYWHERE),)))
        if self.axis != "position" and not crossed:
            encoded.require_aligned("a plan over all positions")
        return checked(Resolved(tuple(dims), tuple(cells), self.spec()), encoded)

    def _resolve_sets(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        cells = []
        for index, (name, edits) in enumerate(self.members):
            made: list[tuple[Edit, Place]] = []
            for edit in edits:
                site = model.require(edit.site)
                place = EVERYWHERE if site.position is None else Place(at=(site.position,))
                edit = self._edit(site) if self.edit else replace(edit, site=site)
                for other, at in made:
                    if (edit.op, other.op) != ("replace", "replace") and overlap(
                        edit.site, place, other.site, at, encoded
                    ):
                        raise PlanError(
                            f"set {name!r} has {other.op!r} at {other.site} and {edit.op!r} at {site}, which change the same "
                            "numbers; join them into one edit"
                        )
                made.append((edit, place))
                if place.at and all(place.columns(encoded, pair) is None for pair in range(len(encoded.clean))):
                    raise SiteError(f"{site}: position {site.position}, but {longest(encoded)}")
            cells.append(Cell((index,), tuple(made)))
        if any(edit.op == "replace" or place.at for cell in cells for edit, place in cell.edits):
            encoded.require_aligned("a plan over positions")
        return checked(Resolved((("component", self.components),), tuple(cells), self.spec()), encoded)

    def _resolve_paths(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        encoded.require_aligned("path patching")
        sides = [tuple(model.require(Site.parse(name)) for name in side) for side in (self.senders, self.receivers)]
        lengths = [len(prompt) for prompt in encoded.clean]
        for site in (*sides[0], *sides[1]):
            if site.position is not None and not all(-n <= site.position < n for n in lengths):
                raise SiteError(
                    f"{site.node}: position {site.position}, but the shortest prompt has {min(lengths)} tokens"
                )
        cells = []
        for i, sender in enumerate(sides[0]):
            for j, receiver in enumerate(sides[1]):
                edge = Edge(sender, receiver)
                if edge.exists(model.parallel):
                    cells.append(Cell((i, j), edges=(edge,), through_mlps=self.through_mlps))
        senders, receivers = (tuple(site.node for site in side) for side in sides)
        dims: tuple[tuple[str, tuple[Any, ...]], ...] = (("sender", senders), ("receiver", receivers))
        if not cells:
            raise PlanError(
                f"no receiver of {list(self.receivers)} is downstream of any sender of {list(self.senders)}"
            )
        if self.together:
            edges = tuple(edge for cell in cells for edge in cell.edges)
            dims = (("sender", ("+".join(senders),)), ("receiver", ("+".join(receivers),)))
            cells = [Cell((0, 0), edges=edges, through_mlps=self.through_mlps)]
        return checked(Resolved(dims, tuple(cells), self.spec()), encoded)

    def _edit(self, site: Site) -> Edit:
        return Edit(site) if self.edit is None else replace(self.edit, site=site)

    def _size(self, model: SiteFacts, kind: str) -> int:
        return 0 if self.axis == "position" else model.heads_of(kind) if self.axis == "head" else model.units_of(kind)

    def _places(self, encoded: EncodedPairs) -> tuple[list[Place], tuple[Any, ...]]:
        """The positions of the plan with their labels; None means each position of the longest pair."""
        named = dict(self.named)
        wanted = self.positions
        if wanted is None:
            if self.axis != "position":
                return [], ()
            wanted = tuple(range(max(len(prompt) for prompt in encoded.clean)))
        if any(isinstance(position, int) for position in wanted) or named:
            encoded.require_aligned("a plan over positions")
        places = []
        for position in wanted:
            if isinstance(position, int) or position in named:
                place = Place(at=named.get(position, (position,)))
                if all(place.columns(encoded, pair) is None for pair in range(len(encoded.clean))):
                    window = f" {position!r} = {place.at}" if position in named else f" {position}"
                    raise SiteError(f"position{window}, but {longest(encoded)}")
            elif position in encoded.positions:
                place = Place(name=position)
            else:
                raise PlanError(
                    f"the pairs have no position named {position!r}; they have "
                    f"{sorted(encoded.positions) or 'none'}; name it in PromptPairs(positions={{{position!r}: [...]}})"
                )
            places.append(place)
        return places, tuple(wanted)


def _components(
    components: Any, layers: Any, allowed: Sequence[str], what: str
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Kinds of sites, and the layers that are asked for or that the names carry, as hook names of TransformerLens do."""
    names = [components] if isinstance(components, str | Site) else list(components)
    sites = []
    for name in names:
        bare = isinstance(name, str) and "hook" not in name and "." not in name
        if bare and name not in KINDS:
            raise SiteError(f"unknown component {name!r}; components are: {', '.join(KINDS)}")
        sites.append(Site(str(name)) if bare else Site.parse(name))
        if sites[-1].kind not in allowed:
            raise PlanError(f"{what} needs one of {', '.join(allowed)}, got {str(name)!r}")
        if sites[-1] != Site(sites[-1].kind, layer=sites[-1].layer):
            raise PlanError(f"{what} takes whole kinds of sites, but {str(name)!r} is one place; use interp.sets")
    if not sites:
        raise PlanError(f"{what} was given no component")
    whole = [site.kind for site in sites if site.layer is None]
    if len(set(sites)) < len(sites) or any(site.layer is not None and site.kind in whole for site in sites):
        raise PlanError(f"{what} was given a component twice: {', '.join(map(str, names))}")
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    carried = {kind: tuple(site.layer for site in sites if site.kind == kind) for kind in kinds}
    if all(found == (None,) for found in carried.values()):
        return kinds, None if layers is None else integers(layers, "layers")
    if layers is not None or len(set(carried.values())) > 1:
        why = f"layers={layers} is given too" if layers is not None else f"they are not the same for all: {carried}"
        raise PlanError(f"{what}: {', '.join(map(str, names))} name layers, but {why}; use one plan for each, or sets")
    return kinds, tuple(layer for layer in carried[kinds[0]] if layer is not None)


def _positions(positions: Positions | int | str) -> tuple[Any, tuple[tuple[str, tuple[int, ...]], ...]]:
    if positions is None:
        return None, ()
    if isinstance(positions, str):
        return (positions,), ()
    if isinstance(positions, Mapping):
        named = tuple((name, integers(at, f"positions of {name!r}")) for name, at in positions.items())
        if empty := [name for name, at in named if not at]:
            raise PlanError(f"the positions of {empty[0]!r} are empty; name at least one")
        return tuple(name for name, _ in named), named
    positions = [positions] if not hasattr(positions, "__iter__") else positions
    made = tuple(at if isinstance(at, str) else integers(at, "positions")[0] for at in positions)
    if len(set(made)) < len(made):
        raise PlanError(f"positions are given twice: {made}")
    return made, ()


def grid(components: str | Sequence[str], layers: Sequence[int] | int | None = None, positions: Any = None) -> Plan:
    """One cell for each component, layer and position. None = all.

    Args:
        components: kinds of sites (`resid_pre`, `attn_out`, `mlp_out`, …), or TransformerLens hook names, which name their
            layers: then `layers` is left out.
        layers: counted from 0, negative from the end.
        positions: ints (negative from the end), names of `PromptPairs(positions=…)`, or `{"name": [ints]}`, windows
            patched together in every pair. Ints and names together make all labels of the result strings.
    """
    places, named = _positions(positions)
    kinds, at = _components(components, layers, [kind for kind in KINDS if kind != "logits"], "grid")
    return Plan(kinds, "position", at, None, places, named)


def heads(
    components: str | Sequence[str] = "z",
    layers: Sequence[int] | int | None = None,
    heads: Sequence[int] | int | None = None,
    positions: Any = None,
) -> Plan:
    """One cell for each component, layer and head, at all positions together, or crossed with `positions`.

    k, v and k_rot count key/value heads; cells of heads that a component lacks are NaN.
    """
    places, named = _positions(positions)
    kinds, at = _components(components, layers, HEAD_KINDS, "heads")
    items = None if heads is None else integers(heads, "heads")
    if items is not None and len({kind in KV_KINDS for kind in kinds}) > 1:
        raise PlanError("query heads and key/value heads cannot share one list of heads; make two plans")
    return Plan(kinds, "head", at, items, places, named)


def neurons(
    layer: Sequence[int] | int | None = None,
    units: Sequence[int] | int | None = None,
    component: str = "neuron",
    positions: Any = None,
) -> Plan:
    """One cell for each MLP unit of one or more layers, at all positions together, or crossed with `positions`."""
    places, named = _positions(positions)
    kinds, at = _components(component, layer, UNIT_KINDS, "neurons")
    return Plan(kinds, "unit", at, None if units is None else integers(units, "units"), places, named)


def sets(members: Mapping[str, Sequence[Any]]) -> Plan:
    """One cell for each named set of sites, all patched together: `{"name movers": ["L9.H6.z", "L9.H9.z"]}`.

    A member is a `Site`, its text, or an `Edit`. The dims of the result are (component, pair).
    """
    if not members:
        raise PlanError("sets was given no set")
    made = []
    for name, sites in members.items():
        edits = tuple(site if isinstance(site, Edit) else Edit(Site.parse(site)) for site in sites)
        if not edits:
            raise PlanError(f"set {name!r} is empty")
        made.append((str(name), edits))
    return Plan(tuple(name for name, _ in made), "set", members=tuple(made))


def paths(
    senders: Sequence[str | Site] | str,
    receivers: Sequence[str | Site] | str,
    *,
    together: bool = False,
    through_mlps: bool = False,
) -> Plan:
    """One cell for each sender → receiver edge (dims sender, receiver); `together` makes all edges one cell."""
    sides = []
    for side, what in ((senders, "senders"), (receivers, "receivers")):
        names = (side,) if isinstance(side, str | Site) else tuple(side)
        if not names:
            raise PlanError(f"paths was given no {what}")
        sides.append(tuple(Site.parse(name).node for name in names))
        if len(set(sides[-1])) < len(names):
            raise PlanError(f"paths was given {what} twice: {', '.join(sides[-1])}")
    return Plan((), "path", senders=sides[0], receivers=sides[1], together=together, through_mlps=through_mlps)
