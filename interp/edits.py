"""Edits: what is done to an activation at a site, and the compact table in which edits travel.

An `Edit` is a site, an operation and where the new value comes from. Standard library and torch only; the table and
its reader also travel to a remote server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PlanError
from .sites import RECEIVERS, SENDERS, Site

#: "mix" moves towards the source run by a fraction; only the engine makes such edits.
OPS = ("replace", "set", "add", "scale", "mix")
#: Columns of the table of edits. -1 stands for "all" (column, part) or "none" (source, value); a part is a head or a unit.
FIELDS = ("layer", "kind", "op", "row", "source", "column", "source_column", "part", "value")


@dataclass(frozen=True)
class Edit:
    """One change of one activation.

    `op` is "replace" (by the source run's activation at the same site), "set" (to `value`), "add" (`value` is added) or
    "scale" (multiplied by `value`). A value is a number; or numbers `[feature]` for the tensor that holds the site, counted
    over all of its heads (over all parts of a view); or `[position, feature]`.

    Raises:
        PlanError: unknown operation, or a value missing or given where none is used.

    Examples:
        >>> off = interp.Edit(interp.Site.parse("L0.mlp_out"), "scale", 0.0)
        >>> model.logits("The Eiffel Tower is in the city of", edits=off).shape
        torch.Size([1, 10, 49152])
    """

    site: Site
    op: str = "replace"
    value: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.op not in OPS[:-1]:
            raise PlanError(f"unknown edit {self.op!r} at {self.site}; the edits are: {', '.join(OPS[:-1])}")
        if (self.value is None) != (self.op == "replace"):
            raise PlanError(f"edit {self.op!r} at {self.site} needs {'no' if self.op == 'replace' else 'a'} value")
        if not self.site.facts.width and not self.site.facts.layered:
            raise PlanError("the logits are what the metric reads; patch 'resid_post' of the last layer instead")

    def __repr__(self) -> str:
        value = (
            f", {list(self.value.shape)}"
            if isinstance(self.value, Tensor)
            else f", {self.value}" * (self.value is not None)
        )
        return f"Edit({self.site}, {self.op}{value})"


@dataclass(frozen=True)
class Edge:
    """One changed read: the receiver reads the source run's contribution of the sender instead of the base run's.

    Senders: `embed`, a head (`L1.H2`), an MLP (`L1.mlp`). Receivers: `L3.H2.q`, `L3.H1.k`, `L3.H1.v` (k and v by key/value
    head), `L3.mlp`, `logits`. A position on either (`L1.H2@4`) limits the change to that position.

    Raises:
        PlanError: a site that cannot send or receive, or a head's site without a head. Whether the receiver is downstream of
            the sender is `exists`.
    """

    sender: Site
    receiver: Site

    def __post_init__(self) -> None:
        if self.sender.kind not in SENDERS:
            raise PlanError(f"{self.sender} cannot send; senders are 'embed', heads ('L1.H2') and MLPs ('L1.mlp')")
        if self.receiver.kind not in RECEIVERS:
            raise PlanError(
                f"{self.receiver} cannot receive; receivers are 'L3.H2.q', 'L3.H1.k', 'L3.H1.v', 'L3.mlp', 'logits'"
            )
        for site in (self.sender, self.receiver):
            if site.axis and site.part is None:
                raise PlanError(f"{site} names no head; write e.g. 'L{site.layer}.H0'")

    def exists(self, parallel: bool) -> bool:
        """Whether the receiver reads the sender; in parallel blocks an MLP does not read the heads of its own layer."""
        if self.sender.layer is None or self.receiver.layer is None:  # the embedding, the logits
            return True
        start, end = self.sender.layer, self.receiver.layer
        same = bool(self.sender.axis) and not self.receiver.axis and not parallel  # a head, and the MLP of its layer
        return start < end or (start == end and same)


class Group(NamedTuple):
    """Edits of one site and operation that one indexed assignment can do: an index `[edit]` for each.

    `everywhere`, `whole`: no edit has a column, or a part, of its own.
    """

    op: str
    everywhere: bool
    whole: bool
    row: Tensor
    source: Tensor
    column: Tensor
    source_column: Tensor
    part: Tensor
    value: Tensor


def group_edits(table: Tensor, kinds: Sequence[str]) -> dict[tuple[int, str], list[Group]]:
    """Split a table `[edit, field]` into groups by site: {(layer, kind): [group, …]}; `kinds` are those that it numbers."""
    groups: dict[tuple[int, str], list[Group]] = {}
    if not len(table):
        return groups
    place = {name: index for index, name in enumerate(FIELDS)}
    key = table[:, [place["layer"], place["kind"], place["op"]]]
    key = torch.cat([key, (table[:, [place["column"], place["part"]]] < 0).to(key.dtype)], dim=1)
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    for index, (layer, kind, op, everywhere, whole) in enumerate(unique.tolist()):
        rows = table[inverse == index].long()
        fields = [
            rows[:, place[name]].contiguous() for name in ("row", "source", "column", "source_column", "part", "value")
        ]
        groups.setdefault((layer, kinds[kind]), []).append(Group(OPS[op], bool(everywhere), bool(whole), *fields))
    return groups


def locate(group: Group, rows: Tensor, columns: Tensor, x: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """Broadcastable indices (row, column, feature) into `x [row, position, feature]` for every edit of a group."""
    device = x.device
    column = torch.arange(x.shape[1])[None, :] if group.everywhere else columns[:, None]
    if not group.whole:
        feature = group.part[:, None] if index is None else index[group.part]
    elif index is not None and index.numel() != x.shape[-1]:
        feature = index.reshape(1, -1)  # one part of a fused projection
    else:
        feature = torch.arange(x.shape[-1])[None, :]
    return rows[:, None, None].to(device), column[:, :, None].to(device), feature[:, None, :].to(device)


def apply_group(x: Tensor, group: Group, values: Tensor | None, index: Tensor | None) -> None:
    """Do every edit of a group on `x [row, position, feature]`, in place.

    `index [part, width]` says which features belong to which part; `values [value, position or 1, feature]` holds
    the constants of this site.
    """
    target = locate(group, group.row, group.column, x, index)
    if group.op == "replace":
        x[target] = x[locate(group, group.source, group.source_column, x, index)]
        return
    assert values is not None
    none = torch.zeros(1, 1, 1, dtype=torch.long, device=x.device)
    place = none
    if values.shape[1] > 1:  # by the pair's own positions; everywhere: source_column is that of the first column
        own = group.source_column[:, None].to(x.device)
        own = own + torch.arange(x.shape[1], device=x.device)[None, :] if group.everywhere else own
        place = own.clamp(min=0)[:, :, None]
    feature = target[2] if values.shape[2] > 1 else none
    value = values.to(x.device, x.dtype)[group.value[:, None, None].to(x.device), place, feature]
    if group.op == "mix":
        other = x[locate(group, group.source, group.source_column, x, index)]
        x[target] = x[target] + value * (other - x[target])
        return
    x[target] = value if group.op == "set" else x[target] + value if group.op == "add" else x[target] * value
