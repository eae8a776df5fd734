"""What a run says of itself: the residual stream's next tokens (the logit lens), and where heads attend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from .cells import integers
from .direct import direct_effects
from .encoded import EncodedPairs
from .engine.program import Place, Program
from .engine.reading import Reading, encode_prompts, packed, read_program, run_readings
from .engine.schedule import token_budget
from .engine.trace import Found
from .errors import PlanError, SiteError
from .journal import experiment
from .models.model import Model
from .pairs import PromptPairs
from .prompts import one_prompt
from .sites import Site
from .tokens import Text

__all__ = ["attention_patterns", "direct_effects", "logit_lens"]

#: Logits that one forward pass of the lens may hold at once (layers × tokens × vocabulary).
LOGITS = 2**26


class Asked(NamedTuple):
    """A token asked for: where it is in a pass, of which prompt, its place in the result, and the token behind it or -1."""

    row: int
    column: int
    prompt: int
    spot: int
    next: int


@experiment
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
        Dataset with dims (prompt, layer, position, k) of `token` (ids), `text`, `logit`, `probability`; without k
        `next_rank` (0 is top) and `next_probability` of the token that follows in the prompt; `next_token` and the
        coordinate `label` by (prompt, position). Where a prompt has no such position, ids are -1 and numbers NaN;
        the last position has no next token.

    Raises:
        SiteError: a layer or position that does not exist. PlanError: top_k below 1.

    Examples:
        >>> lens = interp.logit_lens(model, ["The Eiffel Tower is in the city of"], layers=[0, 29], positions=-1)
        >>> lens.text.sel(layer=29).isel(k=0).values.item()
        ' Paris'
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
    run_readings(model, pieces, put)
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


@experiment
def attention_patterns(
    model: Model, prompt: str | Sequence[int], *, layers: Sequence[int] | int | None = None, values: bool = False
) -> xr.DataArray:
    """Attention weights of every head on one prompt, whatever the attention implementation; for `plot_attention`.

    Args:
        prompt: a string, or token ids.
        layers: counted from 0, negative from the end; None is all.
        values: also how long each token's value vector is, as the coordinate `value_norm` (layer, head, key): what a head moves
            is the weight times the value (Kobayashi et al. 2020).

    Returns:
        DataArray (layer, head, query, key), float32, with the coordinate `token` by query; each row sums to 1, or
        to less where the architecture has attention sinks.

    Raises:
        SiteError: a layer that does not exist. SiteUnavailableError: attention that exposes no pattern. PlanError: no
            layer. PairsError: several prompts, or what is none.

    Examples:
        >>> seen = interp.lens.attention_patterns(model, pairs.clean[0], layers=[23])
        >>> str(seen["token"].values[seen.sel(layer=23, head=3)[-1].argmax("key")])  # what the last token reads
        ' Justin'
    """
    encoded = encode_prompts(model, [one_prompt("prompt", prompt)])
    wanted = range(model.n_layers) if layers is None else integers(layers, "layers")
    kinds = ("pattern", "v") if values else ("pattern",)
    for kind in kinds:
        chosen = [model.require(Site(kind, layer=layer)).layer or 0 for layer in wanted]
    if not chosen:
        raise PlanError("attention_patterns was given no layer")
    reads = [(layer, kind) for layer in sorted(set(chosen)) for kind in kinds]
    found: dict[Place, torch.Tensor] = {}

    def program(group: Sequence[int]) -> Program:
        made = read_program(model, [encoded.clean[i] for i in group], reads, last=max(chosen))
        made["want_logits"] = False
        return made

    run_readings(model, [Reading.of([0], program)], lambda _, result: found.update(result["reads"]))
    weights = np.stack([found[layer, "pattern"][0].float().cpu().numpy() for layer in chosen])
    coords: dict[str, Any] = {
        "layer": chosen,
        "head": range(model.n_heads),
        "token": ("query", list(encoded.labels[0])),
    }
    if values:
        shared = model.n_heads // model.n_kv_heads
        norms = [
            found[layer, "v"][0].float().norm(dim=-1).T.repeat_interleave(shared, 0).cpu().numpy() for layer in chosen
        ]
        coords["value_norm"] = (("layer", "head", "key"), np.stack(norms))
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
