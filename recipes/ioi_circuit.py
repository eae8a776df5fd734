"""The circuit of indirect object identification: found in four ways, evaluated, drawn.

    python recipes/ioi_circuit.py                          # the bundled model, 32 pairs
    python recipes/ioi_circuit.py --model gpt2 --n 64 --steps 10 --device cuda

"Then, Mary and John went to the shop. John gave a ring to" -> " Mary"; in the corrupted prompt the last name is Mary, so
that John is right. Four rankings are found, and circuits of their best edges are run with all else corrupted:

    EAP           edge attribution patching: Δ · gradient at the clean run
    EAP-IG        gradients averaged over `--steps` inputs between clean and corrupted
    exact nodes   every head and MLP and the embedding patched by itself; a circuit has all edges between the nodes that it keeps
    random        edges in a random order: the floor

Written to `--out`: curves.csv, sizes.csv, summary.md, the circuit as JSON, and pages (.html, and .png where Chromium is
installed) of the faithfulness curves, of the smallest EAP-IG circuit that reaches `--target` as a graph with the heads'
attention patterns, and of its strongest edges as a matrix.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import interp

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SMALL = 0.02  # of all edges: what counts as a small circuit


@dataclass
class Study:
    """What was found, and what it cost."""

    model: interp.Model
    out: Path
    circuits: dict[str, interp.Circuit] = field(default_factory=dict)
    evaluations: dict[str, Any] = field(default_factory=dict)
    costs: list[tuple[str, float, float, float]] = field(default_factory=list)  # step, seconds, CPU seconds, GB

    def timed(self, name: str, what: str, call: Any) -> Any:
        """The result of a call; its time, that of all cores together, and the process's peak memory so far are kept."""
        print(f"{name}: {what} …", flush=True)
        start, cpu = time.perf_counter(), time.process_time()
        result = call()
        spent = time.perf_counter() - start, time.process_time() - cpu
        self.costs.append((f"{name}: {what}", *spent, peak_memory()))
        return result

    def keep(self, name: str, figure: Any) -> None:
        """Write a page and, if there is a browser, a picture."""
        figure.save(self.out / f"{name}.html")
        try:
            figure.save(self.out / f"{name}.png")
        except interp.errors.PlotError as error:
            print(f"{name}: no picture beside the page: {error}")


def peak_memory() -> float:
    """The most memory that this process has held so far, GB; NaN where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def discover_all(study: Study, pairs: interp.PromptPairs, steps: int, seed: int) -> None:
    """Four rankings of the model's edges or nodes."""
    model = study.model

    def shuffled() -> interp.Circuit:
        names = list(study.circuits["EAP"].scores())
        generator = random.Random(seed)
        return interp.Circuit.from_edges({name: generator.random() for name in names}, model)

    for name, find in {
        "EAP": lambda: interp.discover(model, pairs, "eap"),
        "EAP-IG": lambda: interp.discover(model, pairs, "eap-ig", steps=steps),
        "exact nodes": lambda: interp.discover(model, pairs, "exact", level="node"),
        "random": shuffled,
    }.items():
        study.circuits[name] = study.timed(name, "discover", find)


def by_size(study: Study, pairs: interp.PromptPairs, name: str, target: float) -> pd.DataFrame:
    """Circuits of a ranking, smallest first: the `top` edges asked for, how many of them lie on a path, faithfulness.

    To the sizes of the curve come ten between the last one below the target and the first one that reaches it; twice.
    """
    curve, ranking = study.evaluations[name].curve, study.circuits[name]
    for part in ("sizes in between", "sizes between those"):
        first = int(np.flatnonzero(curve["faithfulness"].to_numpy() >= target)[0])  # the whole model reaches 1
        if first == 0:
            break
        between = tuple(np.geomspace(curve["fraction"][first - 1], curve["fraction"][first], 12)[1:-1])

        def finer(fractions: tuple[float, ...] = between) -> Any:
            return interp.evaluate_circuit(study.model, pairs, ranking, fractions=fractions)

        curve = pd.concat([curve, study.timed(name, part, finer).curve])
        curve = curve.sort_values("n_edges").drop_duplicates("n_edges").reset_index(drop=True)
    counts = [ranking.top(n_edges=int(size), connected=True).n_edges for size in curve["n_edges"]]
    return curve.rename(columns={"n_edges": "top"}).assign(on_a_path=counts)


def write(study: Study, lines: list[str]) -> str:
    """curves.csv and summary.md; the summary as text."""
    curves = [each.curve.assign(method=name, cpr=each.cpr, cmd=each.cmd) for name, each in study.evaluations.items()]
    pd.concat(curves).to_csv(study.out / "curves.csv", index=False)
    heads = ["method", "CPR", "CMD", *(f"{100 * fraction:g} %" for fraction in FRACTIONS)]
    lines += ["## Faithfulness by size", "", f"| {' | '.join(heads)} |", "| - |" + " -: |" * (len(heads) - 1)]
    for name, each in study.evaluations.items():
        values = [each.cpr, each.cmd, *each.curve["faithfulness"]]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    nodes = study.evaluations["exact nodes"].curve
    lines += [
        "",
        f"Sizes are fractions of {study.circuits['EAP'].n_edges:,} edges, for exact nodes of "
        f"{study.circuits['exact nodes'].n_nodes} heads and MLPs: their circuits have "
        f"{', '.join(f'{n:,}' for n in nodes['n_edges'])} edges. CPR: area under faithfulness; CMD: area under its distance "
        "from 1.",
        "",
        "## Cost",
        "",
        "| step | seconds | of all cores together | peak memory so far, GB |",
        "| - | -: | -: | -: |",
    ]
    lines += [f"| {name} | {wall:.1f} | {cpu:.1f} | {held:.2f} |" for name, wall, cpu, held in study.costs]
    text = "\n".join([*lines, ""])
    (study.out / "summary.md").write_text(text, encoding="utf-8")
    return text


