"""What comes of running prompts once: their logits, and the activations that were asked for, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xarray as xr
from torch import Tensor

from .errors import SiteError
from .markup import table
from .sites import Site

#: A name of a site: ours, TransformerLens's, a kind alone (every layer), or a kind and its layer.
Name = str | Site | tuple[str, int]


@dataclass(frozen=True, eq=False)
class Cache:
    """Activations of some prompts by site: `cache["L9.z"]`, `cache["blocks.9.attn.hook_z"]` and `cache["z", 9]` are one.

    Each is an xarray.DataArray, fp32, whose dims are named: `prompt`, `position` (from each prompt's own first token; NaN
    behind its end), then `d_model`, or `head` (`kv_head`) and `d_head`, or `unit`; a pattern has `head`, `query`, `key`. The
    coordinate `token` labels positions. Of a kind without a layer there is a dim `layer` behind `prompt`.
    """

    arrays: dict[str, xr.DataArray]
    n_layers: int

    def __getitem__(self, name: Name) -> xr.DataArray:
        """The activation of a site. SiteError: one that was not asked for, or text that is no name of a site."""
        key = self._key(name)
        if key not in self.arrays:
            held = ", ".join(self.arrays) or "nothing"
            raise SiteError(f"{key} was not asked for: run the prompt with sites=[{key!r}, …]; the cache holds {held}")
        return self.arrays[key]

    def __contains__(self, name: Name) -> bool:
        return self._key(name) in self.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def keys(self) -> list[str]:
        """The names of what it holds."""
        return list(self.arrays)

    def items(self) -> list[tuple[str, xr.DataArray]]:
        """Names and activations."""
        return list(self.arrays.items())

    def to_dataset(self) -> xr.Dataset:
        """All of it as one xarray.Dataset, which can be saved: `.to_netcdf(path, engine="h5netcdf")`.

        Labels that differ from site to site (a layer, the tokens of a pattern's queries) are left out.
        """
        own = {name: array.drop_vars(set(array.coords) - set(array.dims)) for name, array in self.items()}
        tokens = [array["token"] for array in self.arrays.values() if array["token"].dims == ("prompt", "position")]
        return xr.Dataset(own).assign_coords({"token": tokens[0]} if tokens else {})

    def __repr__(self) -> str:
        lines = [f"Cache of {len(self)} sites", *(f"  {name}: {shape_of(array)}" for name, array in self.items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_dataset()._repr_html_()

    def _key(self, name: Name) -> str:
        return name if isinstance(name, str) and name in self.arrays else str(site_named(name, self.n_layers))


class ForwardPass(NamedTuple):
    """`logits` `[prompt, position, d_vocab]`, fp32, NaN behind a prompt's end; and the `cache` of the sites asked for.

    It unpacks: `logits, cache = model.run(prompt, sites=[...])`.
    """

    logits: Tensor | None
    cache: Cache

    def __repr__(self) -> str:
        logits = "no logits" if self.logits is None else f"logits {list(self.logits.shape)}"
        return f"ForwardPass({logits}; {self.cache!r})"

    def _repr_html_(self) -> str:
        rows = [(name, shape_of(array)) for name, array in self.cache.items()]
        logits = [] if self.logits is None else [("logits", " × ".join(map(str, self.logits.shape)))]
        return table(["site", "shape"], [*logits, *rows])


class TokenIds(tuple[int, ...]):
    """The token ids of one prompt, with the text of each as `labels`; they are taken wherever ids are."""

    labels: tuple[str, ...]

    def __new__(cls, ids: tuple[int, ...], labels: tuple[str, ...]) -> TokenIds:
        made = super().__new__(cls, ids)
        made.labels = labels
        return made

    def __getnewargs__(self) -> tuple[tuple[int, ...], tuple[str, ...]]:  # what a copy and a pickle are made of
        return tuple(self), self.labels

    def __repr__(self) -> str:
        return " ".join(f"{place}:{label!r}" for place, label in enumerate(self.labels))

    def _repr_html_(self) -> str:
        rows = [(place, label, token) for place, (label, token) in enumerate(zip(self.labels, self, strict=True))]
        return table(["position", "token", "id"], rows)


def site_named(name: Name, n_layers: int) -> Site:
    """The site of a name, its layer counted from 0. A kind alone is a site of every layer.

    Raises:
        SiteError: text that is no name of a site.
    """
    if isinstance(name, tuple):
        kind, layer = name
        site = Site(kind, layer=layer)
    elif isinstance(name, str) and "." not in name and not name.startswith("hook_"):
        kind, _, position = name.partition("@")
        site = Site(kind, position=int(position)) if position.removeprefix("-").isdecimal() else Site(name)
    else:
        site = Site.parse(name)
    return site if site.layer is None else site.at(layer=site.layer % n_layers if site.layer < 0 else site.layer)


def shape_of(array: xr.DataArray) -> str:
    """Dims with their sizes, for people."""
    return " × ".join(f"{dim} {size}" for dim, size in array.sizes.items())
