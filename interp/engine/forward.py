"""The walk through one forward pass: rows join, are edited and read at the taps of each block, and are scored.

Standard library and torch only: these functions are shipped by source to a remote server.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metrics import score
from ..models.layout import Envoy, at
from ..sites import KIND
from .attention import edit_core, edit_heads, edit_probabilities, write_pattern
from .readout import lens_rows, readout
from .state import Run

if TYPE_CHECKING:
    from .program import NoiseTable

#: Kinds that others are read off and written through.
THROUGH = {kind.through for kind in KIND.values()} - {""}


def spread(value: Any, rows: Tensor, start: int, name: str = "") -> Any:
    """Give every batched tensor in a block's arguments one entry per row: rows [row] -> start row."""
    if isinstance(value, tuple | list):
        return type(value)(spread(item, rows, start, name) for item in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if name == "alibi":  # [start * head, 1, position]
        by_row = value.reshape(start, -1, *value.shape[1:])
        return by_row[rows.to(value.device)].flatten(0, 1)
    return value[rows.to(value.device)] if value.shape[0] == start else value


class Port:
    """Gets and puts the tensor of one tap, `[row, position, feature]`, whatever form its module has it in."""

    def __init__(self, tap: Envoy, side: str, rows: int) -> None:
        self.tap, self.side = tap, side
        self.whole = tap.output if side == "output" else tap.input
        tensor = self.whole[0] if isinstance(self.whole, tuple) else self.whole
        self.flat = tensor.ndim == 2  # OPT flattens rows and positions
        self.x: Tensor = tensor.unflatten(0, (rows, -1)) if self.flat else tensor

    def put(self, x: Tensor) -> None:
        """Have the module go on with x."""
        if x is self.x:
            return
        x = x.flatten(0, 1) if self.flat else x
        if self.side == "output":
            self.tap.output = (x, *self.whole[1:]) if isinstance(self.whole, tuple) else x
        else:
            self.tap.input = x


def enter(run: Run, layer: int, block: Envoy) -> None:
    """At a block's input: let the rows of this layer join, then hand round the residual stream."""
    joining = run.program["origin"][run.program["stage"] == layer]
    run.rows = torch.cat([run.rows, run.rows[joining]])
    grown = len(run.rows) > run.start
    if grown and run.below:
        past = run.cache.layers[layer]
        past.keys, past.values = (part[run.rows.to(part.device)] for part in run.below[layer])
    if run.edges is not None:
        run.edges.block = block
    run.z = None  # of the block before
    sites = [(layer - 1, "resid_post"), (layer, "resid_pre")]
    if not grown and not any(run.stops_at(*site) for site in sites):
        return
    args, kwargs = block.inputs
    hidden = args[0] if args else kwargs["hidden_states"]
    if len(joining):
        hidden = torch.cat([hidden, hidden[joining.to(hidden.device)]])
    for site in sites:
        hidden = run.visit(*site, hidden, fresh=len(joining) > 0)
    others = args[1:]
    if grown:
        others = tuple(spread(value, run.rows, run.start) for value in others)
        kwargs = {name: spread(value, run.rows, run.start, name) for name, value in kwargs.items()}
    block.inputs = ((hidden, *others), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def add_noise(x: Tensor, noise: NoiseTable) -> Tensor:
    """Embeddings `[row, position, d_model]` with noise made here from each token's own seed: nothing is shipped."""
    x = x.clone()
    for row, column, seed in noise["table"].tolist():
        drawn = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        x[row, column] += (noise["std"] * drawn).to(x.device, x.dtype)
    return x


def walk(model: Envoy, run: Run) -> None:
    """Follow the forward pass through all blocks, stopping at the taps where somebody listens."""
    taps, last = run.taps, run.program["last"]
    layers = at(model, taps["layers"])
    embed_tokens(model, run)
    for layer in range(taps["n_layers"]):
        block = layers[layer]
        if layer < run.first:
            block.skip((run.entering, None) if taps["tuple_output"] else run.entering)
            continue
        for path, _, kinds in taps["block"]:  # a source tap must be asked for before its module begins to run
            if ".source." in path and any(run.stops_at(layer, kind) for kind in kinds):
                at(block, path.split(".source.")[0]).source  # noqa: B018
        enter(run, layer, block)
        for path, side, kinds in taps["block"][1:]:
            if wanted := [kind for kind in kinds if run.stops_at(layer, kind)]:
                stop(run, layer, at(block, path), side, wanted)
        if layer == last:
            return
    finish(model, run)


def embed_tokens(model: Envoy, run: Run) -> None:
    """At the embedding: noise, edits, and a leaf, so that gradients exist where the weights are frozen."""
    noise = run.program.get("noise")
    if not run.wants(-1, "embed") and noise is None and run.tape is None:
        return
    embed = at(model, run.taps["embed"])
    entering = embed.output if noise is None else add_noise(embed.output, noise)
    if run.tape is not None:
        entering = entering.detach().requires_grad_(True)
    embed.output = run.visit(-1, "embed", entering)


def stop(run: Run, layer: int, tap: Envoy, side: str, kinds: list[str]) -> None:
    """At one tap of a block: hand its tensor round for each kind of site that is listened for there."""
    if side == "inputs":
        run.core = edit_core(run, layer, tap, kinds)
        return
    facts = KIND[kinds[0]]
    if facts.view == "mixture":
        edit_probabilities(run, layer, tap)
        return
    port = Port(tap, side, len(run.rows))
    x = port.x
    if facts.tensor == "shared":
        run.visit(layer, facts.name, x, fresh=True, live=tap.input)
        return
    if facts.tensor == "own" and run.tape is not None:
        x = x.view_as(x)
    for kind in kinds:
        if KIND[kind].view == "decoder":
            x = edit_heads(run, layer, tap, x)
            continue
        if kind in THROUGH:
            x = write_pattern(run, layer, x)
        x = run.visit(layer, kind, x)
        if kind in THROUGH:
            run.z = x
    port.put(x)


def finish(model: Envoy, run: Run) -> None:
    """Behind the last block: rows and edits of the final residual stream."""
    end = run.taps["n_layers"]
    joining = run.program["origin"][run.program["stage"] == end]
    run.rows = torch.cat([run.rows, run.rows[joining]])
    if len(joining) or run.stops_at(end - 1, "resid_post"):
        norm = at(model, run.taps["norm"])
        hidden = norm.input
        if len(joining):
            hidden = torch.cat([hidden, hidden[joining.to(hidden.device)]])
        hidden = run.visit(end - 1, "resid_post", hidden, fresh=len(joining) > 0)
        lens = run.program.get("readout", {}).get("kind") == "lens"
        norm.input = lens_rows(run, hidden) if lens else hidden


def answer_logits(model: Envoy, run: Run) -> Tensor:
    """Logits `[scored, d_vocab]` of the scored rows at their answer positions; no other is computed."""
    head = at(model, run.taps["head"])
    hidden = head.input
    rows, columns = run.program["scored"].to(hidden.device), run.program["at"].to(hidden.device)
    head.input = hidden[rows, columns].unsqueeze(1)
    logits: Tensor = model.output.logits[:, 0]
    return logits


def forward(model: Envoy, run: Run, metric: Callable[..., Tensor] | None, result: dict[str, Any]) -> None:
    """Run one program inside an open trace, into `result`: metric `[scored]` in fp32, logits, reads {site: activation}."""
    result["reads"] = run.kept
    walk(model, run)
    if "readout" in run.program:
        result.update({"reads": {}, **readout(model, run)})
    elif run.program["last"] is None:
        logits = answer_logits(model, run)
        if run.tape is not None:
            run.tape.logits = logits
        with nullcontext() if run.rules is None else run.rules.of_metric():
            result["metric"] = score(metric, logits, run.program) if metric is not None else None
        if run.program["want_logits"]:
            result["logits"] = logits
