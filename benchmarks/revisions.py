"""Our own jobs of the other benchmarks on two revisions, in turn: `python benchmarks/revisions.py REV [--repeats 7]`.

A process for each tree (REV's is checked out into a folder of its own) holds the same random models and runs one job when it is
told to; rounds go A B, B A, A B, …, so that whatever else the machine does falls on both. Ratios are medians over rounds, and of
the sums of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import THREADS, heading, pair_differing_from, random_gpt2, table, wait_for_quiet

ROOT = Path(__file__).parents[1]
#: Short jobs run more rounds: as many as take this long on each tree.
SECONDS = 20.0


def jobs(quick: bool) -> dict[str, Callable[[], Any]]:
    """The jobs by name; public names of the library alone, so that they run on revisions before and after."""
    import torch

    import interp

    torch.set_num_threads(THREADS)
    model = interp.load_model(random_gpt2(n_layer=3) if quick else random_gpt2())
    small = interp.load_model(random_gpt2(n_layer=2 if quick else 4, n_head=4, n_embd=256))
    every, late, shared = pair_differing_from(0), pair_differing_from(10), pair_differing_from(10)
    eight = every
    for seed in range(1, 8):
        eight = eight + pair_differing_from(0, seed=seed)
    texts = torch.randint(50257, (4 if quick else 16, 128), generator=torch.Generator().manual_seed(0)).tolist()
    layers = range(model.n_layers)
    sites = interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=list(layers)[1:-1])
    top = interp.discover(model, every, "eap", progress=False).top(n_edges=40)
    return {
        "residual sweep, all positions": lambda: interp.patch(model, every, interp.grid("resid_pre")),
        "the same, from position 10 on": lambda: interp.patch(model, late, interp.grid("resid_pre")),
        "head z sweep": lambda: interp.patch(model, every, interp.heads("z")),
        "the same, 2/3 of the prompts shared": lambda: interp.patch(model, shared, interp.heads("z")),
        "AtP, three kinds": lambda: interp.attribute(model, every, sites),
        "collection, mlp_out of a middle layer": lambda: interp.collect_activations(
            model, texts, model.n_layers // 2, "mlp_out", progress=False
        ),
        "EAP, 8 pairs": lambda: interp.discover(model, eight, "eap", progress=False, max_tokens=10**6),
        "ACDC, small model, every edge": lambda: interp.discover(small, every, "acdc", progress=False),
        "ACDC, EAP's top edges": lambda: interp.discover(model, every, "acdc", within=top, progress=False),
        "one pass, 24 patches": lambda: interp.patch(
            model, every, interp.grid("resid_pre", positions=range(2)), schedule="growing", max_tokens=10**6
        ),
    }


def serve(quick: bool) -> None:
    """Run the job that each line of stdin names; answer with its seconds, by the clock and of processor time."""
    import resource
    import warnings

    warnings.filterwarnings("ignore")
    known = jobs(quick)
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        known[line.strip()]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([time.perf_counter() - started, time.process_time() - worked, peak]), flush=True)


class Tree:
    """The process that runs jobs on one tree."""

    def __init__(self, tree: Path, quick: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, __file__, "--serve", *(["--quick"] if quick else [])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=tree, **pipes)
        self.names: list[str] = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]

    def run(self, name: str) -> tuple[float, float, float]:
        """Seconds by the clock, of work, and the peak memory so far in GB."""
        self.process.stdin.write(f"{name}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        wall, work, peak = json.loads(self.process.stdout.readline())  # type: ignore[union-attr]
        return wall, work, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?")
    parser.add_argument("--quick", action="store_true", help="small models, two rounds: does it work?")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.quick)
        return
    with tempfile.TemporaryDirectory() as folder:
        tree, git = Path(folder) / "tree", ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(tree), args.revision], check=True)
        try:
            compare(Tree(tree, args.quick), Tree(ROOT, args.quick), 2 if args.quick else args.repeats, args.revision)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(before: Tree, now: Tree, repeats: int, revision: str) -> None:
    """Print the table of ratios now / before."""
    wait_for_quiet()
    rows = []
    for name in now.names:
        timed: dict[Tree, list[tuple[float, float, float]]] = {before: [], now: []}
        for tree in (before, now):
            tree.run(name)  # warm
        rounds = max(repeats, round(SECONDS / before.run(name)[0])) if repeats > 2 else repeats
        for number in range(rounds):
            for tree in (before, now) if number % 2 else (now, before):
                timed[tree].append(tree.run(name))
        wall, work = (
            statistics.median(b[i] / a[i] for a, b in zip(timed[before], timed[now], strict=True)) for i in (0, 1)
        )
        whole = sum(b[0] for b in timed[now]) / sum(a[0] for a in timed[before])
        seconds = [f"{statistics.median(run[0] for run in timed[tree]):.3f} s" for tree in (before, now)]
        rows.append(
            [name, *seconds, f"{100 * (wall - 1):+.1f} %", f"{100 * (work - 1):+.1f} %", f"{100 * (whole - 1):+.1f} %"]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    peaks = [timed[tree][-1][2] for tree in (before, now)]
    rows.append(
        ["highest memory of the whole", *(f"{peak:.2f} GB" for peak in peaks), f"{peaks[1] / peaks[0]:.3f}×", "", ""]
    )
    print(heading(f"Two revisions: {revision} and this tree, medians of {repeats}"))
    print(table(["job", revision, "now", "more time", "more work", "all rounds"], rows))


if __name__ == "__main__":
    main()
