"""Attention patterns: a few heads side by side, or all heads as tiles with one of them drawn large.

Imports bokeh and numpy; patterns may be torch tensors, which are only asked for their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.layouts import column, row
from bokeh.models import LinearColorMapper
from bokeh.palettes import Blues256

from ..errors import PlotError
from .attention_explorer import explorer, pattern_panel
from .given import head_of, labels_of, numbers, whole
from .labels import told_apart, visible
from .page import Figure, color_scale

SIDE_BY_SIDE = 4  # more heads than this are tiles beside one large panel

MAX_WEIGHTS = 12_000_000  # a page holds every weight as one byte, in base64


def plot_attention(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention patterns: queries down, keys across, weights from 0 to 1.

    Up to four heads stand side by side; more are tiles beside one large panel, with a choice of head and layer, and the prompt as
    text: the token under the mouse lights those that it reads (or that read it). There weights are held in steps of 1/254.
    Patterns that know how long each token's value is (`attention_patterns(..., values=True)`) can be weighted by it, as a
    share of the head's longest (Kobayashi et al. 2020): a token that is attended to and has nothing to say fades.
    What no query can attend to (the causal upper triangle, where it is all zero) stays blank.

    Args:
        pattern: what `interp.lens.attention_patterns` gives, or weights [head, query, key] or [layer, head, query,
            key], numpy or torch.
        tokens: one label per position; patterns of `attention_patterns` bring their own.
        heads: indices of heads, or (layer, head) for a pattern with layers; None: all.
        title: heading of the page.

    Raises:
        PlotError: shapes that do not fit, heads out of range, weights outside 0–1, too many for a page.

    Examples:
        >>> seen = interp.lens.attention_patterns(model, pairs.clean[0], layers=[20, 23])
        >>> interp.plot_attention(seen, heads=[(20, 0), (23, 3)]).save("attention.html").name
        'attention.html'
    """
    named = getattr(pattern, "coords", {})
    if tokens is None and "token" not in named:
        raise PlotError("plot_attention needs tokens, one label per position, for a pattern that brings none")
    tokens = labels_of(pattern["token"].values if tokens is None else tokens)
    weights, layered = _weights(pattern, len(tokens))
    labels = [f"head {h}" for h in range(weights.shape[1])]
    layers = pattern["layer"].values.reshape(-1).tolist() if "layer" in named else list(range(weights.shape[0]))
    if heads is not None:
        weights, labels = _choose(weights, heads, layered, layers)
    elif layers != list(range(layers[0], layers[0] + len(layers))):
        raise PlotError(f"layers {layers} are not consecutive: choose (layer, head) of them with heads=")
    if weights.size > MAX_WEIGHTS:
        raise PlotError(f"{weights.size:,} weights are too many for one page: choose some with heads= or fewer layers")
    n = len(tokens)
    if not np.nan_to_num(weights[:, :, *np.triu_indices(n, 1)]).any():
        weights[:, :, *np.triu_indices(n, 1)] = np.nan
    names = told_apart([visible(t) for t in tokens])
    full = [f"{i} “{visible(t, 200)}”" for i, t in enumerate(tokens)]
    mapper = LinearColorMapper(palette=list(Blues256[::-1]), low=0, high=1, nan_color="rgba(0,0,0,0)")
    scale = color_scale(mapper, "attention weight")
    if weights.shape[0] == 1 and len(labels) <= SIDE_BY_SIDE:
        cell = int(np.clip(1100 / len(labels) / n - 8, 12, 30))
        across = max(1, min(len(labels), 1240 // (cell * n + 110)))
        panels = [
            pattern_panel(w, label, names, full, mapper, cell)[0] for w, label in zip(weights[0], labels, strict=True)
        ]
        rows = [row(*panels[i : i + across], spacing=22) for i in range(0, len(panels), across)]
        layout = column(scale, *rows, spacing=14)
    else:
        first = layers[0] if layered and heads is None else None
        norms = _norms(pattern) if heads is None else None
        layout = column(scale, explorer(weights, labels, names, full, mapper, first, norms), spacing=14)
    return Figure(layout, title or "Attention patterns", "queries down, keys across; each row is what one query reads")


def _weights(pattern: Any, n: int) -> tuple[np.ndarray, bool]:
    """A float32 copy [layer, head, query, key], and whether the pattern had layers."""
    try:
        weights = numbers("the pattern", pattern)
    except PlotError as error:
        raise PlotError(
            f"plot_attention draws numbers, not a {type(pattern).__name__}: give interp.lens.attention_patterns(model, "
            f"prompt), or weights [head, query, key] ({error})"
        ) from None
    if weights.ndim not in (3, 4) or 0 in weights.shape:
        raise PlotError(f"a pattern is [head, query, key] or [layer, head, query, key], not of shape {weights.shape}")
    if weights.shape[-2:] != (n, n):
        raise PlotError(f"pattern {weights.shape} has {weights.shape[-2:]} queries and keys, but there are {n} tokens")
    low, high = np.nanmin(weights, initial=0), np.nanmax(weights, initial=0)
    if low < -1e-3 or high > 1 + 1e-3:
        raise PlotError(f"weights lie between {low:.3g} and {high:.3g}, not 0 and 1: are these scores before softmax?")
    return weights.reshape(-1, *weights.shape[-3:]), weights.ndim == 4


def _choose(
    weights: np.ndarray, heads: Sequence[Any], layered: bool, layers: list[int]
) -> tuple[np.ndarray, list[str]]:
    count = weights.shape[1]
    heads = heads.tolist() if hasattr(heads, "tolist") else heads
    if not isinstance(heads, tuple | list):
        raise PlotError(f"heads={heads!r}: give a list of indices, or of (layer, head)")
    if not heads:
        raise PlotError("heads is empty: name at least one, or leave it out for all")
    pairs = [h for h in heads if isinstance(h, tuple | list)]
    if pairs and (len(pairs) < len(heads) or not layered or any(len(p) != 2 for p in pairs)):
        raise PlotError(f"heads={list(heads)}: give indices, or (layer, head) for a pattern [layer, head, query, key]")
    for h in heads:
        layer, head = head_of("a head", h) if pairs else (layers[0], whole("a head", h))
        if not (layer in layers and 0 <= head < count):
            held = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
            raise PlotError(f"head {h} is out of range: the pattern has {held}, heads 0 to {count - 1}")
    if pairs:
        return np.stack([weights[layers.index(layer), head] for layer, head in pairs])[None], [
            f"L{a}.H{b}" for a, b in pairs
        ]
    return weights[:, list(heads)], [f"head {h}" for h in heads]


def _norms(pattern: Any) -> np.ndarray | None:
    """Lengths of values [layer, head, key] as shares of each head's longest; None where the pattern does not know them."""
    if "value_norm" not in getattr(pattern, "coords", {}):
        return None
    norms = numbers("value_norm", pattern["value_norm"].values).reshape(-1, *pattern["value_norm"].shape[-2:])
    return norms / np.maximum(norms.max(-1, keepdims=True), 1e-30)
