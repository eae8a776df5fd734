"""Views inside a forward pass: the parts of a tap's tensor, read and written.

Standard library and torch only: these functions are shipped by source to a remote server.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits import Group, apply_group
from ..models.layout import Taps, part_index
from ..sites import KIND
from ..views import Seen


def by_part(taps: Taps, kind: str, x: Tensor) -> Tensor:
    """A kind's own part of its tap's tensor: `[row, position, head, d_head]`, `[row, position, unit]`, or all of it."""
    if KIND[kind].view != "slice":
        return x
    part = x[..., part_index(taps, kind).to(x.device)]
    return part[..., 0] if KIND[kind].axis == "unit" else part


def index_of(taps: Taps, kind: str) -> Tensor | None:
    """Which features belong to which part `[part, width]`; None where a kind is not divided."""
    return part_index(taps, kind) if KIND[kind].view == "slice" else None


def wide(parts: Tensor) -> Tensor:
    """Parts `[row, position, part, width]`, also from a function that leaves out a width of 1."""
    return parts.unsqueeze(-1) if parts.ndim == 3 else parts


def there(seen: Seen, device: torch.device) -> Seen:
    """The view with its tensors where the model's are; the same where they are there already."""
    if all(tensor.device == device for tensor in seen.tensors.values()):
        return seen
    return seen._replace(tensors={name: tensor.to(device) for name, tensor in seen.tensors.items()})


def parts_of(seen: Seen, x: Tensor) -> Tensor:
    """What a view reads of x: `[row, position, part, width]`."""
    return wide(seen.read(x, seen.tensors))


def pulled(seen: Seen, gradient: Tensor) -> Tensor:
    """What a view makes of the gradient by its tap's tensor: `[row, position, part, width]`."""
    return wide(seen.pull(gradient, seen.tensors))


def moved(old: Tensor, groups: list[Group], values: Tensor | None) -> Tensor:
    """Parts `[row, position, part, width]` with the edits of their site made."""
    flat = old.flatten(2).clone()
    index = torch.arange(flat.shape[-1]).reshape(old.shape[2:])
    for group in groups:
        apply_group(flat, group, values, index)
    return flat.reshape(old.shape)


def write_through(x: Tensor, seen: Seen, groups: list[Group], values: Tensor | None) -> Tensor:
    """x `[row, position, feature]` with the edits of a view's site made; only the rows that they concern are looked at."""
    written = torch.cat([group.row for group in groups]).unique()
    sources = torch.cat([group.source for group in groups])
    rows = torch.cat([written, sources[sources >= 0]]).unique()
    own = [
        group._replace(row=torch.searchsorted(rows, group.row), source=torch.searchsorted(rows, group.source))
        for group in groups
    ]
    old = seen.read(x[rows.to(x.device)], seen.tensors)
    new = moved(wide(old), own, values).reshape(old.shape)
    at, written = torch.searchsorted(rows, written).to(x.device), written.to(x.device)
    out = x.clone()
    out[written] = seen.write(x[written], old[at], new[at], seen.tensors).to(x.dtype)
    return out
