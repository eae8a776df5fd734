"""Pairs in which nothing is corrupted: `normalized` has no scale there and says so; methods that need two runs refuse."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp import Effects, PromptPairs
from interp.circuits.faithfulness import faithfulness_of
from interp.engine.trial import check_metric
from interp.errors import CircuitError, InterpError, PairsError
from interp.plots import plot_activation_patching_results

from .families import count_forwards, loaded, words

SAME, OTHER = words(6, 6)
ALL = PromptPairs([SAME, OTHER], [SAME, OTHER], [20, 21], [33, 34])
SOME = PromptPairs([SAME, OTHER, SAME], [SAME, SAME, SAME], [20, 21, 22], [33, 34, 35])
#: Different prompts whose answers are read before the first difference.
BEHIND = PromptPairs([SAME], [[*SAME[:-1], OTHER[-1]]], [20], [33], answer_positions=-2)


def effects_of(base: list[float], source: list[float], direction: str = "noising", **provenance: Any) -> Effects:
    values = xr.DataArray(
        np.full((2, 3, len(base)), 0.5), dims=("component", "layer", "pair"), coords={"component": ["z", "v"]}
    )
    runs = [xr.DataArray(np.array(run), dims=("pair",)) for run in (base, source)]
    runs = runs if direction == "noising" else runs[::-1]
    return Effects(values, *runs, {"direction": direction, **provenance})


@pytest.mark.parametrize(
    ("base", "source", "dtype", "rounding", "lost"),
    [
        (1.0, 1.0, "float32", None, True),
        (1.0, 1.0000001, "float32", None, True),
        (1.0, 1.0000001, None, None, True),
        (1.0, 1.00009, "float32", None, False),
        (1.0, 1.005, "float16", None, True),
        (1.0, 1.05, "bfloat16", None, True),
        (1.0, 1.05, "float16", None, False),
        (1e-9, 2e-9, "float32", None, False),  # nothing is known of the metric
        (1e-9, 2e-9, "float32", 1e-7, True),  # KL at its zero
        (3e-6, 1e-7, "float32", 1e-12, False),  # a small probability
        (0.0, 0.0, "float64", None, True),
        (-2.0, 2.0, "bfloat16", 0.1, False),
    ],
)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_what_counts_as_rounding(
    base: float, source: float, dtype: str | None, rounding: float | None, lost: bool, direction: str
) -> None:
    effects = effects_of([base, 1.0], [source, 3.0], direction, dtype=dtype, metric_rounding=rounding)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = effects.normalized
    assert bool(found[..., 0].isnull().all()) == lost == bool(seen)
    np.testing.assert_allclose(found[..., 1], (0.5 - 1.0) / (3.0 - 1.0), rtol=1e-6)
    if not lost:
        np.testing.assert_allclose(found[..., 0], (0.5 - np.float32(base)) / (np.float32(source) - np.float32(base)))


def test_the_warning_names_pairs_metrics_and_the_allowance_once() -> None:
    effects = effects_of([1.0, 2.0, -3.0], [1.0000001, 5.0, -3.0])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            _ = effects.normalized
        effects.to_dataframe(), effects.mean(normalized=True), effects.interval(normalized=True)
        plot_activation_patching_results(effects).html()
        _ = pickle.loads(pickle.dumps(effects)).normalized
    assert len(seen) == 1 and seen[0].category is UserWarning and seen[0].filename == __file__
    said = str(seen[0].message)
    assert "normalized is NaN for 2 of 3 pairs, whose two runs differ by rounding only" in said
    assert (
        "pair 0 (base 1, source 1.00000012, allowed 1e-05)" in said
        and "pair 2 (base -3, source -3, allowed 3e-05)" in said
    )
    many = effects_of([1.0] * 8, [1.0] * 8)
    with pytest.warns(UserWarning, match=r"8 of 8 pairs.*pair 4 \(.*\) and 3 more; do their prompts differ"):
        _ = many.normalized
    with pytest.warns(UserWarning):
        _ = copy.copy(replace(many, values=many.values)).normalized  # a record of its own


def test_what_has_no_scale_is_drawn_and_tabled() -> None:
    for base, source in (([1.0], [1.0]), ([1.0, 1.0], [1.0, 3.0])):
        effects = effects_of(base, source)
        with pytest.warns(UserWarning):
            figure = plot_activation_patching_results(effects)
        assert f"1 of {len(base)} pairs are left out: their two runs differ by rounding only." in figure.subtitle
        assert figure.html().count("<main") == 1
        frame = effects.to_dataframe()
        assert frame["normalized"].isnull().sum() == 6 and frame["value"].notnull().all()
        assert plot_activation_patching_results(effects, normalized=False).html()
    units = xr.DataArray(np.ones((1, 70, 1)), dims=("component", "unit", "pair"), coords={"component": ["neuron"]})
    same = Effects(units, xr.DataArray([1.0], dims="pair"), xr.DataArray([1.0], dims="pair"), {"direction": "noising"})
    with pytest.warns(UserWarning):
        assert plot_activation_patching_results(same).html()  # no unit has a bar


@pytest.mark.parametrize("metric", [interp.logit_diff, interp.kl, interp.prob, interp.log_prob, interp.rank])
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2"])
def test_identical_prompts_are_patched_and_have_no_scale(family: str, metric: Any) -> None:
    effects = interp.patch(loaded(family), SOME, interp.grid("z", layers=0), metric)
    np.testing.assert_allclose(effects.clean.values[[0, 2]], effects.corrupted.values[[0, 2]], rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match=r"pair 0 \(.*pair 2 \("):
        found = effects.normalized
    assert found[..., [0, 2]].isnull().all() and found[..., 1].notnull().all()
    with pytest.warns(UserWarning, match="1 of 1 pairs"):
        assert interp.patch(loaded(family), BEHIND, interp.grid("z", layers=0), metric).normalized.isnull().all()


def test_a_small_probability_keeps_its_scale() -> None:
    """Of a tiny model with wide logits; the right values are those of the model's own softmax."""
    model = loaded("gpt2")
    pairs = PromptPairs([SAME] * 4, [OTHER] * 4, [20, 40, 60, 80])
    with torch.no_grad():
        runs = [model.hf(torch.tensor([ids])).logits[0, -1].double() * 4 for ids in (SAME, OTHER)]
    want = torch.stack([run.softmax(-1)[[20, 40, 60, 80]] for run in runs])
    assert want.min() < 1e-6

    def sharp(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return interp.prob(4 * logits, batch)

    effects = interp.patch(model, pairs, interp.grid("z", layers=0), sharp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert effects.normalized.notnull().all()
    np.testing.assert_allclose(effects.clean, want[0], rtol=1e-3)
    assert effects.provenance["metric_rounding"] < 1e-7


def test_the_rounding_of_a_metric_is_recorded_by_dtype() -> None:
    model, plan = loaded("gpt2"), interp.grid("z", layers=0)
    pairs = PromptPairs([SAME], [OTHER], [20], [33])
    encoded = model.encode(pairs)
    for effects in (
        interp.patch(model, pairs, plan),
        interp.attribute(model, pairs, plan),
        interp.ablate(model, pairs, plan),
    ):
        assert effects.provenance["metric_rounding"] == check_metric(interp.logit_diff, encoded, model.vocab_size)
    fine, half, coarse = (
        check_metric(interp.logit_diff, encoded, 92, dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    assert (
        1e-6 < fine < 1e-4
        and half == pytest.approx(1000 * fine, rel=0.01)
        and coarse == pytest.approx(6000 * fine, rel=0.01)
    )
    assert check_metric(interp.rank, encoded, 92, dtype=torch.bfloat16) == 0


# --- methods that find what is corrupted -------------------------------------------------------------------

NEED: dict[str, tuple[Callable[[Any, PromptPairs], Any], type[InterpError]]] = {
    **{
        method: (lambda model, pairs, m=method: interp.discover(model, pairs, m, progress=False), CircuitError)
        for method in ("eap", "eap-ig", "eap-ig-activations", "exact", "acdc")
    },
    **{
        f"attribute {method}": (
            lambda model, pairs, m=method: interp.attribute(model, pairs, interp.grid("z"), method=m),
            PairsError,
        )
        for method in ("atp", "atp*", "ig", "ig-activations")
    },
    "iterative_pruning": (
        lambda model, pairs: interp.iterative_pruning(
            model, pairs=pairs, ablation_type="counterfactual", threshold=0.1
        ),
        CircuitError,
    ),
}


@pytest.mark.parametrize("method", NEED)
def test_prompts_that_are_the_same_in_every_pair_are_refused(method: str) -> None:
    model = loaded("gpt2")
    run, error = NEED[method]
    forwards, stop = count_forwards(model)
    said = "clean and corrupted prompts are the same in every pair: nothing is corrupted"
    with pytest.raises(error, match=said) as caught:
        run(model, ALL)
    assert "use" not in str(caught.value)
    with pytest.raises(error, match="in every pair up to where the answer is read: nothing is corrupted"):
        run(model, BEHIND)
    stop()
    assert not forwards


@pytest.mark.parametrize("method", NEED)
def test_the_pairs_in_which_nothing_is_corrupted_are_named_in_one_warning(method: str) -> None:
    with pytest.warns(UserWarning) as seen:
        NEED[method][0](loaded("gpt2"), SOME)
    said = [str(one.message) for one in seen]
    assert len(said) == 1 and "prompts are the same in pairs 0, 2: nothing is corrupted there" in said[0]
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NEED[method][0](loaded("gpt2"), SOME[[1]])


def test_faithfulness_has_no_scale_where_full_and_empty_differ_by_rounding() -> None:
    full = np.array([1.0, 2.0])
    for empty in (full, full + 1e-7):
        with pytest.raises(CircuitError, match="faithfulness has no scale here"):
            faithfulness_of(np.array([[1.0, 2.0]]), full, empty)
    np.testing.assert_allclose(faithfulness_of(np.array([[1.0, 2.0]]), full, full + 1e-3), [1.0])


def test_a_metric_that_is_flat_under_eap_ig_is_not_sent_to_eap_ig() -> None:
    def flat(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, 20] * 0 + (logits[:, 20] > batch.clean_logits[:, 20]).float()

    pairs = SOME[[1]]
    for method, said in (
        ("eap", "use method='eap-ig', or another metric"),
        ("eap-ig", "mean nothing; use another metric"),
    ):
        with pytest.warns(UserWarning, match=said):
            interp.discover(loaded("gpt2"), pairs, method, metric=flat, progress=False)
    for method, said in (("atp", "use method='ig', another metric"), ("ig", "mean nothing; use another metric")):
        with pytest.warns(UserWarning, match=said):
            interp.attribute(loaded("gpt2"), pairs, interp.grid("z"), flat, method)
