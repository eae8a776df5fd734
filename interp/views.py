"""Views: what part of a tap's tensor a site means, how that part is written, and what a gradient says of it.

A site is a tap (where a tensor can be had) and a view of it. A view is three functions and plain tensors, so that it
travels to a remote server by source; `interp.View` makes one that no architecture knows:

    read(x, tensors) -> [row, position, part, width]          the parts of x `[row, position, feature]`
    write(x, old, new, tensors) -> x                          x with its parts moved from `old` to `new`
    pull(gradient, tensors) -> [row, position, part, width]   the gradient by each part, from that by x

Slices (q, k, v, z, hidden units) are assigned, exactly. Everything else is written as x + D(new − old) with a decoder D
`[part, width, feature]`: a head's output (D is W_O), the features of an autoencoder, directions, a rotated subspace. What
D does not reach stays as it is by construction. `pull` is the transpose of `write`; the audit holds every view to that.
Standard library and torch only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PlanError
from .sites import KIND, KINDS, Site

Tensors = dict[str, Tensor]
Read = Callable[[Tensor, Tensors], Tensor]
Write = Callable[[Tensor, Tensor, Tensor, Tensors], Tensor]
#: The tensor that says which parts a request is about, beside those of the view itself; and the decoder.
PART, DECODER = "part", "decoder"


class Seen(NamedTuple):
    """One view as it travels with a program: the kind of site whose tap it is on, its functions, and its tensors."""

    tap: str
    read: Read
    write: Write
    pull: Read
    tensors: Tensors


def write_decoded(x: Tensor, old: Tensor, new: Tensor, tensors: Tensors) -> Tensor:
    """x + D(new − old): parts that do not change add nothing, whatever they are. Summed in the type of the parts."""
    step = (new - old).flatten(2)
    return x + (step @ tensors["decoder"].to(x.device, step.dtype).flatten(0, -2)).to(x.dtype)


def pull_decoded(gradient: Tensor, tensors: Tensors) -> Tensor:
    """The gradient along each part's rows of D: `[row, position, part, width]`."""
    decoder = tensors["decoder"].to(gradient.device, gradient.dtype)
    return torch.einsum("rpm,nwm->rpnw", gradient, decoder.reshape(len(decoder), -1, decoder.shape[-1]))


@dataclass(frozen=True, eq=False)
class View:
    """Coordinates of one's own at a tap: a rotated basis, directions, the features of a dictionary.

    Args:
        name: what results, texts of sites and messages call it; none of the kinds of sites.
        at: the tap: a kind of site (`"resid_post"`, for every layer) or a site with a layer (`"L8.resid_post"`).
        parts: how many parts there are; they are the units of its sites.
        read: `read(x, tensors) -> [row, position, part, width]`, from x `[row, position, feature]`; `[…, part]` where each
            part is one number. `tensors` holds those given here, and "part", the numbers of the parts that are asked for:
            it must give these alone.
        decoder: `[part, feature]` or `[part, width, feature]`; then `write` and `pull` need not be given: a write adds
            (new − old) times it.
        write, pull: see `interp.views`; without a decoder, both.
        tensors: what the functions use. They are sent once with every request.
        by_part: names of tensors whose first dimension is the part: only the rows of the parts in use are sent.
        exact: reading back gives what was written, as of an orthonormal basis; the audit then checks it. It does not hold
            of features that overlap.

    The functions must be plain functions that use torch alone: they also run where `interp` is not installed.

    Raises:
        PlanError: a name or tap that cannot be, functions or tensors that are missing or do not fit.

    Examples:
        >>> import torch
        >>> basis = torch.linalg.qr(torch.randn(576, 576))[0]
        >>> rotated = interp.View("rotated", at="resid_post", parts=576, decoder=basis,
        ...                       read=lambda x, t: x @ t["decoder"].T, exact=True)
        >>> interp.patch(model, pairs, interp.features(rotated, units=[0, 1], layers=[8])).values.dims
        ('component', 'layer', 'unit', 'pair')
    """

    name: str
    at: str | Site
    parts: int
    read: Read
    decoder: Tensor | None = None
    write: Write | None = None
    pull: Read | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    by_part: Sequence[str] = ()
    exact: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z]\w*", self.name) or self.name in KINDS:
            raise PlanError(f"a view cannot be named {self.name!r}: a word, and none of {', '.join(KINDS)}")
        tap = self.tap
        if tap.kind not in KIND or KIND[tap.kind].width == "" or KIND[tap.kind].view in ("decoder", "mixture"):
            raise PlanError(f"view {self.name!r} is at {tap}, which has no tensor of its own; take e.g. 'resid_post'")
        if tap.part is not None or tap.position is not None:
            raise PlanError(
                f"view {self.name!r} is at {tap}, a part of a tensor; give its kind, and a layer if it is of one"
            )
        if self.parts < 1:
            raise PlanError(f"view {self.name!r} has {self.parts} parts; it needs one or more")
        if self.decoder is None and (self.write is None or self.pull is None):
            raise PlanError(f"view {self.name!r} needs a decoder [part, feature], or write= and pull=")
        for name in (*((DECODER,) if self.decoder is not None else ()), *self.by_part):
            tensor = self.decoder if name == DECODER else self.tensors.get(name)
            if not isinstance(tensor, Tensor) or tensor.ndim < 1 or len(tensor) != self.parts:
                shape = list(tensor.shape) if isinstance(tensor, Tensor) else tensor
                raise PlanError(
                    f"view {self.name!r}: {name} must have {self.parts} rows, one for each part, not {shape}"
                )
        if PART in self.tensors or (self.decoder is not None and DECODER in self.tensors):
            raise PlanError(f"view {self.name!r}: the names {PART!r} and {DECODER!r} are taken")

    @cached_property
    def tap(self) -> Site:
        """The site whose tensor it is a view of; without a layer where it is one for all."""
        return Site(self.at) if isinstance(self.at, str) and "." not in self.at else Site.parse(self.at)

    @property
    def width(self) -> int | None:
        """How many numbers its tap's tensor has; None where only its functions know."""
        return None if self.decoder is None else int(self.decoder.shape[-1])

    def site(self, layer: int | None = None, unit: int | None = None, position: int | None = None) -> Site:
        """A site of this view, `L3.rotated[5]@-1`: one part (`unit`) or all of them; PlanError: another layer than its own."""
        own = self.tap.layer
        if own is not None and layer not in (None, own):
            raise PlanError(f"view {self.name!r} is one of layer {own}, not of layer {layer}")
        return Site(self.name, own if layer is None else layer, position=position, unit=unit, view=self)

    def seen(self, parts: Sequence[int] | None = None) -> Seen:
        """What travels: its functions, and its tensors; of those by part the rows of `parts` (None: all)."""
        chosen = torch.arange(self.parts) if parts is None else torch.tensor(list(parts), dtype=torch.long)
        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        if self.decoder is not None:
            tensors[DECODER] = self.decoder.detach()
        if parts is not None:
            tensors |= {
                name: tensors[name][chosen.to(tensors[name].device)]
                for name in (*self.by_part, DECODER)
                if name in tensors
            }
        return Seen(
            self.tap.kind, self.read, self.write or write_decoded, self.pull or pull_decoded, {**tensors, PART: chosen}
        )

    def __repr__(self) -> str:
        return f"View({self.name!r}, at={str(self.tap)!r}, parts={self.parts})"
