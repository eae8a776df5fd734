"""What travels: programs, each one forward pass, as plain dictionaries of tensors. Their fields, for readers and mypy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from ..views import Seen

Place = tuple[int, str]
#: The keyword arguments of a model's forward: input_ids `[start, position]`, and a mask where there is padding.
Inputs = dict[str, Any]


class NoiseTable(TypedDict):
    """Gaussian noise on the embeddings: standard deviation, and `table [token, (row, column, seed)]`."""

    std: float
    table: Tensor


class Program(TypedDict, total=False):
    """One forward pass. Columns count from the first position that is run; -1 and None stand for "none"."""

    inputs: Inputs
    # rows that join on the way: [joining] the row that each is a copy of until then, and the layer at which it joins, ascending
    origin: Tensor
    stage: Tensor
    edits: Tensor  # the table of `interp.edits`
    values: dict[Place, Tensor]  # {(layer, kind): [value, position or 1, feature]} constants for "set", "add", "scale"
    views: dict[str, Seen]  # the views that edits and reads name besides the kinds of sites
    reads: Sequence[Place]  # activations to return
    last: int | None  # the last layer that must run
    first: int  # blocks below this layer are skipped
    want_logits: bool
    scored: Tensor  # [n] rows whose logits are wanted
    at: Tensor  # [n] at these columns
    clean: Tensor | None  # [n] index into `scored` of the clean run of each scored row
    corrupted: Tensor | None  # the same of the corrupted run
    answers: Tensor | None  # [n] or [n, set] token ids
    distractors: Tensor | None
    # a prepared run: the layers whose input is kept, and the class of an empty cache
    keep: Sequence[int]
    cache: Any
    # a run on a prepared one: its number, which of its rows are needed, the first position run
    use: int
    pick: Tensor
    column: int
    edges: dict[str, Any]  # changed reads, see `interp.engine.edges`
    noise: NoiseTable
    readout: dict[str, Any]  # what is made of the activations that are read, see `interp.engine.readout`
    generation: dict[str, Any]  # tokens that are made, see `interp.engine.generating`
    # a frozen model, see `interp.engine.frozen`: what is read, what writes it, and linear paths around MLPs by layer
    targets: dict[str, Tensor]
    sources: dict[str, Tensor]
    skips: dict[int, Tensor]
    # gradients, see `interp.engine.gradients`
    tape: Sequence[Place]  # sites whose gradients are wanted
    base: Tensor  # [pair] rows of the base run
    source: Tensor  # [pair] rows of the source run
    gradient: Tensor  # [pair, step] rows whose gradients are averaged for each pair
    rule: str  # backward rules, see `interp.engine.rules`
    until: Tensor  # [pair, step] the other end's row of each row in `gradient`, for rules that look at two
    steps: dict[Place, Tensor]  # {site: [pair, step]} rows that move each site by itself (ig-activations), or {}
    features: Sequence[tuple[int, str, str]]  # dictionaries by depth: layer, its view, and the view of what it leaves
    nodes: Tensor  # [node, (layer, 0 head or 1 unit, number)] for edges between these, see `interp.engine.neuron_edges`
    by_edge: bool  # whether scores of edges are wanted instead, see `edge_gradients`
    columns: Tensor | None  # [pair, position] the source position that belongs to each base position (None: the same)
    drop: Sequence[int]  # layers to drop one at a time in the backward pass (GradDrop)
    plain: dict[str, list[object]]  # a forward pass with hooks alone, see `interp.engine.hooked`
    exact_qk: bool  # whether q and k go through the softmax exactly (AtP*)
