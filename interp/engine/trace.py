"""The one place that opens traces: programs are run one after the other, each in one forward pass.

Standard library, torch and nnsight only: these functions are shipped by source to a remote server. What a program is
stands in `interp.engine.program`. Every function here that does work is called alike, `(model, taps, programs, metric,
done)`, so that the door (`interp.engine.door`) can send any of them: it gives one result for each program, or hands it to
`done(index, result)` as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from torch import Tensor

from ..models.layout import Envoy, Taps
from .edge_gradients import edge_scores, edge_tapes
from .feature_edges import feature_scores, feature_tapes
from .forward import forward, walk
from .frozen import Frozen, edge_rows
from .generating import Generating
from .gradients import Tape, attributions, slope, total_of, wanted_tapes
from .neuron_edges import neuron_scores, neuron_tapes
from .rotary import RowsAlone
from .ruled import ruling
from .state import Run

if TYPE_CHECKING:
    from .program import Program

#: What one program gives: tensors by name, or by site.
Found = dict[str, Any]
Metric = Callable[..., Tensor]
Done = Callable[[int, Any], None]
#: A function of this file, or another that is called alike.
Function = Callable[..., Any]


def resume(run: Run, prepared: Found) -> None:
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


def hand_on(index: int, result: Any, results: list[Any], done: Done | None) -> None:
    """Keep a result, or give it to whoever waits for it: nothing is then held here."""
    if done is None:
        results.append(result)
    else:
        done(index, result)


def execute(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric | None, done: Done | None = None
) -> list[Found]:
    """Run programs: {"metric": [scored], "reads": {site: activation}, …} of each.

    A program with `keep` is a prepared run: the programs behind it may use what it kept, until the next one.
    """
    results: list[Found] = []
    prepared: Found = {}
    for index, program in enumerate(programs):
        run = Run(taps, program)
        inputs = program["inputs"]
        keep = program.get("keep")
        if keep is not None:
            run.reads.update((layer, "resid_pre") for layer in keep)
            run.want(*run.reads)
            if program["cache"] is not None:
                run.cache = program["cache"]()
        elif "use" in program:
            resume(run, prepared)
        if run.cache is not None:
            inputs = {**inputs, "past_key_values": run.cache, "use_cache": True}
        with RowsAlone(model, taps), torch.no_grad(), model.trace(**inputs) as tracer:
            result = nnsight.save({})
            forward(model, run, metric, result)
            if program["last"] is not None:
                tracer.stop()
        if keep is not None:
            prepared = {
                "cache": program["cache"],
                "past": [(layer.keys, layer.values) for layer in run.cache.layers] if run.cache is not None else [],
                "stream": {layer: result["reads"].pop((layer, "resid_pre")) for layer in keep},
            }
        hand_on(index, result, results, done)
    return results


def execute_gradients(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric, done: Done | None = None
) -> list[Found]:
    """Run gradient programs: {"metric": [scored], "attributions": {site: …}, "slope": float} of each.

    A program with `by_edge` gives {"edges": [pair, receiver, sender]} instead, see `interp.engine.edge_gradients`.
    """
    results: list[Found] = []
    for index, program in enumerate(programs):
        run = Run(taps, program)
        by_edge = program["by_edge"]
        by_feature, by_neuron = bool(program.get("features")), "nodes" in program
        wanted = edge_tapes(taps) if by_edge else wanted_tapes(taps, program)
        wanted |= feature_tapes(program) if by_feature else neuron_tapes(taps) if by_neuron else set()
        run.tape = Tape(wanted)
        run.want(*wanted)
        rules = ruling(program["rule"], model, program)
        run.rules = rules
        with RowsAlone(model, taps), rules, torch.enable_grad(), model.trace(**program["inputs"]):
            result = nnsight.save({})
            forward(model, run, metric, result)
            if by_edge:
                total = result["metric"][program["gradient"].flatten().to(result["metric"].device)].sum()
                result["edges"] = edge_scores(model, taps, program, run.tape, total)
            elif by_neuron:
                total = total_of(program, result["metric"])
                result.update(neuron_scores(model, taps, program, run.tape, total))
            elif by_feature:
                total = total_of(program, result["metric"])
                result.update(feature_scores(taps, program, run.tape, total))
            else:
                result["slope"] = slope(program, run.tape, result["metric"])
                result["attributions"] = attributions(model, taps, program, run.tape, result["metric"])
            result["metric"] = result["metric"].detach()
            result["reads"] = {}
        hand_on(index, result, results, done)
    return results


def scores(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric, done: Done | None = None
) -> Tensor | list[Found]:
    """The metric of every program behind one another `[scored, of all]`: all that need come back from a server."""
    if done is not None:
        return execute(model, taps, programs, metric, lambda index, result: done(index, result["metric"]))
    return torch.cat([result["metric"].cpu() for result in execute(model, taps, programs, metric)])


def contributions(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric | None, done: Done | None = None
) -> list[tuple[Tensor, Tensor]]:
    """What each sender writes in the one row of each program, `[sender, position, d_model]`, and what the output bias of
    each layer's attention adds, `[layer, position or 1, d_model]`."""
    results: list[tuple[Tensor, Tensor]] = []
    for index, program in enumerate(programs):
        run = Run(taps, program)
        with RowsAlone(model, taps), torch.no_grad(), model.trace(**program["inputs"]):
            walk(model, run)
            assert run.edges is not None
            written = nnsight.save(torch.cat([part[0].cpu() for part in run.edges.parts]))
            biases = nnsight.save(torch.cat([bias[:1].cpu() for bias in run.edges.biases]))
        hand_on(index, (written, biases), results, done)
    return results


def generated(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric | None, done: Done | None = None
) -> list[Found]:
    """Make tokens with edits that hold while they are made: {"tokens": [row, step], "logits": …} of each program."""
    results: list[Found] = []
    for index, program in enumerate(programs):
        made = Generating(program)
        while made.goes_on:
            step = made.step()
            run = Run(taps, step)
            inputs = step["inputs"]
            if made.cache is not None:
                run.cache = made.cache
                inputs = {**inputs, "past_key_values": made.cache, "use_cache": True}
            with RowsAlone(model, taps), torch.no_grad(), model.trace(**inputs):
                result = nnsight.save({})
                forward(model, run, None, result)
            made.take(result["logits"])
        hand_on(index, made.result(), results, done)
    return results


def frozen_edges(
    model: Envoy, taps: Taps, programs: list[Program], metric: Metric | None, done: Done | None = None
) -> list[Found]:
    """Edges of the model frozen around the prompt of each program: {"rows": [target, source], "logits": [d_vocab]}."""
    results: list[Found] = []
    for index, program in enumerate(programs):
        frozen = Frozen(model, taps, program["skips"])
        with RowsAlone(model, taps), frozen, torch.enable_grad(), model.trace(**program["inputs"]):
            logits = nnsight.save(model.output.logits[0, -1].detach())
        rows = edge_rows(frozen, taps, program)
        hand_on(index, {"rows": rows, "logits": logits}, results, done)
    return results
