"""The laws of views: what a part that somebody else thought out must hold, whatever it means.

1. `write(x, read(x), read(x)) == x`: what does not change adds nothing.
2. `pull` is the transpose of `write`: gradient · (write(x, old, new) − x) = pull(gradient) · (new − old), which attribution
   rests on.
3. Some of the parts read alone are those parts of all: only the tensors of parts in use travel.
4. Reading back gives what was written, where the view says that it is `exact`; parts that overlap cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..engine.reading import entry, read
from ..engine.views import pulled
from ..errors import AuditError
from ..findings import Finding
from ..models.model import Model
from ..views import Seen, View
from .parts import TOLERANCE, compare
from .plain import Plain

WHOLE = "whole"


def _all(x: Tensor, _: dict[str, Tensor]) -> Tensor:
    """A tap's tensor as one part."""
    return x.unsqueeze(2)


@torch.no_grad()
def check_views(model: Model, prompt: Sequence[int], plain: Plain, views: Sequence[View]) -> Iterator[Finding]:
    """Every view at its layer, or at all of them."""
    for view in views:
        own = view.tap.layer
        for layer in range(model.n_layers) if own is None else [own]:
            place = model.require(view.site(layer)).place[0]
            whole = {WHOLE: Seen(view.tap.kind, _all, lambda x, *_: x, _all, {})}
            x = read(model, [prompt], [(place, WHOLE)], views=whole)["reads"][place, WHOLE][:, :, 0]
            try:
                yield from check_view(view, layer, x)
            except (RuntimeError, KeyError, IndexError, TypeError) as error:  # its functions are somebody else's
                said = f"at x [row, position, feature] = {list(x.shape)} it fails: {type(error).__name__}: {error}"
                raise AuditError(f"view {view.name!r}: {said}") from error
            yield check_itself(model, prompt, view, layer, plain)


def check_view(view: View, layer: int, x: Tensor) -> Iterator[Finding]:
    """The four laws at one tensor `[row, position, feature]`."""
    seen = view.seen()
    old = seen.read(x, seen.tensors)
    if old.shape[:3] != (*x.shape[:2], view.parts):
        want = [*x.shape[:2], view.parts]
        raise AuditError(
            f"view {view.name!r}: read gives {list(old.shape)}; it must give [row, position, part] = {want}"
        )
    yield compare(view.name, "law", layer, seen.write(x, old, old, seen.tensors), x)
    generator = torch.Generator().manual_seed(layer)
    step = torch.randn(old.shape, generator=generator).to(old) * old.std().clamp(min=1e-2)
    by_x = torch.randn(x.shape, generator=generator).to(x)
    moved = seen.write(x, old, old + step, seen.tensors) - x
    by_part = pulled(seen, by_x).flatten(2)
    pulled_back, wrote = (by_part * step.flatten(2)).sum(-1, keepdim=True), (by_x * moved).sum(-1, keepdim=True)
    size = (by_x.abs() * moved.abs()).sum(-1, keepdim=True)  # what was added up, of either sign
    yield compare(view.name, "law", layer, pulled_back, wrote, beside=[size])
    some = sorted({0, view.parts // 2, view.parts - 1})
    part = view.seen(some)
    yield compare(
        view.name, "law", layer, part.read(x, part.tensors), old.index_select(2, torch.tensor(some)), beside=[x]
    )
    back = seen.read(seen.write(x, old, old + step, seen.tensors), seen.tensors)
    note = "" if view.exact else "its parts overlap: not all that is written is read back"
    finding = compare(view.name, "law", layer, back, old + step, note, beside=[x])
    yield finding if view.exact else Finding(view.name, "law", layer, 0.0, TOLERANCE[x.dtype], note)


def check_itself(model: Model, prompt: Sequence[int], view: View, layer: int, plain: Plain) -> Finding:
    """A row patched with its own parts has the logits that it had."""
    views = {view.name: view.seen()}
    edit = entry(*view.site(layer).place, "replace", 1, views=list(views), source=0)
    run = read(model, [prompt, prompt], edits=[edit], views=views)["logits"]
    return compare(view.name, "self-patch", layer, run[1:], run[:1], noise=plain.logits_noise)
