"""Iterative pruning: heads and MLPs are dropped one at a time, from the last layer on, while nothing moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from tqdm.auto import tqdm

from ..ablation import means
from ..cells import EVERYWHERE, Cell, Resolved
from ..edits import Edit
from ..engine.context import Experiment, Runs
from ..engine.reading import encode_prompts
from ..engine.run import prompts_said, run_cells
from ..engine.trial import check_metric, name_of
from ..errors import CircuitError
from ..journal import experiment
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..options import Options, RunOptions
from ..pairs import PromptPairs
from ..sites import Site
from .circuit import Circuit
from .greedy import MOST_AHEAD, Search, kept_log, settled
from .nodes import Facts
from .runs import Prompts

ABLATION_TYPES = ("zero", "mean", "resample", "counterfactual")
#: Those that take activations from the pairs' corrupted runs.
SWAPPED = ("resample", "counterfactual")


class PruningOptions(RunOptions, total=False):
    """The keyword options of `iterative_pruning`."""

    reference: Prompts | None
    ahead: int


@experiment
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
    **options: Unpack[PruningOptions],
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
        options: `reference`; `ahead`, the largest batch (1 tries one at a time); and of `patch` (checkpoint: tests that are
            done are kept and a later call continues; progress, max_tokens).

    Returns:
        A node circuit; iterating over it gives its (layer, head). Scores are the change of the metric when a node was
        last tested. `circuit.trajectory` lists every test: pass, node, change, dropped.

    Raises:
        CircuitError, PairsError, MetricError: before the model runs.

    Examples:
        >>> pruned = interp.iterative_pruning(
        ...     model, pairs=pairs, threshold=3.0, ablation_type="counterfactual", components="mlp"
        ... )
        >>> "L0.mlp" in pruned.nodes(), "L15.mlp" in pruned.nodes()
        (True, False)
    """
    how, ahead = Options.of(options, "reference", "ahead", error=CircuitError), options.get("ahead", MOST_AHEAD)
    pairs = _pairs(pairs, prompt, answer_tokens)
    if ablation_type not in ABLATION_TYPES:
        raise CircuitError(f"unknown ablation_type {ablation_type!r}; the types are: {', '.join(ABLATION_TYPES)}")
    if ahead < 1:
        raise CircuitError(f"ahead={ahead}; try 1 node at a time or more")
    swap = ablation_type in SWAPPED
    if swap and pairs.corrupted is None:
        raise CircuitError(f"ablation_type={ablation_type!r} needs corrupted prompts; give pairs with them")
    components = (components,) if isinstance(components, str) else tuple(components)
    if set(components) - {"head", "mlp"} or not components:
        raise CircuitError(f"components {list(components)}; they are 'head' and 'mlp'")
    encoded = model.encode(pairs)  # what is wrong with them is told before a mean is taken
    if swap:
        encoded.require_corrupted("iterative_pruning", CircuitError)
        encoded.require_aligned("pruning with a second prompt")
    rounding = check_metric(metric, encoded, model.vocab_size, dtype=model.dtype)
    nodes = [site for site in Facts.of(model).senders[:0:-1] if ("head" if site.axis else "mlp") in components]
    for site in nodes:
        model.require(site)
    how = settled(how, model)
    reference = pairs if options.get("reference") is None else options["reference"]
    edit_of = _edits(model, reference, ablation_type, nodes, how.max_tokens)
    asked = Experiment(model, Runs(encoded), Resolved((), (), {}), metric, "iterative_pruning", rounding=rounding)
    return _Pruning(asked, how, nodes, edit_of, threshold).circuit(ablation_type, ahead)


