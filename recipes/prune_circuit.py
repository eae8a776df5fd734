"""Iterative pruning on one prompt: heads and MLPs are ablated one by one, and dropped while nothing moves.

    python recipes/prune_circuit.py                                            # the bundled model, indirect objects
    python recipes/prune_circuit.py --model gpt2 --threshold 0.05 --ablation zero mean resample
    python recipes/prune_circuit.py --prompt "The Eiffel Tower is in the city of" --answers " Paris" " Rome"

From the last layer to the first, each node is ablated on top of all earlier drops; if that moves the logit difference by
less than `--threshold`, it is gone. Passes repeat until one drops nothing. Ablations: zero; mean over the prompt's own
positions; resample, from the corrupted prompt of the pair.

Written to `--out`: a circuit as JSON and a page for each ablation, a page of the trajectories, trajectory.csv with every
test, and summary.md (pages also as .png where Chromium is installed).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd

import interp


def keep(out: Path, name: str, figure: Any) -> None:
    """Write a page and, if there is a browser, a picture."""
    figure.save(out / f"{name}.html")
    try:
        figure.save(out / f"{name}.png")
    except interp.errors.PlotError as error:
        print(f"{name}: no picture beside the page: {error}")


def describe(circuits: dict[str, interp.Circuit], values: dict[str, float], seconds: dict[str, float]) -> list[str]:
    """What is left under each ablation, as a table, and the nodes that matter most."""
    lines = [
        "| ablation | heads left | MLPs left | passes | tests | seconds | logit difference, whole | pruned | dropped later |",
        "| - |" + " -: |" * 8,
    ]
    for name, circuit in circuits.items():
        tests, heads = circuit.trajectory, len(list(circuit))
        flips = sum(test["dropped"] for test in tests if test["pass"] > 1)
        lines.append(
            f"| {name} | {heads} | {circuit.n_nodes - heads} | {tests[-1]['pass']} | {len(tests)} | {seconds[name]:.1f} | "
            f"{values[name]:.2f} | {circuit.meta['metric_value']:.2f} | {flips} |"
        )
    lines += ["", "Dropped later: nodes that had to stay in the first pass and could go in a later one.", ""]
    for name, circuit in circuits.items():
        strongest = [f"{node} {change:+.2f}" for node, change in circuit.ranking()[:10]]
        lines.append(f"- {name}, strongest nodes (change when ablated): {', '.join(strongest) or 'none left'}")
    if len(circuits) > 1:
        first, *others = circuits.values()
        shared = first
        for other in others:
            shared = shared & other
        lines.append(f"- left under every ablation: {', '.join(name for name in shared.nodes()[1:-1]) or 'nothing'}")
    return lines


def main(arguments: list[str] | None = None) -> Path:
    """Prune with every ablation; the folder that holds the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder or bundled name")
    parser.add_argument("--prompt", default=None, help="a prompt of your own, instead of an indirect object")
    parser.add_argument("--answers", nargs=2, default=None, metavar=("RIGHT", "WRONG"))
    parser.add_argument("--ablation", nargs="+", default=["zero", "mean"], choices=["zero", "mean", "resample"])
    parser.add_argument("--threshold", type=float, default=0.1, help="logits (default 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, …; fp32 on a CPU")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(), default=Path("artifacts/prune_circuit"))
    options = parser.parse_args(arguments)
    if (options.prompt is None) != (options.answers is None):
        parser.error("--prompt and --answers belong together")
    if options.prompt is not None and "resample" in options.ablation:
        parser.error("resample takes activations from a corrupted prompt, which --prompt has none of")

    interp.set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model = interp.load_model(options.model, device=options.device, dtype=options.dtype)
    print(model)
    if options.prompt is None:
        pairs = interp.tasks.ioi(model.tokenizer, n=1, seed=options.seed, template=0, order="ABBA")
    else:
        pairs = interp.PromptPairs([options.prompt], None, [options.answers[0]], [options.answers[1]])
    circuits: dict[str, interp.Circuit] = {}
    seconds, values = {}, {}
    for ablation in options.ablation:
        print(f"pruning with {ablation} …", flush=True)
        start = time.perf_counter()
        circuits[ablation] = interp.iterative_pruning(
            model, pairs=pairs, threshold=options.threshold, ablation_type=ablation
        )
        seconds[ablation] = time.perf_counter() - start
        circuit = circuits[ablation]
        gone = sum(test["change"] for test in circuit.trajectory if test["dropped"])
        values[ablation] = circuit.meta["metric_value"] - gone
        circuit.to_json(options.out / f"{ablation}.json")
        title = f"{circuit.n_nodes} nodes left by pruning, {ablation} ablation · {model.name}"
        keep(options.out, ablation, interp.plot_circuit_graph(circuit, title=title))
    title = f"Iterative pruning on one prompt · {model.name}"
    keep(options.out, "trajectory", interp.plots.plot_pruning(circuits, title=title))
    tests = [pd.DataFrame(circuit.trajectory).assign(ablation=name) for name, circuit in circuits.items()]
    pd.concat(tests).to_csv(options.out / "trajectory.csv", index=False)
    (right,), (wrong,) = pairs.answers[0], pairs.distractors[0]
    lines = [
        f"# Iterative pruning · {model.name}",
        "",
        f'"{pairs.clean[0]}" -> "{right}", not "{wrong}"; threshold {options.threshold:g} logits.',
        "",
        *describe(circuits, values, seconds),
        "",
    ]
    (options.out / "summary.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return options.out


if __name__ == "__main__":
    print(f"results in {main()}")
