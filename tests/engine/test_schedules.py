"""Every schedule against the naive one: all families, any chunks, shared prefixes, sets, constants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, GPTQConfig

import interp
from interp import PromptPairs, Site
from interp.edits import Edit
from interp.engine.schedule import choose_schedule
from interp.errors import PlanError
from tests.families import D_VOCAB, SUPPORTED, has, loaded, oracle_of, words
from tests.oracle.hooks import Patch

FAST = ("rows", "growing", "prefix")
DIRECTIONS = ("noising", "denoising")
every_family = pytest.mark.parametrize("family", SUPPORTED)
in_both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
#: Weighs every logit, so that no change of any of them can hide.
WEIGHTS = torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(7)) / D_VOCAB**0.5


def weighed(logits: Tensor, batch: object) -> Tensor:
    """A metric that depends on all logits."""
    return logits @ WEIGHTS


def pairs_of(*lengths: int, differ: int = 3) -> PromptPairs:
    """Aligned pairs that share their first `differ` tokens (a shorter pair differs at its end only)."""
    clean = words(*lengths)
    corrupted = [list(prompt) for prompt in clean]
    for prompt, new in zip(corrupted, words(*lengths, seed=5), strict=True):
        at = min(differ, len(prompt) - 1)
        prompt[at:] = new[at:]
    return PromptPairs(clean, corrupted, answers=[20 + i for i in range(len(lengths))])


def runs(model, pairs, plan, direction="noising", metric=weighed, schedules=("naive", *FAST), **options):
    """The same effects by each schedule; the first is the reference."""
    return [interp.patch(model, pairs, plan, metric, direction, schedule=schedule, **options) for schedule in schedules]


def assert_same(effects: list, tolerance: float = 1e-5) -> None:
    """All of them equal the first, and the first moves something."""
    naive = effects[0]
    scale = max(1.0, float(abs(naive.values).max()), float(abs(naive.base).max()))
    assert float(abs(naive.values - naive.base).max()) > 0.01 * scale
    for other in effects[1:]:
        assert bool((other.values.isnull() == naive.values.isnull()).all())
        for part in ("values", "base", "source"):
            error = float(abs(getattr(other, part) - getattr(naive, part)).max())
            assert error <= tolerance * scale, f"{other.provenance['schedule']}: {part} off by {error:.2e}"


@in_both_directions
@every_family
def test_all_schedules_agree(family: str, direction: str) -> None:
    """Pairs of two lengths; at most 60 tokens a forward pass, so that chunks end in the middle of a layer.

    The naive schedule, a pass for each cell, runs one position of one layer: in the middle of one pair, the other's last.
    """
    model, pairs = loaded(family), pairs_of(8, 5)
    kinds = [kind for kind in has(family) if kind not in ("q", "k_rot", "mlp_pre", "resid_post")]
    plan = interp.grid(kinds, layers=[1, 2], positions=[1, 4, -1])
    fast = runs(model, pairs, plan, direction, schedules=FAST, max_tokens=60)
    assert_same(fast)
    (naive,) = runs(model, pairs, interp.grid(kinds, layers=[1], positions=[4]), direction, schedules=["naive"])
    assert_same([naive, *(replace(made, values=made.values.sel(layer=[1], position=[4])) for made in fast)])
    assert naive.provenance["forwards"] == naive.values.notnull().sum()
    assert all(made.provenance["forwards"] < made.values.notnull().sum() / 4 for made in fast)


HEADS = interp.heads(["z", "v"], layers=[0, 2])


@cache
def heads_one_by_one(family: str) -> interp.Effects:
    """`HEADS` by the naive schedule."""
    return runs(loaded(family), pairs_of(6, 9), HEADS, schedules=["naive"])[0]


@pytest.mark.parametrize("max_tokens", [1, 33, 100, 4000])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom", "qwen3_moe"])
def test_the_size_of_a_forward_pass_changes_nothing(family: str, max_tokens: int) -> None:
    fast = runs(loaded(family), pairs_of(6, 9), HEADS, max_tokens=max_tokens, schedules=FAST)
    assert_same([heads_one_by_one(family), *fast])


@in_both_directions
@pytest.mark.parametrize("schedule", ["naive", *FAST, "auto"])
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3", "bloom"])
def test_cells_before_the_first_difference_equal_the_base(family: str, schedule: str, direction: str) -> None:
    pairs = pairs_of(9, 7, differ=4)
    effects = interp.patch(
        loaded(family), pairs, interp.grid(["resid_pre", "mlp_out"]), weighed, direction, schedule=schedule
    )
    early, late = effects.values.sel(position=slice(0, 3)), effects.values.sel(position=slice(4, 6))
    if schedule == "prefix":  # known by causality, not run
        assert bool((early == effects.base).all())
    else:
        assert float(abs(early - effects.base).max()) <= 1e-5 * max(1.0, float(abs(effects.base).max()))
    assert float(abs(late - effects.base).min(["component", "layer"]).max()) > 1e-3


def test_positions_behind_the_answer_are_not_run_and_equal_the_base() -> None:
    clean, corrupted = words(8), words(8, seed=9)
    pairs = PromptPairs(clean, corrupted, answers=[20], answer_positions=4)
    naive, prefix = runs(loaded("llama"), pairs, interp.grid("attn_out"), schedules=["naive", "prefix"])
    assert_same([naive, prefix])
    assert bool((prefix.values.sel(position=slice(5, None)) == prefix.base).all())
    assert float(abs(prefix.values.sel(position=4) - prefix.base).max()) > 0.01


@in_both_directions
@pytest.mark.parametrize("schedule", ["naive", *FAST])
def test_identical_prompts_move_nothing(schedule: str, direction: str) -> None:
    """One pair of equal prompts between two that differ."""
    clean = words(7, 7, 7)
    corrupted = [words(7, seed=3)[0], clean[1], words(7, seed=4)[0]]
    pairs = PromptPairs(clean, corrupted, answers=[20, 21, 22])
    plan = interp.grid(["resid_pre", "z"])
    effects = interp.patch(loaded("qwen3"), pairs, plan, weighed, direction, schedule=schedule)
    moved = abs(effects.values - effects.base).max(["component", "layer", "position"])
    assert float(moved[1]) <= 1e-5
    assert float(moved[0]) > 0.01 < float(moved[2])
    alone = interp.patch(loaded("qwen3"), pairs[[1]], plan, weighed, direction, schedule=schedule)
    assert float(abs(alone.values - alone.base).max()) <= 1e-5
    assert float(abs(alone.values - effects.values[..., [1]].values).max()) <= 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "bloom", "phi3"])
def test_in_bf16(family: str) -> None:
    """Within 4 · 2⁻⁸ (bf16's precision) of the largest logit: each schedule rounds sums of its own shape."""
    model = loaded(family, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    kinds = [kind for kind in ("resid_pre", "attn_out", "mlp_out", "pattern", "z") if kind in has(family)]
    pairs = pairs_of(8, 6)
    plan = interp.grid(kinds, layers=[0, 2], positions=[3, -1])

    def answer(logits: Tensor, batch: object) -> Tensor:
        return logits.gather(1, batch["answers"][:, None])[:, 0]  # type: ignore[index]

    def largest(logits: Tensor, batch: object) -> Tensor:
        return logits.abs().max(1).values

    effects = runs(model, pairs, plan, metric=answer, max_tokens=60)
    scale = float(runs(model, pairs, plan, metric=largest, schedules=["rows"])[0].values.max())
    for other in effects[1:]:
        assert float(abs(other.values - effects[0].values).max()) <= 4 * 2**-8 * scale
    exact = interp.patch(loaded(family), pairs, plan, answer)
    far = float(abs(effects[0].values - exact.values).max())
    assert 0 < far < 16 * 2**-8 * scale  # the numbers are those of the fp32 model


def test_reads_and_edits_in_bf16_do_not_turn_into_fp32() -> None:
    model = loaded("llama_gqa", dtype=torch.bfloat16)
    plan = interp.sets({"two": [Edit(Site("mlp_out", 1), "set", torch.randn(32)), Site("z", 1, 0)]})
    effects = interp.patch(model, pairs_of(6), plan, weighed)
    assert effects.provenance["dtype"] == "bfloat16"
    assert bool(effects.values.notnull().all())


# --- several edits in one cell -----------------------------------------------------------------------------


def check_sets(family: str, direction: str, members: dict, patches: dict, pairs: PromptPairs) -> None:
    """Each set by each schedule, against the oracle with the same patches, built from a pair's source."""
    model, oracle = loaded(family), oracle_of(family)
    effects = runs(model, pairs, interp.sets(members), direction, max_tokens=70)
    assert_same(effects)
    assert effects[0].values.dims == ("component", "pair")
    for pair in range(len(pairs)):
        sides = [list(pairs.clean[pair]), list(pairs.corrupted[pair])]  # type: ignore[index]
        base, source = sides if direction == "noising" else sides[::-1]
        for name, build in patches.items():
            want = oracle.run(base, build(partial(oracle.read, source)))[-1] @ WEIGHTS
            got = float(effects[-1].values.sel(component=name)[pair])
            assert got == pytest.approx(float(want), abs=1e-5 * max(1.0, abs(float(want)))), name


@in_both_directions
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "bloom", "falcon_new", "mixtral", "opt"])
def test_sets_of_sites_are_patched_together(family: str, direction: str) -> None:
    members = {
        "heads": ["L0.H1.z", "L2.H3.z", "L1.H0.v"],
        "mixed": [Site("mlp_out", 0, position=3), Site("attn_out", 2), Site("resid_pre", 1, position=-1)],
        "embedding": [Site("embed", position=2), Site("mlp_out", 2)],
        "last": [Site("resid_post", 2, position=-1), Site("z", 0, 0)],
        "pattern and values": [Site("pattern", 1, 2), Site("v", 1, 0), Site("q", 2, 1)],
    }
    patches = {
        "heads": lambda of: [
            Patch("z", 0, of("z", 0), head=1),
            Patch("z", 2, of("z", 2), head=3),
            Patch("v", 1, of("v", 1), head=0),
        ],
        "mixed": lambda of: [
            Patch("mlp_out", 0, of("mlp_out", 0), (3,)),
            Patch("attn_out", 2, of("attn_out", 2)),
            Patch("resid_pre", 1, of("resid_pre", 1), (-1,)),
        ],
        "embedding": lambda of: [
            Patch("embed", 0, of("embed", 0), (2,)), Patch("mlp_out", 2, of("mlp_out", 2))
        ],
        "last": lambda of: [
            Patch("resid_post", 2, of("resid_post", 2), (-1,)), Patch("z", 0, of("z", 0), head=0)
        ],
        "pattern and values": lambda of: [
            Patch("pattern", 1, of("pattern", 1), head=2),
            Patch("v", 1, of("v", 1), head=0),
            Patch("q", 2, of("q", 2), head=1),
        ],
    }  # fmt: skip
    check_sets(family, direction, members, patches, pairs_of(7, 5, differ=0))


