"""The one place that opens traces: a forward pass in which rows join, are edited, and are scored.

Standard library, torch and nnsight only: these functions are shipped by source to a remote server. A *program* is a
plain dictionary made by the schedule:

    inputs      keyword arguments of the model's forward (input_ids [start, position], and a mask where there is padding)
    origin      [grown] start row that each grown row copies; stage [grown] the layer at which it joins, ascending
    edits       the table of `interp.edits`; columns count from the first position that is run
    values      {(layer, kind): [value, position or 1, feature]} constants for "set", "add", "scale"
    reads       [(layer, kind)] activations to return; last: the last layer that must run, or None
    scored      [n] rows whose logits are wanted, at columns `at` [n]
    clean, corrupted   [n] index into `scored` of the clean and the corrupted run of each scored row (or None)
    answers, distractors   [n] or [n, set] token ids (or None)
    first       blocks below this layer are skipped
    keep, cache a prepared run: the layers whose input is kept, and the class of an empty cache (or None)
    use, pick, column   a run on a prepared one: its number, which of its rows are needed, the first position run
    edges       changed reads, see `interp.engine.edges` (or absent)
    noise       Gaussian noise on the embeddings: std, and table [token, (row, column, seed)] (or absent)
    readout     what is made of the activations that are read, see `interp.engine.readout` (or absent)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nnsight
import torch
from torch import Tensor

from ..edits import apply_group, group_edits
from ..metrics import score
from ..models.views import at, attention_pattern, features, mix_values, output_matrix
from .edge_gradients import edge_scores, edge_tapes
from .edges import Edges
from .gradients import Tape, attributions, slope, wanted_tapes
from .readout import lens_rows, readout

#: Kinds that are part of a wider tensor, or are divided into heads.
FEATURED = ("q", "k", "v", "z", "q_rot", "k_rot", "mlp_pre")


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


class Run:
    """The state of one forward pass: which rows exist, what is edited and read, what was read."""

    def __init__(self, taps: dict[str, Any], program: dict[str, Any]) -> None:
        self.taps, self.program = taps, program
        self.start = program["inputs"]["input_ids"].shape[0]
        self.rows = torch.arange(self.start)
        self.edits = group_edits(program["edits"])
        self.values = program["values"]
        self.reads = set(program["reads"])
        self.active = set(self.edits) | self.reads | {tuple(site) for site in program.get("tape", ())}
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.first = program["first"]
        spec = program.get("edges")
        self.edges = Edges(taps, spec, self.start) if spec is not None else None
        self.tape: Tape | None = None  # activations that gradients are taken of
        self.cache: Any = None
        self.below: list[tuple[Tensor, Tensor]] = []  # keys and values below the first position run, by layer
        self.entering: Tensor | None = None  # residual stream entering the first block that is run

    def by_row(self, x: Tensor) -> Tensor:
        """`[row, position, feature]`, also where a family flattens rows and positions (OPT)."""
        return x.unflatten(0, (len(self.rows), -1)) if x.ndim == 2 else x

    def visit(self, layer: int, kind: str, x: Tensor, fresh: bool = False, raw: Tensor | None = None) -> Tensor:
        """Apply the edits of one site to `x [row, position, feature]`, and keep it if it is to be read.

        `raw` is the module's own tensor where `x` is a view of it: that is what a gradient must be taken of.
        """
        groups = self.edits.get((layer, kind), ())
        if groups:
            index = features(self.taps, kind) if kind in FEATURED else None
            x = x if fresh else x.clone()
            for group in groups:
                apply_group(x, group, self.values.get((layer, kind)), index)
        if (layer, kind) in self.reads:
            own = x[..., features(self.taps, kind).to(x.device)] if kind in FEATURED else x
            own = own[..., 0, :] if kind == "mlp_pre" else own
            self.kept[layer, kind] = own.clone()  # a block may add to it in place later (Falcon)
        if self.tape is not None:
            self.tape.take(layer, kind, x, x if raw is None or groups else raw)
        return x


def enter(run: Run, layer: int, block: Any) -> None:
    """At a block's input: let the rows of this layer join, then edit the residual stream."""
    joining = run.program["origin"][run.program["stage"] == layer]
    run.rows = torch.cat([run.rows, joining])
    grown = len(run.rows) > run.start
    if grown and run.below:
        past = run.cache.layers[layer]
        past.keys, past.values = (part[run.rows.to(part.device)] for part in run.below[layer])
    sites = [(layer - 1, "resid_post"), (layer, "resid_pre")]
    if not grown and run.edges is None and not any(site in run.active for site in sites):
        return
    args, kwargs = block.inputs
    hidden = args[0] if args else kwargs["hidden_states"]
    if run.edges is not None and layer == 0:
        run.edges.record(-1, "embed", hidden)
    if len(joining):
        hidden = torch.cat([hidden, hidden[joining.to(hidden.device)]])
    if run.edges is not None and layer == 0:
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
    if "pattern" not in kinds:
        return None
    mask = new[first + 3] if len(new) > first + 3 else kwargs.get("attention_mask")
    core = {"query": new[first], "key": new[first + 1], "value": new[first + 2], "mask": mask, "options": kwargs}
    if run.tape is not None:
        run.tape.core[layer] = {name: part.detach() if isinstance(part, Tensor) else part for name, part in core.items()}
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
    if run.tape is not None:
        run.tape.take(layer, "pattern", pattern)
    if (layer, "pattern") in run.reads:
        run.kept[layer, "pattern"] = pattern.reshape(len(run.rows), -1, *pattern.shape[-2:])


