"""The walk through one forward pass: rows join, are edited and read at the taps of each block, and are scored.

Standard library and torch only: these functions are shipped by source to a remote server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..metrics import score
from ..models.views import at
from .attention import edit_core, edit_heads, edit_probabilities, write_pattern
from .readout import lens_rows, readout
from .state import Run


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


def enter(run: Run, layer: int, block: Any) -> None:
    """At a block's input: let the rows of this layer join, then edit the residual stream."""
    joining = run.program["origin"][run.program["stage"] == layer]
    run.rows = torch.cat([run.rows, run.rows[joining]])
    grown = len(run.rows) > run.start
    if grown and run.below:
        past = run.cache.layers[layer]
        past.keys, past.values = (part[run.rows.to(part.device)] for part in run.below[layer])
    sites = [(layer - 1, "resid_post"), (layer, "resid_pre")]
    if not grown and run.edges is None and not any(site in run.active for site in sites):
        return
    args, kwargs = block.inputs
    hidden = args[0] if args else kwargs["hidden_states"]
    if len(joining):
        hidden = torch.cat([hidden, hidden[joining.to(hidden.device)]])
    if run.edges is not None and layer == 0:
        run.edges.record(-1, "embed", hidden)
        hidden = run.edges.add(-1, "embed", hidden)
    for site in sites:
        hidden = run.visit(*site, hidden, fresh=len(joining) > 0)
    if run.edges is not None:
        run.edges.hidden = hidden
    others = args[1:]
    if grown:
        others = tuple(spread(value, run.rows, run.start) for value in others)
        kwargs = {name: spread(value, run.rows, run.start, name) for name, value in kwargs.items()}
    block.inputs = ((hidden, *others), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def add_noise(x: Tensor, noise: dict[str, Any]) -> Tensor:
    """Embeddings `[row, position, d_model]` with noise made here from each token's own seed: nothing is shipped."""
    x = x.clone()
    for row, column, seed in noise["table"].tolist():
        drawn = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        x[row, column] += (noise["std"] * drawn).to(x.device, x.dtype)
    return x


def walk(model: Any, run: Run) -> None:
    """Follow the forward pass through all blocks, stopping at the taps where something is edited or read."""
    taps, last = run.taps, run.program["last"]
    layers = at(model, taps["layers"])
    noise = run.program.get("noise")
    if (-1, "embed") in run.active or noise is not None or run.tape is not None:
        embed = at(model, taps["embed"])
        entering = embed.output if noise is None else add_noise(embed.output, noise)
        if run.tape is not None:  # a leaf, so that gradients exist where the weights are frozen
            entering = entering.detach().requires_grad_(True)
        embed.output = run.visit(-1, "embed", entering)
    for layer in range(taps["n_layers"]):
        block = layers[layer]
        if layer < run.first:
            block.skip((run.entering, None) if taps["tuple_output"] else run.entering)
            continue
        for path, _, kinds in taps["block"]:  # a source tap must be asked for before its module begins to run
            if ".source." in path and any((layer, kind) in run.active for kind in kinds):
                at(block, path.split(".source.")[0]).source  # noqa: B018
        enter(run, layer, block)
        core: dict[str, Any] | None = None
        z: Tensor | None = None
        for path, side, kinds in taps["block"][1:]:
            here = [kind for kind in kinds if (layer, kind) in run.active]
            late = "z" in kinds and (core is not None or (layer, "head_out") in run.active)
            if not here and not late and (run.edges is None or not run.edges.at_tap(layer, kinds)):
                continue
            tap = at(block, path)
            if side == "inputs":
                core = edit_core(run, layer, tap, here)
            elif kinds == ("pattern",):
                edit_probabilities(run, layer, tap)
            elif "mlp_in" in kinds:
                whole = tap.input
                if (
                    run.tape is not None
                ):  # attention or the stream may read the very same tensor: a gradient of the MLP's own
                    whole = whole.view_as(whole)
                x = run.visit(layer, "mlp_in", run.by_row(whole))
                if run.edges is not None:
                    x = run.edges.mlp_input(layer, block, x)
                tap.input = x.flatten(0, 1) if whole.ndim == 2 else x
            elif "resid_mid" in kinds:  # the same tensor enters the norm and the residual stream: write in place
                mid = run.visit(layer, "resid_mid", run.by_row(tap.input), fresh=True, live=tap.input)
                if run.edges is not None:
                    run.edges.mid = mid
            else:
                whole = tap.input if side == "input" else tap.output
                before = x = run.by_row(whole[0] if isinstance(whole, tuple) else whole)
                if core is not None and "z" in kinds:
                    x, core = write_pattern(run, layer, core, x), None
                if run.edges is not None:
                    x = run.edges.pass_tap(layer, kinds, block, x)
                for kind in here:
                    if kind == "head_out":
                        assert z is not None
                        x = edit_heads(run, layer, tap, z, x)
                    else:
                        x = run.visit(layer, kind, x)
                if "z" in kinds:
                    z = x
                if x is before:
                    continue
                x = (
                    x
                    if before.ndim == len((whole[0] if isinstance(whole, tuple) else whole).shape)
                    else x.flatten(0, 1)
                )
                if side == "input":
                    tap.input = x
                else:
                    tap.output = (x, *whole[1:]) if isinstance(whole, tuple) else x
        if layer == last:
            return
    finish(model, run)


def finish(model: Any, run: Run) -> None:
    """Behind the last block: rows and edits of the final residual stream."""
    end = run.taps["n_layers"]
    joining = run.program["origin"][run.program["stage"] == end]
    run.rows = torch.cat([run.rows, run.rows[joining]])
    if len(joining) or run.edges is not None or (end - 1, "resid_post") in run.active:
        norm = at(model, run.taps["norm"])
        hidden = norm.input
        if len(joining):
            hidden = torch.cat([hidden, hidden[joining.to(hidden.device)]])
        hidden = run.visit(end - 1, "resid_post", hidden, fresh=len(joining) > 0)
        hidden = hidden if run.edges is None else run.edges.final(hidden)
        lens = run.program.get("readout", {}).get("kind") == "lens"
        norm.input = lens_rows(run, hidden) if lens else hidden


def answer_logits(model: Any, run: Run) -> Tensor:
    """Logits `[scored, d_vocab]` of the scored rows at their answer positions; no other is computed."""
    head = at(model, run.taps["head"])
    hidden = head.input
    rows, columns = run.program["scored"].to(hidden.device), run.program["at"].to(hidden.device)
    head.input = hidden[rows, columns].unsqueeze(1)
    logits: Tensor = model.output.logits[:, 0]
    return logits


def forward(model: Any, run: Run, metric: Callable[..., Tensor] | None, found: dict[str, Any]) -> None:
    """Run one program inside an open trace, into `found`: metric `[scored]` in fp32, logits, reads {site: activation}."""
    found["reads"] = run.kept
    walk(model, run)
    if "readout" in run.program:
        found.update({"reads": {}, **readout(model, run)})
    elif run.program["last"] is None:
        logits = answer_logits(model, run)
        if run.tape is not None:
            run.tape.logits = logits
        found["metric"] = score(metric, logits, run.program) if metric is not None else None
        if run.program["want_logits"]:
            found["logits"] = logits
