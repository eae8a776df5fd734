"""Attribution graphs (Ameisen et al. 2025): one prompt, its MLPs seen through transcoders, what every active feature and every
logit is made of.

1. The prompt is run; transcoders say which features are active, and what each leaves of its MLP's output (an error node).
2. The model is frozen around the prompt: patterns and norms' scales held, MLPs replaced by what they wrote. What a feature
   reads, and a logit, is then a sum over embeddings, errors and features below, which gradients give (`engine.frozen`).
3. Rows are computed for the logits first, then for the features that influence them most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.program import Program
from ..engine.reading import Reading, encode_prompts, read_program, run_readings
from ..engine.schedule import gradient_budget
from ..engine.trace import Found, execute, frozen_edges
from ..errors import PlanError
from ..journal import experiment
from ..models.model import Model
from ..prompts import one_prompt
from ..saes.library import Dictionary, is_transcoder
from ..saes.library import checked as checked_sae
from ..saes.views import decoder_of, describe, inference, tensors_of
from ..sites import Site
from ..tokens import Text
from .influence import Influence
from .prompt_graph import AttributionGraph

#: Least probability that the logits of a graph hold together, and how many there are at most.
PROBABILITY, LOGITS = 0.95, 10


@experiment
def attribution_graph(
    model: Model,
    prompt: str | Sequence[int],
    transcoders: Mapping[int, Dictionary] | Sequence[Dictionary],
    *,
    logits: int = LOGITS,
    answers: Sequence[int | str] | None = None,
    max_features: int = 4096,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> AttributionGraph:
    """What the logits of one prompt are made of, through the active features of transcoders.

    Args:
        transcoders: by layer, or one for each layer; of SAELens, reading what an MLP receives behind its norm and writing
            `mlp_out` (behind a norm that follows it, where the family has one). An MLP without one is an error node alone. A skip
            transcoder's linear path stays a path.
        logits, answers: the most likely next tokens, at most so many and as many as hold 95 % of the probability; or these.
        max_features: active features whose own rows are computed, the most influential first.
        max_tokens: tokens in one forward and backward pass.

    Raises:
        PlanError: a transcoder that is none, or does not fit. PairsError: a prompt that is none. SiteError: a layer out of range.

    Examples:
        >>> sides = interp.collect_activations(model, list(pairs.clean), layer=29, component=["mlp_in", "mlp_out"])
        >>> transcoder = interp.SparseAutoencoder(model, "L29.mlp_out", architecture="transcoder", d_sae=32, k=4)
        >>> trained = interp.train_sae(transcoder, sides, n_epochs=20, batch_size=16)  # a toy
        >>> graph = interp.attribution_graph(model, "The Eiffel Tower is in", {29: transcoder}, logits=2, max_features=8)
        >>> interp.plot_circuit_graph(graph.prune()).save("graph.html").name
        'graph.html'
    """
    chosen = checked(model, transcoders)
    encoded = encode_prompts(model, [one_prompt("prompt", prompt)])
    ids = encoded.clean[0]
    seen = look(model, ids, chosen)
    targets = logit_targets(model, seen, logits, answers)
    rows = Rows(model, ids, seen, max_tokens or gradient_budget(model), progress)
    rows.compute([(model.n_layers, len(ids) - 1, token) for token in targets])
    size = len(seen.names) + len(targets)
    weights = torch.zeros(size)
    weights[len(seen.names) :] = torch.tensor(list(targets.values()))
    adjacency = torch.zeros(size, size)
    adjacency[len(seen.names) :, : len(seen.names)] = rows.take()
    step, done = max(1, rows.batch), torch.zeros(len(seen.features), dtype=torch.bool)
    while int(done.sum()) < min(max_features, len(seen.features)):
        influence = Influence(adjacency).of(weights)[seen.first : len(seen.names)]
        order = influence.masked_fill(done, -1.0).argsort(descending=True)
        room = min(4 * step, max_features - int(done.sum()), int((~done).sum()))
        batch = [int(i) for i in order[:room] if not done[i]]
        rows.compute([(*seen.features[i][:2], i) for i in batch])
        adjacency[[seen.first + i for i in batch], : len(seen.names)] = rows.take()
        done[batch] = True
    reader = Text(model.tokenizer)
    named = [f"logit:{reader.label(token)}" for token in targets]
    meta = {
        "model": model.name,
        "n_layers": model.n_layers,
        "layers": sorted(chosen),
        "rows": int(done.sum()),
        "active": len(seen.features),
    }
    activations = torch.zeros(size)
    activations[seen.first : len(seen.names)] = torch.tensor([value for *_, value in seen.features])
    return AttributionGraph(
        (*seen.names, *named), adjacency, activations, tuple(encoded.labels[0]), tuple(ids),
        dict(zip(named, targets.values(), strict=True)), meta,
    )  # fmt: skip


def checked(model: Model, given: Mapping[int, Dictionary] | Sequence[Dictionary]) -> dict[int, Dictionary]:
    """Transcoders by layer, in the form that is used. PlanError, SiteError: one that does not fit."""
    if not isinstance(given, Mapping | Sequence):
        raise PlanError(
            f"attribution_graph was given a {type(given).__name__}: give {{layer: transcoder}}, or one for each layer"
        )
    by_layer = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    if not by_layer:
        raise PlanError("attribution_graph was given no transcoder: give {layer: transcoder}")
    model.rests_on("attribution_graph", "mlp_in", "mlp_out")
    made = {}
    for layer, one in by_layer.items():
        at = model.require(Site("mlp_in", layer=layer))
        if not is_transcoder(checked_sae(one)):
            raise PlanError(f"{describe(one)} at layer {layer} reads and writes one site; a graph needs transcoders")
        used = inference(one)
        if (used.cfg.d_in, int(used.b_dec.shape[0])) != (model.d_model, model.d_model):
            raise PlanError(
                f"{describe(used)} at layer {layer} writes {used.b_dec.shape[0]}; the MLPs of {model.name} read and write "
                f"{model.d_model}"
            )
        if not all(bool(value.isfinite().all()) for value in used.state_dict().values()):
            raise PlanError(f"{describe(used)} at layer {layer} holds NaN or infinity")
        if int(tensors_of(used)[0]["norm"]):
            raise PlanError(f"{describe(used)} at layer {layer} scales each token by its norm, which is not linear")
        made[at.layer or 0] = used
    return made


@dataclass(frozen=True)
class Seen:
    """The prompt's own run: which features are active, what MLPs wrote beside them, and the names of all sources.

    `features`: (layer, position, number, activation); `first`: where they begin among the names.
    """

    names: tuple[str, ...]
    features: tuple[tuple[int, int, int, float], ...]
    errors: Tensor
    writes: Tensor
    reads: Tensor
    skips: dict[int, Tensor]
    logits: Tensor

    @property
    def first(self) -> int:
        """Where features begin."""
        return len(self.names) - len(self.features)


@torch.no_grad()
def look(model: Model, ids: Sequence[int], transcoders: Mapping[int, Dictionary]) -> Seen:
    """Run the prompt once, and encode what each MLP received."""
    places = [(layer, kind) for layer in range(model.n_layers) for kind in ("mlp_in", "mlp_out")]
    found: list[Found] = []
    make = lambda _: read_program(model, [ids], places)  # noqa: E731
    run_readings(model, [Reading.of([0], make)], lambda _, result: found.append(result), execute)
    reads = found[0]["reads"]
    names = [f"emb@{position}" for position in range(len(ids))]
    errors, features, writes, vectors, skips = [], [], [], [], {}
    for layer in range(model.n_layers):
        x, out = (reads[layer, kind][0].float().cpu() for kind in ("mlp_in", "mlp_out"))
        error = out
        if layer in transcoders:
            one = transcoders[layer]
            acts = one.encode(x.to(one.W_enc)).float().cpu()
            decoder = decoder_of(one).cpu()
            error = out - one(x.to(one.W_enc)).float().cpu()
            for position, number in acts.nonzero().tolist():
                features.append((layer, position, number, float(acts[position, number])))
                writes.append(acts[position, number] * decoder[number])
                vectors.append(one.W_enc[:, number].float().cpu())
            if hasattr(one, "W_skip"):
                skips[layer] = one.W_skip.detach().float()
        names += [f"L{layer}.error@{position}" for position in range(len(ids))]
        errors.append(error)
    names += [f"L{layer}.f{number}@{position}" for layer, position, number, _ in features]
    none = torch.zeros(0, model.d_model)
    return Seen(
        tuple(names), tuple(features), torch.stack(errors), torch.stack(writes) if writes else none,
        torch.stack(vectors) if vectors else none, skips, found[0]["logits"][0].float().cpu(),
    )  # fmt: skip


def logit_targets(model: Model, seen: Seen, count: int, answers: Sequence[int | str] | None) -> dict[int, float]:
    """Tokens whose logits are explained, with their probability. PlanError: none."""
    probability = seen.logits.softmax(-1)
    if answers is not None:
        tokens = Text(model.tokenizer, vocab_size=model.vocab_size).answer_set("answers", 0, tuple(answers))
    else:
        if count < 1:
            raise PlanError(f"logits={count}: explain 1 or more")
        order = probability.argsort(descending=True)
        enough = int((probability[order].cumsum(0) < PROBABILITY).sum()) + 1
        tokens = tuple(order[: min(count, enough)].tolist())
    return {token: float(probability[token]) for token in tokens}


class Rows:
    """Rows of the graph, computed a batch at a time through the door."""

    def __init__(self, model: Model, ids: Sequence[int], seen: Seen, budget: int, progress: bool | None) -> None:
        self.model, self.ids, self.seen, self.progress = model, ids, seen, progress
        self.batch = max(1, min(64, budget // len(ids)))
        self.found: dict[int, Tensor] = {}
        place = [torch.tensor([feature[part] for feature in seen.features], dtype=torch.long) for part in (0, 1)]
        self.sources = {"errors": seen.errors, "layer": place[0], "position": place[1], "writes": seen.writes}

    def compute(self, targets: Sequence[tuple[int, int, int]]) -> None:
        """Rows of (layer, position, number of a feature, or of a token where the layer is behind the last)."""

        def program(chosen: Sequence[int]) -> Program:
            some = [targets[i] for i in chosen]
            made = read_program(self.model, [self.ids] * len(some))
            end = self.model.n_layers
            vectors = [self.seen.reads[n] if layer < end else torch.zeros(self.model.d_model) for layer, _, n in some]
            layer, position, token = (torch.tensor([target[part] for target in some]) for part in range(3))
            made["targets"] = {"layer": layer, "position": position, "token": token, "vector": torch.stack(vectors)}
            made["sources"], made["skips"] = self.sources, self.seen.skips
            return made

        def put(piece: Reading, result: Found) -> None:
            for number, row in zip(piece.asked, result["rows"], strict=True):
                self.found[number] = row

        blocks = [range(start, min(len(targets), start + self.batch)) for start in range(0, len(targets), self.batch)]
        run_readings(
            self.model,
            [Reading.of(block, program) for block in blocks],
            put,
            frozen_edges,
            None,
            ("graph", self.progress),
        )

    def take(self) -> Tensor:
        """The rows computed last, in their order `[target, source]`."""
        rows = torch.stack([self.found[number] for number in sorted(self.found)])
        self.found.clear()
        return rows
