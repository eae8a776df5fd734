"""The invariants of whole runs: changed embeddings, a run patched with itself, left padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..engine.reading import entry, read
from ..findings import Finding
from ..models.layout import at
from ..models.model import Model
from .parts import compare
from .plain import Plain, logits_of, plain_run


@torch.no_grad()
def check_embed(model: Model, prompt: Sequence[int], plain: Plain) -> Iterator[Finding]:
    """A write to the embedding equals a plain forward whose embedding puts out the changed values."""
    place = len(prompt) // 2
    embed = at(model.hf, model.family.embed)
    embedded = embed(torch.tensor([list(prompt)], device=model.device))
    spread = float(embedded.float().std()) or 1.0
    step = torch.randn(embedded.shape[-1], generator=torch.Generator().manual_seed(0)) * spread
    step = step.to(embedded.device, embedded.dtype)
    edits = [entry(-1, "embed", "add", 0, column=place, source_column=place, value=0)]
    got = read(model, [prompt], edits=edits, values={(-1, "embed"): step[None, None]})["logits"]
    embedded[:, place] += step
    handle = embed.register_forward_hook(lambda *_: embedded)
    try:
        want = logits_of(model, [prompt])
    finally:
        handle.remove()
    yield compare("embed", "write", 0, got, want, noise=plain.logits_noise)


@torch.no_grad()
def check_identity(model: Model, prompt: Sequence[int], plain: Plain, kinds: Sequence[str]) -> Iterator[Finding]:
    """Patching a run with itself, at every layer at once, changes nothing."""
    edits = [
        entry(layer, kind, "replace", 1 + row, source=0)
        for row, kind in enumerate(kinds)
        for layer in range(model.n_layers)
    ]
    logits = read(model, [prompt], edits=edits, origin=[0] * len(kinds), stage=[0] * len(kinds))["logits"]
    for row, kind in enumerate(kinds, start=1):
        yield compare(kind, "self-patch", model.n_layers, logits[row], logits[0], noise=plain.logits_noise)


@torch.no_grad()
def check_padding(model: Model, prompt: Sequence[int]) -> Iterator[Finding]:
    """A left-padded row beside another equals the same prompt alone, at every layer and position.

    Rounding is carried on in the stream: a last layer may cancel an activation of ten thousands whose rounding stays
    (SmolLM2; in float64 nothing is left of it). What is allowed at each position is what rounding moves there.
    """
    short = list(prompt[: max(2, len(prompt) - 3)])
    reads = [(layer, "resid_post") for layer in range(model.n_layers)]
    both, alone, plain = read(model, [prompt, short], reads), read(model, [short], reads), plain_run(model, short)
    logits = both["logits"][1:], alone["logits"]
    yield compare("logits", "padding", model.n_layers, *logits, noise=plain.logits_noise)
    for layer, kind in reads:
        place = (layer + 1, "attention" if layer + 1 < model.n_layers else "logits")
        got, want = both["reads"][layer, kind][1:, -len(short) :], alone["reads"][layer, kind]
        yield compare("resid_post", "padding", layer, got, want, noise=plain.noise[place])
