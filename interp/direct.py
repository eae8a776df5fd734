"""Direct effects: what each component adds by itself to the logit difference of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from .effects import Effects
from .encoded import EncodedPairs
from .engine.compile import token_sets
from .engine.program import Program
from .engine.reading import read_program, readings, run_readings
from .engine.run import provenance
from .engine.trace import Found
from .errors import AuditError, MetricError, PlanError
from .journal import experiment
from .models.model import Model
from .pairs import PromptPairs
from .sites import Site


@experiment
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

    Examples:
        >>> parts = interp.direct_effects(model, pairs, by="head")
        >>> parts.mean().sel(component="head_out").to_series().nlargest(1).index.tolist()
        [(23, 3)]
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
    run_readings(model, pieces, lambda piece, result: results.append((piece.asked, result)))
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
