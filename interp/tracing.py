"""Causal tracing: which clean activations restore an answer when the subject's embeddings are drowned in noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr

from .cells import Cell, Resolved
from .edits import Edit
from .effects import Effects
from .encoded import EncodedPairs
from .engine.context import Experiment, Noise, Runs
from .engine.program import Program
from .engine.reading import read_program, readings, run_readings
from .engine.run import run_cells
from .engine.trial import check_metric
from .errors import PairsError, PlanError
from .journal import experiment
from .metrics import Metric, prob
from .models.model import Model
from .options import Options, RunOptions
from .pairs import PromptPairs
from .plan import grid


class TraceOptions(RunOptions, total=False):
    """The keyword options of `causal_trace`."""

    seed: int
    average: bool


@experiment
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
    **options: Unpack[TraceOptions],
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
        seed: of the noise, 0 by default. average: False keeps the samples apart, in a dimension `sample`.
        options: of `patch` (schedule, checkpoint, progress, max_tokens).

    Returns:
        Effects with dims (component, layer, position, pair) and direction "denoising", as the base run is the noisy one.
        `corrupted` is its metric, mean over samples; `clean` that of the run without noise.

    Raises:
        PairsError: the pairs name no such subject, or it is empty. PlanError: no samples, or a window below 1.

    Examples:
        >>> tower = interp.PromptPairs(
        ...     ["The Eiffel Tower is in the city of"], answers=[" Paris"], positions={"subject": ["The Eiffel Tower"]}
        ... )
        >>> trace = interp.causal_trace(model, tower, samples=2, components="mlp_out", layers=[5, 15])
        >>> dict(trace.values.sizes)
        {'component': 1, 'layer': 2, 'position': 10, 'pair': 1}
    """
    how, seed = Options.of(options, "seed", "average"), options.get("seed", 0)
    if samples < 1 or window < 1 or noise < 0:
        raise PlanError(f"samples and window must be 1 or more, noise 0 or more; got {samples=}, {window=}, {noise=}")
    model.rests_on("causal_trace", "embed")
    encoded = model.encode(pairs)
    spans = subject_positions(encoded, subject)
    drawn = repeated(encoded, samples)
    resolved = in_windows(grid(components, layers, positions).resolve(model, drawn), window, model.n_layers)
    rounding = check_metric(metric, drawn, model.vocab_size, dtype=model.dtype)
    std = embedding_std(model, encoded.clean, spans, how.max_tokens)
    at = [
        tuple((position, token_seed(seed, sample, pair, position)) for position in spans[pair])
        for sample in range(samples)
        for pair in range(len(encoded))
    ]
    details = {
        "noise": noise,
        "embedding_std": std,
        "noise_seed": seed,
        "samples": samples,
        "window": window,
        "subject": [list(span) for span in spans],
    }
    runs = Runs(drawn, "denoising", Noise(noise * std, tuple(at)))
    asked = Experiment(model, runs, resolved, metric, "causal_trace", pairs.name, details, rounding=rounding)
    return by_pair(run_cells(asked, how), len(encoded), samples, options.get("average", True))


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
    model: Model, prompts: Sequence[Sequence[int]], spans: Sequence[Sequence[int]], max_tokens: int | None
) -> float:
    """Standard deviation of all entries of the subject tokens' embeddings, as the embedding module puts them out."""
    spread: list[torch.Tensor] = []

    def program(chosen: Sequence[int]) -> Program:
        width = max(len(prompts[index]) for index in chosen)
        tokens = [(row, width - len(prompts[i]) + at) for row, i in enumerate(chosen) for at in spans[i]]
        rows, columns = torch.tensor(tokens).unbind(1)
        made = read_program(model, [prompts[index] for index in chosen], [(-1, "embed")], last=0)
        made["readout"] = {"kind": "tokens", "rows": rows, "columns": columns}
        return made

    pieces = readings(model, [len(prompt) for prompt in prompts], program, max_tokens)
    run_readings(model, pieces, lambda _, result: spread.append(result["reads"][-1, "embed"].cpu()))
    return float(torch.cat(spread).double().std())


def token_seed(seed: int, sample: int, pair: int, position: int) -> int:
    """The seed of one token's noise."""
    digest = hashlib.sha256(repr((seed, sample, pair, position)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def repeated(encoded: EncodedPairs, samples: int) -> EncodedPairs:
    """Pairs whose two prompts are both the clean one, each pair as often as there are samples."""
    named = {key: rows * samples for key, rows in encoded.positions.items()}
    sets = [None if part is None else part * samples for part in (encoded.answers, encoded.distractors)]
    times = replace(
        encoded,
        clean=encoded.clean * samples,
        answers=sets[0],
        distractors=sets[1],
        labels=encoded.labels * samples,
        positions=named,
        answer_positions=encoded.answer_positions * samples,
    )
    return times.beside(times.clean, times.labels)


def in_windows(resolved: Resolved, window: int, n_layers: int) -> Resolved:
    """The same cells, with attention and MLP outputs restored in windows of layers around each cell's own."""

    def widen(cell: Cell) -> Cell:
        edits = []
        for edit, place in cell.edits:
            layer = edit.site.layer
            around = [layer]  # one layer of what attention or an MLP adds is too little to be seen
            if layer is not None and edit.site.facts.branch:
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
