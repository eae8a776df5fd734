"""Peak memory of a sweep beside one plain forward pass of a chunk's tokens, each in a process of its own.

python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
from pathlib import Path

import torch
from common import THREADS, heading, pair_differing_from, random_gpt2, table

import interp
from interp.engine.schedule import token_budget

#: What is run: nothing after loading, a plain forward pass of as many tokens as a chunk may hold, sweeps.
RUNS = ("plain", "residual", "heads")


def peak(what: str, layers: int) -> tuple[int, int]:
    """(resident bytes before, highest resident bytes during) one run, in this process (Linux)."""
    torch.set_num_threads(THREADS)
    model = interp.load_model(random_gpt2(n_layer=layers))
    pairs = pair_differing_from(0)
    ids = torch.tensor(list(pairs.clean))
    with torch.no_grad():
        model.hf(input_ids=ids[:, :2])  # what the first run leaves behind is not counted
    interp.patch(model, pairs[:1], interp.grid("resid_pre", layers=[0], positions=[0]), progress=False)
    rows = token_budget(model) // ids.shape[1]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest use begins anew
    before = resident("VmRSS")
    if what == "plain":
        with torch.no_grad():
            model.hf(input_ids=ids.repeat(rows, 1), logits_to_keep=1)
    else:
        plan = interp.grid("resid_pre") if what == "residual" else interp.heads("z")
        interp.patch(model, pairs, plan, progress=False)
    return before, resident("VmHWM")


def resident(name: str) -> int:
    """Resident bytes now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*peak(args.child[0], int(args.child[1])))
        return
    layers = 3 if args.quick else 12
    found: dict[str, list[tuple[int, int]]] = {what: [] for what in RUNS}
    for _ in range(1 if args.quick else args.repeats):
        for what in RUNS:
            command = [sys.executable, __file__, "--child", what, str(layers)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found[what].append((int(said[-2]), int(said[-1])))
    most = {what: sorted(high for _, high in runs)[len(runs) // 2] for what, runs in found.items()}
    more = {what: sorted(high - low for low, high in runs)[len(runs) // 2] for what, runs in found.items()}
    rows = []
    for what, name in zip(
        RUNS, ("one plain forward pass of a chunk's tokens", "residual sweep", "head z sweep"), strict=True
    ):
        ratio = more[what] / more["plain"]
        said = "" if what == "plain" else f"**{ratio:.2f}×** (≤ 2×{'' if ratio <= 2 else ', MISSED'})"
        whole = "" if what == "plain" else f"{most[what] / most['plain']:.2f}×"
        rows.append([name, f"{more[what] / 2**20:.0f} MiB", said, f"{most[what] / 2**20:.0f} MiB", whole])
    print(heading(f"Peak memory: GPT-2 small's size, {layers} layers, medians of {len(found['plain'])} processes"))
    print(table(["run", "above the loaded model", "", "whole process", ""], rows))


if __name__ == "__main__":
    main()
