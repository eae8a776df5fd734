"""Plans: which edits make up an experiment, as labelled cells. `grid`, `heads`, `neurons`, `features`, `sets` describe; a
model decides.

A plan names its axes before any model is known; `resolve` turns it into cells of edits for one model and one set of pairs,
and refuses what cannot be before anything runs. Products of axes stand in `interp.product`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .cells import EVERYWHERE, Cell, Place, Resolved, SiteFacts, checked, integers, longest, overlap
from .edits import Edge, Edit
from .encoded import EncodedPairs
from .errors import PlanError, SiteError
from .product import Components, Numbers, Positions, Product, named_components, named_positions
from .sites import HEAD_KINDS, KINDS, KV_KINDS, UNIT_KINDS, Site
from .views import View


class Plan(Protocol):
    """What an experiment changes, in labelled cells. Made by `grid`, `heads`, `neurons`, `features` and `sets`.

    Examples:
        >>> plan = interp.grid(["resid_pre", "attn_out"], layers=[20, 23])  # one of those that make a plan
        >>> plan.spec()["components"], plan.spec()["layers"]
        (['resid_pre', 'attn_out'], [20, 23])
    """

    def spec(self) -> dict[str, object]:
        """The plan as plain data, for provenance and checkpoints."""

    def resolve(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        """Cells for this model and these pairs.

        Raises:
            SiteError, SiteUnavailableError, AuditError: a site that this model does not have.
            PairsError: a position-wise plan on pairs whose prompts differ in length.
            PlanError: a named position that the pairs do not have, or nothing left to do.
        """


@dataclass(frozen=True)
class Sets:
    """Named sets of edits; those of one set are made together."""

    members: tuple[tuple[str, tuple[Edit, ...]], ...]

    def with_edit(self, op: str, value: float | Tensor | None = None) -> Sets:
        """The same sets with another operation in every edit."""
        changed = [(name, tuple(Edit(edit.site, op, value) for edit in edits)) for name, edits in self.members]
        return Sets(tuple(changed))

    def __repr__(self) -> str:
        sets = "; ".join(
            f"{name}: {', '.join(str(edit.site) for edit in edits[:6])}" for name, edits in self.members[:6]
        )
        return f"Plan({len(self.members)} sets: {sets}{'; …' * (len(self.members) > 6)})"

    def spec(self) -> dict[str, object]:
        """As `Plan.spec`."""
        members = {name: [f"{edit.op} {edit.site}" for edit in edits] for name, edits in self.members}
        return {"axis": "set", "components": list(members), "members": members}

    def resolve(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        """As `Plan.resolve`; one cell for each set."""
        cells = [
            Cell((index,), self._together(name, edits, model, encoded))
            for index, (name, edits) in enumerate(self.members)
        ]
        if any(edit.op == "replace" or place.at for cell in cells for edit, place in cell.edits):
            encoded.require_aligned("a plan over positions")
        names = tuple(name for name, _ in self.members)
        return checked(Resolved((("component", names),), tuple(cells), self.spec()), encoded)

    def _together(
        self, name: str, edits: Sequence[Edit], model: SiteFacts, encoded: EncodedPairs
    ) -> tuple[tuple[Edit, Place], ...]:
        """The edits of one set with their places. PlanError: two of them change the same numbers in an order that counts."""
        made: list[tuple[Edit, Place]] = []
        for edit in edits:
            site = model.require(edit.site)
            place = EVERYWHERE if site.position is None else Place(at=(site.position,))
            for other, at in made:
                if (edit.op, other.op) != ("replace", "replace") and overlap(edit.site, place, other.site, at, encoded):
                    raise PlanError(
                        f"set {name!r} has {other.op!r} at {other.site} and {edit.op!r} at {site}, which change the same "
                        "numbers; join them into one edit"
                    )
            made.append((Edit(site, edit.op, edit.value), place))
            if place.at and all(place.columns(encoded, pair) is None for pair in range(len(encoded.clean))):
                raise SiteError(f"{site}: position {site.position}, but {longest(encoded)}")
        return tuple(made)


@dataclass(frozen=True)
class Paths:
    """Every edge from a sender to a receiver; `together` in one cell, `through_mlps` with the MLPs between them."""

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    together: bool = False
    through_mlps: bool = False

    def spec(self) -> dict[str, object]:
        """As `Plan.spec`."""
        sides = {"senders": list(self.senders), "receivers": list(self.receivers)}
        return {"axis": "path", **sides, "together": self.together, "through_mlps": self.through_mlps}

    def resolve(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        """As `Plan.resolve`; one cell for each edge that the model has."""
        encoded.require_aligned("path patching")
        senders, receivers = (
            tuple(model.require(Site.parse(name)) for name in side) for side in (self.senders, self.receivers)
        )
        lengths = [len(prompt) for prompt in encoded.clean]
        for site in (*senders, *receivers):
            if site.position is not None and not all(-n <= site.position < n for n in lengths):
                raise SiteError(
                    f"{site.node}: position {site.position}, but the shortest prompt has {min(lengths)} tokens"
                )
        edges = {
            (i, j): Edge(sender, receiver)
            for i, sender in enumerate(senders)
            for j, receiver in enumerate(receivers)
            if Edge(sender, receiver).exists(model.parallel)
        }
        if not edges:
            raise PlanError(
                f"no receiver of {list(self.receivers)} is downstream of any sender of {list(self.senders)}"
            )
        names = [[site.node for site in side] for side in (senders, receivers)]
        cells = [Cell(index, edges=(edge,), through_mlps=self.through_mlps) for index, edge in edges.items()]
        if self.together:
            names = [["+".join(side)] for side in names]
            cells = [Cell((0, 0), edges=tuple(edges.values()), through_mlps=self.through_mlps)]
        dims = (("sender", tuple(names[0])), ("receiver", tuple(names[1])))
        return checked(Resolved(dims, tuple(cells), self.spec()), encoded)


def grid(components: Components, layers: Numbers | None = None, positions: Positions = None) -> Product:
    """One cell for each component, layer and position. None = all.

    Args:
        components: kinds of sites (`resid_pre`, `attn_out`, `mlp_out`, …), TransformerLens hook names, which name their
            layers (then `layers` is left out), or views, all parts together.
        layers: counted from 0, negative from the end.
        positions: ints (negative from the end), names of `PromptPairs(positions=…)`, or `{"name": [ints]}`, windows
            patched together in every pair. Ints and names together make all labels of the result strings.

    Examples:
        >>> plan = interp.grid(["resid_pre", "mlp_out"], layers=[20, 21], positions=[-1])
        >>> dict(interp.patch(model, pairs, plan).values.sizes)
        {'component': 2, 'layer': 2, 'position': 1, 'pair': 2}
    """
    places, named = named_positions(positions)
    kinds, at = named_components(components, layers, KINDS[:-1], "grid")
    return Product(kinds, "position", at, None, places, named)


def heads(
    components: Components = "z",
    layers: Numbers | None = None,
    heads: Numbers | None = None,
    positions: Positions = None,
) -> Product:
    """One cell for each component, layer and head, at all positions together, or crossed with `positions`.

    k, v and k_rot count key/value heads; cells of heads that a component lacks are NaN.

    Examples:
        >>> dict(interp.patch(model, pairs, interp.heads("pattern", layers=[23])).values.sizes)
        {'component': 1, 'layer': 1, 'head': 9, 'pair': 2}
    """
    places, named = named_positions(positions)
    kinds, at = named_components(components, layers, HEAD_KINDS, "heads")
    items = None if heads is None else integers(heads, "heads")
    if items is not None and len({kind in KV_KINDS for kind in kinds}) > 1:
        raise PlanError("query heads and key/value heads cannot share one list of heads; make two plans")
    return Product(kinds, "head", at, items, places, named)


def neurons(
    layer: Numbers | None = None,
    units: Numbers | None = None,
    component: Components = "neuron",
    positions: Positions = None,
) -> Product:
    """One cell for each MLP unit of one or more layers, at all positions together, or crossed with `positions`.

    Examples:
        >>> dict(interp.ablate(model, pairs, interp.neurons(layer=5, units=[10, 11])).values.sizes)
        {'component': 1, 'layer': 1, 'unit': 2, 'pair': 2}
    """
    places, named = named_positions(positions)
    kinds, at = named_components(component, layer, UNIT_KINDS, "neurons")
    return Product(kinds, "unit", at, None if units is None else integers(units, "units"), places, named)


def features(
    view: Any, units: Numbers | None = None, layers: Numbers | None = None, positions: Positions = None
) -> Product:
    """One cell for each part of a view: a feature of a dictionary, a coordinate of a basis; as `neurons`.

    Args:
        view: an `interp.View`, or a dictionary of SAELens that knows its site.
        units: numbers of its parts; None = all.
        layers: where the view is one for every layer; None = all. A view of one layer is taken at that one.

    Examples:
        >>> dict(interp.attribute(model, pairs, interp.features(sae, units=range(3), positions=[-1])).values.sizes)
        {'component': 1, 'layer': 1, 'unit': 3, 'position': 1, 'pair': 2}
    """
    if hasattr(view, "W_dec"):
        from .saes.views import view_of

        view = view_of(view)
    if not isinstance(view, View):
        raise PlanError(
            f"features was given a {type(view).__name__}; it takes an interp.View, or a dictionary of SAELens"
        )
    places, named = named_positions(positions)
    kinds, at = named_components(view, layers, (), "features")
    return Product(kinds, "unit", at, None if units is None else integers(units, "units"), places, named)


def sets(members: Mapping[str, Sequence[Site | Edit | str]]) -> Sets:
    """One cell for each named set of sites, all patched together: `{"name movers": ["L9.H6.z", "L9.H9.z"]}`.

    A member is a `Site`, its text, or an `Edit`. The dims of the result are (component, pair).

    Examples:
        >>> both = interp.patch(model, pairs, interp.sets({"both": ["L20.H0.z", "L23.H3.z"]}))
        >>> bool(both.mean(normalized=True) > 0.9)  # the two make most of the difference
        True
    """
    if not members:
        raise PlanError("sets was given no set")
    made = []
    for name, sites in members.items():
        edits = tuple(site if isinstance(site, Edit) else Edit(Site.parse(site)) for site in sites)
        if not edits:
            raise PlanError(f"set {name!r} is empty")
        made.append((str(name), edits))
    return Sets(tuple(made))


def paths(
    senders: Sequence[str | Site] | str,
    receivers: Sequence[str | Site] | str,
    *,
    together: bool = False,
    through_mlps: bool = False,
) -> Paths:
    """One cell for each sender → receiver edge (dims sender, receiver); `together` makes all edges one cell."""
    sides = []
    for side, what in ((senders, "senders"), (receivers, "receivers")):
        names = (side,) if isinstance(side, str | Site) else tuple(side)
        if not names:
            raise PlanError(f"paths was given no {what}")
        sides.append(tuple(Site.parse(name).node for name in names))
        if len(set(sides[-1])) < len(names):
            raise PlanError(f"paths was given {what} twice: {', '.join(sides[-1])}")
    return Paths(sides[0], sides[1], together, through_mlps)
