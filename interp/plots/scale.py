"""What drawings of graphs share: a diverging scale of colours, and the callback that lights paths."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from bokeh.models import LinearColorMapper
from bokeh.palettes import interp_palette

#: Blue over a grey that still shows on white to red: the middle is a weak edge, not none.
COLORS = ("#2166ac", "#67a9cf", "#d6d6d6", "#ef8a62", "#b2182b")

NO_SCORE = "#8f8f8f"
#: Shows the strongest edges, and fades all that is on no path through the node that was clicked.
LIGHT = """
const E = edges.data, N = nodes.data, n = slider ? slider.value : 1e9, count = N.rank.length;
const shown = [], touched = new Set();
for (let i = 0; i < E.rank.length; i++) if (E.rank[i] < n) {
  shown.push(i); touched.add(E.start[i]); for (const t of E.ends[i]) touched.add(t);
}
const here = (j) => of_nodes ? N.rank[j] < n : touched.has(j) || N.rank[j] < 0;
edge_filter.indices = shown;
node_filter.indices = [...Array(count).keys()].filter(here);
const chosen = nodes.selected.indices.filter(here).slice(0, 1), any = chosen.length > 0;
const up = new Set(chosen), down = new Set(chosen), lit = new Set();
const climbing = [...shown].sort((a, b) => N.y[E.start[a]] - N.y[E.start[b]]);
for (const i of climbing) if (down.has(E.start[i])) { lit.add(i); for (const t of E.ends[i]) down.add(t); }
for (const i of climbing.reverse()) if (E.ends[i].some((t) => up.has(t))) { lit.add(i); up.add(E.start[i]); }
const fade = (data, i, alpha) => { moved ||= data.alpha[i] !== alpha; data.alpha[i] = alpha; };
let moved = false;
for (const i of shown) fade(E, i, !any ? E.plain[i] : lit.has(i) ? 0.95 : 0.06);
for (let j = 0; j < count; j++) fade(N, j, !any || up.has(j) || down.has(j) ? 1 : 0.2);
if (moved) { edges.change.emit(); nodes.change.emit(); }
"""


def diverging(scores: Iterable[float | None]) -> LinearColorMapper:
    """The diverging scale, centred on zero, for these scores."""
    most = max((abs(score) for score in scores if score is not None), default=0.0) or 1.0
    return LinearColorMapper(palette=list(interp_palette(COLORS, 255)), low=-most, high=most, nan_color="rgba(0,0,0,0)")


def colour(score: float | None, mapper: LinearColorMapper) -> str:
    """The colour of a score on the mapper's scale; grey without a score."""
    if score is None:
        return NO_SCORE
    palette, low, high = (getattr(mapper, name) for name in ("palette", "low", "high"))
    return palette[int(np.clip((score - low) / (high - low) * len(palette), 0, len(palette) - 1))]


def signed(score: float) -> str:
    """A score in a hover."""
    return f"{score:+.4g}".replace("-", "−")


def dark(colour: str) -> bool:
    """Whether letters on a colour are to be white."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 120
