"""The circuit of indirect object identification: found in four ways, evaluated at every size, drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from .. import tasks
from ..circuits import Circuit, discover, evaluate_circuit
from ..lens import attention_patterns
from ..plots import plot_circuit_graph, plot_circuit_matrix, plot_faithfulness
from .folder import Folder

if TYPE_CHECKING:
    from ..circuits.faithfulness import Evaluation
    from ..models.model import Model
    from ..pairs import PromptPairs

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SMALL = 0.02  # of all edges: what counts as a small circuit


@dataclass(frozen=True)
class Found:
    """Rankings by the name of their method, and their evaluations."""

    folder: Folder
    pairs: PromptPairs
    circuits: dict[str, Circuit] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def circuit_study(
    model: Model, out: str | Path, *, n: int = 32, steps: int = 5, target: float = 0.85, seed: int = 0
) -> Path:
    """Find the circuit of indirect objects in four ways, evaluate and draw it; the folder.

    EAP; EAP-IG over `steps` inputs between clean and corrupted; every node patched by itself (a circuit has all edges between the
    nodes that it keeps); edges in a random order. Circuits of their best edges are run with all else corrupted. Written to
    `out`: curves.csv, sizes.csv, summary.md, the smallest EAP-IG circuit that reaches `target` as JSON, the report index.html,
    and pages of the curves, of that circuit with its heads' attention, and of its strongest edges as a matrix.

    Raises:
        TaskError: too few pairs for this tokenizer. AuditError: edges do not add up on this model.
    """
    kind = {"template": 0, "order": "ABBA"}
    pairs = tasks.ioi(model.tokenizer, n=n, seed=seed, **kind)  # type: ignore[arg-type]
    others = tasks.ioi(model.tokenizer, n=n, seed=seed + 1, **kind)  # type: ignore[arg-type]
    folder = Folder(model, Path(out), f"Indirect objects: the circuit · {model.name}")
    folder.out.mkdir(parents=True, exist_ok=True)
    found = Found(folder, pairs)
    rank(found, steps, seed)
    first, total = found.evaluations["EAP"], found.circuits["EAP"].n_edges
    figure = plot_faithfulness(found.evaluations, title=f"Indirect objects: faithfulness · {model.name}")
    folder.draw("curves", figure)

    sizes = by_size(found, "EAP-IG", target)
    sizes.to_csv(folder.out / "sizes.csv", index=False)
    reaching = sizes[(sizes["faithfulness"] >= target) & (sizes["on_a_path"] > 0)].iloc[0]
    small = sizes[sizes["on_a_path"] <= SMALL * total]
    best = small.loc[small["faithfulness"].idxmax()]
    circuit = found.circuits["EAP-IG"].top(n_edges=int(reaching["top"]), connected=True)
    fresh = evaluate_circuit(model, others, circuit, completeness=True, minimality=5, progress=False)
    circuit.to_json(folder.out / "circuit.json")
    draw(folder, circuit, pairs)
    lines = [
        f"{model!r}, {torch.get_num_threads()} threads. {len(pairs)} pairs; logit difference {first.full:.2f} clean, "
        f"{first.empty:.2f} corrupted.",
        "",
        f"- EAP-IG ({steps} steps), smallest circuit seen to reach {target:g}: {said(reaching, total)}",
        f"- best of at most {100 * SMALL:g} % of the edges: {said(best, total)}",
        f"- the first of these on {len(others)} other pairs: {fresh.curve['faithfulness'].iloc[-1]:.3f}; completeness "
        f"there {fresh.completeness:.2f}",
    ]
    folder.show("Faithfulness by size", figure)
    numbers = curves(found)
    folder.show("The same as numbers", numbers)
    folder.show(f"The circuit that reaches {target:g}", circuit)
    folder.show(f"That circuit on {len(others)} other pairs", fresh)
    folder.lines.extend([*lines, "", *strongest(circuit, fresh), "", *faithfulness_table(found, numbers)])
    return folder.finish(["\n".join(line for line in lines if line)])


def rank(found: Found, steps: int, seed: int) -> None:
    """Four rankings of the model's edges or nodes, and how faithful the best of each are."""
    model, pairs = found.folder.model, found.pairs

    def shuffled() -> Circuit:
        generator = random.Random(seed)
        return Circuit.from_edges({name: generator.random() for name in found.circuits["EAP"].scores()}, model)

    for name, find in {
        "EAP": lambda: discover(model, pairs, "eap"),
        "EAP-IG": lambda: discover(model, pairs, "eap-ig", steps=steps),
        "exact nodes": lambda: discover(model, pairs, "exact", level="node"),
        "random": shuffled,
    }.items():
        found.circuits[name] = found.folder.timed(f"{name}: discover", find)
    for name, circuit in found.circuits.items():
        found.evaluations[name] = evaluated(found, f"{name}: evaluate", circuit, FRACTIONS)