def edit_heads(run: Run, layer: int, module: Any, z: Tensor, out: Tensor) -> Tensor:
    """Write heads' outputs z·W_O: what the output projection wrote, plus new − old of the heads that change."""
    index = features(run.taps, "z")
    by_head = output_matrix(module, index.to(z.device))  # [head, d_head, d_model]
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
        run.tape.take(layer, "head_out", out)
    return out


def add_noise(x: Tensor, noise: dict[str, Any]) -> Tensor:
    """Embeddings `[row, position, d_model]` with noise made here from each token's own seed: nothing is shipped."""
    x = x.clone()
    for row, column, seed in noise["table"].tolist():
        drawn = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed))
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
                if run.tape is not None:  # attention or the stream may read the very same tensor: a gradient of the MLP's own
                    whole = whole.view_as(whole)
                x = run.visit(layer, "mlp_in", run.by_row(whole), raw=whole if whole.ndim == 3 else None)
                if run.edges is not None:
                    x = run.edges.mlp_input(layer, block, x)
                tap.input = x.flatten(0, 1) if whole.ndim == 2 else x
            elif "resid_mid" in kinds:  # the same tensor enters the norm and the residual stream: write in place
                mid = run.visit(layer, "resid_mid", run.by_row(tap.input), fresh=True, raw=tap.input)
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
                        whole_x = whole[0] if isinstance(whole, tuple) else whole
                        x = run.visit(layer, kind, x, raw=whole_x if x is before else None)
                if "z" in kinds:
                    z = x
                if x is before:
                    continue
                x = x if before.ndim == len((whole[0] if isinstance(whole, tuple) else whole).shape) else x.flatten(0, 1)
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
    run.rows = torch.cat([run.rows, joining])
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


def resume(run: Run, prepared: dict[str, Any]) -> None:
    """Take from a prepared run what lies below this one: keys and values of earlier positions, the stream of lower layers."""
    program = run.program
    pick, column = program["pick"], program["column"]
    if column:
        run.cache = prepared["cache"]()
        for layer, (keys, values) in enumerate(prepared["past"]):
            rows = pick.to(keys.device)
            run.below.append((keys[rows, :, :column], values[rows, :, :column]))
            run.cache.update(*run.below[-1], layer)
    if run.first:
        stream = prepared["stream"][run.first]
        run.entering = stream[pick.to(stream.device), column:]


def execute(
    model: Any,
    taps: dict[str, Any],
    programs: list[dict[str, Any]],
    metric: Callable[..., Tensor] | None,
    done: Callable[[int, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run programs one after the other, each in one trace; `done(index, result)` is called after each.

    A program with `keep` is a prepared run: the programs behind it may use what it kept, until the next one.
    """
    results: list[dict[str, Any]] = []
    prepared: dict[str, Any] = {}
    for index, program in enumerate(programs):
        run = Run(taps, program)
        inputs = program["inputs"]
        keep = program.get("keep")
        if keep is not None:
            run.reads.update((layer, "resid_pre") for layer in keep)
            run.active.update(run.reads)
            if program["cache"] is not None:
                run.cache = program["cache"]()
        elif "use" in program:
            resume(run, prepared)
        if run.cache is not None:
            inputs = {**inputs, "past_key_values": run.cache, "use_cache": True}
        with torch.no_grad(), model.trace(**inputs) as tracer:
            found = nnsight.save({})
            forward(model, run, metric, found)
            if program["last"] is not None:
                tracer.stop()
        if keep is not None:
            prepared = {
                "cache": program["cache"],
                "past": [(layer.keys, layer.values) for layer in run.cache.layers] if run.cache is not None else [],
                "stream": {layer: found["reads"].pop((layer, "resid_pre")) for layer in keep},
            }
        results.append(found)
        if done is not None:
            done(index, found)
    return results


def execute_gradients(
    model: Any,
    taps: dict[str, Any],
    programs: list[dict[str, Any]],
    metric: Callable[..., Tensor],
) -> list[dict[str, Any]]:
    """Run gradient programs, each in one trace: {"metric": [scored], "attributions": {site: …}, "slope": float}.

    A program with `by_edge` gives {"edges": [pair, receiver, sender]} instead, see `interp.engine.edge_gradients`.
    """
    results = []
    for program in programs:
        run = Run(taps, program)
        by_edge = program.get("by_edge", False)
        wanted = edge_tapes(taps) if by_edge else wanted_tapes(taps, program)
        run.tape = Tape(wanted)
        run.active |= wanted
        with torch.enable_grad(), model.trace(**program["inputs"]):
            found = nnsight.save({})
            forward(model, run, metric, found)
            if by_edge:
                total = found["metric"][program["gradient"].flatten().to(found["metric"].device)].sum()
                found["edges"] = edge_scores(model, taps, program, run.tape, total)
            else:
                found["slope"] = slope(program, run.tape, found["metric"])
                found["attributions"] = attributions(model, taps, program, run.tape, found["metric"])
            found["metric"] = found["metric"].detach()
            found["reads"] = {}
        results.append(found)
    return results


def scores(
    model: Any, taps: dict[str, Any], programs: list[dict[str, Any]], metric: Callable[..., Tensor]
) -> Tensor:
    """The metric of every program behind one another `[scored, of all]`: all that need come back from a server."""
    return torch.cat([found["metric"].cpu() for found in execute(model, taps, programs, metric)])


def mean_contributions(model: Any, taps: dict[str, Any], program: dict[str, Any]) -> Tensor:
    """What each sender writes in the one row of a program: `[sender, position, d_model]`."""
    run = Run(taps, program)
    with torch.no_grad(), model.trace(**program["inputs"]):
        walk(model, run)
        assert run.edges is not None
        written = nnsight.save(torch.cat([part[0].cpu() for part in run.edges.parts]))
    return written
