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

#: What runs on each tree; it is given the file to write and whether only tiny models are to run.
JOBS = """
import sys
import numpy as np
import torch, interp
from interp.lens import attention_patterns
from interp.circuits import run_circuit
from tests.families import loaded, words

out, quick = sys.argv[1], sys.argv[2] == "quick"
numbers = {}


def keep(name, value):
    if hasattr(value, "values") and hasattr(value, "clean"):  # Effects
        keep(f"{name}: runs", np.stack([value.clean.values] + ([] if value.corrupted is None else [value.corrupted.values])))
        value = value.values.values
    if isinstance(value, interp.Circuit):
        keep(f"{name}: kept", value.matrix().astype(float))
        value = list(value.scores().values())
    value = value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)
    numbers[name] = value
    print(name, value.shape, file=sys.stderr, flush=True)


def jobs(name, model, pairs, layers, small):
    own = lambda job: f"{name}: {job}"
    last = layers[-1]
    schedules = ("auto", "naive", "rows", "growing", "prefix") if small else ("auto",)
    grid = interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=layers)
    for direction in ("noising", "denoising"):
        for schedule in schedules:
            keep(own(f"patch grid {direction} {schedule}"), interp.patch(model, pairs, grid, direction=direction, schedule=schedule))
        keep(own(f"patch heads {direction}"), interp.patch(model, pairs, interp.heads(["z", "q", "pattern", "head_out"], layers=layers), direction=direction))
        keep(own(f"patch kv heads {direction}"), interp.patch(model, pairs, interp.heads(["k", "v"], layers=layers), direction=direction))
    keep(own("patch sets"), interp.patch(model, pairs, interp.sets({"a": [f"L{last}.H0.z", f"L{last}.mlp@-1"], "b": ["L0.H1.k", "embed"]})))
    keep(own("patch neurons"), interp.patch(model, pairs, interp.neurons(last, units=range(12))))
    keep(own("patch embed"), interp.patch(model, pairs, interp.grid(["embed", "resid_post"], layers=[0])))
    for method in ("atp", "atp*", "ig", "ig-activations"):
        keep(own(f"attribute {method}"), interp.attribute(model, pairs, interp.grid(["resid_pre", "mlp_out"], layers=layers), method=method, steps=3, verify=4))
        keep(own(f"attribute heads {method}"), interp.attribute(model, pairs, interp.heads(["z", "q", "head_out"], layers=layers), method=method, steps=3))
    senders = ["embed", "L0.H1", f"L{last - 1}.mlp", f"L{last - 1}.H0@-1"]
    for through in (False, True):
        keep(own(f"path_patch through_mlps={through}"), interp.path_patch(model, pairs, senders, [f"L{last}.H0.q", f"L{last}.H0.v", f"L{last}.mlp", "logits"], through_mlps=through))
    for mode in ("zero", "mean", "positional_mean", "resample"):
        keep(own(f"ablate {mode}"), interp.ablate(model, pairs, interp.heads(["z", "head_out"], layers=layers), mode))
        keep(own(f"ablate mlp {mode}"), interp.ablate(model, pairs, interp.grid("mlp_out", layers=layers), mode))
    keep(own("causal_trace"), interp.causal_trace(model, pairs, samples=2, window=2, components=["resid_post", "mlp_out"], layers=layers))
    for method in ("eap", "eap-ig", "eap-ig-activations") if small else ("eap", "eap-ig"):
        keep(own(f"discover {method}"), interp.discover(model, pairs, method, steps=2, progress=False))
    circuit = interp.discover(model, pairs, "eap", progress=False).top(n_edges=30)
    keep(own("discover exact"), interp.discover(model, pairs, "exact", within=circuit, progress=False))
    keep(own("discover acdc"), interp.discover(model, pairs, "acdc", within=circuit, progress=False))
    for ablation in ("counterfactual", "mean", "zero"):
        keep(own(f"run_circuit {ablation}"), run_circuit(model, pairs, circuit, ablation))
    found = interp.evaluate_circuit(model, pairs, interp.discover(model, pairs, "eap", progress=False), fractions=(0.01, 0.1, 1.0))
    keep(own("evaluate_circuit"), found.curve[["metric", "faithfulness"]].to_numpy())
    if small:
        keep(own("discover exact nodes"), interp.discover(model, pairs, "exact", level="node", progress=False))
        for kind in ("mean", "zero", "counterfactual"):
            keep(own(f"iterative_pruning {kind}"), interp.iterative_pruning(model, pairs=pairs, ablation_type=kind, threshold=0.05, progress=False))
    for kind in ("resid_post", "z", "k", "head_out", "mlp_pre", "neuron", "embed"):
        keep(own(f"collect {kind}"), interp.collect_activations(model, pairs, last, kind))
    lens = interp.logit_lens(model, pairs, layers=layers)
    for name_ in ("token", "logit", "next_rank", "next_probability"):
        keep(own(f"logit_lens {name_}"), np.nan_to_num(lens[name_].values))
    for by in ("component", "head", "position"):
        keep(own(f"direct_effects {by}"), interp.direct_effects(model, pairs, by))
    keep(own("attention_patterns"), attention_patterns(model, pairs.clean[0], layers=layers).values)


for family in ("gpt2", "llama_gqa"):
    clean = words(7, 7, 5)
    corrupted = [[p[0], 99 - p[1] % 50, *p[2:]] for p in clean]
    pairs = interp.PromptPairs(clean, corrupted, [20, 21, 22], [40, 41, 42], positions={"subject": [[1, 2]] * 3})
    alike = interp.PromptPairs(clean[:2], corrupted[:2], [20, 21], [40, 41], positions={"subject": [[1, 2]] * 2})
    model = loaded(family)
    jobs(family, model, alike, [0, 1, 2], True)
    keep(f"{family}: padded", interp.patch(model, pairs, interp.grid(["resid_mid", "resid_post"])))
    keep(f"{family}: padded gradients", interp.attribute(model, pairs, interp.grid(["resid_mid", "mlp_out"]), method="ig"))
    keep(f"{family}: padded edges", interp.discover(model, pairs, "eap-ig", progress=False))
if not quick:
    model = interp.load_model("smollm2-135m")
    jobs("smollm2-135m", model, interp.tasks.ioi(model.tokenizer, n=2, seed=0), [3, 14, 29], False)
np.savez(out, **numbers)
"""


def numbers_of(tree: Path, out: Path, quick: bool) -> dict[str, np.ndarray]:
    """The jobs' numbers, computed by the library in a tree; the models and prompts are this tree's own tests'."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", JOBS, str(out), "quick" if quick else "whole"]
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
