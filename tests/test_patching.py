"""Patching as people call it: what comes back, in which terms, and what is refused before the model runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import Effects, PromptPairs, grid, heads
from interp.errors import AnswerError, InterpError, MetricError, PairsError, PlanError
from tests.families import count_forwards, loaded, oracle_of, words

CLEAN = "Mary and John went to the store and Mary gave a drink to"
CORRUPTED = "Mary and John went to the store and Paul gave a drink to"


def pairs_of(*lengths: int, **more: object) -> PromptPairs:
    return PromptPairs(words(*lengths), words(*lengths, seed=3), [20] * len(lengths), [30] * len(lengths), **more)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_what_an_effect_says_about_itself(direction: str) -> None:
    model = loaded("gpt2")
    pairs = PromptPairs([CLEAN] * 2, [CORRUPTED, CLEAN], ["John", "John"], ["Mary", "Mary"], name="ioi")
    effects = interp.patch(model, pairs, grid(["resid_pre", "mlp_out"], layers=[0, 2]), direction=direction)
    assert isinstance(effects, Effects) and effects.values.dims == ("component", "layer", "position", "pair")
    assert effects.values.shape == (2, 2, 13, 2) and effects.values.dtype == np.float32
    assert effects.direction == direction
    assert effects.base is (effects.clean if direction == "noising" else effects.corrupted)
    facts = effects.provenance
    assert facts["prompts"]["name"] == "ioi" and facts["metric"] == "logit_diff" and facts["method"] == "patch"
    assert facts["tokens"][0] == CLEAN.split() and facts["plan"]["components"] == ["resid_pre", "mlp_out"]
    assert facts["schedule"] == "prefix" and facts["dtype"] == "float32" and facts["versions"]["nnsight"]


def test_normalized_is_one_where_the_source_run_was_put_whole() -> None:
    """resid_pre of layer 0 at the one position that differs is the whole difference."""
    pairs = PromptPairs([CLEAN], [CORRUPTED], ["John"], ["Mary"])
    for direction in ("noising", "denoising"):
        effects = interp.patch(loaded("gpt2"), pairs, grid(["resid_pre", "resid_post"]), direction=direction)
        first = effects.normalized.sel(component="resid_pre", layer=0, pair=0)
        assert float(first.sel(position=8)) == pytest.approx(1, abs=1e-4)
        assert float(abs(first.drop_sel(position=8)).max()) < 1e-4
        last = effects.normalized.sel(component="resid_post", layer=2, pair=0)
        assert float(last.sel(position=12)) == pytest.approx(1, abs=1e-4)
        assert float(effects.source[0]) != pytest.approx(float(effects.base[0]), abs=1e-3)


def test_the_directions_are_each_other_with_the_prompts_swapped() -> None:
    plan, model = grid("attn_out"), loaded("llama_gqa")
    pairs = pairs_of(7, 5)
    noising = interp.patch(model, pairs, plan, interp.log_prob)
    swapped = PromptPairs(pairs.corrupted, pairs.clean, pairs.answers, pairs.distractors)
    other = interp.patch(model, swapped, plan, interp.log_prob, "denoising")
    np.testing.assert_allclose(noising.values, other.values, atol=1e-6)
    np.testing.assert_allclose(noising.clean, other.corrupted, atol=1e-6)


def test_comprehensive_activation_patching_is_a_grid_over_one_pair() -> None:
    model = loaded("gpt2")
    effects = interp.comprehensive_activation_patching(model, CLEAN, CORRUPTED, ["John", "Mary"])
    assert list(effects.values.component.values) == ["resid_pre", "attn_out", "mlp_out"]
    assert effects.values.shape == (3, 3, 13, 1)
    pairs = PromptPairs([CLEAN], [CORRUPTED], ["John"], ["Mary"])
    same = interp.patch(model, pairs, grid(["resid_pre", "attn_out", "mlp_out"]))
    np.testing.assert_array_equal(effects.values, same.values)
    ids = [model.tokenizer(text)["input_ids"] for text in (CLEAN, CORRUPTED, "John")]
    by_id = interp.comprehensive_activation_patching(
        model, *ids, components=["z"], metric=interp.log_prob, direction="denoising", schedule="rows"
    )
    assert by_id.direction == "denoising" and by_id.provenance["schedule"] == "rows"
    base = oracle_of("gpt2").run(ids[1])[-1].log_softmax(-1)[ids[2][0]]
    assert float(by_id.base[0]) == pytest.approx(float(base), abs=1e-5)


def test_a_metric_of_ones_own_sees_tensors() -> None:
    seen = []

    def top(logits: torch.Tensor, batch: dict) -> torch.Tensor:
        seen.append({name: tuple(value.shape) for name, value in batch.items()})
        return logits.max(1).values

    interp.patch(loaded("gpt2"), pairs_of(6), grid("z", layers=[1]), top)
    rows, vocabulary = seen[-1]["clean_logits"]
    assert seen[-1] == {
        "answers": (rows,),
        "distractors": (rows,),
        "clean_logits": (rows, vocabulary),
        "corrupted_logits": (rows, vocabulary),
    }


def test_prompts_without_answers_work_for_metrics_that_need_none() -> None:
    pairs = PromptPairs(words(6), words(6, seed=2))
    effects = interp.patch(loaded("gpt2"), pairs, heads("z"), interp.kl)
    assert float(effects.values.max()) > 1e-3 and float(effects.clean[0]) == pytest.approx(0, abs=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = loaded("mistral")
    ids = torch.tensor(words(7))
    with torch.no_grad():
        before = model.hf(ids).logits
        weights = {name: weight.clone() for name, weight in model.hf.named_parameters()}
        interp.patch(model, pairs_of(7, 5), grid(["resid_pre", "z", "pattern", "mlp_out"]))
        assert torch.equal(model.hf(ids).logits, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.hf.named_parameters())
    assert not model.hf.training and all(weight.grad is None for weight in model.hf.parameters())


@pytest.mark.parametrize("schedule", ["naive", "prefix"])
def test_the_same_call_gives_the_same_numbers(schedule: str) -> None:
    first, second = (
        interp.patch(loaded("qwen3_moe"), pairs_of(7, 5), grid(["z", "mlp_out"]), schedule=schedule) for _ in range(2)
    )
    np.testing.assert_array_equal(first.values, second.values)


# --- wrong input, refused before the model runs ------------------------------------------------------------

ONE = words(6)
REFUSED = {
    "no prompts": (lambda: dict(pairs=PromptPairs([], [], [])), PairsError, "no prompt pairs"),
    "an empty prompt": (lambda: dict(pairs=PromptPairs([[]], ONE, [20])), PairsError, "clean of pair 0 is empty"),
    "fewer corrupted than clean": (lambda: dict(pairs=PromptPairs(ONE * 2, ONE, [2, 2])), PairsError, "counts differ"),
    "no corrupted prompts": (lambda: dict(pairs=PromptPairs(ONE, None, [20], [30])), PlanError, "no corrupted prompts"),
    "an answer of two tokens": (
        lambda: dict(pairs=PromptPairs(ONE, ONE, ["Mary John"], [30])),
        AnswerError,
        r"'Mary John' is not one token .* 2 tokens \['Mary', 'John'\]",
    ),
    "a distractor of two tokens": (
        lambda: dict(pairs=PromptPairs(ONE, ONE, [20], ["a b"])),
        AnswerError,
        "distractors",
    ),
    "a token of another vocabulary": (
        lambda: dict(pairs=PromptPairs([[1, 2, 5000]], [[1, 2, 3]], [20], [30])),
        PairsError,
        "token id 5000 at position 2 is outside the vocabulary",
    ),
    "an answer past the end": (lambda: dict(pairs=pairs_of(6, answer_positions=6)), PairsError, "answer_positions"),
    "an unknown direction": (lambda: dict(direction="clean"), PlanError, "it is 'noising' .* or 'denoising'"),
    "an unknown schedule": (lambda: dict(schedule="fast"), PlanError, "the schedules are: auto, naive, rows"),
    "no room for a token": (lambda: dict(max_tokens=0), PlanError, "max_tokens=0"),
    "no distractors": (lambda: dict(pairs=PromptPairs(ONE, ONE, [20])), MetricError, "pairs have no distractors"),
    "no answers": (lambda: dict(pairs=PromptPairs(ONE, ONE), metric=interp.prob), MetricError, "pairs have no answers"),
    "no metric": (lambda: dict(metric=None), MetricError, "metric None fails"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input(name: str) -> None:
    make, error, message = REFUSED[name]
    model = loaded("gpt2")
    forwards, stop = count_forwards(model)
    with pytest.raises(error, match=message) as caught:
        interp.patch(model, **{"pairs": pairs_of(6), "plan": grid("z"), **make()})
    stop()
    assert not forwards
    assert isinstance(caught.value, InterpError)


@pytest.mark.parametrize("tokens", [[], "John", [20, 30, 40]])
def test_answer_tokens_are_right_and_wrong(tokens: object) -> None:
    with pytest.raises(AnswerError, match=r"give \[right, wrong\]"):
        interp.comprehensive_activation_patching(loaded("gpt2"), CLEAN, CORRUPTED, tokens)


def test_a_bar_names_the_layer_it_is_at(capsys: pytest.CaptureFixture[str]) -> None:
    interp.patch(loaded("gpt2"), pairs_of(6), grid("z"), max_tokens=30, progress=True)
    shown = capsys.readouterr().err
    assert "patching" in shown and "18/18" in shown and "layer 2" in shown
    interp.patch(loaded("gpt2"), pairs_of(6), grid("z"), progress=False)
    assert not capsys.readouterr().err
