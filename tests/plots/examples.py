"""Effects to draw, and what a drawn figure holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from bokeh.plotting import figure

from interp.effects import Effects
from interp.plots import Figure

IOI = [
    "<|endoftext|>",
    "When",
    " Mary",
    " and",
    " John",
    " went",
    ",",
    " John",
    " gave",
    " to",
    "\n",
    "$$$$",
    "</script>",
]


def make(
    dims: dict[str, Any], pairs: int = 3, tokens: list[list[str]] | None = None, direction: str = "noising"
) -> Effects:
    """Random effects over `dims` (name → coordinate), clean 3 and corrupted −1 in every pair."""
    rng = np.random.default_rng(0)
    shape = [len(c) for c in dims.values()]
    values = xr.DataArray(3 - 2 * rng.random((*shape, pairs)), dims=(*dims, "pair"), coords=dims)
    provenance = {"model": "toy", "metric": "logit_diff", "method": "patch", "direction": direction}
    return Effects(
        values,
        xr.DataArray(np.full(pairs, 3.0), dims="pair"),
        xr.DataArray(np.full(pairs, -1.0), dims="pair"),
        provenance | {"tokens": tokens or []},
    )


def grid(
    layers: int = 4,
    tokens: list[str] = IOI,
    components: tuple[str, ...] = ("resid_pre", "mlp_out"),
    pairs: int = 3,
) -> Effects:
    dims = {"component": list(components), "layer": list(range(layers)), "position": list(range(len(tokens)))}
    return make(dims, pairs, [tokens] * pairs)


def panels(picture: Figure) -> list[figure]:
    """The figures that have a hover, in reading order."""
    return [p for r in picture.layout.children[1:] for p in r.children if isinstance(p, figure)]


def cells(plot: figure, kind: int = 0) -> dict[str, Any]:
    return plot.renderers[kind].data_source.data


def labels(plot: figure, axis: str = "x") -> list[str]:
    chosen = plot.xaxis[0] if axis == "x" else plot.yaxis[0]
    return [chosen.major_label_overrides[t] for t in chosen.ticker.ticks]
