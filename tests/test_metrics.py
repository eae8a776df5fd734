"""Metrics against the formulas they stand for, their gradients, and what the engine refuses of anybody's own."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.errors import MetricError
from interp.metrics import Batch, Metric, gather, kl, log_prob, logit_diff, prob, prob_diff, rank, score
from tests.families import count_forwards, loaded, words

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 3.0], [1.0, 5.0, 1.0, 1.0]])
ONE = Batch(answers=torch.tensor([0, 1, 1]), distractors=torch.tensor([2, 3, 0]), clean_logits=LOGITS.flip(0))
SETS = Batch(
    answers=torch.tensor([[0, -1], [1, 2], [1, 3]]),
    distractors=torch.tensor([[2, 3, -1], [3, -1, -1], [0, 2, 3]]),
    clean_logits=LOGITS.flip(0),
)
PROBABILITIES = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in LOGITS.tolist()]


def test_logit_diff() -> None:
    assert logit_diff(LOGITS, ONE).tolist() == [1.0, -3.0, 4.0]
    assert logit_diff(LOGITS, SETS).tolist() == pytest.approx([2.0, -3.0, 2.0])


def test_prob_and_log_prob() -> None:
    p = PROBABILITIES
    assert prob(LOGITS, ONE).tolist() == pytest.approx([p[0][0], p[1][1], p[2][1]])
    assert prob(LOGITS, SETS).tolist() == pytest.approx([p[0][0], p[1][1] + p[1][2], p[2][1] + p[2][3]])
    assert log_prob(LOGITS, SETS).exp().tolist() == pytest.approx(prob(LOGITS, SETS).tolist())
    far = torch.tensor([[0.0, 400.0]])
    assert log_prob(far, Batch(answers=torch.tensor([0]))).item() == -400  # where the probability itself is 0


def test_prob_diff() -> None:
    p = PROBABILITIES
    assert prob_diff(LOGITS, SETS).tolist() == pytest.approx(
        [p[0][0] - p[0][2] - p[0][3], p[1][1] + p[1][2] - p[1][3], p[2][1] - p[2][0] - p[2][2]]
    )


def test_kl_is_from_the_clean_run() -> None:
    p = PROBABILITIES
    want = [sum(c * math.log(c / q) for c, q in zip(p[2 - row], p[row], strict=True)) for row in range(3)]
    assert kl(LOGITS, ONE).tolist() == pytest.approx(want, abs=1e-6)
    assert want[0] != pytest.approx(sum(q * math.log(q / c) for c, q in zip(p[2], p[0], strict=True)))
    assert kl(LOGITS, Batch(clean_logits=LOGITS)).abs().max() < 1e-6


def test_rank() -> None:
    assert rank(LOGITS, ONE).tolist() == [0, 1, 0]
    worse = Batch(answers=torch.tensor([[3, -1], [1, 3], [0, 2]]))
    assert rank(LOGITS, worse).tolist() == [3, 0, 1]


def test_padding_of_sets_does_not_count() -> None:
    """-1 is not the last token."""
    assert gather(LOGITS, torch.tensor([[0, -1], [1, -1], [2, -1]]), "mean").tolist() == [2.0, 0.0, 1.0]
    assert gather(LOGITS, torch.tensor([[0, -1], [1, -1], [2, -1]]), "logsumexp").tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("metric", [logit_diff, log_prob, prob, prob_diff, kl])
@pytest.mark.parametrize("batch", [ONE, SETS])
def test_gradients_are_finite_and_each_row_depends_on_its_own_logits_alone(metric: Metric, batch: Batch) -> None:
    logits = LOGITS.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(metric(logits, batch)[0], logits)
    assert gradient.isfinite().all() and gradient[0].abs().max() > 1e-3
    assert not gradient[1:].any()


def test_a_batch_is_read_as_attributes_or_items() -> None:
    assert ONE.answers is ONE["answers"]
    with pytest.raises(AttributeError, match=r"the batch has no 'answer'; it has \['answers'"):
        _ = ONE.answer


def test_scores_are_of_fp32_logits_and_of_the_runs_of_each_rows_pair() -> None:
    """Rows 0 and 1 are the runs of one pair, 2 and 3 of another; row 4 is a patch of the second."""
    logits = torch.randn(5, 6).bfloat16()
    seen = {}

    def metric(given: Tensor, batch: Batch) -> Tensor:
        seen.update(batch, logits=given)
        return given[:, 0].double()

    program = {
        "answers": torch.tensor([1, 1, 2, 2, 2]),
        "distractors": None,
        "clean": torch.tensor([0, 0, 2, 2, 2]),
        "corrupted": torch.tensor([1, 1, 3, 3, 3]),
    }
    assert score(metric, logits, program).dtype == torch.float32
    assert seen["logits"].dtype == torch.float32 and seen["distractors"] is None
    assert torch.equal(seen["clean_logits"], logits[[0, 0, 2, 2, 2]].float())
    assert torch.equal(seen["corrupted_logits"], logits[[1, 1, 3, 3, 3]].float())


def test_metrics_import_torch_and_the_standard_library_alone() -> None:
    """They run where `interp` is not installed: the file must load on its own."""
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('m', sys.argv[1]);"
        "m = importlib.util.module_from_spec(s); s.loader.exec_module(m);"
        "assert 'interp' not in sys.modules and m.logit_diff"
    )
    subprocess.run([sys.executable, "-c", code, interp.metrics.__file__], check=True, timeout=300)


# --- metrics of one's own ----------------------------------------------------------------------------------


def raises(logits: Tensor, batch: Batch) -> Tensor:
    raise KeyError("subject")


REFUSED = {
    "a scalar": (lambda logits, batch: logits.mean(), r"returned shape \[\]; it must return one number per row"),
    "one number too many": (lambda logits, batch: torch.zeros(len(logits) + 1), r"returned shape \[4\]"),
    "all logits": (lambda logits, batch: logits, r"returned shape \[3, \d+\]"),
    "a column": (lambda logits, batch: logits[:, :1], r"returned shape \[3, 1\]"),
    "a float": (lambda logits, batch: 0.5, "returned float"),
    "nothing": (lambda logits, batch: None, "returned NoneType"),
    "NaN": (lambda logits, batch: logits[:, 0] / 0 * 0, "returned NaN"),
    "one NaN": (lambda logits, batch: torch.tensor([0.0, float("nan"), 0.0]), "returned NaN"),
    "an error": (raises, "metric raises fails on logits .*: 'subject'"),
    "what the pairs lack": (logit_diff, "these pairs have no distractors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_metric_is_refused_before_the_model_runs(name: str) -> None:
    metric, message = REFUSED[name]
    model = loaded("gpt2")
    clean, corrupted = words(6), words(6, seed=1)
    forwards, stop = count_forwards(model)
    with pytest.raises(MetricError, match=message):
        interp.patch(model, PromptPairs(clean, corrupted, answers=[20]), interp.grid("z"), metric)
    stop()
    assert not forwards


def test_nan_of_the_model_itself_is_told_afterwards() -> None:
    """A metric that is sound on random logits, of a model that overflows."""
    model = loaded("gpt2")
    pairs = PromptPairs(words(6), words(6, seed=1), answers=[20])

    def fragile(logits: Tensor, batch: Batch) -> Tensor:
        return logits[:, 0] if len(logits) == 3 else logits[:, 0] * float("nan")

    with pytest.raises(MetricError, match="'fragile' gave NaN on this model's logits"):
        interp.patch(model, pairs, interp.grid("z"), fragile)
