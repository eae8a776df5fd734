"""Effects: the labelled record that every experiment returns, with its provenance, on disk and as a table.

Imports the standard library, numpy, pandas, xarray and rooms above.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from .errors import EffectsError
from .files import path_of, write_atomically
from .spans import same_runs, warn_of_same

#: Version of the file layout; a file with a greater one is refused.
SCHEMA = 1
DIRECTIONS = ("noising", "denoising")
_CHUNK = 4096  # cells bootstrapped at once, so that memory stays near samples × 4096 floats


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """What a plan did to the metric: one float per cell and pair, beside the two unpatched runs.

    Args:
        values: raw metric after each cell's edits, float32, dims such as (component, layer, position, pair)
            or (component, layer, head, pair), always with `pair`. NaN where a cell does not exist.
        clean: metric of the unpatched clean run, dim (pair,).
        corrupted: metric of the unpatched corrupted run, dim (pair,); None without a second run.
        provenance: JSON-able record of how the values came to be: model, revision, versions, seed, plan,
            metric, direction, prompts, tokens (per pair, the clean prompt's token labels), schedule, method,
            device, dtype, created.

    Raises:
        EffectsError: dims or pairs that do not fit together, an unknown direction, provenance not JSON.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[20, 23]))
        >>> effects.mean(normalized=True).to_series().nlargest(2).index.tolist()
        [('z', 23, 3), ('z', 20, 0)]
        >>> interp.Effects.load(effects.save("heads.nc")).provenance["direction"]
        'noising'
    """

    values: xr.DataArray
    clean: xr.DataArray
    corrupted: xr.DataArray | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {"values": self.values, "clean": self.clean, "corrupted": self.corrupted}
        for name, array in arrays.items():
            if array is None and name == "corrupted":
                continue
            if not isinstance(array, xr.DataArray) or "pair" not in array.dims:
                given = getattr(array, "dims", type(array).__name__)
                raise EffectsError(f"{name} must be an xarray.DataArray with a 'pair' dimension, not {given}")
            if name != "values" and array.dims != ("pair",):
                raise EffectsError(f"{name} must have the one dimension ('pair',), not {array.dims}")
            if array.sizes["pair"] != self.values.sizes["pair"]:
                n, m = array.sizes["pair"], self.values.sizes["pair"]
                raise EffectsError(f"{name} has {n} pairs, but values has {m}")
            # xarray would silently drop the pairs whose labels do not match
            labelled = "pair" in array.coords and "pair" in self.values.coords
            if labelled and not np.array_equal(array["pair"], self.values["pair"]):
                raise EffectsError(f"the pair labels of {name} are not those of values")
            object.__setattr__(self, name, array.astype(np.float32, copy=False).rename(name))
        try:
            # the round trip copies, and makes a record that is loaded equal to the one that was saved
            object.__setattr__(self, "provenance", json.loads(json.dumps(self.provenance)))
        except (TypeError, ValueError) as error:
            raise EffectsError(f"provenance must be JSON-able: {error}") from error
        if self.direction is not None and self.direction not in DIRECTIONS:
            raise EffectsError(f"direction {self.direction!r} is unknown; it is one of {', '.join(DIRECTIONS)}")
        if self.direction == "denoising" and self.corrupted is None:
            raise EffectsError("direction 'denoising' patches into the corrupted run, but corrupted is None")

    @property
    def direction(self) -> str | None:
        """`noising`, `denoising`, or None for a method without a second run."""
        return self.provenance.get("direction")

    @property
    def base(self) -> xr.DataArray:
        """Metric of the run that was patched into, dim (pair,): clean, or corrupted when denoising."""
        return self.corrupted if self.direction == "denoising" else self.clean  # type: ignore[return-value]

    @property
    def source(self) -> xr.DataArray | None:
        """Metric of the run that activations were taken from, dim (pair,); None without a second run."""
        return self.clean if self.direction == "denoising" else self.corrupted

    @property
    def normalized(self) -> xr.DataArray:
        """(patched − base) / (source − base) per pair: 0 nothing moved, 1 became the source run.

        Same dims as `values`; NaN without a source run, and for pairs whose two runs differ by rounding only.

        Warns:
            UserWarning: once, of the pairs whose two runs differ by rounding only.
        """
        if self.source is None:
            return xr.full_like(self.values, np.nan)
        return ((self.values - self.base) / self._span).transpose(*self.values.dims)

    @cached_property
    def _span(self) -> xr.DataArray:
        """source − base by pair; NaN where the two runs differ by rounding only, of which it warns once."""
        base, source = self.base.values, xr.DataArray(self.source).values
        same, allowed = same_runs(base, source, self.provenance)
        warn_of_same(base, source, same, allowed, stacklevel=4)  # the caller of `normalized`, behind a cached property
        return (xr.DataArray(self.source) - self.base).where(~same)

    def mean(self, normalized: bool = False) -> xr.DataArray:
        """Mean over the pairs that have the cell; dims of `values` without `pair`."""
        return (self.normalized if normalized else self.values).mean("pair")

    def interval(self, level: float = 0.95, samples: int = 2000, seed: int = 0, normalized: bool = False) -> xr.Dataset:
        """Mean over pairs with a bootstrap interval: `bootstrap` of `values`, or of `normalized`."""
        return bootstrap(self.normalized if normalized else self.values, level, samples, seed)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell and pair: the dims, then `value`, `normalized` and `token`.

        `token` is the clean prompt's token at an integer position, None for named positions and other cells.
        """
        table = xr.Dataset({"value": self.values, "normalized": self.normalized})
        table = table.drop_vars([name for name in table.coords if name not in table.dims])
        for dim in set(table.dims) - set(table.coords):
            table = table.assign_coords({dim: np.arange(table.sizes[dim])})
        tokens = self._tokens()
        table["token"] = tokens.assign_coords({dim: table[dim] for dim in tokens.dims})
        frame = table.to_dataframe(dim_order=list(self.values.dims)).reset_index()
        frame["token"] = frame["token"].astype(object).where(frame["token"].notna(), None)
        return frame[[*map(str, self.values.dims), "value", "normalized", "token"]]

    def _tokens(self) -> xr.DataArray:
        """Labels [position, pair] of the clean prompts; a single None where no position is an integer."""
        labels, dims = self.provenance.get("tokens") or [], self.values.dims
        positions = self.values["position"] if "position" in dims else xr.DataArray("")
        places = [
            int(p) if str(p).removeprefix("-").isdecimal() else None for p in positions.values.reshape(-1).tolist()
        ]
        if len(labels) != self.values.sizes["pair"] or all(p is None for p in places):
            return xr.DataArray(None)
        rows = [[t[p] if p is not None and -len(t) <= p < len(t) else None for t in labels] for p in places]
        return xr.DataArray(np.array(rows, dtype=object).reshape(len(rows), -1), dims=("position", "pair"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one NetCDF file, atomically: an earlier file of that name stays whole if anything fails.

        Raises:
            EffectsError: the folder cannot be written, the disk is full, or coordinates NetCDF cannot hold.
        """
        path = path_of(path, EffectsError)
        parts = {"values": self.values, "clean": self.clean}
        if self.corrupted is not None:
            parts["corrupted"] = self.corrupted
        provenance = json.dumps(self.provenance, ensure_ascii=False)
        dataset = xr.Dataset(parts)
        dataset.attrs = {
            "interp_effects": SCHEMA,
            "provenance": provenance,
            "sha256": _digest(parts, provenance),
        }
        try:
            data = bytes(dataset.to_netcdf(engine="h5netcdf"))
        except ImportError as error:
            raise EffectsError(f"cannot write {path}: {error}; pip install h5netcdf h5py") from error
        except (TypeError, ValueError) as error:
            raise EffectsError(f"cannot write {path}: NetCDF cannot hold these effects: {error}") from error
        try:
            write_atomically(path, data)
        except (OSError, ValueError) as error:  # "." has no name to write to
            raise EffectsError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Effects:
        """Read a file written by `save`.

        Raises:
            EffectsError: no such file, not a file of ours, damaged, or written by a newer version.
        """
        path = path_of(path, EffectsError)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise EffectsError(f"cannot read effects from {path}: {error.strerror or error}") from error
        if not data.startswith(b"\x89HDF\r\n\x1a\n"):
            raise EffectsError(f"{path} is not an effects file: it is no NetCDF file ({len(data)} bytes)")
        try:
            dataset = xr.load_dataset(io.BytesIO(data), engine="h5netcdf")
        except ImportError as error:
            raise EffectsError(f"cannot read {path}: {error}; pip install h5netcdf h5py") from error
        except Exception as error:  # a damaged HDF5 file fails in as many ways as it has bytes
            raise EffectsError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if "interp_effects" not in dataset.attrs:
            given = ", ".join(map(str, dataset.data_vars)) or "nothing"
            raise EffectsError(f"{path} is a NetCDF file, but not one of effects (it holds {given})")
        version = int(dataset.attrs["interp_effects"])
        if version > SCHEMA:
            raise EffectsError(f"{path} has schema version {version}, newer than {SCHEMA}: upgrade interp")
        parts = {str(name): dataset[name] for name in dataset.data_vars}
        provenance = dataset.attrs.get("provenance", "")
        if _digest(parts, provenance) != dataset.attrs.get("sha256"):
            raise EffectsError(f"{path} is damaged: its checksum does not match its contents")
        # a dimension coordinate that only `values` had has spread to the others; that changes nothing
        return cls(parts["values"], parts["clean"], parts.get("corrupted"), json.loads(provenance))

    def __repr__(self) -> str:
        return f"Effects({'; '.join(f'{k}: {v}' if k else v for k, v in self._summary())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(k)}</th>"
            f"<td style='text-align:left'>{html.escape(v)}</td></tr>"
            for k, v in self._summary()
        )
        return f"<table><caption style='text-align:left'>Effects</caption>{rows}</table>"

    def _summary(self) -> list[tuple[str, str]]:
        known = [str(self.provenance[k]) for k in ("model", "method", "metric", "direction") if self.provenance.get(k)]
        rows = [("", ", ".join(known))] if known else []
        rows.append(("", " × ".join(f"{dim} {n}" for dim, n in self.values.sizes.items())))
        if "component" in self.values.coords:
            rows.append(("components", ", ".join(map(str, np.atleast_1d(self.values["component"].values)))))
        rows.append(("clean", f"{float(self.clean.mean()):.4g}"))
        if self.corrupted is not None:
            rows.append(("corrupted", f"{float(self.corrupted.mean()):.4g}"))
        return rows


def bootstrap(values: xr.DataArray, level: float = 0.95, samples: int = 2000, seed: int = 0) -> xr.Dataset:
    """Mean over `pair` with a percentile bootstrap interval (Efron 1979), resampling pairs.

    Returns:
        Dataset with `mean`, `low`, `high`, dims of `values` without `pair`. Pairs that lack a cell (NaN) are
        left out of it; `low` and `high` are NaN where fewer than two pairs have it: one pair has no spread.

    Raises:
        EffectsError: a level outside (0, 1), or no samples.
    """
    if not 0 < level < 1 or samples < 1:
        raise EffectsError(f"level must lie in (0, 1) and samples be >= 1, not level={level}, samples={samples}")
    stacked = values.transpose("pair", ...)
    flat = stacked.values.reshape(stacked.sizes["pair"], -1).astype(np.float64)  # [pair, cell]
    n, cells = flat.shape
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples).astype(np.float64)
    bounds = np.full((2, cells), np.nan)
    quantiles = [(1 - level) / 2, (1 + level) / 2]
    present = ~np.isnan(flat)
    usable = np.flatnonzero(present.sum(0) >= 2)
    for start in range(0, len(usable), _CHUNK):
        at = usable[start : start + _CHUNK]
        held = draws @ present[:, at]  # [sample, cell], how many pairs of the resample have the cell
        means = draws @ np.where(present[:, at], flat[:, at], 0) / np.where(held > 0, held, np.nan)
        whole = (held > 0).all(0)
        bounds[:, at[whole]] = np.quantile(means[:, whole], quantiles, axis=0)
        if not whole.all():  # some resample missed every pair of a cell; nanquantile is far slower
            bounds[:, at[~whole]] = np.nanquantile(means[:, ~whole], quantiles, axis=0)
    mean = values.mean("pair")
    dims = stacked.dims[1:]
    low, high = (xr.DataArray(b.reshape(stacked.shape[1:]), dims=dims) for b in bounds.astype(np.float32))
    return xr.Dataset({"mean": mean}).assign(low=low, high=high).assign_attrs(level=level, samples=samples)


def _digest(parts: dict[str, xr.DataArray], provenance: str) -> str:
    """sha256 over the numbers, their coordinates and the provenance."""
    digest = hashlib.sha256(provenance.encode())
    for name in sorted(parts):
        array = parts[name]
        digest.update(f"{name}{array.dims}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array.values, dtype=np.float32).tobytes())
        for dim in array.dims:
            if name == "values" and dim in array.coords:
                digest.update(json.dumps([dim, array[dim].values.tolist()]).encode())
    return digest.hexdigest()
