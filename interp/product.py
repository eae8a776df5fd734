"""Products of axes: components × layers × (positions | heads | units), as a plan that a model resolves to cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from .cells import EVERYWHERE, Cell, Place, Resolved, SiteFacts, checked, integers, longest
from .edits import Edit
from .encoded import EncodedPairs
from .errors import PlanError, SiteError
from .sites import KIND, KINDS, LAYERLESS, Site
from .views import View

Component = str | View
Components = Component | Sequence[Component]
Numbers = Iterable[int] | int
Positions = Sequence[int | str] | Mapping[str, Sequence[int]] | int | str | None
Named = tuple[tuple[str, tuple[int, ...]], ...]


def name_of(component: Component) -> str:
    """What results call a component."""
    return component if isinstance(component, str) else component.name


@dataclass(frozen=True)
class Product:
    """Components × layers × (positions | heads | units); heads and units may be crossed with positions."""

    components: tuple[Component, ...]
    axis: str  # "position" | "head" | "unit"
    layers: tuple[int, ...] | None = None
    items: tuple[int, ...] | None = None  # heads or units; None = all
    positions: tuple[int | str, ...] | None = None  # None = each position (grid) or all at once (heads, units)
    named: Named = ()
    op: str = "replace"
    value: float | Tensor | None = None

    def with_edit(self, op: str, value: float | Tensor | None = None) -> Product:
        """The same cells with another operation in every edit: "set", "add", "scale" by a value, or "replace"."""
        return replace(self, op=op, value=value)

    def __repr__(self) -> str:
        said = self.spec()
        parts = [f"{name} {said[name]}" for name in ("layers", "items", "positions", "edit") if said[name] is not None]
        return f"Plan({', '.join(map(str, said['components']))} by {self.axis}{''.join(f'; {part}' for part in parts)})"  # type: ignore[call-overload]

    def spec(self) -> dict[str, object]:
        """As `Plan.spec`."""
        return {
            "components": [name_of(component) for component in self.components],
            "axis": self.axis,
            "layers": None if self.layers is None else list(self.layers),
            "items": None if self.items is None else list(self.items),
            "positions": None if self.positions is None else list(self.positions),
            "named": {name: list(at) for name, at in self.named},
            "edit": None if self.op == "replace" else self.op,
        }

    def resolve(self, model: SiteFacts, encoded: EncodedPairs) -> Resolved:
        """As `Plan.resolve`."""
        layers = self._layers(model)
        places, labels = self._places(encoded)
        whole = self.axis == "position"
        counts = [0 if whole else self._count(model, component) for component in self.components]
        items = range(len(places)) if whole else range(max(counts)) if self.items is None else self.items
        crossed = not whole and self.positions is not None
        names = tuple(map(name_of, self.components))
        dims: list[tuple[str, tuple[object, ...]]] = [("component", names), ("layer", layers)]
        dims += [(self.axis, labels if whole else tuple(items))] + ([("position", labels)] if crossed else [])
        cells = []
        for (c, component), (la, layer) in product(enumerate(self.components), enumerate(layers)):
            if isinstance(component, str) and component in LAYERLESS and la:
                continue  # it has no layer: its cells stand at the first one
            for it, item in enumerate(items):
                if not whole and self.items is None and item >= counts[c]:
                    continue
                site = model.require(self._site(component, layer, None if whole else item))
                edit = Edit(site, self.op, self.value)
                if whole:
                    cells.append(Cell((c, la, it), ((edit, places[item]),)))
                elif crossed:
                    cells += [Cell((c, la, it, p), ((edit, place),)) for p, place in enumerate(places)]
                else:
                    cells.append(Cell((c, la, it), ((edit, EVERYWHERE),)))
        if not whole and not crossed:
            encoded.require_aligned("a plan over all positions")
        return checked(Resolved(tuple(dims), tuple(cells), self.spec()), encoded)

    def _site(self, component: Component, layer: int | None, item: int | None) -> Site:
        if isinstance(component, View):
            return component.site(layer, unit=item)
        layer = None if component in LAYERLESS else layer
        head, unit = (item, None) if self.axis == "head" else (None, item)
        return Site(component, layer, head, unit=unit)

    def _layers(self, model: SiteFacts) -> tuple[int, ...]:
        """The layers, counted from 0. PlanError: one twice, as -1 and the last may be."""
        first = self.components[0]
        own = first.tap.layer if isinstance(first, View) else None
        asked = [own] if own is not None else range(model.n_layers) if self.layers is None else self.layers
        # a component without a layer has no range of its own to be held against
        probe = [self._site("resid_pre" if first in LAYERLESS else first, layer, None) for layer in asked]
        layers = tuple(model.require(site).layer or 0 for site in probe)
        return integers(layers, "layers")

    def _count(self, model: SiteFacts, component: Component) -> int:
        """How many heads or units a component has in each layer."""
        if isinstance(component, View):
            return component.parts
        return model.heads_of(component) if self.axis == "head" else model.units_of(component)

    def _places(self, encoded: EncodedPairs) -> tuple[list[Place], tuple[int | str, ...]]:
        """The positions of the plan with their labels; None means each position of the longest pair."""
        named = dict(self.named)
        wanted = self.positions
        if wanted is None:
            if self.axis != "position":
                return [], ()
            wanted = tuple(range(max(len(prompt) for prompt in encoded.clean)))
        if any(isinstance(position, int) for position in wanted) or named:
            encoded.require_aligned("a plan over positions")
        return [self._place(position, named, encoded) for position in wanted], tuple(wanted)

    def _place(self, position: int | str, named: Mapping[str, tuple[int, ...]], encoded: EncodedPairs) -> Place:
        if isinstance(position, int) or position in named:
            at = (position,) if isinstance(position, int) else named[position]
            place = Place(at=at)
            if all(place.columns(encoded, pair) is None for pair in range(len(encoded.clean))):
                window = f" {position}" if isinstance(position, int) else f" {position!r} = {at}"
                raise SiteError(f"position{window}, but {longest(encoded)}")
            return place
        if position in encoded.positions:
            return Place(name=position)
        raise PlanError(
            f"the pairs have no position named {position!r}; they have "
            f"{sorted(encoded.positions) or 'none'}; name it in PromptPairs(positions={{{position!r}: [...]}})"
        )


def named_components(
    components: Components, layers: Numbers | None, allowed: Sequence[str], what: str
) -> tuple[tuple[Component, ...], tuple[int, ...] | None]:
    """Components, and the layers that are asked for or that the names carry, as hook names of TransformerLens do.

    Raises:
        SiteError, PlanError: a component that is unknown, not one of `allowed`, or there twice; layers that do not agree.
    """
    listed: list[Component | Site] = [components] if isinstance(components, str | Site | View) else list(components)
    sites = list(_sites(listed, allowed, what))
    if not sites:
        raise PlanError(f"{what} was given no component")
    texts = ", ".join(map(str, listed))
    whole = [site.kind for site in sites if site.layer is None]
    if len(set(sites)) < len(sites) or any(site.layer is not None and site.kind in whole for site in sites):
        raise PlanError(f"{what} was given a component twice: {texts}")
    kinds: dict[Component, list[int | None]] = {}
    for site in sites:
        kinds.setdefault(site.view if isinstance(site.view, View) else site.kind, []).append(site.layer)
    carried = {tuple(at) for at in kinds.values()}
    if carried == {(None,)}:
        return tuple(kinds), None if layers is None else integers(layers, "layers")
    if layers is not None or len(carried) > 1:
        at = {name_of(kind): tuple(layers_of) for kind, layers_of in kinds.items()}
        why = f"layers={layers} is given too" if layers is not None else f"they are not the same for all: {at}"
        raise PlanError(f"{what}: {texts} name layers, but {why}; use one plan for each, or sets")
    return tuple(kinds), tuple(layer for layer in next(iter(carried)) if layer is not None)


def _sites(listed: Sequence[Component | Site], allowed: Sequence[str], what: str) -> Iterator[Site]:
    """The whole kind of site that each component names."""
    for name in listed:
        if isinstance(name, View):
            yield name.site()
            continue
        bare = isinstance(name, str) and "hook" not in name and "." not in name
        if bare and name not in KIND:
            raise SiteError(f"unknown component {name!r}; components are: {', '.join(KINDS)}")
        site = Site(str(name)) if bare else Site.parse(name)
        if site.view is None and site.kind not in allowed:
            raise PlanError(f"{what} needs one of {', '.join(allowed)}, got {str(name)!r}")
        if site != Site(site.kind, layer=site.layer, view=site.view):
            raise PlanError(f"{what} takes whole kinds of sites, but {str(name)!r} is one place; use interp.sets")
        yield site


def named_positions(positions: Positions) -> tuple[tuple[int | str, ...] | None, Named]:
    """Positions as labels, and the windows that some of them name."""
    if positions is None:
        return None, ()
    if isinstance(positions, str):
        return (positions,), ()
    if isinstance(positions, Mapping):
        named = tuple((name, integers(at, f"positions of {name!r}")) for name, at in positions.items())
        if empty := [name for name, at in named if not at]:
            raise PlanError(f"the positions of {empty[0]!r} are empty; name at least one")
        return tuple(name for name, _ in named), named
    listed = list(positions) if isinstance(positions, Iterable) else [positions]
    made = tuple(at if isinstance(at, str) else integers(at, "positions")[0] for at in listed)
    if len(set(made)) < len(made):
        raise PlanError(f"positions are given twice: {made}")
    return made, ()
