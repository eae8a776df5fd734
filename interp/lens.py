"""What the residual stream says about the next token: the logit lens, and what each component adds to the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from .cells import integers
from .effects import Effects
from .encoded import EncodedPairs
from .engine.compile import token_sets
from .engine.program import Place, Program
from .engine.reading import Reading, encode_prompts, packed, read_all, read_program, readings
from .engine.run import provenance
from .engine.schedule import token_budget
from .engine.trace import Found
from .errors import AuditError, MetricError, PlanError, SiteError
from .models.model import Model
from .pairs import PromptPairs
from .prompts import one_prompt
from .sites import Site
from .tokens import Text

#: Logits that one forward pass of the lens may hold at once (layers × tokens × vocabulary).
LOGITS = 2**26


class Asked(NamedTuple):
    """A token asked for: where it is in a pass, of which prompt, its place in the result, and the token behind it or -1."""

    row: int
    column: int
    prompt: int
    spot: int
    next: int


def logit_lens(
    model: Model,
    prompts: PromptPairs | Sequence[str | Sequence[int]] | str,
    *,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    top_k: int = 5,
) -> xr.Dataset:
    """Next-token predictions of the residual stream behind every layer (nostalgebraist 2020).

    `resid_post` of each layer goes through the model's own final norm, head, and softcap or logit scale, so that the
    last layer gives the model's own prediction. Computed where the model runs: only the top tokens come back.

    Args:
        prompts: strings or token ids, or pairs whose clean prompts are taken.
        layers: counted from 0, negative from the end; None is all.
        positions: from each prompt's own first token, negative from its end; None is all.

    Returns:
        Dataset with dims (prompt, layer, position, k): `token` (ids), `text`, `logit`, `probability`; without k:
        `next_rank` (0 is top) and `next_probability` of the token that follows in the prompt; `next_token` and the
        coordinate `label` by (prompt, position). Where a prompt has no such position, ids are -1 and numbers NaN;
        the last position has no next token.

    Raises:
        SiteError: a layer or position that does not exist. PlanError: top_k below 1.
    """
    if top_k < 1:
        raise PlanError(f"top_k={top_k}; ask for 1 token or more")
    encoded = encode_prompts(model, prompts)
    wanted = range(model.n_layers) if layers is None else integers(layers, "layers")
    chosen = [model.require(Site("resid_post", layer=layer)).layer or 0 for layer in wanted]
    lengths = [len(prompt) for prompt in encoded.clean]
    places = range(max(lengths)) if positions is None else integers(positions, "positions")
    for position in places:
        if not -max(lengths) <= position < max(lengths):
            raise SiteError(f"position {position}, but the longest prompt has positions 0 to {max(lengths) - 1}")
    if not chosen or not len(places):
        raise PlanError("logit_lens was given no layer or no position")
    shape = (len(lengths), len(chosen), len(places))
    k = min(top_k, model.vocab_size)
    ids = np.full((*shape, k), -1)
    numbers = {name: np.full((*shape, k), np.nan, np.float32) for name in ("logit", "probability")}
    numbers |= {name: np.full(shape, np.nan, np.float32) for name in ("next_rank", "next_probability")}
    following = np.full((shape[0], shape[2]), -1)

    def tokens_of(group: Sequence[int], part: frozenset[tuple[int, int]]) -> list[Asked]:
        """The tokens of one pass, as rows and columns of it."""
        return [token for token in asked(encoded.clean, group, places) if (token.prompt, token.spot) in part]

    def program(key: tuple[frozenset[tuple[int, int]], list[int]], group: Sequence[int]) -> Program:
        part, some = key
        at = sorted({chosen[index] for index in some} | {model.n_layers - 1})
        rows, columns, _, _, nexts = torch.tensor(tokens_of(group, part)).reshape(-1, 5).unbind(1)
        made = read_program(model, [encoded.clean[i] for i in group], [(layer, "resid_post") for layer in at])
        where = {"layers": [chosen[index] for index in some], "rows": rows, "columns": columns}
        made["readout"] = {"kind": "lens", **where, "next": nexts, "top": k}
        return made

    def put(piece: Reading, result: Found) -> None:
        part, some = piece.key
        tokens = tokens_of(piece.asked, part)
        of, place = (np.array([token[field] for token in tokens], dtype=int) for field in (2, 3))
        has_next = np.array([token.next >= 0 for token in tokens], dtype=bool)
        for number, index in enumerate(some):
            ids[of, index, place] = result["token"][number].numpy()
            for name, array in numbers.items():
                value = result[name][number].float().numpy()
                keep = has_next if name.startswith("next") else np.ones(len(tokens), bool)
                array[of[keep], index, place[keep]] = value[keep]

    pieces = []
    for group in packed(lengths, token_budget(model)):
        tokens = asked(encoded.clean, group, places)
        for token in tokens:
            following[token.prompt, token.spot] = token.next
        for some_tokens, some in parts(tokens, len(chosen), LOGITS // model.vocab_size):
            key = (frozenset((token.prompt, token.spot) for token in some_tokens), some)
            pieces.append(Reading.of(group, partial(program, key), key))
    read_all(model, pieces, put)
    return _predictions(model, encoded, (chosen, places), ids, numbers, following)


def _predictions(
    model: Model,
    encoded: EncodedPairs,
    at: tuple[Sequence[int], Sequence[int]],
    ids: np.ndarray,
    numbers: dict[str, np.ndarray],
    following: np.ndarray,
) -> xr.Dataset:
    """What `logit_lens` returns, of layers and positions `at`."""
    chosen, places = at
    text = Text(model.tokenizer)
    names = {int(token): text.label(int(token)) if token >= 0 else "" for token in np.unique(ids)}
    labels = [[row[p] if -len(row) <= p < len(row) else "" for p in places] for row in encoded.labels]
    dims = ("prompt", "layer", "position")
    variables: dict[str, Any] = {
        "token": ((*dims, "k"), ids),
        "text": ((*dims, "k"), np.array([names[int(token)] for token in ids.flat]).reshape(ids.shape)),
        "next_token": (("prompt", "position"), following),
    }
    variables |= {name: ((*dims, "k") if array.ndim == 4 else dims, array) for name, array in numbers.items()}
    coords: dict[str, Any] = {"layer": chosen, "position": list(places)}
    coords["label"] = (("prompt", "position"), np.array(labels))
    return xr.Dataset(variables, coords, {"model": model.name, "revision": model.revision})


def attention_patterns(
    model: Model, prompt: str | Sequence[int], *, layers: Sequence[int] | int | None = None
) -> xr.DataArray:
    """Attention weights of every head on one prompt, whatever the attention implementation; for `plot_attention`.

    Args:
        prompt: a string, or token ids.
        layers: counted from 0, negative from the end; None is all.

    Returns:
        DataArray (layer, head, query, key), float32, with the coordinate `token` by query; each row sums to 1, or
        to less where the architecture has attention sinks.

    Raises:
        SiteError: a layer that does not exist. SiteUnavailableError: attention that exposes no pattern. PlanError: no
            layer. PairsError: several prompts, or what is none.
    """
    encoded = encode_prompts(model, [one_prompt("prompt", prompt)])
    wanted = range(model.n_layers) if layers is None else integers(layers, "layers")
    chosen = [model.require(Site("pattern", layer=layer)).layer or 0 for layer in wanted]
    if not chosen:
        raise PlanError("attention_patterns was given no layer")
    reads = [(layer, "pattern") for layer in sorted(set(chosen))]
    weights_of: dict[Place, torch.Tensor] = {}

    def program(group: Sequence[int]) -> Program:
        made = read_program(model, [encoded.clean[i] for i in group], reads, last=max(chosen))
        made["want_logits"] = False
        return made

    read_all(model, [Reading.of([0], program)], lambda _, result: weights_of.update(result["reads"]))
    weights = np.stack([weights_of[layer, "pattern"][0].float().cpu().numpy() for layer in chosen])
    coords = {"layer": chosen, "head": range(model.n_heads), "token": ("query", list(encoded.labels[0]))}
    return xr.DataArray(weights, coords, ("layer", "head", "query", "key"), attrs={"model": model.name})


def asked(prompts: Sequence[Sequence[int]], group: Sequence[int], places: Sequence[int]) -> list[Asked]:
    """The tokens asked for in one batch of prompts."""
    width = max(len(prompts[index]) for index in group)
    tokens = []
    for row, index in enumerate(group):
        prompt = prompts[index]
        for place, position in enumerate(places):
            if -len(prompt) <= position < len(prompt):
                at = position % len(prompt)
                after = prompt[at + 1] if at + 1 < len(prompt) else -1
                tokens.append(Asked(row, width - len(prompt) + at, index, place, after))
    return tokens


def parts(tokens: list[Asked], n_layers: int, limit: int) -> Iterator[tuple[list[Asked], list[int]]]:
    """Split tokens × layers into parts of at most `limit` cells (one at least): (tokens, indices of layers)."""
    limit = max(1, limit)
    per = max(1, limit // max(1, len(tokens)))
    for start in range(0, len(tokens), limit):
        for first in range(0, n_layers, per):
            yield tokens[start : start + limit], list(range(first, min(n_layers, first + per)))


def direct_effects(model: Model, pairs: PromptPairs, by: str = "component") -> Effects:
    """What each component adds by itself to the logit difference of the clean run (Elhage et al. 2021).

    The final norm's scaling is frozen at its value in the run, so that the parts sum to the logit difference of answers
    and distractors (of the answers alone where there are no distractors; means over sets) at the answer's position.
    Behind a norm of its own (Gemma 2, OLMo 2), a head's part is its share at that norm's scale in the run. In models
    with a final softcap these are the logits before it.

    Args:
        by: "component": dims (component, layer, pair), components embed, attn_out (with the bias of its output
            projection), mlp_out and bias (of the final norm and the head).
            "head": dims (component, layer, head, pair): head_out of every head, and attn_bias, the output projections'
            biases, beside embed, mlp_out and bias.
            "position": dims (component, layer, position, pair): attn_out by the position that attention reads from,
            attn_bias, embed, mlp_out and bias at the answer's position.

    Returns:
        Effects whose values, summed over all dims but `pair`, are `clean`. A part without a layer stands at layer 0,
        one without a head at head 0; all other cells are NaN. provenance["remainder"] is the largest difference.

    Raises:
        AuditError: parts that do not add up on this model. PlanError: an unknown `by`. MetricError: the pairs have no
            answers. SiteError: a part that this model does not show.
    """
    if by not in ("component", "head", "position"):
        raise PlanError(f"by={by!r}; it is one of 'component', 'head', 'position'")
    if not isinstance(pairs, PromptPairs) or pairs.answers is None:
        raise MetricError("direct effects are those on the answers' logits; give PromptPairs(answers=[...])")
    encoded = model.encode(pairs.alone())
    model.rests_on("direct_effects", "senders", "head")
    inside = ("z", "mlp_out", *(("pattern", "v") if by == "position" else ()))
    ends = [(0, "resid_pre"), (model.n_layers - 1, "resid_post")]
    for kind in ("head_out", *inside, *(kind for _, kind in ends)):
        model.require(Site(kind, layer=0))
    reads = [*ends, *((layer, kind) for layer in range(model.n_layers) for kind in inside)]

    def program(group: Sequence[int]) -> Program:
        prompts = [encoded.clean[pair] for pair in group]
        width = max(map(len, prompts))
        at = [width - len(encoded.clean[pair]) + encoded.answer_positions[pair] for pair in group]
        made = read_program(model, prompts, reads)
        answers, distractors = (token_sets(sets, group) for sets in (encoded.answers, encoded.distractors))
        made.update({"at": torch.tensor(at), "answers": answers, "distractors": distractors})
        made["readout"] = {"kind": "direct", "by_source": by == "position"}
        return made

    results: list[tuple[Sequence[int], Found]] = []
    pieces = readings(model, [len(prompt) for prompt in encoded.clean], program)
    read_all(model, pieces, lambda piece, result: results.append((piece.asked, result)))
    return labelled(model, encoded, pairs.name, by, results)


def labelled(
    model: Model, encoded: EncodedPairs, name: str, by: str, results: Sequence[tuple[Sequence[int], Found]]
) -> Effects:
    """The parts of every batch as one record."""
    n, lengths = len(encoded), [len(prompt) for prompt in encoded.clean]
    names = {
        "component": ("embed", "attn_out", "mlp_out", "bias"),
        "head": ("embed", "head_out", "attn_bias", "mlp_out", "bias"),
        "position": ("embed", "attn_out", "attn_bias", "mlp_out", "bias"),
    }[by]
    size = {"component": 1, "head": model.n_heads, "position": max(lengths)}[by]
    values = np.full((len(names), model.n_layers, size, n), np.nan, np.float32)
    clean = np.zeros(n, np.float32)
    at = {name: index for index, name in enumerate(names)}
    for group, result in results:
        part, width = result["parts"], max(lengths[pair] for pair in group)
        for row, pair in enumerate(group):
            clean[pair] = result["metric"][row]
            here = encoded.answer_positions[pair] if by == "position" else 0
            values[at["embed"], 0, here, pair] = part["embed"][row]
            values[at["bias"], 0, here, pair] = part["norm_bias"][row] + part["head_bias"][row]
            values[at["mlp_out"], :, here, pair] = part["mlp_out"][row]
            if by == "component":
                values[at["attn_out"], :, 0, pair] = part["head_out"][row].sum(-1) + part["attn_bias"][row]
                continue
            values[at["attn_bias"], :, here, pair] = part["attn_bias"][row]
            if by == "head":
                values[at["head_out"], :, :, pair] = part["head_out"][row]
            else:
                values[at["attn_out"], :, : lengths[pair], pair] = part["source"][row, :, width - lengths[pair] :]
    dims = ["component", "layer", *([by] if by != "component" else []), "pair"]
    coords: dict[str, Any] = {"component": list(names), "layer": range(model.n_layers), "pair": range(n)}
    if by == "component":
        values = values[:, :, 0]
    else:
        coords[by] = range(size)
    sums = np.nansum(values, axis=tuple(range(values.ndim - 1)), dtype=np.float64)
    remainder = float(np.abs(sums - clean).max())
    most = float(np.nansum(np.abs(values), axis=tuple(range(values.ndim - 1)), dtype=np.float64).max())
    if not remainder <= 1024 * torch.finfo(model.dtype).eps * most:
        raise AuditError(
            f"direct effects on {model.name} sum to another logit difference than the model's (off by {remainder:.3g} of "
            f"parts as large as {most:.3g}): something writes to the stream, or scales the logits, that no part here "
            "stands for. model.audit() says which law does not hold"
        )
    record = provenance(
        model,
        encoded,
        name,
        method="direct_effects",
        metric="logit_diff" if encoded.distractors is not None else "logit",
        direction=None,
        plan={"by": by},
        remainder=remainder,
    )
    array = xr.DataArray(values, dims=dims, coords={name: list(labels) for name, labels in coords.items()})
    return Effects(array, xr.DataArray(clean, dims=["pair"], coords={"pair": list(range(n))}), None, record)
