"""The invariants of whole runs: changed embeddings, a run patched with itself, left padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..engine.reading import entry, read
from ..models.model import Model
from ..models.views import at
from .parts import TOLERANCE, Finding, compare, kinds_of


@torch.no_grad()
def check_embed(model: Model, prompt: Sequence[int]) -> Iterator[Finding]:
    """A write to the embedding equals a plain forward from changed embeddings."""
    place = len(prompt) // 2
    embedded = at(model.hf, model.family.embed)(torch.tensor([list(prompt)], device=model.device))
    spread = float(embedded.float().std()) or 1.0
    step = torch.randn(embedded.shape[-1], generator=torch.Generator().manual_seed(0)) * spread
    step = step.to(embedded.device, embedded.dtype)
    edits = [entry(-1, "embed", "add", 0, column=place, source_column=place, value=0)]
    got = read(model, [prompt], edits=edits, values={(-1, "embed"): step[None, None]})["logits"]
    embedded[:, place] += step
    yield compare("embed", "write", 0, got, model.hf(inputs_embeds=embedded).logits[:, -1])


@torch.no_grad()
def check_identity(model: Model, prompt: Sequence[int]) -> Iterator[Finding]:
    """Patching a run with itself, at every layer at once, changes nothing."""
    kinds = kinds_of(model)
    edits = [
        entry(layer, kind, "replace", 1 + row, source=0)
        for row, kind in enumerate(kinds)
        for layer in range(model.n_layers)
    ]
    run = read(model, [prompt], edits=edits, origin=[0] * len(kinds), stage=[0] * len(kinds))
    for row, kind in enumerate(kinds, start=1):
        yield compare(kind, "self-patch", model.n_layers, run["logits"][row], run["logits"][0])


@torch.no_grad()
def check_padding(model: Model, prompt: Sequence[int]) -> Iterator[Finding]:
    """A left-padded row equals the same prompt alone, at every layer.

    Rounding is carried on in the stream: it is held against the largest value that any layer so far had, since a last
    layer may cancel an activation of ten thousands whose rounding stays (SmolLM2; in float64 nothing is left of it).
    """
    short = list(prompt[: max(2, len(prompt) - 3)])
    reads = [(layer, "resid_post") for layer in range(model.n_layers)]
    both, alone = read(model, [prompt, short], reads), read(model, [short], reads)
    yield compare("logits", "padding", model.n_layers, both["logits"][1], alone["logits"][0])
    peak = 1.0
    for site in reads:
        activation = alone["reads"][site]
        peak = max(peak, float(activation.abs().max()))
        found = compare("resid_post", "padding", site[0], both["reads"][site][1:, -len(short) :], activation)
        yield replace(found, tolerance=TOLERANCE[activation.dtype] * peak)
