"""Metrics against the formulas they stand for, their gradients, and what the engine refuses of anybody's own."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.engine.trial import check_metric
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
        distance = (logits - batch.clean_logits).norm(dim=-1)
        return distance / distance  # 0 / 0 at the clean run

    with pytest.raises(MetricError, match=r"'fragile' gave NaN on this model's logits \(dtype torch.float32, pair 0\)"):
        interp.patch(model, pairs, interp.grid("z"), fragile)


# --- a row's number is its own -----------------------------------------------------------------------------


def first(tokens: Tensor) -> Tensor:
    return tokens if tokens.ndim == 1 else tokens[:, 0]


def at(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, first(tokens)[:, None])[:, 0]


ONE_PAIR = PromptPairs([[4, 5, 6]], [[7, 5, 6]], [20], [33])
PAIRS = {
    "one pair": ONE_PAIR,
    "two pairs": PromptPairs([[4, 5, 6]] * 2, [[7, 5, 6]] * 2, [20, 21], [33, 34]),
    "sets": PromptPairs([[4, 5, 6]] * 3, [[7, 5, 6]] * 3, [[20, 22], 21, 23], [33, [34, 35, 36], 37]),
    "one answer for all": PromptPairs([[4, 5, 6]] * 4, [[7, 5, 6]] * 4, [20] * 4, [33] * 4),
}
STATE = {"calls": 0}


def counting(logits: Tensor, batch: Batch) -> Tensor:
    STATE["calls"] += 1
    return logits[:, 3] + STATE["calls"]


def writing(logits: Tensor, batch: Batch) -> Tensor:
    logits -= logits.mean()
    return logits[:, 3]


def writing_rows(logits: Tensor, batch: Batch) -> Tensor:
    logits -= logits.mean(-1, keepdim=True)
    return logits[:, 3]


#: A metric whose numbers depend on more than the row, and what its refusal says.
MIXING: dict[str, tuple[Metric, str]] = {
    "the mean of all": (lambda x, batch: at(x - x.mean(), batch.answers), "mixes rows"),
    "a small part of it": (lambda x, batch: at(x - 0.01 * x.mean(), batch.answers), "mixes rows"),
    "the mean over rows": (lambda x, batch: at(x - x.mean(0), batch.answers), "mixes rows"),
    "a softmax over rows": (lambda x, batch: at(x.softmax(0), batch.answers), "mixes rows"),
    "a norm of all": (lambda x, batch: at(x / x.norm(), batch.answers), "mixes rows"),
    "the largest of all": (lambda x, batch: at(x, batch.answers) / x.max(), "mixes rows"),
    "the number of rows": (lambda x, batch: at(x, batch.answers) / len(x), "mixes rows"),
    "its place": (lambda x, batch: torch.arange(len(x)) * x[:, 3], "mixes rows"),
    "the first row's logits": (lambda x, batch: x.flatten()[first(batch.answers)], "mixes rows"),
    "what came before": (lambda x, batch: x[:, 3].cumsum(0), "mixes rows"),
    "an order of rows": (lambda x, batch: x[:, 3].sort().values, "mixes rows"),
    "one row's number": (lambda x, batch: x[:, 3] * float(x[0, 2].detach()), "mixes rows"),
    "what it wrote": (writing, "mixes rows"),
    "noise": (lambda x, batch: x[:, 3] + 0.01 * torch.randn(len(x)), "is random"),
    "dropout": (lambda x, batch: torch.dropout(x, 0.01, True)[:, 3], "is random"),
    "how often it was called": (counting, "is random"),
    "a pole": (lambda x, batch: x[:, 3] / 0, r"returned \[.*inf.*\] on finite logits"),
    "a pole in one row": (
        lambda x, batch: torch.where(torch.arange(len(x)) == 1, torch.inf, x[:, 3]),
        r"returned \[.*, inf, .*\] on finite logits",
    ),
    "no row of its own": (lambda x, batch: x[:, 3].squeeze(), r"returned shape \[\].* shape \[row\] = \[1\]"),
}
#: Wrong only where pairs differ: with one pair every row gets its own number all the same.
MIXING_PAIRS: dict[str, Metric] = {
    "the first pair's answers": lambda x, batch: x[:, int(first(batch.answers)[0])],
    "the first pair's distractors": lambda x, batch: x[:, 3] - x[:, int(first(batch.distractors)[0])],
    "the first clean run": lambda x, batch: x[:, 3] - batch.clean_logits[0, 3],
    "the mean of clean runs": lambda x, batch: x[:, 3] - batch.clean_logits.mean(),
    "the mean of corrupted runs": lambda x, batch: x[:, 3] - batch["corrupted_logits"].mean(0)[3],
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MIXING)
def test_a_number_that_is_not_the_rows_own_is_refused(name: str, mode: type) -> None:
    metric, said = MIXING[name]
    for pairs in PAIRS.values():
        with mode(), pytest.raises(MetricError, match=said):
            check_metric(metric, pairs.encode(None), 92)


@pytest.mark.parametrize("name", MIXING_PAIRS)
def test_a_number_of_another_pair_is_refused_where_pairs_differ(name: str) -> None:
    with pytest.raises(MetricError, match="mixes rows"):
        check_metric(MIXING_PAIRS[name], PAIRS["two pairs"].encode(None), 92)
    check_metric(MIXING_PAIRS[name], ONE_PAIR.encode(None), 92)


SOUND: dict[str, Metric] = {
    **{metric.__name__: metric for metric in (logit_diff, log_prob, prob, prob_diff, kl, rank)},
    "a softmax of each row": lambda x, batch: at(x.softmax(-1), batch.answers),
    "bf16 inside": lambda x, batch: -(x.bfloat16().softmax(-1) * x.bfloat16().log_softmax(-1)).sum(-1).float(),
    "bf16": lambda x, batch: at(x.bfloat16().log_softmax(-1), batch.answers),
    "fp16": lambda x, batch: x.half().mean(-1),
    "float64": lambda x, batch: x.double().logsumexp(-1),
    "a constant": lambda x, batch: torch.full((len(x),), 3.0),
    "nothing at all": lambda x, batch: torch.zeros(len(x)),
    "hits": lambda x, batch: x.argmax(-1) == first(batch.answers),
    "a loop": lambda x, batch: torch.stack([x[i, 3] - x[i].mean() for i in range(len(x))]),
    "a mean that cancels": lambda x, batch: logit_diff(x - x.mean(), batch),
    "the clean run's": lambda x, batch: torch.cosine_similarity(x, batch.clean_logits, -1),
    "odds": lambda x, batch: prob(x, batch) / (1 - prob(x, batch)),
    "a logarithm": lambda x, batch: at(x.softmax(-1), batch.answers).log(),
    "what it wrote in its row": writing_rows,
    "random once": (lambda weight: lambda x, batch: x @ weight)(torch.randn(92)),
    "seeded": lambda x, batch: x @ torch.randn(92, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SOUND)
def test_what_is_the_rows_own_is_taken(name: str, threads: int) -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(threads)
    try:
        for pairs in PAIRS.values():
            assert check_metric(SOUND[name], pairs.encode(None), 92) >= 0
            check_metric(SOUND[name], pairs.encode(None), 92, dtype=torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_many_thousands_of_tokens_are_the_same_in_other_shapes() -> None:
    for name in ("bf16 inside", "fp16", "float64", "kl", "the clean run's"):
        check_metric(SOUND[name], PAIRS["sets"].encode(None), 50_000)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_trial_finds_a_gradient_whatever_mode_it_is_called_in(mode: type) -> None:
    with mode():
        for name in ("logit_diff", "kl", "what it wrote in its row"):
            check_metric(SOUND[name], PAIRS["sets"].encode(None), 92, gradient=True)
        for name in ("rank", "a constant", "hits"):
            with pytest.raises(MetricError, match="has no gradient"):
                check_metric(SOUND[name], PAIRS["sets"].encode(None), 92, gradient=True)


METHODS: dict[str, Callable[[interp.Model, PromptPairs, Metric], Any]] = {
    "patch": lambda model, pairs, metric: interp.patch(model, pairs, interp.grid("z"), metric),
    "path_patch": lambda model, pairs, metric: interp.path_patch(model, pairs, ["L0.H0"], metric=metric),
    "ablate": lambda model, pairs, metric: interp.ablate(model, pairs, interp.grid("z"), metric=metric),
    "mean ablation": lambda model, pairs, metric: interp.ablate(model, pairs, interp.grid("z"), "mean", metric=metric),
    "causal_trace": lambda model, pairs, metric: interp.causal_trace(
        model, PromptPairs(pairs.clean, None, pairs.answers, positions={"subject": 1}), metric=metric
    ),
    "attribute": lambda model, pairs, metric: interp.attribute(model, pairs, interp.grid("z"), metric),
    "discover": lambda model, pairs, metric: interp.discover(model, pairs, metric=metric),
    "acdc": lambda model, pairs, metric: interp.discover(model, pairs, "acdc", metric=metric),
    "run_circuit": lambda model, pairs, metric: interp.run_circuit(model, pairs, ["L0.H0"], "mean", metric),
    "evaluate_circuit": lambda model, pairs, metric: interp.evaluate_circuit(
        model, pairs, interp.Circuit.from_nodes(["L0.H0"], model), "positional_mean", metric
    ),
    "iterative_pruning": lambda model, pairs, metric: interp.iterative_pruning(model, pairs=pairs, metric=metric),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_a_mixing_metric_before_the_model_runs(method: str) -> None:
    model = loaded("gpt2")
    forwards, stop = count_forwards(model)
    with pytest.raises(
        MetricError, match=r"metric writing mixes rows: row 0 gets .* beside rows of other runs and .* without"
    ):
        METHODS[method](model, PAIRS["two pairs"], writing)
    stop()
    assert not forwards


# --- numbers of the model that are no numbers --------------------------------------------------------------


def near_the_clean_run(logits: Tensor, batch: Batch) -> Tensor:
    """Infinite where a run is the clean one."""
    return 1 / (logits - batch.clean_logits).abs().sum(-1)


def test_an_infinite_metric_of_the_unpatched_runs_is_refused() -> None:
    model, plan = loaded("gpt2"), interp.grid("z")
    said = r"metric 'near_the_clean_run' gave inf on this model's logits \(dtype torch.float32, pair 0\)"
    for run in (interp.patch, interp.attribute):
        with pytest.raises(MetricError, match=said):
            run(model, ONE_PAIR, plan, near_the_clean_run)


def test_infinite_cells_are_counted_in_one_warning() -> None:
    model, plan = loaded("gpt2"), interp.grid("resid_pre", layers=[0, 1], positions=[0, 2])

    plain = interp.patch(model, ONE_PAIR, plan, lambda logits, batch: logits[:, 3])
    chosen = torch.tensor(plain.values.values.ravel()[[2, 3]])  # moved from both runs

    def pole(logits: Tensor, batch: Batch) -> Tensor:
        near = (logits[:, 3, None] - chosen).abs().min(-1).values < 1e-5
        return torch.where(near, torch.inf, logits[:, 3])

    with pytest.warns(UserWarning) as seen:
        effects = interp.patch(model, ONE_PAIR, plan, pole)
    assert np.isinf(effects.values).sum() == 2
    assert [str(one.message).split(":")[0] for one in seen] == ["metric 'pole' is infinite in 2 of 4 patched runs"]
