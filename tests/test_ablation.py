"""`interp.ablate` against plain hooks: constants made by reading every reference prompt, one forward per number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from interp import PromptPairs, Site, grid, heads, neurons, patch, sets
from interp.ablation import MODES, ablate
from interp.edits import Edit
from interp.errors import PairsError, PlanError
from interp.plan import paths
from tests.families import HEAD_KINDS, UNIT_KINDS, activation, allowed, has, loaded, oracle_of, words
from tests.oracle.hooks import Patch

ANSWERS, DISTRACTORS = (20, 41, 7), (33, 12, 9)
#: Fused, split and grouped projections, post-norms, parallel blocks, experts, a flattened MLP, an eager pattern.
CASES = ("gpt2", "llama_gqa", "gemma2", "gpt_neox", "opt", "phi3", "falcon_new", "mixtral")
every_case = pytest.mark.parametrize("family", CASES)


def clean_pairs(*lengths: int, seed: int = 0) -> PromptPairs:
    prompts = words(*lengths, seed=seed)
    return PromptPairs(prompts, None, ANSWERS[: len(prompts)], DISTRACTORS[: len(prompts)])


def score(logits: Tensor, pair: int) -> float:
    return float(logits[-1, ANSWERS[pair]] - logits[-1, DISTRACTORS[pair]])


def averages(family: str, prompts: list[list[int]], kind: str, layer: int, by_position: bool) -> Tensor:
    """The mean over prompts and positions, or over the prompts that have each position, in double precision."""
    # the mean of a head's output is made from z here as everywhere: means commute with a matrix
    read = [activation(family, prompt, kind, layer).double() for prompt in prompts]
    if not by_position:
        return torch.cat(read).mean(0, keepdim=True).float()
    rows = [[part[p] for part in read if len(part) > p] for p in range(max(map(len, read)))]
    return torch.stack([torch.stack(row).mean(0) for row in rows]).float()


class Loop:
    """The naive loop: numbers of the library, each beside the run of the oracle that must give it."""

    def __init__(self, family: str) -> None:
        self.oracle = oracle_of(family)
        self.noted: list[tuple[float, list[int], int, list[Patch]]] = []

    def check(self, got: float, prompt: list[int], pair: int, patches: list[Patch]) -> None:
        """Note one number; `compare` holds it to its run."""
        self.noted.append((got, prompt, pair, patches))

    def compare(self) -> dict[str, float]:
        """Compare all that was noted; by kind of the first patch, how far the edits moved a number at most."""
        base = {prompt: self.oracle.run(prompt) for prompt in {tuple(prompt) for _, prompt, *_ in self.noted}}
        runs = self.oracle.run_all((prompt, patches) for _, prompt, _, patches in self.noted)
        moved: dict[str, float] = {}
        for (got, prompt, pair, patches), logits in zip(self.noted, runs, strict=True):
            kind = patches[0].kind
            if not abs(got - score(logits, pair)) <= 2 * allowed(
                logits
            ):  # alone, if the rows beside it round another way
                logits = self.oracle.run(prompt, patches)
            assert abs(got - score(logits, pair)) <= 2 * allowed(logits), (kind, patches[0].layer, pair)
            moved[kind] = max(moved.get(kind, 0.0), abs(got - score(base[tuple(prompt)], pair)))
        return moved


@pytest.mark.parametrize("mode", ["zero", "mean", "positional_mean"])
@every_case
def test_positions(family: str, mode: str) -> None:
    """Every kind at single positions, in pairs of two lengths, over references of other lengths."""
    model, loop = loaded(family), Loop(family)
    kinds = [kind for kind in has(family) if kind != "pattern" or mode == "zero"]
    if mode == "zero" and model.family.post_attn:  # a norm of zeros up to rounding is no number to compare
        kinds.remove("head_out")
    pairs, references = clean_pairs(9, 6), words(9, 4, 11, seed=5)
    given = {} if mode == "zero" else {"reference": references}
    effects = ablate(model, pairs, grid(kinds, layers=[0, 2], positions=[1, -1]), mode, **given)
    assert effects.corrupted is None and effects.direction is None
    for kind in kinds:
        for layer in [0] if kind == "embed" else [0, 2]:
            mean = averages(family, references, kind, layer, mode == "positional_mean") if given else 0.0
            for position in (1, -1):
                cell = effects.values.sel(component=kind, layer=layer, position=position)
                for pair, prompt in enumerate(pairs.clean):
                    at = position % len(prompt)
                    value = mean[at if mode == "positional_mean" else 0] if isinstance(mean, Tensor) else 0.0
                    loop.check(float(cell[pair]), prompt, pair, [Patch(kind, layer, value, (at,))])
    moved = loop.compare()
    assert min(moved.values()) > 0.001, moved


@pytest.mark.parametrize("mode", ["zero", "mean", "positional_mean"])
@every_case
def test_heads_at_all_positions(family: str, mode: str) -> None:
    model, loop = loaded(family), Loop(family)
    kinds = [k for k in has(family) if k in HEAD_KINDS and (k != "pattern" or mode == "zero")]
    pairs = clean_pairs(9, 6)
    effects = ablate(model, pairs, heads(kinds, layers=1), mode)  # over the pairs' own prompts
    for kind in kinds:
        by_position = mode == "positional_mean"
        mean = averages(family, list(pairs.clean), kind, 1, by_position) if mode != "zero" else 0.0
        for head in range(model.heads_of(kind)):
            for pair, prompt in enumerate(pairs.clean):
                value = mean[: len(prompt)] if isinstance(mean, Tensor) else 0.0
                got = float(effects.values.sel(component=kind, layer=1, head=head)[pair])
                loop.check(got, prompt, pair, [Patch(kind, 1, value, head=head)])
    loop.compare()


@pytest.mark.parametrize("schedule", ["naive", "rows", "growing", "prefix"])
@pytest.mark.parametrize("mode", ["zero", "mean", "positional_mean"])
def test_units_and_schedules(mode: str, schedule: str) -> None:
    """Small chunks, so that rows join, layers are skipped and prefixes reused in every schedule that does so."""
    for family in ("phi3", "opt"):
        model, loop, pairs = loaded(family), Loop(family), clean_pairs(9, 6)
        for kind in UNIT_KINDS:
            plan = neurons(layer=[1, 2], units=[0, 5, 47], component=kind, positions=[-2])
            effects = ablate(model, pairs, plan, mode, schedule=schedule, max_tokens=60)
            for layer in (1, 2):
                mean = averages(family, list(pairs.clean), kind, layer, mode == "positional_mean")
                for unit in (0, 5, 47):
                    for pair, prompt in enumerate(pairs.clean):
                        at = len(prompt) - 2
                        value = mean[at if mode == "positional_mean" else 0] if mode != "zero" else 0.0
                        got = float(effects.values.sel(layer=layer, unit=unit)[0, 0, pair])
                        loop.check(got, prompt, pair, [Patch(kind, layer, value, (at,), unit=unit)])
        loop.compare()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_sets_are_ablated_together(family: str) -> None:
    model, loop, pairs = loaded(family), Loop(family), clean_pairs(9, 6)
    named = {"two": ["L0.H1", Site("attn_out", layer=1, position=-1), Edit(Site("mlp_out", layer=2), "scale", 3.0)]}
    for mode in ("zero", "mean", "positional_mean"):
        effects = ablate(model, pairs, sets(named), mode)
        assert effects.values.dims == ("component", "pair")
        for pair, prompt in enumerate(pairs.clean):
            patches = []
            for kind, layer, more in (
                ("head_out", 0, {"head": 1}),
                ("attn_out", 1, {"positions": (len(prompt) - 1,)}),
                ("mlp_out", 2, {}),
            ):
                mean = averages(family, list(pairs.clean), kind, layer, mode == "positional_mean")
                mean = mean[: len(prompt)] if mode == "positional_mean" else mean
                patches.append(Patch(kind, layer, 0.0 if mode == "zero" else mean, **more))
            loop.check(float(effects.values[0, pair]), prompt, pair, patches)
    loop.compare()


def test_resample_takes_one_seeded_prompt_per_pair() -> None:
    model, oracle = loaded("llama_gqa"), oracle_of("llama_gqa")
    pairs, references = clean_pairs(9, 6, 9), words(9, 6, 9, 6, 9, 4, seed=3)
    plan = grid(["resid_pre", "z", "pattern"], layers=[1], positions=[-1, 3])
    effects = ablate(model, pairs, plan, "resample", reference=references, seed=4)
    drawn = effects.provenance["prompts"]["corrupted"]
    for pair, (prompt, other) in enumerate(zip(pairs.clean, drawn, strict=True)):
        assert other in references and len(other) == len(prompt)
        assert float(effects.corrupted[pair]) == pytest.approx(score(oracle.run(other), pair), abs=1e-4)
        for kind in ("resid_pre", "z", "pattern"):
            value = oracle.read(other, kind, 1)
            for position in (-1, 3):
                got = float(effects.values.sel(component=kind, layer=1, position=position)[pair])
                loop = Loop("llama_gqa")
                loop.check(got, prompt, pair, [Patch(kind, 1, value, (position % len(prompt),))])
                assert loop.compare()[kind] > 0.001 or kind == "pattern" or position == 3
    again = ablate(model, pairs, plan, "resample", reference=references, seed=4)
    assert bool((again.values == effects.values).all())
    draws = {
        str(ablate(model, pairs, grid("z", 2, -1), "resample", references, seed=s).provenance["prompts"]["corrupted"])
        for s in range(8)
    }
    assert len(draws) > 2


def test_resample_among_the_pairs_never_takes_the_pair_itself() -> None:
    pairs = clean_pairs(7, 7, 7)
    for seed in range(6):
        effects = ablate(loaded("gpt2"), pairs, grid("mlp_out", 0, -1), "resample", seed=seed)
        for own, other in zip(pairs.clean, effects.provenance["prompts"]["corrupted"], strict=True):
            assert list(own) != other and tuple(other) in pairs.clean


def test_named_positions_in_pairs_whose_prompts_differ_in_length() -> None:
    """The corrupted prompts play no part, so that their length does not matter."""
    model, loop = loaded("gpt2"), Loop("gpt2")
    spans = [{"clean": [1, 2], "corrupted": [4]}, {"clean": [3], "corrupted": [0]}]
    pairs = PromptPairs(words(9, 6), words(7, 8, seed=1), (20, 41), (33, 12), positions={"subject": spans})
    effects = ablate(model, pairs, grid("attn_out", [1], ["subject"]), "mean")
    mean = averages("gpt2", list(pairs.clean), "attn_out", 1, False)
    for pair, prompt in enumerate(pairs.clean):
        patches = [Patch("attn_out", 1, mean, tuple(spans[pair]["clean"]))]
        loop.check(float(effects.values[0, 0, 0, pair]), prompt, pair, patches)
    loop.compare()
    effects = ablate(model, clean_pairs(6, 6), grid("attn_out", [1], [-1]), "resample")
    assert not math.isnan(float(effects.normalized[0, 0, 0, 0]))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_counterfactual_is_patching(direction: str) -> None:
    model = loaded("gpt2")
    pairs = PromptPairs(words(9, 6), words(9, 6, seed=1), (20, 41), (33, 12))
    plan = grid(["resid_pre", "z"], positions=[2, -1])
    ours = ablate(model, pairs, plan, "counterfactual", direction=direction)
    theirs = patch(model, pairs, plan, direction=direction)
    assert bool((ours.values == theirs.values).all()) and ours.direction == direction
    assert ours.provenance["method"] == "ablate" and ours.provenance["mode"] == "counterfactual"


def test_what_is_refused() -> None:
    model, pairs = loaded("gpt2"), clean_pairs(9, 6)
    plan = grid("z", positions=[-1])
    with pytest.raises(PlanError, match=r"unknown ablation 'average'.*positional_mean"):
        ablate(model, pairs, plan, "average")
    for mode in ("mean", "positional_mean"):
        with pytest.raises(PlanError, match="mean attention pattern is not defined"):
            ablate(model, pairs, heads("pattern"), mode)
    with pytest.raises(PlanError, match="use path_patch"):
        ablate(model, pairs, paths("embed", "logits"))
    with pytest.raises(PlanError, match="uses no reference"):
        ablate(model, pairs, plan, "zero", reference=words(5))
    with pytest.raises(PlanError, match="no second run, so no direction"):
        ablate(model, pairs, plan, "mean", direction="denoising")
    with pytest.raises(PlanError, match="no corrupted prompts"):
        ablate(model, pairs, plan, "counterfactual")
    with pytest.raises(PairsError, match=r"position 5 is needed \(the longest pair has 9 tokens\)"):
        ablate(model, pairs, plan, "positional_mean", reference=words(5, 3))
    with pytest.raises(PairsError, match=r"pair 0.* 9 tokens.*lengths \[6, 9\]"):
        ablate(model, pairs, plan, "resample")
    assert len(MODES) == 5
