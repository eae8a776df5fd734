"""`interp.attribute`: exact where it must be, honest where it cannot be, and verified by patches."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import Effects, Model, Plan, PromptPairs
from interp.attribution import attribute
from interp.edits import Edit
from interp.engine.slopes import grad_drop, midpoints
from interp.errors import MetricError, PairsError, PlanError, SiteError
from interp.plan import paths
from tests.circuits.known import Known, cancelling, linear, saturated
from tests.families import D_VOCAB, allowed, has, loaded, words
from tests.oracle.configs import tiny
from tests.oracle.derivatives import gradient
from tests.oracle.hooks import Oracle

METHODS = ("atp", "atp*", "ig", "ig-activations")
DIRECTIONS = ("noising", "denoising")
in_both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
every_method = pytest.mark.parametrize("method", METHODS)
#: All that a program may look at besides its logits.
WEIGHTS = torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(3)) / D_VOCAB**0.5


@cache
def model_of(make: Any) -> Model:
    known: Known = make()
    return interp.load_model(known.model, known.tokenizer)


def pairs_of(*lengths: int) -> PromptPairs:
    """Aligned pairs; every second one shares its first two tokens."""
    clean, other = words(*lengths), words(*lengths, seed=5)
    for i, (one, two) in enumerate(zip(clean, other, strict=True)):
        two[: 2 * (i % 2)] = one[: 2 * (i % 2)]
    count = len(lengths)
    return PromptPairs(clean, other, [20, 41, 25, 30][:count], [33, 12, 50, 61][:count])


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    expected = np.asarray(expected)
    scale = max(1.0, float(np.nanmax(np.abs(expected))))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * scale)


def change(effects: Effects) -> np.ndarray:
    return (effects.values - effects.base).values


# ---- models on which the answer is known ------------------------------------------------------------------------


@in_both_directions
@pytest.mark.parametrize("method", ["atp", "ig", "ig-activations"])
def test_a_linear_model_is_attributed_exactly(method: str, direction: str) -> None:
    model, pairs = model_of(linear), linear().pairs
    kinds = [kind for kind in has("gpt2") if kind != "pattern" or method != "ig-activations"]
    for plan in (interp.grid(kinds), interp.heads(["z", "v", "head_out"]), interp.neurons(1)):
        exact = interp.patch(model, pairs, plan, direction=direction)
        close(attribute(model, pairs, plan, method=method, direction=direction).values, exact.values)
        for name, moved in zip(exact.values["component"].values, np.abs(change(exact)), strict=True):
            attends = name in ("q", "k", "q_rot", "k_rot", "pattern")  # every head averages, whatever enters it
            assert (float(np.nanmax(moved)) > 1e-3) is not attends, name
    joined = interp.sets({"both": ["L0.H0.z", "L0.H1.z@-1"], "unit": ["L1.neuron[3]@-1"]})
    close(
        attribute(model, pairs, joined, method=method, direction=direction).values,
        interp.patch(model, pairs, joined, direction=direction).values,
    )


@in_both_directions
def test_a_saturated_softmax_hides_queries_and_keys_from_atp_but_not_from_atp_star(direction: str) -> None:
    model, pairs = model_of(saturated), saturated().pairs
    plan = interp.heads(["q", "k"], positions=[1, 2, 3])
    exact = interp.patch(model, pairs, plan, direction=direction)
    here = {"layer": 1, "head": 0}
    assert float(abs(exact.values - exact.base).sel(here).max(["position", "pair"]).min()) >= 1
    plain, star = (attribute(model, pairs, plan, method=m, direction=direction) for m in ("atp", "atp*"))
    assert np.nanmax(np.abs(change(plain))) < 1e-4
    close(star.values, exact.values, 1e-4)  # what the head writes is read linearly: all is exact here
    everywhere = interp.heads(["q", "k"])
    star = attribute(model, pairs, everywhere, method="atp*", direction=direction)
    exact = interp.patch(model, pairs, everywhere, direction=direction)
    close(star.values.sel(component="q"), exact.values.sel(component="q"), 1e-4)
    assert float(abs(star.values - star.base).sel(component="k", **here).min()) >= 1  # keys one at a time: found


def test_a_cancelled_head_is_missed_by_atp_and_found_by_atp_star() -> None:
    model, pairs = model_of(cancelling), cancelling().pairs
    plan = interp.heads("z", layers=[0])
    exact = change(interp.patch(model, pairs, plan))
    close(exact, np.full_like(exact, -1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the metric's gradient does not vanish, though the estimate does
        close(change(attribute(model, pairs, plan)), np.zeros_like(exact))
    close(change(attribute(model, pairs, plan, method="atp*")), exact)


def test_grad_drop_of_numbers() -> None:
    assert grad_drop(np.array([0.7])) == 0.7
    assert grad_drop(np.array([0.5, 0.0, 2.0, -1.0])) == pytest.approx(1.5)  # (0 + 2 + 1) / 2
    assert grad_drop(np.array([-0.1, 0.0, 2.0, -1.0])) == pytest.approx(-1.5)
    assert grad_drop(np.array([0.0, 0.0, -2.0, 1.0])) == pytest.approx(-1.5)  # no sign of its own: that of the sum
    assert grad_drop(np.zeros(4)) == 0


# ---- the same numbers, however they are run -----------------------------------------------------------------------


@in_both_directions
@every_method
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_several_pairs_are_each_of_them_alone(family: str, method: str, direction: str) -> None:
    """Pairs of three lengths in blocks of two, the plan over positions, heads and units."""
    model, pairs = loaded(family), pairs_of(7, 5, 7, 6)
    kinds = ["resid_pre", "q", "k", "mlp_out"]
    for plan in (interp.grid(kinds, layers=[0, 2]), interp.heads(["z", "v"]), interp.neurons(1, units=[0, 5])):
        options: dict[str, Any] = {"method": method, "direction": direction, "steps": 2}
        whole = attribute(model, pairs, plan, max_tokens=60, **options)
        assert whole.values.dims[-1] == "pair" and whole.direction == direction
        for pair in (1, 2):  # in two blocks, one with a shared start
            alone = attribute(model, pairs[[pair]], plan, **options)
            assert float(alone.base[0]) == pytest.approx(float(whole.base[pair]), abs=1e-5)
            assert float(alone.source[0]) == pytest.approx(float(whole.source[pair]), abs=1e-5)
            found = whole.values[..., pair].values
            if "position" in whole.values.dims:
                length = len(pairs.clean[pair])
                assert np.isnan(found[:, :, length:]).all()
                found = found[:, :, :length]
            close(found, alone.values[..., 0].values)
            assert np.nanmax(np.abs(change(alone))) > 1e-3
    runs = interp.patch(model, pairs, interp.grid("z", layers=[2]), direction=direction)
    close(whole.base, runs.base)
    close(whole.source, runs.source)


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_the_simulated_backend_gives_the_same(method: str) -> None:
    hf, tokenizer = tiny("llama_gqa")
    there = interp.load_model(hf, tokenizer, backend="simulated")
    pairs, plan = pairs_of(6, 5), interp.grid(["resid_pre", "q", "k", "pattern"])
    found = attribute(there, pairs, plan, method=method, steps=2)
    expected = attribute(loaded("llama_gqa"), pairs, plan, method=method, steps=2)
    close(found.values, expected.values, 1e-6)
    assert np.nanmax(np.abs(change(expected))) > 0.01


@in_both_directions
def test_named_positions_where_prompts_differ_in_length(direction: str) -> None:
    """Each base position against the position of the other prompt that bears its name."""
    clean, corrupted = words(8, 6), words(6, 9, seed=2)
    named = {"subject": [{"clean": [2, 3], "corrupted": [1, 4]}, {"clean": [1], "corrupted": [3]}], "end": -1}
    pairs = PromptPairs(clean, corrupted, [20, 41], [33, 12], positions=named)
    kinds = ["embed", "resid_pre", "v", "head_out", "mlp_out"]
    model = loaded("llama_gqa")
    effects = attribute(model, pairs, interp.grid(kinds, layers=[1], positions=["subject", "end"]), direction=direction)
    oracle = Oracle(tiny("llama_gqa")[0], copy_model=False)
    to, of = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
    for pair in (0, 1):
        base, source = (getattr(pairs, side)[pair] for side in (to, of))
        places = {
            "subject": tuple(named["subject"][pair][side] for side in (to, of)),
            "end": ([len(base) - 1], [len(source) - 1]),
        }

        def score(logits: Tensor, pair: int = pair) -> Tensor:
            return logits[-1, pairs.answers[pair][0]] - logits[-1, pairs.distractors[pair][0]]

        for kind in kinds:
            slope = gradient(oracle, base, (kind, 1), score)
            old, new = (oracle.read(ids, kind, 1) for ids in (base, source))
            for name, (here, there) in places.items():
                products = (new[there] - old[here]) * slope[here]
                want, size = (
                    float(products.sum()),
                    float(products.abs().sum()),
                )  # what is summed decides how it is rounded
                found = (effects.values - effects.base).sel(component=kind, position=name)[0, pair]
                assert float(found) == pytest.approx(want, abs=1e-5 * max(1, size)), (kind, name)
    with pytest.raises(PlanError, match=r"'atp\*' at q needs prompts of one length .* pair 0 is patched at"):
        attribute(model, pairs, interp.grid("q", positions=["subject"]), method="atp*", direction=direction)
    for method in ("ig", "ig-activations"):
        with pytest.raises(PairsError, match=f"method '{method}'"):
            attribute(model, pairs, interp.grid("v", positions=["end"]), method=method, direction=direction)
    twice = PromptPairs(words(5), words(5, seed=1), [20], [33], positions={"a": 2, "b": [{"clean": 2, "corrupted": 3}]})
    with pytest.raises(PlanError, match=r"position 2 of pair 0 is patched from position 3 and from position 2"):
        attribute(model, twice, interp.grid("v", positions=["a", "b"]))
    alone = attribute(model, twice, interp.grid("v", positions=["b"]))
    assert np.nanmax(np.abs(change(alone) - change(attribute(model, twice, interp.grid("v", positions=["a"]))))) > 1e-3


# ---- metrics ------------------------------------------------------------------------------------------------------


def normalised(logits: Tensor, batch: Any) -> Tensor:
    """A metric whose scale comes from the two unpatched runs."""
    value, clean, corrupted = (x @ WEIGHTS for x in (logits, batch.clean_logits, batch.corrupted_logits))
    return (value - corrupted) / (clean - corrupted)


def weighed(logits: Tensor, batch: Any) -> Tensor:
    return logits @ WEIGHTS


@in_both_directions
@every_method
def test_the_unpatched_logits_are_constants_of_a_metric(method: str, direction: str) -> None:
    model, pairs, plan = loaded("gpt2"), pairs_of(6, 6), interp.grid(["resid_pre", "z"], layers=[1])
    options = {"method": method, "direction": direction, "steps": 2}
    found = attribute(model, pairs, plan, normalised, **options)
    by_hand = attribute(model, pairs, plan, weighed, **options)
    span = (by_hand.clean - by_hand.corrupted).values
    close(change(found), change(by_hand) / span, 1e-4)
    assert np.abs(change(found)).max() > 0.01


def test_kl_has_no_gradient_at_the_clean_run_and_says_so() -> None:
    model, pairs, plan = loaded("llama_gqa"), pairs_of(7, 6), interp.grid(["resid_pre", "mlp_out"])
    for method in ("atp", "atp*"):
        with pytest.warns(UserWarning, match="gradient of kl vanishes at the base run of 'noising'.*method='ig'"):
            flat = attribute(model, pairs, plan, interp.kl, method=method)
        assert np.nanmax(np.abs(change(flat))) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            {"metric": interp.kl, "direction": "denoising"}, {"metric": interp.kl, "method": "ig"},
            {"metric": interp.kl, "method": "ig-activations"}, {"metric": interp.log_prob}, {"metric": interp.prob},
        ):  # fmt: skip
            effects = attribute(model, pairs, plan, **options)
            assert np.nanmax(np.abs(change(effects))) > 1e-4
    alike = PromptPairs([pairs.clean[0]] * 2, [pairs.clean[0], pairs.corrupted[0]], [20, 20], [33, 33])
    with pytest.warns(UserWarning, match="the same in pair 0") as seen:
        told = np.abs(change(attribute(model, alike, plan))[..., 0]).max()
    assert told <= allowed(torch.tensor([20.0]))  # nothing but how two rows of one batch are rounded, yet no vanishing
    assert len(seen) == 1
    exact = interp.patch(model, pairs, plan, interp.kl)
    assert np.nanmax(change(exact)) > 0.01


def test_metrics_that_cannot_be_attributed() -> None:
    plan = interp.grid("resid_pre")
    with pytest.raises(MetricError, match=r"rank has no gradient.*use `patch`"):
        attribute(loaded("gpt2"), pairs_of(5), plan, interp.rank)
    with pytest.raises(MetricError, match="no distractors"):
        attribute(loaded("gpt2"), PromptPairs(words(5), words(5, seed=1), [20]), plan)


# ---- verification -------------------------------------------------------------------------------------------------


@in_both_directions
@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_the_largest_are_patched_exactly(method: str, direction: str) -> None:
    model, pairs, plan = loaded("gemma2"), pairs_of(7, 5), interp.grid(["resid_pre", "attn_out", "mlp_out"])
    options: dict[str, Any] = {"method": method, "direction": direction}
    plain = attribute(model, pairs, plan, **options)
    assert plain.provenance["verification"] is None
    effects = attribute(model, pairs, plan, verify=6, **options)
    exact = interp.patch(model, pairs, plan, direction=direction)
    report = effects.provenance["verification"]
    size = abs((plain.values - plain.base).mean("pair"))
    dims = ("component", "layer", "position")
    chosen = {tuple(cell[dim] for dim in dims): cell for cell in report["cells"]}
    assert len(chosen) == 12 and sum(cell["top"] for cell in chosen.values()) == 6
    assert (report["sampled"], report["unverified"]) == (6, 3 * 3 * 7 - 12)
    tops = sorted(float(size.loc[where]) for where, cell in chosen.items() if cell["top"])
    np.testing.assert_allclose(tops, np.sort(size.values.ravel())[-6:], rtol=1e-6)
    weakest = min(abs(cell["exact"]) for cell in chosen.values() if cell["top"])
    wrong = 0.0
    for component in plan.components:
        for layer in range(3):
            for position in range(7):
                where = (component, layer, position)
                cell = chosen.get(where)
                close(effects.values.loc[where], (exact if cell else plain).values.loc[where])
                if cell:
                    moved, guess = (float((e.values - e.base).mean("pair").loc[where]) for e in (exact, plain))
                    assert cell["exact"] == pytest.approx(moved, abs=1e-5)
                    assert cell["estimated"] == pytest.approx(guess, abs=1e-5)
                    assert cell["missed"] is (not cell["top"] and abs(cell["exact"]) > weakest)
                    wrong = max(wrong, abs(cell["exact"] - cell["estimated"]))
    assert wrong > 0.01 and report["missed"] == sum(cell["missed"] for cell in chosen.values())


def test_what_attribution_missed_is_reported() -> None:
    """The cancelled head has no estimate; among the cells drawn at random it is found to matter."""
    model, pairs = model_of(cancelling), cancelling().pairs
    plan = interp.heads("z")
    effects = attribute(model, pairs, plan, verify=2)
    report = effects.provenance["verification"]
    assert report == effects.provenance["verification"] and report["unverified"] == 0
    (head,) = [cell for cell in report["cells"] if cell["layer"] == 0]
    assert (head["estimated"], head["exact"]) == (pytest.approx(0, abs=1e-5), pytest.approx(-1, abs=1e-5))
    assert head["missed"] is not head["top"] and report["missed"] == int(head["missed"])
    close(effects.values, interp.patch(model, pairs, plan).values)  # as many cells as there are: all are exact
    more = attribute(model, pairs, plan, verify=50).provenance["verification"]
    assert (len(more["cells"]), more["sampled"], more["missed"]) == (3, 0, 0)


# ---- records and refusals -----------------------------------------------------------------------------------------


def test_the_record_is_that_of_patch_and_names_the_method(tmp_path: Any) -> None:
    model, pairs, plan = loaded("gpt2"), pairs_of(6, 5), interp.grid(["resid_pre", "z"])
    exact, found = interp.patch(model, pairs, plan), attribute(model, pairs, plan, method="ig", steps=4)
    assert found.values.dims == exact.values.dims
    assert all((found.values[dim] == exact.values[dim]).all() for dim in exact.values.dims)
    assert (found.provenance["method"], found.provenance["points"]) == ("attribute:ig", [0.125, 0.375, 0.625, 0.875])
    assert attribute(model, pairs, plan).provenance["points"] is None
    assert found.provenance["plan"] == exact.provenance["plan"]
    found.save(tmp_path / "ig.nc")
    assert Effects.load(tmp_path / "ig.nc").values.equals(found.values)
    one_point = attribute(model, pairs, plan, method="ig", points=[0.0])
    close(one_point.values, attribute(model, pairs, plan).values)  # at the base run: attribution patching
    assert midpoints(2) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("plan", "method", "error", "says"),
    [
        (interp.grid("z"), "gradient", PlanError, r"unknown attribution method 'gradient'; .*atp, atp\*, ig"),
        (interp.grid("z").with_edit("set", 0.0), "atp", PlanError, "constants and edges have no estimate"),
        (paths("embed", "logits"), "atp", PlanError, "constants and edges have no estimate"),
        (interp.sets({"a": [Edit(interp.Site("z", 0), "scale", 2.0)]}), "ig", PlanError, "constants and edges"),
        (interp.grid("pattern"), "ig-activations", PlanError, "no path between two attention patterns"),
        (interp.grid("z", layers=[3]), "atp", SiteError, "layer 3"),
    ],
)
def test_plans_without_an_estimate(plan: Plan, method: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attribute(loaded("gpt2"), pairs_of(5), plan, method=method)


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "ig-activations"])
def test_weights_that_want_gradients_of_their_own_change_nothing(method: str) -> None:
    """Models are loaded so by transformers; those of most tests here are frozen."""
    hf, tokenizer = tiny("llama_gqa")
    model = interp.load_model(hf.requires_grad_(True), tokenizer=tokenizer)
    plan = interp.heads(["z", "q", "head_out", *(["pattern"] if method != "ig-activations" else [])])
    found = attribute(model, pairs_of(5, 6), plan, method=method)
    np.testing.assert_array_equal(
        found.values, attribute(loaded("llama_gqa"), pairs_of(5, 6), plan, method=method).values
    )
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_runs_without_an_estimate() -> None:
    model, plan = loaded("gpt2"), interp.grid("z")
    for option in ({"verify": -1}, {"max_tokens": 0}):
        with pytest.raises(PlanError, match="or more"):
            attribute(model, pairs_of(5), plan, **option)
    with pytest.raises(PlanError, match="no corrupted prompts"):
        attribute(model, PromptPairs(words(5), answers=[20], distractors=[33]), plan)
    with pytest.raises(PlanError, match="direction 'up'"):
        attribute(model, pairs_of(5), plan, direction="up")
    with pytest.raises(PlanError, match=r"steps=0.*at least one"):
        attribute(model, pairs_of(5), plan, method="ig", steps=0)
    with pytest.raises(PlanError, match=r"'atp\*' needs the attention logits.*bloom models do not expose"):
        attribute(loaded("bloom"), pairs_of(5), interp.grid("q"), method="atp*")
    found = attribute(loaded("bloom"), pairs_of(5), interp.grid("z"), method="atp*")
    assert np.abs(change(found)).max() > 1e-3
