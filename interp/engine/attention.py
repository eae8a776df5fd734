"""Attention inside a forward pass: q and k behind the rotary embedding, patterns, and what heads write.

Standard library and torch only: these functions are shipped by source to a remote server.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits import Group
from ..models.layout import Envoy, attention_pattern, mix_values, output_matrix, part_index
from ..sites import KIND
from ..views import write_decoded
from .state import Core, Run
from .views import moved

PATTERN, HEADS, ROTATED = "pattern", "head_out", ("q_rot", "k_rot")
#: For the audit: v as attention mixes it, which some models clip on the way.
VALUE = "value"


def edit_core(run: Run, layer: int, call: Envoy, kinds: list[str]) -> Core | None:
    """At the attention call: edit or read q and k after the rotary embedding; give the call where its pattern is wanted."""
    args, kwargs = call.inputs
    first = run.taps["core_first"]
    new = list(args)
    rotated = [kind for kind in kinds if KIND[kind].view == "slice"]
    for kind in rotated:
        place = first if kind == ROTATED[0] else first + 1
        whole = new[place]  # [row, head, position, d_head]; keys may start with a cached prefix
        own = new[first].shape[2]
        past, part = whole[:, :, :-own], whole[:, :, -own:]
        flat = run.visit(layer, kind, part.transpose(1, 2).flatten(2))
        part = flat.unflatten(2, (whole.shape[1], -1)).transpose(1, 2)
        new[place] = torch.cat([past, part], dim=2) if past.shape[2] else part
    if rotated:
        call.inputs = (tuple(new), kwargs)
    if (layer, VALUE) in run.reads:
        run.kept[layer, VALUE] = new[first + 2].transpose(1, 2)[:, -new[first].shape[2] :].clone()
    if len(rotated) == len(kinds):
        return None
    mask = new[first + 3] if len(new) > first + 3 else kwargs.get("attention_mask")
    core: Core = {"query": new[first], "key": new[first + 1], "value": new[first + 2], "mask": mask, "options": kwargs}
    if run.tape is not None:
        run.tape.core[layer] = {
            name: part.detach() if isinstance(part, Tensor) else part for name, part in core.items()
        }
    return core


def pattern_of(core: Core, rows: Tensor | None = None) -> Tensor:
    """Attention probabilities `[row, head, query, key]` of some rows (all when None)."""
    query, key, mask = core["query"], core["key"], core["mask"]
    if rows is not None:
        rows = rows.to(query.device)
        mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
        query, key = query[rows], key[rows]
    return attention_pattern(query, key, mask, core["options"])


def with_number(pattern: Tensor, group: Group, values: Tensor) -> Tensor:
    """Attention probabilities `[edit, …]` with the number of each edit set, added or multiplied where there is attention."""
    number = values[group.value, 0, 0].to(pattern.device, pattern.dtype).reshape(-1, *[1] * (pattern.ndim - 1))
    if group.op == "scale":
        return pattern * number
    return torch.where(pattern > 0, number if group.op == "set" else pattern + number, pattern)


def placed(group: Group, heads: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads `[edit or 1, head]`, columns and source columns `[edit or 1, position]` of a group of edits of patterns."""
    head = torch.arange(heads)[None, :] if group.whole else group.part[:, None]
    column = torch.arange(positions)[None, :] if group.everywhere else group.column[:, None]
    return head, column, column if group.everywhere else group.source_column[:, None]


def write_pattern(run: Run, layer: int, z: Tensor) -> Tensor:
    """Write attention probabilities as z = P·v: the source row's pattern over this row's values."""
    core, run.core = run.core, None
    if core is None:
        return z
    site = (layer, PATTERN)
    if site in run.reads:
        run.kept[site] = pattern_of(core)
    groups = run.edits.get(site, ())
    if groups:
        z = z.clone()
    for group in groups:
        replaced = group.op == "replace"
        rows, source = group.row.to(z.device), (group.source if replaced else group.row).to(z.device)
        pattern = pattern_of(core, source)
        pattern = pattern if replaced else with_number(pattern, group, run.values[site])
        mixed = mix_values(pattern, core["value"][rows]).to(z.dtype)  # [edit, query, head, d_head]
        heads, column, origin = placed(group, run.taps["n_heads"], z.shape[1])
        if replaced and not torch.equal(column, origin):
            raise ValueError("a pattern row can only be taken from the same position of the source run")
        view = z.unflatten(2, (run.taps["n_heads"], -1))
        each = torch.arange(len(rows))[:, None, None]
        view[rows[:, None, None], column[:, :, None], heads[:, None, :]] = mixed[
            each, column[:, :, None], heads[:, None, :]
        ]
    return z


def edit_probabilities(run: Run, layer: int, call: Envoy) -> None:
    """Where eager attention holds the pattern itself `[row, head, query, key]`: read it or write it there."""
    pattern, site = call.output, (layer, PATTERN)
    groups = run.edits.get(site, ())
    if groups:
        shape = pattern.shape
        pattern = pattern.reshape(len(run.rows), -1, *shape[-2:]).clone()
        flat = pattern.transpose(1, 2)  # [row, query, head, key]
        for group in groups:
            heads, column, origin = placed(group, flat.shape[2], flat.shape[1])
            target = (group.row[:, None, None], column[:, :, None], heads[:, None, :])
            if group.op == "replace":
                flat[target] = flat[group.source[:, None, None], origin[:, :, None], heads[:, None, :]]
            else:
                flat[target] = with_number(flat[target], group, run.values[site])
        pattern = pattern.reshape(shape)
        call.output = pattern
    if run.tape is not None and site in run.tape.wanted:
        pattern = call.output = run.tape.take(*site, pattern)
    if site in run.reads:
        run.kept[site] = pattern.reshape(len(run.rows), -1, *pattern.shape[-2:])


def edit_heads(run: Run, layer: int, module: Envoy, out: Tensor) -> Tensor:
    """Write heads' outputs z·W_O: what the output projection wrote, plus new − old of the heads that change."""
    z, site = run.z, (layer, HEADS)
    assert z is not None
    by_head = output_matrix(module, part_index(run.taps, HEADS), z)  # [head, d_head, d_model]
    heads = z.unflatten(2, (run.taps["n_heads"], -1))
    if site in run.reads:
        run.kept[site] = torch.einsum("rphd,hdm->rphm", heads, by_head)
    if groups := run.edits.get(site, ()):
        out = write_decoded(out, heads, moved(heads, groups, run.values.get(site)), {"decoder": by_head})
    return out if run.tape is None else run.tape.take(*site, out)
