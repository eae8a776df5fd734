"""Attention inside a forward pass: q and k behind the rotary embedding, patterns, and what heads write.

Standard library and torch only: these functions are shipped by source to a remote server.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..edits import apply_group
from ..models.views import attention_pattern, features, mix_values, output_matrix
from .state import Run


def edit_core(run: Run, layer: int, call: Any, kinds: list[str]) -> dict[str, Any] | None:
    """At the attention call: edit or read q and k after the rotary embedding; prepare patterns that must be written."""
    args, kwargs = call.inputs
    first = run.taps["core_first"]
    new = list(args)
    for place, kind in ((first, "q_rot"), (first + 1, "k_rot")):
        if kind in kinds:
            whole = new[place]  # [row, head, position, d_head]; keys may start with a cached prefix
            own = new[first].shape[2]
            past, part = whole[:, :, :-own], whole[:, :, -own:]
            flat = run.visit(layer, kind, part.transpose(1, 2).flatten(2))
            part = flat.unflatten(2, (whole.shape[1], -1)).transpose(1, 2)
            new[place] = torch.cat([past, part], dim=2) if past.shape[2] else part
    if "q_rot" in kinds or "k_rot" in kinds:
        call.inputs = (tuple(new), kwargs)
    if (layer, "value") in run.reads:  # for the audit: v as attention mixes it, which some models clip on the way
        run.kept[layer, "value"] = new[first + 2].transpose(1, 2)[:, -new[first].shape[2] :].clone()
    if "pattern" not in kinds:
        return None
    mask = new[first + 3] if len(new) > first + 3 else kwargs.get("attention_mask")
    core = {"query": new[first], "key": new[first + 1], "value": new[first + 2], "mask": mask, "options": kwargs}
    if run.tape is not None:
        run.tape.core[layer] = {
            name: part.detach() if isinstance(part, Tensor) else part for name, part in core.items()
        }
    return core


def pattern_of(core: dict[str, Any], rows: Tensor | None = None) -> Tensor:
    """Attention probabilities `[row, head, query, key]` of some rows (all when None)."""
    query, key, mask = core["query"], core["key"], core["mask"]
    if rows is not None:
        rows = rows.to(query.device)
        mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        query, key = query[rows], key[rows]
    return attention_pattern(query, key, mask, core["options"])


def with_number(pattern: Tensor, group: dict[str, Any], values: Tensor) -> Tensor:
    """Attention probabilities `[edit, …]` with the number of each edit set, added or multiplied where there is attention."""
    number = values[group["value"], 0, 0].to(pattern.device, pattern.dtype).reshape(-1, *[1] * (pattern.ndim - 1))
    if group["op"] == "scale":
        return pattern * number
    return torch.where(pattern > 0, number if group["op"] == "set" else pattern + number, pattern)


def write_pattern(run: Run, layer: int, core: dict[str, Any], z: Tensor) -> Tensor:
    """Write attention probabilities as z = P·v: the source row's pattern over this row's values."""
    if (layer, "pattern") in run.reads:
        run.kept[layer, "pattern"] = pattern_of(core)
    groups = run.edits.get((layer, "pattern"), ())
    if groups:
        z = z.clone()
    for group in groups:
        replaced = group["op"] == "replace"
        rows, source = group["row"].to(z.device), group["source" if replaced else "row"].to(z.device)
        pattern = pattern_of(core, source)
        pattern = pattern if replaced else with_number(pattern, group, run.values[layer, "pattern"])
        mixed = mix_values(pattern, core["value"][rows]).to(z.dtype)  # [edit, query, head, d_head]
        heads = torch.arange(run.taps["n_heads"])[None, :] if group["no_head"] else group["head"][:, None]
        column = torch.arange(z.shape[1])[None, :] if group["everywhere"] else group["column"][:, None]
        origin = column if group["everywhere"] else group["source_column"][:, None]
        if replaced and not torch.equal(column, origin):
            raise ValueError("a pattern row can only be taken from the same position of the source run")
        view = z.unflatten(2, (run.taps["n_heads"], -1))
        each = torch.arange(len(rows))[:, None, None]
        view[rows[:, None, None], column[:, :, None], heads[:, None, :]] = mixed[
            each, column[:, :, None], heads[:, None, :]
        ]
    return z


def edit_probabilities(run: Run, layer: int, call: Any) -> None:
    """Where eager attention holds the pattern itself `[row, head, query, key]`: read it or write it there."""
    pattern = call.output
    groups = run.edits.get((layer, "pattern"), ())
    if groups:
        shape = pattern.shape
        pattern = pattern.reshape(len(run.rows), -1, *shape[-2:]).clone()
        flat = pattern.transpose(1, 2)  # [row, query, head, key]
        for group in groups:
            heads = torch.arange(flat.shape[2])[None, :] if group["no_head"] else group["head"][:, None]
            column = torch.arange(flat.shape[1])[None, :] if group["everywhere"] else group["column"][:, None]
            origin = column if group["everywhere"] else group["source_column"][:, None]
            target = (group["row"][:, None, None], column[:, :, None], heads[:, None, :])
            if group["op"] == "replace":
                flat[target] = flat[group["source"][:, None, None], origin[:, :, None], heads[:, None, :]]
            else:
                flat[target] = with_number(flat[target], group, run.values[layer, "pattern"])
        pattern = pattern.reshape(shape)
        call.output = pattern
    if run.tape is not None and (layer, "pattern") in run.tape.wanted:
        pattern = call.output = run.tape.take(layer, "pattern", pattern)
    if (layer, "pattern") in run.reads:
        run.kept[layer, "pattern"] = pattern.reshape(len(run.rows), -1, *pattern.shape[-2:])


def edit_heads(run: Run, layer: int, module: Any, z: Tensor, out: Tensor) -> Tensor:
    """Write heads' outputs z·W_O: what the output projection wrote, plus new − old of the heads that change."""
    index = features(run.taps, "z")
    by_head = output_matrix(module, index, z)  # [head, d_head, d_model]
    if (layer, "head_out") in run.reads:
        heads = z.unflatten(2, (run.taps["n_heads"], -1))
        run.kept[layer, "head_out"] = torch.einsum("rphd,hdm->rphm", heads, by_head)
    groups = run.edits.get((layer, "head_out"), ())
    if groups:
        changed = z.clone()
        for group in groups:
            apply_group(changed, group, run.values.get((layer, "head_out")), index)
        out = out + (changed - z) @ by_head.flatten(0, 1)
    if run.tape is not None:
        out = run.tape.take(layer, "head_out", out)
    return out
