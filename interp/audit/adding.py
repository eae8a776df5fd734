"""The laws of backward rules: by "secant" effects of embeddings add up to the change; "relp" has a rule for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..engine.ruled import Rows, Ruling
from ..engine.rules import RULES
from ..errors import AuditError
from ..findings import Finding
from ..models.layout import at
from ..models.model import Model
from .plain import logits_of, probe

#: How far a sum may be off the change, in fp32.
ADDS_UP = 1e-4


def check_rules(model: Model, prompt: Sequence[int], other: Sequence[int]) -> Iterator[Finding]:
    """Both directions of two prompts, through the model's own forward pass."""
    leaves: list[Tensor] = []

    def leaf(_: object, __: object, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_(True))
        return leaves[-1]

    handle = at(model.hf, model.family.embed).register_forward_hook(leaf)
    try:
        rows = Rows(2, torch.tensor([0, 1]), torch.tensor([1, 0]))
        with torch.enable_grad(), Ruling("secant", model.hf, rows) as rules:
            scores = probe(logits_of(model, [prompt, other]).float(), None)
        x = leaves.pop()
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        eps = torch.finfo(x.dtype).eps
        for base, end in ((0, 1), (1, 0)):
            parts = (x[end] - x[base]).detach().double() * gradient[base].double()
            change = float((scores[end] - scores[base]).detach())
            scale = max(abs(change), 0.01 * float(scores.detach().abs().max()), 0.01)
            # an embedding of zeros has a norm's slope of 1/√ε: its parts are large, and their rounding with them
            rounding = 4 * eps * float(parts.abs().sum())
            allowed = max(min(0.25, ADDS_UP * max(1.0, eps / 1.2e-7)) * scale, rounding)
            yield Finding("secant", "law", 0, abs(float(parts.sum()) - change), allowed)
    except (AuditError, RuntimeError, IndexError) as error:
        for law in ("secant", "relp"):
            yield Finding(law, "law", 0, float("inf"), 0.0, (str(error).strip().splitlines() or [""])[0])
        return
    finally:
        handle.remove()
    without = sorted(rules.used - set(RULES["relp"]))
    said = f"'relp' has no rule for {', '.join(without)}" if without else ""
    yield Finding("relp", "law", 0, float("inf") if without else 0.0, 0.0, said)
