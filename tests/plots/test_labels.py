"""Labels as the browser draws them: every one there, whole, and clear of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from interp.plots import Figure, plot_activation_patching_results
from tests.plots.browser import Page
from tests.plots.examples import grid, labels, make, panels


@pytest.mark.parametrize(
    ("positions", "layers", "components"), [(15, 30, 3), (15, 12, 1), (40, 12, 2), (100, 30, 1), (300, 12, 1)]
)
def test_labels_neither_overlap_nor_are_cut_off(
    tmp_path: Path, chromium: str, positions: int, layers: int, components: int
) -> None:
    tokens = [f" longish{i}" if i % 3 else " antidisestablishmentarianism" for i in range(positions)]
    tokens[0] = "WWWWWWWWWWWWWWWW"  # the widest of its length, and the one that reaches out to the left
    effects = grid(layers, tokens, ("resid_pre", "attn_out", "z")[:components], 1)
    picture = plot_activation_patching_results(effects)
    check_labels(picture, tmp_path)
    for plot in panels(picture):
        assert len(labels(plot, "y")) == layers
        assert len(labels(plot)) == positions or positions > 100  # beyond that, some go unnamed


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (12, 12), (32, 32)])
def test_labels_of_heads(tmp_path: Path, chromium: str, layers: int, heads: int) -> None:
    dims = {"component": ["z", "q"], "layer": list(range(layers)), "head": list(range(heads))}
    picture = plot_activation_patching_results(make(dims, 1))
    check_labels(picture, tmp_path)
    assert {len(labels(plot)) for plot in panels(picture)} == {heads}


def check_labels(picture: Figure, folder: Path) -> None:
    """Every label that the axes name is drawn, whole, and touches no other."""
    with Page(picture.save(folder / "page.html"), width=1366) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        canvases = page.drawn()
    expected = sorted(text for plot in panels(picture) for axis in "xy" for text in labels(plot, axis))
    drawn = [word for words in canvases for word in words]
    missing = list(expected)
    for word in drawn:
        if word["text"] in missing:
            missing.remove(word["text"])
    assert missing == []
    for words in canvases:
        for i, word in enumerate(words):
            assert all(0 <= x <= word["width"] and 0 <= y <= word["height"] for x, y in word["corners"]), word
            assert not [w["text"] for w in words[:i] if overlap(word["corners"], w["corners"])], word["text"]


def overlap(a: list[list[float]], b: list[list[float]]) -> bool:
    """Whether two rectangles, perhaps rotated, share an area: no side of either separates them."""
    a, b = np.array(a), np.array(b)
    for box in (a, b):
        for side in (box[1] - box[0], box[3] - box[0]):
            p, q = a @ side, b @ side
            if p.max() <= q.min() or q.max() <= p.min():
                return False
    return True


def test_overlap_is_seen() -> None:
    square = [[0, 0], [1, 0], [1, 1], [0, 1]]
    tilted = [[1.4, 0.5], [0.9, 1.0], [0.4, 0.5], [0.9, 0.0]]
    assert overlap(square, tilted)
    assert not overlap(square, [[x + 1.1, y] for x, y in square])
    assert not overlap(square, [[x + 0.8, y + 0.8] for x, y in tilted])
