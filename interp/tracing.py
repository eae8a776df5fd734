"""Causal tracing: which clean activations restore an answer when the subject's embeddings are drowned in noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from .cells import Cell, Resolved
from .edits import Edit
from .effects import Effects
from .engine.reading import packed, read_program
from .engine.rows import Noise
from .engine.run import run_plan
from .engine.schedule import token_budget
from .engine.trace import execute
from .engine.trial import check_metric
from .errors import PairsError, PlanError
from .metrics import Metric, prob
from .models.model import Model
from .pairs import EncodedPairs, PromptPairs
from .plan import grid

#: Components that are restored in a window of layers: one layer of them adds too little to be seen.
WINDOWED = ("attn_out", "mlp_out")


def causal_trace(
    model: Model,
    pairs: PromptPairs,
    noise: float = 3.0,
    samples: int = 10,
    window: int = 10,
    components: Sequence[str] | str = "resid_post",
    subject: str = "subject",
    metric: Metric = prob,
    *,
    layers: Sequence[int] | int | None = None,
    positions: Any = None,
    seed: int = 0,
    average: bool = True,
    **options: Any,
) -> Effects:
    """Corrupt the subject with Gaussian noise and restore one clean activation at a time (Meng et al. 2022).

    The noise is added to the token embedding's output at the subject's positions; its standard deviation is `noise`
    times that of the embeddings of the subjects' tokens over all pairs. A run with one sample of noise, and every run
    of that sample with something restored, share the same noise. It is made where the model runs, from `seed`.
    Corrupted prompts are not needed and play no part.

    Args:
        samples: how many times noise is drawn for each pair; values are means over them.
        window: for `attn_out` and `mlp_out` the clean activations of this many layers around each layer are restored
            together: `window // 2` below it, the layer, and as many above as are left, cut at the ends.
        components: `resid_post` (as Meng et al.'s hidden states), `resid_pre`, `attn_out`, `mlp_out`, or other kinds
            that have positions.
        subject: the name of the subject's positions in `PromptPairs(positions={"subject": [...]})`.
        layers, positions: as in `grid`; None is all. Pairs of different lengths have NaN past their ends.
        average: False keeps the samples apart, in a dimension `sample`.
        options: of `patch` (schedule, checkpoint, progress, max_tokens).

    Returns:
        Effects with dims (component, layer, position, pair) and direction "denoising": the base run is the noisy one.
        `corrupted` is its metric, mean over samples; `clean` that of the run without noise.

    Raises:
        PairsError: the pairs name no such subject, or it is empty. PlanError: no samples, or a window below 1.
    """
    if samples < 1 or window < 1 or noise < 0:
        raise PlanError(f"samples and window must be 1 or more, noise 0 or more; got {samples=}, {window=}, {noise=}")
    model.rests_on("causal_trace", "embed")
    encoded = model.encode(pairs)
    spans = subject_positions(encoded, subject)
    doubled = twice(encoded, samples, pairs.name)
    rounding = check_metric(metric, model.encode(doubled), model.vocab_size, dtype=model.dtype)
    std = embedding_std(model, encoded.clean, spans, options.get("max_tokens"))
    at = [
        tuple((position, token_seed(seed, sample, pair, position)) for position in spans[pair])
        for sample in range(samples)
        for pair in range(len(encoded))
    ]
    effects = run_plan(
        model,
        doubled,
        grid(components, layers, positions),
        metric,
        "denoising",
        method="causal_trace",
        rounding=rounding,
        rewrite=lambda resolved: in_windows(resolved, window, model.n_layers),
        noise=Noise(noise * std, tuple(at)),
        details={
            "noise": noise,
            "embedding_std": std,
            "noise_seed": seed,
            "samples": samples,
            "window": window,
            "subject": [list(span) for span in spans],
        },
        **options,
    )
    return by_pair(effects, len(encoded), samples, average)


def subject_positions(encoded: EncodedPairs, subject: str) -> list[tuple[int, ...]]:
    """Positions of the subject's tokens in every clean prompt.

    Raises:
        PairsError: no such name, or no position in some pair.
    """
    if subject not in encoded.positions:
        raise PairsError(
            f"the pairs have no positions named {subject!r} to put noise on; they have "
            f"{sorted(encoded.positions) or 'none'}; name them in PromptPairs(positions={{{subject!r}: [...]}})"
        )
    spans = [tuple(dict.fromkeys(clean)) for clean, _ in encoded.positions[subject]]
    for pair, span in enumerate(spans):
        if not span:
            raise PairsError(f"{subject!r} of pair {pair} has no position; give the tokens of its subject")
    return spans


def embedding_std(
    model: Model, prompts: Sequence[Sequence[int]], spans: Sequence[Sequence[int]], budget: int | None
) -> float:
    """Standard deviation of all entries of the subject tokens' embeddings, as the embedding module puts them out."""
    programs = []
    for group in packed([len(prompt) for prompt in prompts], budget or token_budget(model)):
        chosen = [prompts[index] for index in group]
        width = max(map(len, chosen))
        tokens = [(row, width - len(prompts[i]) + at) for row, i in enumerate(group) for at in spans[i]]
        rows, columns = torch.tensor(tokens).unbind(1)
        spec = {"kind": "tokens", "rows": rows, "columns": columns}
        programs.append({**read_program(model, chosen, [(-1, "embed")], last=0), "readout": spec})
    found = model.backend.call(model, execute, model.taps, programs, None)
    return float(torch.cat([part["reads"][-1, "embed"].cpu() for part in found]).double().std())


def token_seed(seed: int, sample: int, pair: int, position: int) -> int:
    """The seed of one token's noise."""
    digest = hashlib.sha256(repr((seed, sample, pair, position)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def twice(encoded: EncodedPairs, samples: int, name: str) -> PromptPairs:
    """Pairs whose two prompts are both the clean one, each pair as often as there are samples."""
    named = {
        key: [{"clean": at, "corrupted": at} for at, _ in rows] * samples for key, rows in encoded.positions.items()
    }
    sets = [None if part is None else list(part) * samples for part in (encoded.answers, encoded.distractors)]
    return PromptPairs(
        encoded.clean * samples,
        encoded.clean * samples,
        *sets,
        positions=named,
        answer_positions=encoded.answer_positions * samples,
        name=name,
    )


def in_windows(resolved: Resolved, window: int, n_layers: int) -> Resolved:
    """The same cells, with attention and MLP outputs restored in windows of layers around each cell's own."""

    def widen(cell: Cell) -> Cell:
        edits = []
        for edit, place in cell.edits:
            layer = edit.site.layer
            around = [layer]
            if layer is not None and edit.site.kind in WINDOWED:
                first = layer - window // 2
                around = list(range(max(0, first), min(n_layers, first + window)))
            edits += [(Edit(replace(edit.site, layer=each)), place) for each in around]
        return replace(cell, edits=tuple(edits))

    return replace(resolved, cells=tuple(widen(cell) for cell in resolved.cells))


def by_pair(effects: Effects, n: int, samples: int, average: bool) -> Effects:
    """One entry per pair again: means over the samples of noise, or a dimension `sample` in the values."""

    def apart(array: xr.DataArray) -> xr.DataArray:
        shape = (*array.shape[:-1], samples, n)
        coords = {dim: array[dim] for dim in array.dims[:-1]}
        return xr.DataArray(
            array.values.reshape(shape),
            dims=[*array.dims[:-1], "sample", "pair"],
            coords=coords | {"sample": np.arange(samples), "pair": np.arange(n)},
        )

    assert effects.corrupted is not None
    values = apart(effects.values)
    record = dict(effects.provenance)
    record["tokens"] = record["tokens"][:n]
    prompts = {key: part[:n] if isinstance(part, list) else part for key, part in record["prompts"].items()}
    positions = {name: at[:n] for name, at in record["prompts"]["positions"].items()}
    record["prompts"] = {**prompts, "corrupted": None, "positions": positions}
    return Effects(
        values=values.mean("sample") if average else values,
        clean=apart(effects.clean).mean("sample"),
        corrupted=apart(effects.corrupted).mean("sample"),
        provenance=record,
    )