def evaluated(found: Found, step: str, circuit: Circuit, fractions: tuple[float, ...]) -> Evaluation:
    """How faithful the best edges of a ranking are, timed."""
    model, pairs = found.folder.model, found.pairs
    return found.folder.timed(step, lambda: evaluate_circuit(model, pairs, circuit, fractions=fractions))


def by_size(found: Found, name: str, target: float) -> pd.DataFrame:
    """Circuits of a ranking, smallest first: the `top` edges asked for, how many of them lie on a path, faithfulness.

    To the sizes of the curve come ten between the last one below the target and the first one that reaches it; twice.
    """
    curve, ranking = found.evaluations[name].curve, found.circuits[name]
    for part in ("sizes in between", "sizes between those"):
        first = int(np.flatnonzero(curve["faithfulness"].to_numpy() >= target)[0])  # the whole model reaches 1
        if first == 0:
            break
        between = tuple(np.geomspace(curve["fraction"][first - 1], curve["fraction"][first], 12)[1:-1])
        curve = pd.concat([curve, evaluated(found, f"{name}: {part}", ranking, between).curve])
        curve = curve.sort_values("n_edges").drop_duplicates("n_edges").reset_index(drop=True)
    counts = [ranking.top(n_edges=int(size), connected=True).n_edges for size in curve["n_edges"]]
    return curve.rename(columns={"n_edges": "top"}).assign(on_a_path=counts)


def draw(folder: Folder, circuit: Circuit, pairs: PromptPairs) -> None:
    """The circuit as a graph, with what its heads attend to on a click, and its strongest edges as a matrix."""
    seen = attention_patterns(folder.model, pairs.clean[0])
    patterns = {head: seen[head].values for head in circuit}
    tokens = seen["token"].values.tolist()
    title = f"Indirect objects: {circuit.n_edges:,} edges that EAP-IG found · {folder.model.name}"
    folder.draw("circuit", plot_circuit_graph(circuit, title=title, patterns=patterns, tokens=tokens))
    strongest = circuit.top(n_edges=min(150, circuit.n_edges))
    title = f"The {strongest.n_edges} strongest edges · {folder.model.name}"
    folder.draw("matrix", plot_circuit_matrix(strongest, title=title))


def said(row: pd.Series, total: int) -> str:
    """One size of the curve, in words."""
    share = 100 * row["on_a_path"] / total
    return (
        f"{int(row['on_a_path']):,} edges ({share:.2f} % of all; those of the best {int(row['top']):,} that lie on a "
        f"path from the embedding to the logits), faithfulness {row['faithfulness']:.3f} "
        f"({row['low']:.3f} to {row['high']:.3f})"
    )


def strongest(circuit: Circuit, fresh: Evaluation) -> list[str]:
    """The strongest edges, in lines of the summary."""
    assert fresh.minimality is not None
    drops = dict(zip(fresh.minimality["part"], fresh.minimality["drop"], strict=True))
    first = (
        "Strongest edges: the mean change of the logit difference when that edge is corrupted, as estimated; and the drop of "
        "faithfulness on the other pairs when that edge alone leaves the circuit."
    )
    edges = circuit.ranking()[:5]
    return [first, "", *(f"- {a} -> {b}: {score:+.2f}, drop {drops[f'{a} -> {b}']:+.3f}" for (a, b), score in edges)]


def curves(found: Found) -> pd.DataFrame:
    """CPR, CMD and the faithfulness at every size of each method; written as curves.csv in its long form."""
    long = [each.curve.assign(method=name, cpr=each.cpr, cmd=each.cmd) for name, each in found.evaluations.items()]
    pd.concat(long).to_csv(found.folder.out / "curves.csv", index=False)
    names = [f"{100 * fraction:g} %" for fraction in FRACTIONS]
    rows = [
        {"method": name, "CPR": each.cpr, "CMD": each.cmd, **dict(zip(names, each.curve["faithfulness"], strict=True))}
        for name, each in found.evaluations.items()
    ]
    return pd.DataFrame(rows)


def faithfulness_table(found: Found, table: pd.DataFrame) -> list[str]:
    """What `curves` gave in lines of the summary."""
    lines = [
        "## Faithfulness by size",
        "",
        f"| {' | '.join(table.columns)} |",
        "| - |" + " -: |" * (len(table.columns) - 1),
    ]
    for name, *values in table.itertuples(index=False):
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    nodes = found.evaluations["exact nodes"].curve
    return [
        *lines,
        "",
        f"Sizes are fractions of {found.circuits['EAP'].n_edges:,} edges, for exact nodes of "
        f"{found.circuits['exact nodes'].n_nodes} heads and MLPs: their circuits have "
        f"{', '.join(f'{n:,}' for n in nodes['n_edges'])} edges. CPR: area under faithfulness; CMD: area under its distance "
        "from 1.",
    ]
