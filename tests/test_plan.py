"""Plans: the cells they make, and every way in which they are refused before a model runs."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import PromptPairs, Site, grid, heads, neurons, sets
from interp.edits import Edit
from interp.errors import InterpError, PairsError, PlanError, SiteError, SiteUnavailableError
from interp.plan import Plan, paths
from tests.families import count_forwards, loaded, words


def pairs_of(*lengths: int, **more: object) -> PromptPairs:
    return PromptPairs(words(*lengths), words(*lengths, seed=3), [20] * len(lengths), [30] * len(lengths), **more)


def resolved(plan: Plan, pairs: PromptPairs | None = None, family: str = "llama_gqa"):
    model = loaded(family)
    return plan.resolve(model, model.encode(pairs or pairs_of(7, 5)))


def labels(plan: Plan, **more: object) -> dict[str, tuple]:
    return dict(resolved(plan, **more).dims)


# --- the cells that a plan makes ---------------------------------------------------------------------------


def test_a_grid_has_each_component_layer_and_position_once() -> None:
    made = resolved(grid(["resid_pre", "z"], layers=[0, -1], positions=[1, -1]))
    assert dict(made.dims) == {"component": ("resid_pre", "z"), "layer": (0, 2), "position": (1, -1)}
    sites = [(cell.edits[0][0].site, cell.edits[0][1].at) for cell in made.cells]
    assert sorted(sites, key=str) == sorted(
        [(Site(kind, layer), (at,)) for kind in ("resid_pre", "z") for layer in (0, 2) for at in (1, -1)], key=str
    )
    assert len({cell.index for cell in made.cells}) == len(made.cells) == 8


def test_everything_is_the_default() -> None:
    assert labels(grid("z")) == {"component": ("z",), "layer": (0, 1, 2), "position": tuple(range(7))}
    assert labels(heads()) == {"component": ("z",), "layer": (0, 1, 2), "head": (0, 1, 2, 3)}
    assert labels(neurons()) == {"component": ("neuron",), "layer": (0, 1, 2), "unit": tuple(range(48))}
    assert labels(neurons(layer=1, units=3)) == {"component": ("neuron",), "layer": (1,), "unit": (3,)}


def test_heads_of_key_value_kinds_are_fewer() -> None:
    made = resolved(heads(["z", "v"]))
    assert dict(made.dims)["head"] == (0, 1, 2, 3)
    assert sum(cell.index[0] == 0 for cell in made.cells) == 12 and sum(cell.index[0] == 1 for cell in made.cells) == 6


def test_the_embedding_has_one_layer() -> None:
    made = resolved(grid(["embed", "mlp_out"], positions=[0]))
    assert [cell.index for cell in made.cells if cell.edits[0][0].site.kind == "embed"] == [(0, 0, 0)]
    values = interp.patch(loaded("llama_gqa"), pairs_of(5), grid(["embed", "mlp_out"], positions=[0])).values
    assert values.sel(component="embed").isnull().sum() == 2 and not values.sel(component="mlp_out").isnull().any()


def test_transformer_lens_names_make_the_same_plan() -> None:
    assert grid("hook_resid_pre".replace("hook_", "")) == grid("resid_pre")
    assert heads("blocks.0.attn.hook_z") == heads("z", layers=0)
    both = ["blocks.3.hook_attn_out", "blocks.3.mlp.hook_post", "blocks.1.hook_attn_out", "blocks.1.mlp.hook_post"]
    assert grid(both) == grid(["attn_out", "neuron"], layers=[3, 1])


def test_windows_and_named_positions_are_labels() -> None:
    named = {"s": [{"clean": [1, 2], "corrupted": [3, 4]}] * 2}
    assert labels(grid("z", positions={"first": [0, 1], "end": -1}))["position"] == ("first", "end")
    assert labels(grid("z", positions=["s", -1]), pairs=pairs_of(7, 5, positions=named))["position"] == ("s", -1)
    crossed = labels(heads("z", positions=[0, -1]))
    assert list(crossed) == ["component", "layer", "head", "position"]


def test_sets_hold_sites_texts_and_edits() -> None:
    made = resolved(
        sets({"a": ["L0.H1.z", Site("mlp_out", -1, position=3)], "b": [Edit(Site("z", 1, 2), "scale", 0.5)]})
    )
    assert dict(made.dims) == {"component": ("a", "b")}
    assert [edit.site for edit, _ in made.cells[0].edits] == [Site("z", 0, 1), Site("mlp_out", 2, position=3)]
    assert made.cells[1].edits[0][0].op == "scale"


def test_a_plan_is_a_value_that_says_what_it_is() -> None:
    plan = grid(["resid_pre"], layers=[1], positions=["s", 2])
    assert plan == grid(["resid_pre"], layers=[1], positions=["s", 2]) != grid(["resid_pre"], layers=[1])
    assert plan.spec()["components"] == ["resid_pre"] and plan.spec()["positions"] == ["s", 2]
    assert plan.with_edit("add", 2.0).spec()["edit"] == "add" and plan.spec()["edit"] is None


# --- what is refused ---------------------------------------------------------------------------------------

LONG = torch.zeros(3, 32)
MAKING = {
    "an unknown component": (lambda: grid("resid"), SiteError, "unknown component 'resid'; components are: embed"),
    "one among others": (lambda: heads(["z", "zz"]), SiteError, "unknown component 'zz'"),
    "an unknown hook": (lambda: grid("blocks.0.hook_x"), SiteError, "no site for hook"),
    "no component": (lambda: grid([]), PlanError, "given no component"),
    "a component twice": (lambda: grid(["z", "blocks.0.attn.hook_z"]), PlanError, "component twice"),
    "hooks at different layers": (
        lambda: grid(["blocks.3.hook_attn_out", "blocks.1.mlp.hook_post"]),
        PlanError,
        "not the same",
    ),
    "layers twice over": (lambda: grid("blocks.3.hook_attn_out", layers=2), PlanError, "layers=2 is given too"),
    "one head as a component": (lambda: heads("L1.H2.z"), PlanError, "one place; use interp.sets"),
    "layers that are no integers": (lambda: grid("z", layers=[1.5]), PlanError, "whole numbers"),
    "senders twice": (lambda: paths(["L1.H2", "L1.H2"], "logits"), PlanError, "senders twice"),
    "the logits": (lambda: grid("logits"), PlanError, "grid needs one of"),
    "heads of what has none": (lambda: heads("mlp_out"), PlanError, "heads needs one of q, k, v"),
    "units of what has none": (lambda: neurons(1, component="z"), PlanError, "neurons needs one of mlp_pre, neuron"),
    "layers twice": (lambda: grid("z", layers=[1, 1]), PlanError, "layers are given twice"),
    "heads twice": (lambda: heads("z", heads=[1, 1]), PlanError, "heads are given twice"),
    "units twice": (lambda: neurons(1, units=[4, 4]), PlanError, "units are given twice"),
    "positions twice": (lambda: grid("z", positions=[1, 1]), PlanError, "positions are given twice"),
    "an empty window": (lambda: grid("z", positions={"w": []}), PlanError, "positions of 'w' are empty"),
    "two kinds of heads": (lambda: heads(["q", "k"], heads=[0]), PlanError, "cannot share one list"),
    "no set": (lambda: sets({}), PlanError, "given no set"),
    "an empty set": (lambda: sets({"a": []}), PlanError, "set 'a' is empty"),
    "a set of no sites": (lambda: sets({"a": ["mlp 4"]}), SiteError, "cannot read site 'mlp 4'"),
    "an unknown edit": (lambda: Edit(Site("z", 1), "double", 2.0), PlanError, "unknown edit 'double'.*replace, set"),
    "a missing value": (lambda: Edit(Site("z", 1), "add"), PlanError, "needs a value"),
    "a needless value": (lambda: Edit(Site("z", 1), "replace", 1.0), PlanError, "needs no value"),
    "writing logits": (lambda: Edit(Site("logits")), PlanError, "patch 'resid_post' of the last layer"),
}


@pytest.mark.parametrize("name", MAKING)
def test_refused_when_it_is_made(name: str) -> None:
    make, error, message = MAKING[name]
    with pytest.raises(error, match=message) as caught:
        make()
    assert isinstance(caught.value, InterpError)


RESOLVING = {
    "a layer that the model lacks": (grid("z", layers=[3]), SiteError, "layer 3, but .* has layers 0 to 2"),
    "one too far from the end": (grid("z", layers=[-4]), SiteError, "layer -4"),
    "one layer by two names": (grid("z", layers=[-1, 2]), PlanError, r"layers are given twice: \(2, 2\)"),
    "no layers": (grid("z", layers=[]), PlanError, "no cells"),
    "no positions": (grid("z", positions=[]), PlanError, "no cells"),
    "no heads": (heads("z", heads=[]), PlanError, "no cells"),
    "a head": (heads("z", heads=[4]), SiteError, "head 4, but .* has heads 0 to 3"),
    "a negative head": (heads("z", heads=[-1]), SiteError, "head -1"),
    "a key/value head": (heads("v", heads=[2]), SiteError, "key/value heads 0 to 1"),
    "a unit": (neurons(1, units=[48]), SiteError, "unit 48, but .* has units 0 to 47"),
    "a position": (grid("z", positions=[7]), SiteError, "position 7, but the longest prompt has positions 0 to 6"),
    "a negative position": (grid("z", positions=[-8]), SiteError, "position -8, but the longest"),
    "a position for heads": (heads("z", positions=[9]), SiteError, "position 9"),
    "a window": (grid("z", positions={"w": [3, 99]}), SiteError, r"'w' = \(3, 99\), but the longest"),
    "a position in a set": (sets({"a": [Site("z", 1, position=7)]}), SiteError, "L1.z@7: position 7, but the longest"),
    "a layer in a set": (sets({"a": ["L3.z"]}), SiteError, "layer 3"),
    "a name": (grid("z", positions=["subject"]), PlanError, "no position named 'subject'; they have none"),
    "one edit upon another": (
        sets({"a": [Edit(Site("z", 1), "add", 1.0), Site("z", 1, head=2)]}),
        PlanError,
        "set 'a' has 'add' at L1.z and 'replace' at L1.H2.z, which change the same",
    ),
    "a value of the wrong width": (
        sets({"a": [Edit(Site("resid_pre", 1), "set", torch.zeros(5))]}),
        PlanError,
        r"has shape \[5\]; it is a number, \[32\] features",
    ),
    "too few positions": (
        sets({"a": [Edit(Site("mlp_out", 1), "set", LONG)]}),
        PlanError,
        r"\[3, 32\].*\[7, 32\] by pos",
    ),
    "too many dimensions": (sets({"a": [Edit(Site("z", 1), "set", LONG[None])]}), PlanError, r"shape \[1, 3, 32\]"),
    "a value that is none": (sets({"a": [Edit(Site("z", 1), "set", "x")]}), PlanError, "'x', no number or tensor"),
    "NaN": (sets({"a": [Edit(Site("z", 1), "set", float("nan"))]}), PlanError, "holds NaN or infinity"),
}


@pytest.mark.parametrize("name", RESOLVING)
def test_refused_for_a_model_and_pairs_before_the_model_runs(name: str) -> None:
    plan, error, message = RESOLVING[name]
    forwards, stop = count_forwards(loaded("llama_gqa"))
    with pytest.raises(error, match=message):
        interp.patch(loaded("llama_gqa"), pairs_of(7, 5), plan)
    stop()
    assert not forwards


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        ("gptj", grid(["resid_pre", "resid_mid"])),
        ("mixtral", neurons(0)),
        ("mixtral", grid("mlp_pre")),
        ("bloom", heads("q_rot")),
        ("falcon", sets({"a": ["L0.H0.k_rot"]})),
    ],
)
def test_sites_that_an_architecture_lacks(family: str, plan: Plan) -> None:
    forwards, stop = count_forwards(loaded(family))
    with pytest.raises(SiteUnavailableError, match=" have no "):
        interp.patch(loaded(family), pairs_of(7), plan)
    stop()
    assert not forwards


def unaligned(subject: dict[str, list[int]]) -> PromptPairs:
    return PromptPairs(words(7, 6), words(7, 5), [20, 21], [30, 31], positions={"s": [subject] * 2})


@pytest.mark.parametrize(
    "plan",
    [
        grid("z"),
        grid("z", positions=[-1]),
        grid("z", positions={"w": [0]}),
        heads("z"),
        neurons(1),
        sets({"a": ["L1.z"]}),
    ],
)
def test_prompts_of_unequal_length_are_shown_side_by_side(plan: Plan) -> None:
    model = loaded("llama_gqa")
    forwards, stop = count_forwards(model)
    with pytest.raises(PairsError, match="pair 1 has 6 clean and 5 corrupted tokens") as caught:
        interp.patch(model, unaligned({"clean": [2], "corrupted": [3]}), plan)
    stop()
    assert not forwards
    first, second = (model.tokenizer.convert_ids_to_tokens(prompt) for prompt in (words(7, 6)[1], words(7, 5)[1]))
    assert repr(first[0]) in str(caught.value) and repr(second[-1]) in str(caught.value)
    assert 'positions={"subject"' in str(caught.value)


@pytest.mark.parametrize("family", ["llama_gqa", "bloom"])
def test_a_pattern_is_patched_at_one_position_of_aligned_prompts_only(family: str) -> None:
    model, plan = loaded(family), grid("pattern", positions=["s"])
    with pytest.raises(PairsError, match="patching a pattern goes position by position"):
        interp.patch(model, unaligned({"clean": [2], "corrupted": [2]}), plan)
    shifted = pairs_of(7, positions={"s": [{"clean": [2], "corrupted": [3]}]})
    with pytest.raises(PlanError, match=r"'s' of pair 0 is at \(2,\) and at \(3,\)"):
        interp.patch(model, shifted, plan)
    both = pairs_of(7, positions={"s": [[2, 3]]})
    assert interp.patch(model, both, plan).values.notnull().all()


def test_named_positions_are_as_many_in_both_prompts() -> None:
    with pytest.raises(PairsError, match=r"'s' of pair 0 is 2 tokens in the clean prompt .* and 1 in the corrupted"):
        interp.patch(loaded("gpt2"), unaligned({"clean": [2, 3], "corrupted": [3]}), grid("z", positions=["s"]))
