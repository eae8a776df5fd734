"""Which attribution when: every method of `interp.attribute` and `interp.discover` beside patching, on the bundled model.

python benchmarks/which_method.py [--pairs N] [--tasks ioi facts agreement] [--cost] [--circuits]

Pearson correlations with exact patching over all cells of a grid, with 95 % intervals of a bootstrap over pairs; `--circuits`: of
the strongest edges with exact single edges, and CPR and CMD on other pairs; `--cost`: seconds, interleaved, and peak memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import heading, interleaved, ratio_of, table

import interp
from interp.circuits import Circuit, Facts

KINDS = ["resid_pre", "attn_out", "mlp_out"]
METHODS: dict[str, dict[str, Any]] = {
    "atp": {"method": "atp"},
    "relp": {"method": "relp"},
    "ig-5": {"method": "ig"},
    "ig-20": {"method": "ig", "steps": 20},
    "secant": {"method": "secant"},
    "secant, 2 parts": {"method": "secant", "points": [0.5]},
    "secant, 3 parts": {"method": "secant", "points": [1 / 3, 2 / 3]},
}
EDGES: dict[str, dict[str, Any]] = {
    "eap": {"method": "eap"},
    "relp": {"method": "relp"},
    "eap-ig-5": {"method": "eap-ig"},
    "secant, 1 part": {"method": "secant", "points": []},
    "secant": {"method": "secant"},
    "secant, 3 parts": {"method": "secant", "points": [1 / 3, 2 / 3]},
}


def task(model: interp.Model, name: str, n: int) -> interp.PromptPairs:
    """Pairs of one template: a grid over positions needs prompts of one shape, up to what stands first."""
    if name == "ioi":
        return interp.tasks.ioi(model.tokenizer, n=n, template=0)
    return getattr(interp.tasks, name)(model.tokenizer, n=n)


def pearson(exact: np.ndarray, estimate: np.ndarray) -> float:
    both = np.isfinite(exact) & np.isfinite(estimate)
    return float(np.corrcoef(exact[both], estimate[both])[0, 1])


def with_interval(exact: np.ndarray, estimate: np.ndarray) -> str:
    """The correlation over all cells and pairs (the last axis), and its 95 % interval over pairs."""
    rng, count = np.random.default_rng(0), exact.shape[-1]
    drawn = [rng.integers(0, count, count) for _ in range(300)]
    low, high = np.percentile([pearson(exact[..., some], estimate[..., some]) for some in drawn], [2.5, 97.5])
    return f"{pearson(exact, estimate):.3f} [{low:.3f}, {high:.3f}]"


def grids(model: interp.Model, name: str, n: int) -> None:
    pairs, plan = task(model, name, n), interp.grid(KINDS)
    exact = interp.patch(model, pairs, plan, progress=False)
    want = (exact.values - exact.clean).values
    rows = []
    for method, options in METHODS.items():
        found = interp.attribute(model, pairs, plan, **options)
        got = (found.values - found.clean).values
        off = found.provenance["completeness"]
        cells = [with_interval(want[kind], got[kind]) for kind in range(len(KINDS))]
        rows.append([method, *cells, "" if off is None else f"{off:.1e}"])
    print(f"\n{name}, {len(pairs)} pairs: Pearson with exact patching\n")
    print(table(["method", *KINDS, "off the sum"], rows))


def circuits(model: interp.Model, name: str, n: int) -> None:
    pairs = task(model, name, 2 * n)
    first, other = pairs[:n], pairs[n:]
    found = {method: interp.discover(model, first, progress=False, **options) for method, options in EDGES.items()}
    strong = sorted({edge for circuit in found.values() for edge, _ in circuit.ranking()[:100]})
    within = Circuit.from_edges(dict.fromkeys(strong, 1.0), Facts.of(model), {})
    exact = interp.discover(model, first, "exact", within=within, progress=False).scores()
    rows = []
    for method, circuit in found.items():
        scores = circuit.scores()
        near = pearson(np.array([exact[edge] for edge in strong]), np.array([scores[edge] for edge in strong]))
        judged = [interp.evaluate_circuit(model, some, circuit, progress=False) for some in (first, other)]
        rows.append([method, f"{near:.3f}", *(f"{one.cpr:.3f} / {one.cmd:.3f}" for one in judged)])
    print(f"\n{name}, {n} pairs: {len(strong)} single edges, CPR / CMD on these pairs and on {n} others\n")
    print(table(["method", "single edges", "these", "others"], rows))


def kilobytes(name: str) -> int:
    """A line of what Linux says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(method: str) -> None:
    """In a process of its own: the most memory that a method needs beyond the loaded model, in MB. Linux."""
    model = interp.load_model("smollm2-135m")
    pairs = task(model, "ioi", 32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is forgotten
    before = kilobytes("VmRSS")
    interp.attribute(model, pairs, interp.grid(KINDS), **METHODS[method])
    print("peak", (kilobytes("VmHWM") - before) // 1024, before // 1024)


def cost(model: interp.Model, repeats: int) -> None:
    pairs, plan = task(model, "ioi", 32), interp.grid(KINDS)
    jobs = {
        method: lambda options=options: interp.attribute(model, pairs, plan, **options)
        for method, options in METHODS.items()
        if method != "ig-20"
    }
    timed = interleaved(jobs, repeats)
    rows = []
    for method in jobs:
        command = [sys.executable, __file__, "--peak", method]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("peak")[1].split()
        seconds = sorted(timed[method].wall)[repeats // 2]
        rows.append([method, f"{seconds:.2f}", f"{ratio_of(timed, method, 'atp'):.2f}", said[0], said[1]])
    print("\nioi, 32 pairs: medians, interleaved\n")
    print(table(["method", "seconds", "x atp", "peak MB", "MB before"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tasks", nargs="*", default=["ioi", "facts", "agreement"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--circuits", action="store_true")
    parser.add_argument("--peak", choices=list(METHODS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        peak(options.peak)
        return
    print(heading("Which attribution when"))
    model = interp.load_model("smollm2-135m")
    if options.cost:
        cost(model, options.repeats)
        return
    for name in options.tasks:
        (circuits if options.circuits else grids)(model, name, options.pairs)


if __name__ == "__main__":
    main()