@in_both_directions
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3", "bloom", "phi3", "opt"])
def test_constants(family: str, direction: str) -> None:
    """Numbers and vectors that are set, added or multiplied, at one position or all, beside a replacement."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    members = {
        "zero": [Edit(Site("attn_out", 1), "set", 0.0)],
        "a neuron": [
            Edit(Site("neuron", 1, unit=7), "set", 3.0),
            Edit(Site("neuron", 2, unit=9), "add", -2.0),
        ],
        "steer": [
            Edit(Site("resid_post", 1), "add", vector),
            Edit(Site("resid_pre", 0, position=-1), "add", vector),
        ],
        "by position": [Edit(Site("mlp_out", 0), "set", rows)],
        "one row": [Edit(Site("mlp_out", 0, position=2), "set", rows)],
        "half": [
            Edit(Site("z", 0, 2), "scale", 0.5),
            Edit(Site("v", 2, 1), "scale", -1.0),
            Site("mlp_out", 1),
        ],
        "negative position": [Edit(Site("resid_mid", 1, position=-2), "set", vector)],
        "embedding": [Edit(Site("embed", position=1), "scale", 2.0)],
    }
    patches = {
        "zero": lambda of: [Patch("attn_out", 1, op="zero")],
        "a neuron": lambda of: [Patch("neuron", 1, 3.0, unit=7), Patch("neuron", 2, -2.0, unit=9, op="add")],
        "steer": lambda of: [
            Patch("resid_post", 1, vector, op="add"), Patch("resid_pre", 0, vector, (-1,), op="add")
        ],
        "by position": lambda of: [Patch("mlp_out", 0, rows)],
        "one row": lambda of: [Patch("mlp_out", 0, rows[2], (2,))],
        "half": None,
        "negative position": lambda of: [Patch("resid_mid", 1, vector, (-2,))],
        "embedding": None,
    }  # fmt: skip
    oracle = oracle_of(family)
    pairs = pairs_of(5, 5, differ=1)

    for pair in (0, 1):
        base = pairs.clean[pair] if direction == "noising" else pairs.corrupted[pair]  # type: ignore[index]
        v_of = [Patch("z", 0, 0.5 * oracle.read(base, "z", 0), head=2)]
        patches["half"] = lambda of, v_of=v_of, base=base: [
            *v_of,
            Patch("mlp_out", 1, of("mlp_out", 1)),
            Patch("v", 2, -oracle.read(base, "v", 2, [*v_of, Patch("mlp_out", 1, of("mlp_out", 1))]), head=1),
        ]
        patches["embedding"] = lambda of, base=base: [Patch("embed", 0, 2 * oracle.read(base, "embed"), (1,))]
        check_sets(family, direction, members, patches, pairs[[pair]])


def test_one_operation_for_a_whole_plan() -> None:
    """`with_edit` turns any plan into one of constants, here without a use for the source run."""
    plan = interp.heads("z", layers=[1]).with_edit("set", 0.0)
    effects = runs(loaded("gpt2"), pairs_of(7, differ=0), plan, max_tokens=30)
    assert_same(effects)
    oracle, clean = oracle_of("gpt2"), pairs_of(7, differ=0).clean[0]
    for head in range(4):
        want = oracle.run(clean, [Patch("z", 1, head=head, op="zero")])[-1] @ WEIGHTS
        assert float(effects[-1].values.sel(layer=1, head=head)[0, 0]) == pytest.approx(float(want), abs=1e-5)


# --- what is scored ----------------------------------------------------------------------------------------


@in_both_directions
@pytest.mark.parametrize("schedule", ["naive", *FAST])
def test_answers_elsewhere_than_at_the_end_sets_of_answers_and_each_pairs_own_values(
    schedule: str, direction: str
) -> None:
    clean, corrupted = words(8, 6, 8), words(8, 6, 8, seed=6)
    answers, distractors = [[20, 31, 44], [25], [50, 51]], [33, [12, 13], [60]]
    at = [5, -1, -2]
    pairs = PromptPairs(clean, corrupted, answers, distractors, answer_positions=at)
    plan = interp.grid("resid_pre", layers=[1], positions=[0, 3, 5])
    oracle = oracle_of("llama_gqa")
    effects = interp.patch(loaded("llama_gqa"), pairs, plan, direction=direction, schedule=schedule, max_tokens=50)

    def score(logits: Tensor, pair: int) -> float:
        row = logits[at[pair]]
        right, wrong = ([*(x if isinstance(x, list) else [x])] for x in (answers[pair], distractors[pair]))
        return float(row[right].mean() - row[wrong].mean())

    for pair in range(3):
        base, source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
        assert float(effects.base[pair]) == pytest.approx(score(oracle.run(base[pair]), pair), abs=1e-5)
        assert float(effects.source[pair]) == pytest.approx(score(oracle.run(source[pair]), pair), abs=1e-5)
        for position in (0, 3, 5):
            patched = oracle.patched(base[pair], source[pair], "resid_pre", 1, positions=[position])
            got = float(effects.values.sel(position=position)[0, 0, pair])
            assert got == pytest.approx(score(patched, pair), abs=1e-5)


@in_both_directions
def test_every_metric_sees_the_clean_and_the_corrupted_run_of_its_own_pair(direction: str) -> None:
    """KL is measured from the clean run, in either direction and by every schedule."""
    pairs, oracle = pairs_of(8, 5, 8), oracle_of("gpt2")
    effects = runs(
        loaded("gpt2"),
        pairs,
        interp.grid("mlp_out", positions=[3, -1]),
        direction,
        metric=interp.kl,
        max_tokens=60,
    )
    for made in effects:
        for pair in range(3):
            clean = oracle.run(pairs.clean[pair])[-1].log_softmax(-1)
            base, source = pairs.clean[pair], pairs.corrupted[pair]  # type: ignore[index]
            if direction == "denoising":
                base, source = source, base
            patched = oracle.patched(base, source, "mlp_out", 0, positions=[3])[-1].log_softmax(-1)
            want = float((clean.exp() * (clean - patched)).sum())
            assert float(made.values.sel(layer=0, position=3)[0, pair]) == pytest.approx(want, abs=1e-5)
            assert float(made.clean[pair]) == pytest.approx(0, abs=1e-6)


def test_a_schedule_that_does_not_exist() -> None:
    with pytest.raises(PlanError, match="unknown schedule 'fast'"):
        interp.patch(loaded("gpt2"), pairs_of(6), interp.grid("z"), weighed, schedule="fast")


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3"])
def test_a_constant_makes_positions_differ_that_the_prompts_share(family: str) -> None:
    """Behind a constant, a replacement before the first difference restores what the constant changed."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    steer = Edit(Site("resid_pre", 0, position=0), "add", vector)
    members = {
        "restored at once": [steer, Site("resid_pre", 1, position=0)],
        "steered": [steer],
        "a part restored": [steer, Site("mlp_out", 0, position=0)],
    }
    pairs = pairs_of(7, differ=4)
    effects = runs(loaded(family), pairs, interp.sets(members), max_tokens=60)
    assert_same(effects)
    moved = abs(effects[0].values - effects[0].base)[:, 0]
    assert float(moved[1]) > 0.01 and float(abs(moved[2] - moved[1])) > 1e-3


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (None, "prefix"),
        (BitsAndBytesConfig(load_in_8bit=True), "naive"),
        (BitsAndBytesConfig(load_in_4bit=True), "prefix"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "naive"),
        ({"quant_method": "gptq", "bits": 4}, "prefix"),
        (GPTQConfig(bits=4), "prefix"),
        ({"quant_method": "a new one"}, "naive"),
    ],
    ids=str,
)
def test_rows_stay_apart_where_activations_are_quantised(
    config: object, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("gpt2")
    monkeypatch.setattr(model.hf.config, "quantization_config", config, raising=False)
    assert choose_schedule(model, "auto") == schedule
    assert choose_schedule(model, "growing") == "growing"  # what is named is run


def agree(
    model: interp.Model, pairs: PromptPairs, plan: interp.Plan, direction: str, moves: bool = True, **options: object
) -> None:
    """Every schedule gives the naive one's values and runs, and the patches move something, or nothing."""
    naive = interp.patch(model, pairs, plan, schedule="naive", direction=direction, **options)
    scale = 1e-5 * max(1.0, float(abs(naive.values).max()))
    for schedule in FAST:
        found = interp.patch(model, pairs, plan, schedule=schedule, direction=direction, **options)
        for part in ("values", "clean", "corrupted"):
            one, other = (getattr(effects, part).values for effects in (found, naive))
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=scale)
    assert (float(abs(naive.values - naive.base).max()) > 1e-2) is moves


@in_both_directions
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "bloom"])
def test_a_name_that_stands_before_the_first_difference_takes_another_position(family: str, direction: str) -> None:
    clean, other = words(8, 8)
    corrupted = [*clean[:3], *other[3:]]
    for here, there in ((1, 4), (0, 2), (4, 1)):
        named = {"s": [{"clean": here, "corrupted": there}]}
        pairs = PromptPairs([clean], [corrupted], [20], [33], positions=named)
        agree(loaded(family), pairs, interp.grid("resid_pre", positions=["s"]), direction)


@in_both_directions
@pytest.mark.parametrize("metric", [interp.logit_diff, interp.kl])
def test_answers_of_two_prompts_at_different_distances_from_their_ends(metric: object, direction: str) -> None:
    short, long = words(5), words(9, seed=3)
    for here, there in ((2, 6), (4, 8), (3, 3)):
        named = {"s": [{"clean": here, "corrupted": there}]}
        pairs = PromptPairs(short, long, [20], [33], positions=named, answer_positions=[4])
        moves = (here if direction == "noising" else there) <= 4  # not behind the answer
        agree(loaded("gpt2"), pairs, interp.grid("resid_pre", positions=["s"]), direction, moves, metric=metric)