class _Pruning:
    """One search: nodes, the edit that ablates each, which are dropped, and the score that each had when last tried."""

    def __init__(
        self, asked: Experiment, options: Options, nodes: Sequence[Site], edit_of: Mapping[Site, Edit], threshold: float
    ) -> None:
        self.asked, self.options, self.nodes, self.edit_of = asked, options, nodes, edit_of
        self.threshold = threshold
        self.dropped: list[Site] = []
        self.scores: dict[Site, float] = {}
        self.stays = dict.fromkeys(nodes, False)  # what is expected of each node: its fate when it was last tried
        self.trajectory: list[dict[str, object]] = []

    def measure(self, sets: Sequence[Sequence[Site]]) -> tuple[list[float], float]:
        """The mean metric with each of these sets of nodes ablated, and with none."""
        edits = [tuple((self.edit_of[site], EVERYWHERE) for site in chosen) for chosen in sets]
        cells = tuple(Cell((i,), edits=each) for i, each in enumerate(edits))
        resolved = Resolved((("circuit", tuple(range(len(sets)))),), cells, {"pruning": len(self.dropped)})
        quiet = Options(max_tokens=self.options.max_tokens, progress=False)
        effects = run_cells(replace(self.asked, resolved=resolved), quiet)
        return effects.values.mean("pair").values.tolist(), float(effects.clean.mean())

    def attempt(self, batch: Sequence[Site]) -> tuple[list[float], list[bool]]:
        """The metric with each node of a batch dropped, those before it too that are expected to go."""
        sets: list[list[Site]] = []
        assumed, expected = list(self.dropped), [self.stays[site] for site in batch]
        for site, stay in zip(batch, expected, strict=True):
            sets.append([*assumed, site])
            assumed = assumed if stay else sets[-1]
        return self.measure(sets)[0], expected

    def circuit(self, ablation: str, ahead: int) -> Circuit:
        """Passes from the last layer to the first until one drops nothing, and what is left."""
        _, current = self.measure([self.nodes[:1]])
        passes, asked = 0, self.asked
        every = Cell((0,), edits=tuple((edit, EVERYWHERE) for edit in self.edit_of.values()))
        details = {"threshold": self.threshold, "ablation": ablation}
        kept_as = replace(asked, resolved=Resolved((), (every,), {}), details=details)
        most = len(self.nodes) * (len(self.nodes) + 1)  # more than passes can take
        shown = None if self.options.progress is None else not self.options.progress
        with tqdm(disable=shown, desc="pruning", unit="node") as bar, kept_log(kept_as, self.options, most) as log:
            search = Search(self.attempt, self.stays, self.threshold, ahead, bar, log)
            while True:
                passes += 1
                left, before = [site for site in self.nodes if site not in self.dropped], len(self.dropped)
                for site, change, value in search.in_turn(left, current):
                    self.scores[site] = change
                    tested = {"pass": passes, "node": site.node, "change": change, "dropped": not self.stays[site]}
                    self.trajectory.append(tested)
                    if not self.stays[site]:
                        self.dropped.append(site)
                        current = value
                if len(self.dropped) == before:
                    break
        kept = {site.node: self.scores[site] for site in reversed(self.nodes) if site not in self.dropped}
        meta = {
            "model": asked.model.name,
            "method": asked.method,
            "metric": name_of(asked.metric),
            "ablation": ablation,
            "threshold": self.threshold,
            "metric_value": current,
            "prompts": prompts_said(asked.runs.encoded, asked.name),
            "trajectory": self.trajectory,
        }
        return Circuit.from_nodes(kept, Facts.of(asked.model), meta)


def _pairs(
    pairs: PromptPairs | None, prompt: str | Sequence[int] | None, answer_tokens: Sequence[str | int] | None
) -> PromptPairs:
    """Pairs as they are given, or one prompt and its answers. CircuitError: both, or neither."""
    if pairs is not None and (prompt is not None or answer_tokens is not None):
        raise CircuitError("iterative_pruning takes a prompt with answer_tokens, or pairs=, not both")
    if pairs is not None:
        return pairs
    if prompt is None or answer_tokens is None:
        raise CircuitError("iterative_pruning needs a prompt and answer_tokens=[right, wrong], or pairs=")
    return PromptPairs.one({"prompt": prompt}, answer_tokens)


def _edits(
    model: Model, reference: Prompts | None, ablation: str, nodes: Sequence[Site], max_tokens: int | None
) -> dict[Site, Edit]:
    """The edit that ablates each node."""
    if ablation in SWAPPED:
        return {site: Edit(site) for site in nodes}
    if ablation == "zero":
        return {site: Edit(site, "set", 0.0) for site in nodes}
    prompts = encode_prompts(model, reference)
    mean = means(model, prompts, sorted({site.place for site in nodes}), None, max_tokens)
    return {site: Edit(site, "set", mean[site.place]) for site in nodes}
