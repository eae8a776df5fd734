"""Are the numbers those of another revision? `python -m tests.tools.same_numbers REV [--quick]`.

REV is checked out into a folder of its own; the same jobs, which use public names alone, run in a fresh process on each tree.
A line for each job says how many numbers there are, how far they are apart, and whether they are the same bits. Exit status 1
where anything differs by more than 1e-6 of the largest number of its job.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
ALLOWED = 1e-6

JOBS = Path(__file__).with_name("same_numbers_jobs.py")


def numbers_of(tree: Path, out: Path, quick: bool) -> dict[str, np.ndarray]:
    """The jobs' numbers, computed by the library in a tree; the models and prompts are this tree's own tests'."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(JOBS), str(out), "quick" if quick else "whole"]
    subprocess.run(command, check=True, cwd=tree, env=environment)
    with np.load(out) as found:
        return {name: found[name] for name in found.files}


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--quick", action="store_true", help="tiny models alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(tree), args.revision], check=True)
        try:
            before = numbers_of(tree, Path(folder) / "before.npz", args.quick)
            now = numbers_of(ROOT, Path(folder) / "now.npz", args.quick)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    return compare(before, now)


def compare(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> int:
    """Print the table; 1 where any job differs."""
    print(f"{'job':<58}{'numbers':>9}{'largest':>12}{'apart':>11}{'of largest':>12}")
    failed = 0
    for name in before | now:
        if name not in before or name not in now or before[name].shape != now[name].shape:
            print(f"{name:<58} another shape, or only one of the two")
            failed += 1
            continue
        one, other = before[name], now[name]
        same = np.array_equal(one, other, equal_nan=True)
        holes = np.array_equal(np.isnan(one), np.isnan(other))
        largest = float(np.nanmax(np.abs(one))) if one.size and not np.isnan(one).all() else 0.0
        apart = float(np.nanmax(np.abs(one - other))) if largest else 0.0
        share = apart / largest if largest else 0.0
        bad = not holes or share > ALLOWED
        failed += bad
        verdict = "same bits" if same else f"{share:.1e}" + (" DIFFERS" if bad else "")
        print(f"{name:<58}{one.size:>9}{largest:>12.4g}{apart:>11.2e}{verdict:>12}")
    print(f"{len(before | now)} jobs, {failed} differ by more than {ALLOWED:g} of their largest number")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