def main(arguments: list[str] | None = None) -> Path:
    """Run the study; the folder that holds its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder or bundled name")
    parser.add_argument("--n", type=int, default=32, help="pairs of prompts (default 32)")
    parser.add_argument("--steps", type=int, default=5, help="interpolation points of EAP-IG (default 5)")
    parser.add_argument("--target", type=float, default=0.85, help="faithfulness that a circuit should reach")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, …; fp32 on a CPU")
    parser.add_argument("--out", type=lambda text: Path(text).expanduser(), default=Path("artifacts/ioi_circuit"))
    options = parser.parse_args(arguments)

    interp.set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(interp.load_model(options.model, device=options.device, dtype=options.dtype), options.out)
    model, threads = study.model, torch.get_num_threads()
    print(model)
    one_kind = {"template": 0, "order": "ABBA"}
    pairs = interp.tasks.ioi(model.tokenizer, n=options.n, seed=options.seed, **one_kind)
    others = interp.tasks.ioi(model.tokenizer, n=options.n, seed=options.seed + 1, **one_kind)
    discover_all(study, pairs, options.steps, options.seed)
    for name, circuit in study.circuits.items():
        study.evaluations[name] = study.timed(
            name,
            "evaluate",
            lambda circuit=circuit: interp.evaluate_circuit(model, pairs, circuit, fractions=FRACTIONS),
        )
    first = study.evaluations["EAP"]
    study.keep(
        "curves",
        interp.plots.plot_faithfulness(study.evaluations, title=f"Indirect objects: faithfulness · {model.name}"),
    )

    ranking, total = study.circuits["EAP-IG"], study.circuits["EAP"].n_edges
    sizes = by_size(study, pairs, "EAP-IG", options.target)
    sizes.to_csv(options.out / "sizes.csv", index=False)
    reaching = sizes[(sizes["faithfulness"] >= options.target) & (sizes["on_a_path"] > 0)].iloc[0]
    small = sizes[sizes["on_a_path"] <= SMALL * total]
    best = small.loc[small["faithfulness"].idxmax()]
    circuit = ranking.top(n_edges=int(reaching["top"]), connected=True)
    fresh = interp.evaluate_circuit(model, others, circuit, completeness=True, minimality=5, progress=False)
    circuit.to_json(options.out / "circuit.json")
    title = f"Indirect objects: {circuit.n_edges:,} edges that EAP-IG found · {model.name}"
    seen = interp.lens.attention_patterns(model, pairs.clean[0])  # on a click on a head
    patterns = {head: seen[head].values for head in circuit}
    tokens = seen["token"].values.tolist()
    study.keep("circuit", interp.plot_circuit_graph(circuit, title=title, patterns=patterns, tokens=tokens))
    strongest = circuit.top(n_edges=min(150, circuit.n_edges))
    title = f"The {strongest.n_edges} strongest edges · {model.name}"
    study.keep("matrix", interp.plots.plot_circuit_matrix(strongest, title=title))

    def said(row: pd.Series) -> str:
        share = 100 * row["on_a_path"] / total
        return (
            f"{int(row['on_a_path']):,} edges ({share:.2f} % of all; those of the best {int(row['top']):,} that lie on a "
            f"path from the embedding to the logits), faithfulness {row['faithfulness']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f})"
        )

    lines = [
        f"# Indirect objects · {model.name}",
        "",
        f"{model!r}, {threads} threads. {len(pairs)} pairs; logit difference {first.full:.2f} clean, {first.empty:.2f} "
        "corrupted.",
        "",
        f"- EAP-IG ({options.steps} steps), smallest circuit seen to reach {options.target:g}: {said(reaching)}",
        f"- best of at most {100 * SMALL:g} % of the edges: {said(best)}",
        f"- the first of these on {len(others)} other pairs: {fresh.curve['faithfulness'].iloc[-1]:.3f}; completeness "
        f"there {fresh.completeness:.2f}",
        "",
        "Strongest edges: the mean change of the logit difference when that edge is corrupted, as estimated; and the drop "
        "of faithfulness on the other pairs when that edge alone leaves the circuit.",
        "",
    ]
    drops = dict(zip(fresh.minimality["part"], fresh.minimality["drop"], strict=True))
    for edge, score in circuit.ranking()[:5]:
        lines.append(f"- {edge[0]} -> {edge[1]}: {score:+.2f}, drop {drops[' -> '.join(edge)]:+.3f}")
    print(write(study, [*lines, ""]))
    return options.out


if __name__ == "__main__":
    print(f"results in {main()}")
