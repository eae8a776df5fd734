"""What is measured of a dictionary on rows of activations: thresholds, active features, explained variance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import Dictionary, is_transcoder
from .views import OVER_BATCHES

#: Rows that are encoded at once, and how many times k of their largest readings are looked at for a threshold.
ROWS, TIMES = 1024, 8


@dataclass(frozen=True)
class Held:
    """Rows to measure on, `[row, width]` of each part, and whether they were held out of training."""

    parts: Sequence[Tensor]
    held_out: bool

    def chunks(self) -> Iterator[Tensor]:
        """A few rows at a time."""
        for part in self.parts:
            yield from part.split(ROWS)


@torch.no_grad()
def calibrate(sae: Dictionary, rows: Held) -> None:
    """Set the threshold with which a batch-top-k dictionary is used, so that k features of a token are active on these rows.

    The moving threshold of training begins at 0 and lags behind. The one set here lies halfway between the last reading that
    is kept and the first that is not, so that rounding moves neither.
    """
    if sae.cfg.architecture() not in OVER_BATCHES:
        return
    k = float(getattr(sae.cfg, "k", 0))
    kept: list[Tensor] = []
    count = 0
    for chunk in rows.chunks():
        before = sae.encode_with_hidden_pre(chunk[:, : sae.cfg.d_in].to(sae.W_enc))[1].relu().flatten()
        kept.append(before.topk(min(len(before), int(TIMES * k * len(chunk)) + 1)).values)
        count += len(chunk)
    every = torch.cat(kept)
    wanted = min(max(1, round(k * count)), len(every) - 1)
    largest = every.topk(wanted + 1).values
    threshold = (largest[-2].double() + largest[-1].double()) / 2
    sae.topk_threshold.copy_(threshold.clamp(min=0))


@torch.no_grad()
def measured(sae: Dictionary, rows: Held) -> dict[str, float]:
    """L0, explained variance and the share of features that never fire, as the dictionary is used."""
    from .views import inference

    used = inference(sae)
    fired = torch.zeros(used.cfg.d_sae, dtype=torch.long)
    active = error = total = 0.0
    count = 0
    targets = [chunk[:, -used.b_dec.shape[0] :].to(used.W_dec) for chunk in rows.chunks()]
    mean = sum(target.double().sum(0) for target in targets) / sum(map(len, targets))
    for chunk, target in zip(rows.chunks(), targets, strict=True):
        x = chunk[:, : used.cfg.d_in].to(used.W_enc)
        acts = used.encode(x)
        out = used.decode(acts) if not is_transcoder(used) else used(x)
        fired += (acts > 0).sum(0).cpu()
        active += float((acts > 0).sum())
        error += float((out - target).double().pow(2).sum())
        total += float((target.double() - mean).pow(2).sum())
        count += len(chunk)
    return {
        "l0": active / count,
        "explained_variance": 1 - error / max(total, 1e-30),
        "dead": float((fired == 0).float().mean()),
        "rows": float(count),
        "held_out": float(rows.held_out),
    }
