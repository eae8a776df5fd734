"""What patching a plan will take on a server: the chunks are made as they would be sent, a few of them as bytes, and none is."""

from __future__ import annotations

import torch

from ..errors import PlanError
from ..estimates import Estimate
from ..metrics import Metric, logit_diff
from ..models.model import Model
from ..pairs import PromptPairs
from ..plan import Plan
from .context import Runs, context_of
from .door import shape_of
from .parts import Part
from .program import Program
from .remote import Shipped, requests
from .schedule import choose_schedule, make_job, token_budget
from .trace import scores

#: Requests of which the size is found; of more, those of evenly chosen ones.
SEALED = 4
#: Bytes of an answer beside its numbers.
ANSWER = 600


def estimate(
    model: Model,
    plan: Plan,
    pairs: PromptPairs,
    metric: Metric = logit_diff,
    *,
    direction: str = "noising",
    schedule: str = "auto",
    max_tokens: int | None = None,
) -> Estimate:
    """What `interp.patch(model, pairs, plan, …)` with the same options will take: nothing is run or sent.

    Raises:
        PlanError: a model that runs in this process. What `patch` refuses before it runs.

    Examples:
        >>> there = interp.load_model("smollm2-135m", backend="simulated")
        >>> there.estimate(interp.grid("resid_pre"), pairs).requests
        1
    """
    backend = model.backend
    if not isinstance(backend, Shipped):
        raise PlanError(
            f"{model.name} runs in this process: an estimate is of what a server is sent (load_model(backend=…))"
        )
    encoded = model.encode(pairs)
    runs, resolved = Runs(encoded, direction).need_source(), plan.resolve(model, encoded)
    known = choose_schedule(model, schedule)
    job = make_job(resolved, context_of(model, runs, resolved, known), known, max_tokens or token_budget(model), {})
    programs: list[Program] = []
    ready: Program | None = None
    for part in (Part.of(job, index) for index in range(len(job.chunks))):
        if part.prepared is not None and part.prepared is not ready:
            ready = part.prepared
            programs.append(ready)
        programs.append(part.program)
    groups = requests(programs, backend.limit)
    chosen = (
        sorted({round(place * (len(groups) - 1) / max(1, SEALED - 1)) for place in range(SEALED)}) if groups else []
    )
    sizes = []
    for number in chosen:
        part_of = [programs[index] for index in groups[number]]
        sizes.append(len(backend.seal(model, scores, (model.taps, part_of, metric), ("", 0)).blob))
    floats = sum(len(programs[index]["scored"]) for group in groups for index in group)
    return Estimate(
        cells=sum(len(chunk.rows) for chunk in job.chunks),
        forwards=len(programs),
        requests=len(groups),
        bytes_up=round(sum(sizes) / max(1, len(sizes)) * len(groups)),
        largest=max(sizes, default=0),
        bytes_down=4 * floats + ANSWER * len(groups),
        tokens=sum(rows * positions for rows, positions in map(shape_of, programs)),
        weights=sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters()),
        activations=max((activations(model, program) for program in programs), default=0),
    )


def activations(model: Model, program: Program) -> int:
    """Bytes that one forward pass holds at a time: a layer's numbers of every token, keys and values of all, scored logits."""
    rows, positions = shape_of(program)
    d_mlp = model.d_mlp or 4 * model.d_model
    a_layer = 8 * model.d_model + 3 * d_mlp + 4 * model.n_heads * model.d_head
    kept = 2 * model.n_layers * model.n_kv_heads * model.d_head
    logits = len(program["scored"]) * model.vocab_size * torch.float32.itemsize
    return rows * positions * (a_layer + kept) * model.dtype.itemsize + logits
