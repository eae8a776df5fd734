"""Metrics: what a run is scored by. `metric(logits, batch) -> [row]`, computed where the model runs.

`logits` is `[row, d_vocab]` in fp32 at the answer position. `batch` holds tensors only: `answers` and `distractors`
(`[row]` token ids, or `[row, set]` padded with -1 where answers are sets), `clean_logits` and `corrupted_logits`
(`[row, d_vocab]`, of the two unpatched runs of each row's pair); one that the pairs lack is None. Read them as
attributes or as items. A metric of your own must use torch alone: it also runs where `interp` is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Metric = Callable[[Tensor, "Batch"], Tensor]


class Batch(dict):
    """The tensors that a metric may use; `batch.answers` and `batch["answers"]` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no {name!r}; it has {sorted(self)}") from None


def gather(values: Tensor, tokens: Tensor, reduce: str) -> Tensor:
    """Values `[row, d_vocab]` at token ids `[row]` or sets `[row, set]` (padded with -1), reduced over each set."""
    if tokens.ndim == 1:
        return values.gather(1, tokens[:, None])[:, 0]
    chosen = values.gather(1, tokens.clamp(min=0))
    if reduce == "mean":
        return chosen.masked_fill(tokens < 0, 0).sum(1) / (tokens >= 0).sum(1)
    return chosen.masked_fill(tokens < 0, float("-inf")).logsumexp(1)


def logit_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Logit of the answer minus logit of the distractor, means over sets (Wang et al. 2022). `[row]`, logits.

    Examples:
        >>> plan = interp.heads("z", layers=[23], heads=[3])
        >>> interp.patch(model, pairs, plan, metric=interp.logit_diff).values.dims
        ('component', 'layer', 'head', 'pair')
    """
    return gather(logits, batch["answers"], "mean") - gather(logits, batch["distractors"], "mean")


def log_prob(logits: Tensor, batch: Batch) -> Tensor:
    """Log probability that the next token is in the answer set. `[row]`, nats.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[23], heads=[3]), metric=interp.log_prob)
        >>> bool((effects.values < effects.clean).all())
        True
    """
    return gather(logits.log_softmax(-1), batch["answers"], "logsumexp")


def prob(logits: Tensor, batch: Batch) -> Tensor:
    """Probability that the next token is in the answer set. `[row]`, 0 to 1.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[23], heads=[3]), metric=interp.prob)
        >>> bool((effects.values < effects.clean).all())  # without that head's part the answer is less likely
        True
    """
    return log_prob(logits, batch).exp()


def prob_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of the answers minus probability of the distractors (Hanna et al. 2023). `[row]`, -1 to 1."""
    scores = logits.log_softmax(-1)
    right = gather(scores, batch["answers"], "logsumexp").exp()
    return right - gather(scores, batch["distractors"], "logsumexp").exp()


def kl(logits: Tensor, batch: Batch) -> Tensor:
    """KL(clean || patched) of the next-token distribution. `[row]`, nats; 0 at the clean run, where its gradient vanishes.

    Examples:
        >>> effects = interp.patch(model, pairs, interp.heads("z", layers=[23], heads=[3]), metric=interp.kl)
        >>> bool((effects.values > effects.clean).all())
        True
    """
    clean = batch["clean_logits"].log_softmax(-1)
    return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)


def rank(logits: Tensor, batch: Batch) -> Tensor:
    """How many tokens score above the (best) answer: 0 when it is top-1. `[row]`; has no gradient.

    Examples:
        >>> interp.patch(model, pairs, interp.heads("z", layers=[23], heads=[3]), metric=interp.rank).clean.values.tolist()
        [0.0, 0.0]
    """
    answers = batch["answers"]
    chosen = logits.gather(1, answers.clamp(min=0) if answers.ndim == 2 else answers[:, None])
    if answers.ndim == 2:
        chosen = chosen.masked_fill(answers < 0, float("-inf"))
    return (logits > chosen.max(1, keepdim=True).values).sum(1).float()


def score(metric: Metric, logits: Tensor, program: Mapping[str, Any]) -> Tensor:
    """Apply a metric to logits `[row, d_vocab]` with the batch that a program describes: `[row]` in fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    batch = Batch()
    for name in ("answers", "distractors"):
        tokens = program.get(name)
        batch[name] = None if tokens is None else tokens.to(logits.device)
    for name in ("clean", "corrupted"):
        rows = program.get(name)
        # constants of the metric: a gradient is that of the patched run alone
        batch[f"{name}_logits"] = None if rows is None else logits.detach()[rows.to(logits.device)]
    return metric(logits, batch).to(logits.dtype)
