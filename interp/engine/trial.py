"""A metric is tried before the model runs: is a row's number finite, the same every time, and its own?

The engine decides which rows share a forward pass, so a number that depends on the other rows depends on the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..encoded import EncodedPairs
from ..errors import MetricError
from ..metrics import Batch, Metric
from ..spans import rounding_of
from .compile import token_sets

#: Rows of the trial: spread and centre of their logits, and what is added to their answers' and distractors'. They differ
#: so much that a mean, a norm or a softmax over rows shows; one row has its answer on top and one far below.
SPREAD, CENTRE, LEVEL = (1.0, 2.0, 0.5), (0.0, 5.0, -4.0), (0.0, 6.0, -9.0)
ROWS = len(SPREAD)
#: How far two calls on the same rows may differ, in parts of the largest number; and two on batches of other shapes, where a
#: metric that computes in bf16 rounds otherwise.
SAME, OTHER_SHAPE = 1e-4, 2e-2
DRAWS = 2


def name_of(metric: Metric) -> str:
    """A metric as records and messages call it."""
    return getattr(metric, "__name__", repr(metric))


def check_metric(
    metric: Metric, encoded: EncodedPairs, d_vocab: int, gradient: bool = False, dtype: torch.dtype = torch.float32
) -> float:
    """Try a metric on random logits of several pairs, whatever mode of autograd the caller is in.

    Returns:
        What rounding in `dtype` may do to it: its change when every logit is changed at random within the tolerance of that
        type, in the row that it changes least. A probability rounds in proportion to itself, which is next to nothing in a row
        whose answer is far below; a difference of logits by the size of the logits, in every row.

    Raises:
        MetricError: it fails, needs what the pairs lack, returns another shape than [row], NaN, an infinite number, other numbers
            when called again, a number that depends on the other rows, or no gradient where one is needed.
    """
    trial, rows = _Trial(metric, encoded, d_vocab, gradient), range(ROWS)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.no_grad():
        with torch.set_grad_enabled(gradient):
            scores = trial(rows)
        scale, state = float(scores.abs().max()), torch.get_rng_state()
        again = trial(rows)
        if not _close(again, scores, SAME * scale) or not torch.equal(torch.get_rng_state(), state):
            row = int((again - scores).abs().argmax())
            raise MetricError(
                f"metric {trial.name} is random: for the same logits it gives {scores[row]:.6g} and then {again[row]:.6g}, "
                "or may the next time; draw what is random once, outside of the metric"
            )
        for row in rows:  # beside copies of itself a row is alone, in a batch of the same shape
            alone = trial([row] * ROWS)
            _own(trial.name, row, scores[row], alone[row], SAME * scale)
            for number in alone:
                _own(trial.name, row, scores[row], number, OTHER_SHAPE * scale)
        _own(trial.name, 0, scores[0], trial([0])[0], OTHER_SHAPE * scale)
        generator = torch.Generator().manual_seed(1)
        noise = [1 + rounding_of(dtype) * torch.randn(ROWS, d_vocab, generator=generator) for _ in range(DRAWS)]
        changes = torch.stack([(trial(rows, factor) - scores).abs() for factor in noise])
        return float(changes.max(0).values.min())


class _Trial:
    """Random logits for rows of several pairs; a call gives the metric of some of them, float64."""

    def __init__(self, metric: Metric, encoded: EncodedPairs, d_vocab: int, gradient: bool) -> None:
        self.metric, self.name, self.gradient = metric, name_of(metric), gradient
        owners = _owners(encoded)
        generator = torch.Generator().manual_seed(0)
        spread, centre = torch.tensor(SPREAD)[:, None], torch.tensor(CENTRE)[:, None]
        draw = [torch.randn(ROWS, d_vocab, generator=generator) for _ in range(3)]
        first = torch.tensor([owners.index(pair) for pair in owners])  # the runs of a pair are those of all its rows
        self.logits = draw[0] * spread + centre
        self.parts = {
            "answers": token_sets(encoded.answers, owners),
            "distractors": token_sets(encoded.distractors, owners),
            "clean_logits": (draw[1] * spread.flip(0) + centre.roll(1, 0))[first],
            "corrupted_logits": None if encoded.corrupted is None else (draw[2] * spread + centre.flip(0))[first],
        }
        for sets in (encoded.answers, encoded.distractors):
            for row, pair in enumerate(owners if sets is not None else ()):
                self.logits[row, list(sets[pair])] += LEVEL[row]  # type: ignore[index]

    def __call__(self, rows: Sequence[int], factor: Tensor | None = None) -> Tensor:
        at = torch.tensor(rows)
        logits = (self.logits if factor is None else self.logits * factor)[at].requires_grad_(self.gradient)
        batch = Batch({name: None if part is None else part[at] for name, part in self.parts.items()})
        try:
            out = self.metric(logits.clone(), batch)  # a metric may write into what it is given
        except Exception as error:
            missing = [name for name, part in self.parts.items() if part is None]
            lacks = f" (these pairs have no {' and no '.join(missing)})" if missing else ""
            raise MetricError(
                f"metric {self.name} fails on logits [row, d_vocab] = {list(logits.shape)}{lacks}: {error}"
            ) from error
        if not isinstance(out, Tensor) or out.shape != (len(rows),):
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise MetricError(
                f"metric {self.name} returned {got}; it must return one number per row, shape [row] = [{len(rows)}]"
            )
        if self.gradient and torch.is_grad_enabled() and not out.requires_grad:
            raise MetricError(
                f"metric {self.name} has no gradient, so nothing can be attributed; use `patch`, or log_prob"
            )
        out = out.detach().double()
        if out.isnan().any():
            raise MetricError(f"metric {self.name} returned NaN on finite logits; shape {list(out.shape)}")
        if out.isinf().any():
            raise MetricError(
                f"metric {self.name} returned {[round(number, 4) for number in out.tolist()]} on finite logits: nothing can "
                "be said of an infinite number; use a metric that stays finite, such as log_prob in place of log(prob)"
            )
        return out


def _owners(encoded: EncodedPairs) -> list[int]:
    """The pair of each row: pairs with answers of their own, if there are such."""
    sets = zip(encoded.answers or [()] * len(encoded), encoded.distractors or [()] * len(encoded), strict=True)
    first: dict[Any, int] = {}
    for pair, answers in enumerate(sets):
        first.setdefault(answers, pair)
    chosen = list(dict.fromkeys([*first.values(), *range(len(encoded))]))
    return [chosen[row % len(chosen)] for row in range(ROWS)]


def _close(one: Tensor, other: Tensor, allowed: float) -> bool:
    return bool(((one - other).abs() <= allowed).all())


def _own(name: str, row: int, beside: Tensor, alone: Tensor, allowed: float) -> None:
    """Refuse a number that is not the row's own. MetricError."""
    if not _close(beside, alone, allowed):
        raise MetricError(
            f"metric {name} mixes rows: row {row} gets {beside:.6g} beside rows of other runs and {alone:.6g} without them, but "
            "which rows run together is the engine's choice; take means, norms and softmax over the last dimension, and the "
            "answers, distractors and clean_logits of each row"
        )
