"""Iterative pruning: heads and MLPs are dropped one at a time, from the last layer on, while nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..ablation import means
from ..cells import EVERYWHERE, Cell, Resolved
from ..edits import Edit
from ..engine.reading import encode_prompts
from ..engine.run import run_plan
from ..engine.trial import check_metric, name_of
from ..errors import CircuitError
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..pairs import EncodedPairs, PromptPairs
from ..sites import Site
from .circuit import Circuit
from .greedy import MOST_AHEAD, budget_of, in_turn, kept_log
from .nodes import Facts
from .runs import Cells

ABLATION_TYPES = ("zero", "mean", "resample", "counterfactual")


def iterative_pruning(
    model: Model,
    prompt: str | Sequence[int] | None = None,
    answer_tokens: Sequence[str | int] | None = None,
    threshold: float = 0.01,
    ablation_type: str = "mean",
    *,
    pairs: PromptPairs | None = None,
    metric: Metric = logit_diff,
    components: str | Sequence[str] = ("head", "mlp"),
    reference: Any = None,
    ahead: int = MOST_AHEAD,
    checkpoint: Any = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> Circuit:
    """Drop every node whose ablation, all earlier drops made, changes the metric by less than the threshold.

    Nodes go from the last layer to the first, one at a time, and are dropped at once; passes repeat until one drops
    nothing. Candidates are tried in batches that assume a fate for each one before them; behind the first whose fate was
    another they are tried again, so the result is the same whatever the batch size.

    Args:
        prompt, answer_tokens: one prompt and [right, wrong]; or give `pairs`, whose clean prompts are used.
        threshold: in the metric's own units, on the mean over pairs.
        ablation_type: "mean" (over `reference` prompts, or without them over the prompts' own positions), "zero",
            "resample" or "counterfactual" (both: the pairs' corrupted runs).
        components: "head", "mlp" or both.
        ahead: the largest batch; 1 tries one at a time.
        checkpoint: a path; tests that are done are kept and a later call continues.

    Returns:
        A node circuit; iterating over it gives its (layer, head). Scores are the change of the metric when a node was
        last tested. `circuit.trajectory` lists every test: pass, node, change, dropped.

    Raises:
        CircuitError, PairsError, MetricError: before the model runs.
    """
    if pairs is not None and (prompt is not None or answer_tokens is not None):
        raise CircuitError("iterative_pruning takes a prompt with answer_tokens, or pairs=, not both")
    if pairs is None:
        if prompt is None or answer_tokens is None:
            raise CircuitError("iterative_pruning needs a prompt and answer_tokens=[right, wrong], or pairs=")
        pairs = PromptPairs.one({"prompt": prompt}, answer_tokens)
    if ablation_type not in ABLATION_TYPES:
        raise CircuitError(f"unknown ablation_type {ablation_type!r}; the types are: {', '.join(ABLATION_TYPES)}")
    if ahead < 1:
        raise CircuitError(f"ahead={ahead}; try 1 node at a time or more")
    swap = ablation_type in ("resample", "counterfactual")
    if swap and pairs.corrupted is None:
        raise CircuitError(f"ablation_type={ablation_type!r} needs corrupted prompts; give pairs with them")
    components = (components,) if isinstance(components, str) else tuple(components)
    unknown = set(components) - {"head", "mlp"}
    if unknown or not components:
        raise CircuitError(f"components {list(components)}; they are 'head' and 'mlp'")
    encoded = model.encode(pairs)  # what is wrong with them is told before a mean is taken
    if swap:
        encoded.require_corrupted("iterative_pruning", CircuitError)
    rounding = check_metric(metric, encoded, model.vocab_size, dtype=model.dtype)
    facts = Facts.of(model)
    nodes = [site for site in facts.senders[:0:-1] if ("mlp" if site.kind == "mlp_out" else "head") in components]
    for site in nodes:
        model.require(site)
    max_tokens = budget_of(checkpoint, model, max_tokens)
    edit_of = _edits(model, pairs, ablation_type, reference, nodes, max_tokens)
    trajectory: list[dict[str, Any]] = []
    dropped: list[Site] = []
    scores: dict[Site, float] = {}
    stays = dict.fromkeys(nodes, False)  # what is expected of each node: its fate when it was last tried

    def measure(sets: list[list[Site]]) -> tuple[np.ndarray, float]:
        edits = [tuple((edit_of[site], EVERYWHERE) for site in chosen) for chosen in sets]
        cells = tuple(Cell((i,), edits=each) for i, each in enumerate(edits))
        plan: Any = _Sets("circuit", tuple(range(len(sets))), cells, {"pruning": len(dropped)})
        options: dict[str, Any] = {"max_tokens": max_tokens, "progress": False, "needs_source": swap}
        options |= {"method": "iterative_pruning", "rounding": rounding}
        found = run_plan(model, pairs, plan, metric, "noising", **options)
        return found.values.mean("pair").values, float(found.clean.mean())

    def attempt(batch: Sequence[Site]) -> tuple[list[float], list[bool]]:
        sets, assumed, expected = [], list(dropped), [stays[site] for site in batch]
        for site, stay in zip(batch, expected, strict=True):
            sets.append([*assumed, site])
            assumed = assumed if stay else sets[-1]
        return measure(sets)[0].tolist(), expected

    _, current = measure([nodes[:1]])
    passes = 0
    spec = {"threshold": threshold, "ablation": ablation_type}
    every = Cell((0,), edits=tuple((edit, EVERYWHERE) for edit in edit_of.values()))
    bar = tqdm(disable=None if progress is None else not progress, desc="pruning", unit="node")
    tests = len(nodes) * (len(nodes) + 1)  # more than passes can take
    with bar, kept_log(checkpoint, model, pairs, metric, "iterative_pruning", spec, every, tests, max_tokens) as log:
        while True:
            passes += 1
            left, before = [site for site in nodes if site not in dropped], len(dropped)
            for site, change, value in in_turn(left, current, threshold, attempt, stays, ahead, bar, log):
                scores[site] = change
                trajectory.append({"pass": passes, "node": site.node, "change": change, "dropped": not stays[site]})
                if not stays[site]:
                    dropped.append(site)
                    current = value
            if len(dropped) == before:
                break
    kept = {site.node: scores[site] for site in reversed(nodes) if site not in dropped}
    meta = {
        "model": model.name,
        "method": "iterative_pruning",
        "metric": name_of(metric),
        "ablation": ablation_type,
        "threshold": threshold,
        "metric_value": current,
        "trajectory": trajectory,
    }
    return Circuit.from_nodes(kept, facts, meta)


class _Sets(Cells):
    """Sets of nodes; only those that take activations from a second prompt need aligned pairs."""

    def resolve(self, model: Any, encoded: EncodedPairs) -> Resolved:
        """The cells as they are."""
        if any(edit.op == "replace" for cell in self.cells for edit, _ in cell.edits):
            encoded.require_aligned("pruning with a second prompt")
        return Resolved(((self.dim, self.labels),), self.cells, dict(self.spec))


def _edits(
    model: Model, pairs: PromptPairs, ablation: str, reference: Any, nodes: Sequence[Site], max_tokens: int | None
) -> dict[Site, Edit]:
    """The edit that ablates each node."""
    if ablation in ("resample", "counterfactual"):
        return {site: Edit(site) for site in nodes}
    if ablation == "zero":
        return {site: Edit(site, "set", 0.0) for site in nodes}
    prompts = encode_prompts(model, pairs if reference is None else reference)
    found = means(model, prompts, sorted({(site.layer or 0, site.kind) for site in nodes}), None, max_tokens)
    return {site: Edit(site, "set", found[site.layer or 0, site.kind]) for site in nodes}
