"""How large pages are and how long they take to open in headless Chromium; attention beside CircuitsVis, where it is installed.

    python benchmarks/pages.py [--rounds 5] [--quick]

Opening is from the call of the browser until the page says that all is drawn, in a tab of its own; medians. CircuitsVis fetches
its scripts from a content network when it is opened, so that here only the size of its page can be told.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import interp
from interp.plots.browser import Browser


def patterns(layers: int, heads: int, tokens: int) -> xr.DataArray:
    """Random causal attention with values' lengths."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((layers, heads, tokens, tokens), dtype=np.float32) ** 8 + 1e-3)
    weights /= weights.sum(-1, keepdims=True)
    norms = rng.random((layers, heads, tokens), dtype=np.float32)
    coords: dict[str, Any] = {"token": ("query", [f" word{n}" for n in range(tokens)]), "layer": range(layers)}
    coords["value_norm"] = (("layer", "head", "key"), norms)
    return xr.DataArray(weights, coords, ("layer", "head", "query", "key"))


def pages(folder: Path, quick: bool) -> dict[str, Path]:
    """What is opened: name and file."""
    layers, heads, tokens = (3, 4, 20) if quick else (30, 9, 100)
    seen = patterns(layers, heads, tokens)
    made = {f"attention, {tokens} tokens × {layers} layers × {heads} heads": interp.plot_attention(seen)}
    few = [(1, 0), (1, 1), (2, 0), (2, 1)]
    made["four of these heads side by side"] = interp.plot_attention(seen, heads=few)
    edges = {
        (f"L{a}.H{h}", f"L{b}.H{k}.q"): float(np.random.default_rng(a * 100 + b).normal())
        for a in range(5) for b in range(a + 1, 12) for h in range(5) for k in range(3)
    }  # fmt: skip
    circuit = interp.Circuit.from_edges(dict(list(edges.items())[:500]))
    made[f"circuit of {circuit.n_edges} edges"] = interp.plot_circuit_graph(circuit)
    made["400 tokens, 8 series"] = interp.plot_tokens([" word"] * 400, np.random.default_rng(0).normal(size=(400, 8)))
    files = {name: figure.save(folder / f"{number}.html") for number, (name, figure) in enumerate(made.items())}
    items = [("Attention", made[next(iter(made))]), ("Circuit", circuit), "Some words."]
    files["report of that attention, that circuit and text"] = interp.report(items, folder / "report.html")
    return files


def opening(path: Path, rounds: int) -> list[float]:
    """Seconds of each opening."""
    taken = []
    for _ in range(rounds):
        with Browser() as browser:
            browser.evaluate("1")
            start = time.perf_counter()
            browser.open(path)
            taken.append(time.perf_counter() - start)
    return taken


def circuitsvis(quick: bool) -> int | None:
    """Bytes of CircuitsVis's page of the same attention, all layers below one another; None where it is not installed."""
    try:
        from circuitsvis.attention import attention_heads
    except ImportError:
        return None
    layers, heads, tokens = (3, 4, 20) if quick else (30, 9, 100)
    seen = patterns(layers, heads, tokens)
    words = [str(word) for word in seen["token"].values]
    draw: Callable[..., Any] = attention_heads
    return sum(len(str(draw(tokens=words, attention=layer.values))) for layer in seen)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| page | MB | opens in, s |\n| - | -: | -: |")
        for name, path in pages(Path(folder), options.quick).items():
            taken = statistics.median(opening(path, 1 if options.quick else options.rounds))
            print(f"| {name} | {path.stat().st_size / 1e6:.2f} | {taken:.2f} |")
    theirs = circuitsvis(options.quick)
    said = "not installed" if theirs is None else f"{theirs / 1e6:.2f} MB, beside the scripts that it fetches"
    print(f"\nCircuitsVis, the same attention: {said}")


if __name__ == "__main__":
    main()
