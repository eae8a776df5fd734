"""`interp.path_patch` against path patching in three passes with plain hooks, on every family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import interp
from interp import Effects, Model, PromptPairs, Site
from interp.errors import PairsError, PlanError, SiteError
from interp.paths import path_patch
from tests.families import SUPPORTED, allowed, loaded, oracle_of, words
from tests.oracle import edges

DIRECTIONS = ("noising", "denoising")
ANSWERS, DISTRACTORS = (20, 41), (33, 12)
SENDERS = ("embed", "L0.H1", "L0.mlp", "L1.H2@4")
#: Classical, grouped-query with two norms, parallel, post-norm only, one key/value head, ALiBi.
SOME = ("gpt2", "gemma2", "gpt_neox", "olmo2", "falcon", "bloom")
every_family = pytest.mark.parametrize("family", SUPPORTED)
in_both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
directly_or_through_mlps = pytest.mark.parametrize("through_mlps", [False, True], ids=["direct", "mlps"])


def receivers(model: Model) -> tuple[str, ...]:
    return ("L1.H0.q", "L2.H0.k", f"L2.H{model.n_kv_heads - 1}.v", "L1.mlp@4", "L2.mlp", "logits")


def pairs_of(*differ: int, lengths: tuple[int, ...] = (7, 5)) -> PromptPairs:
    """Pairs of two lengths, so that batches are padded, which differ from a position of their own on."""
    clean = words(*lengths)
    other = words(*lengths, seed=5)
    corrupted = [c[:at] + o[at:] for c, o, at in zip(clean, other, differ, strict=True)]
    return PromptPairs(clean, corrupted, ANSWERS[: len(lengths)], DISTRACTORS[: len(lengths)])


def by_hand(
    family: str, pairs: PromptPairs, pair: int, direction: str, senders: Sequence[str], ends: Sequence[str], mlps: bool
) -> tuple[float, float]:
    """The logit difference of three passes with hooks, and what may separate an equal one from it."""
    return cells_by_hand(family, pairs, pair, direction, [(senders, ends)], mlps)[0]


def cells_by_hand(
    family: str,
    pairs: PromptPairs,
    pair: int,
    direction: str,
    cells: Sequence[tuple[Sequence[str], Sequence[str]]],
    mlps: bool,
) -> list[tuple[float, float]]:
    """The same for each of several (senders, receivers)."""
    base, source = pairs.clean[pair], pairs.corrupted[pair]
    if direction == "denoising":
        base, source = source, base
    logits = edges.paths(oracle_of(family), base, source, cells, through_mlps=mlps)[:, -1]
    return [(difference(row, pair), allowed(row)) for row in logits]


def difference(logits: Tensor, pair: int) -> float:
    return float(logits[ANSWERS[pair]] - logits[DISTRACTORS[pair]])


def check(effects: Effects, family: str, pairs: PromptPairs, direction: str, mlps: bool, only: Sequence[int]) -> None:
    """Every cell of some pairs; NaN exactly where the receiver does not read the sender."""
    senders = list(effects.values["sender"].values)
    ends = list(effects.values["receiver"].values)
    assert effects.values.dims == ("sender", "receiver", "pair")
    worst, moved = 0.0, dict.fromkeys((*senders, *ends), 0.0)
    every = [(sender, end) for sender in senders for end in ends]
    oracle = oracle_of(family)
    there = [(s, e) for s, e in every if edges.is_edge(oracle, s.split("@")[0], e.split("@")[0])]
    for sender, end in set(every) - set(there):
        assert effects.values.sel(sender=sender, receiver=end).isnull().all(), (sender, end)
    for pair in only:
        wanted = cells_by_hand(family, pairs, pair, direction, [([s], [e]) for s, e in there], mlps)
        for (sender, end), (want, tolerance) in zip(there, wanted, strict=True):
            got = float(effects.values.sel(sender=sender, receiver=end)[pair])
            if not abs(got - want) <= tolerance:  # alone, if the rows beside it round another way
                want, tolerance = by_hand(family, pairs, pair, direction, [sender], [end], mlps)
            error = abs(got - want) / tolerance
            assert error <= 1, f"{sender} → {end}, pair {pair}: {got}, by hand {want}"
            worst = max(worst, error)
            for name in (sender, end):
                moved[name] = max(moved[name], abs(want - float(effects.base[pair])))
    assert min(moved.values()) > 2e-4, moved
    print(f"{family} {direction}: largest difference {worst:.2f} of what is allowed")


@every_family
def test_every_family_equals_three_passes(family: str) -> None:
    """One direction along direct paths, the other through MLPs; other families have all four below."""
    model, pairs = loaded(family), pairs_of(2, 1)
    flip = SUPPORTED.index(family) % 2
    for direction, mlps in zip(DIRECTIONS, (bool(flip), not flip), strict=True):
        effects = path_patch(model, pairs, SENDERS, receivers(model), direction=direction, through_mlps=mlps)
        check(effects, family, pairs, direction, mlps, only=[int(mlps)])


@directly_or_through_mlps
@in_both_directions
@pytest.mark.parametrize("family", SOME)
def test_both_ways_in_both_directions(family: str, direction: str, through_mlps: bool) -> None:
    """The last cell is right for each pair of a padded batch, in one forward pass or in many."""
    model, pairs = loaded(family), pairs_of(2, 1)
    senders, ends = ("L0.H0", "L1.mlp", "embed@-1", "L0.mlp@2"), ("L2.H1.q@4", "L2.H0.v", "logits")
    made = [
        path_patch(model, pairs, senders, ends, direction=direction, through_mlps=through_mlps, **options)
        for options in ({}, {"max_tokens": 30}, {"schedule": "growing"})
    ]
    senders, pairs_here = ("L0.H0", "L1.mlp", "L0.mlp@2"), (0, 1)
    named = Effects(made[0].values.sel(sender=list(senders)), made[0].clean, made[0].corrupted, made[0].provenance)
    check(named, family, pairs, direction, through_mlps, only=pairs_here)
    for pair in pairs_here:  # the oracle counts from 0
        last = len(pairs.clean[pair]) - 1
        want, tolerance = by_hand(family, pairs, pair, direction, [f"embed@{last}"], ["logits"], through_mlps)
        assert float(made[0].values.sel(sender="embed@-1", receiver="logits")[pair]) == pytest.approx(
            want, abs=tolerance
        )
        assert abs(want - float(made[0].base[pair])) > 1e-3
    for other in made[1:]:
        same(other, made[0])
    assert made[1].provenance["forwards"] > made[0].provenance["forwards"]


@directly_or_through_mlps
@every_family
def test_all_edges_together(family: str, through_mlps: bool) -> None:
    model, pairs = loaded(family), pairs_of(2, 1)
    direction = DIRECTIONS[SUPPORTED.index(family) % 2]
    ends = receivers(model)
    options = {"direction": direction, "together": True, "through_mlps": through_mlps}
    naive, auto = (path_patch(model, pairs, SENDERS, ends, schedule=s, **options) for s in ("naive", "auto"))
    assert naive.values.shape == (1, 1, 2) and str(naive.values["sender"].item()) == "+".join(SENDERS)
    for pair in (0, 1):
        want, tolerance = by_hand(family, pairs, pair, direction, SENDERS, ends, through_mlps)
        for effects in (naive, auto):
            assert float(effects.values[0, 0, pair]) == pytest.approx(want, abs=tolerance)
        assert abs(want - float(naive.base[pair])) > 1e-3


@pytest.mark.parametrize("family", SOME)
def test_an_mlp_that_sends_at_one_position_passes_on_changes_at_the_others(family: str) -> None:
    model, pairs, senders = loaded(family), pairs_of(2, 1), ("embed", "L0.H1", "L1.mlp@3")
    options = {"together": True, "through_mlps": True}
    found = path_patch(model, pairs, senders, ["L2.H0.q", "logits"], **options)
    whole = path_patch(model, pairs, ("embed", "L0.H1", "L1.mlp"), ["L2.H0.q", "logits"], **options)
    for pair in (0, 1):
        want, tolerance = by_hand(family, pairs, pair, "noising", senders, ["L2.H0.q", "logits"], True)
        assert float(found.values[0, 0, pair]) == pytest.approx(want, abs=tolerance)
    assert float(abs(found.values.values - whole.values.values).max()) > 1e-3


@directly_or_through_mlps
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("senders", [("L0.H0@2", "L0.H1@3"), ("L0.H1@3", "L0.H0@2"), ("L0.H0", "L0.H1@4")], ids=str)
def test_senders_at_several_positions_reach_one_receiver_together(
    family: str, senders: tuple[str, ...], through_mlps: bool
) -> None:
    model, pairs = loaded(family), pairs_of(2, 1)
    for end in ("L1.H0.v", "L1.mlp", "L2.H1.q", "logits"):
        found = path_patch(model, pairs, senders, end, together=True, through_mlps=through_mlps)
        for pair in (0, 1):
            want, tolerance = by_hand(family, pairs, pair, "noising", senders, [end], through_mlps)
            assert float(found.values[0, 0, pair]) == pytest.approx(want, abs=tolerance), end


def same(found: Effects, expected: Effects) -> None:
    scale = max(1.0, float(abs(expected.values).max()))
    np.testing.assert_allclose(found.values.values, expected.values.values, rtol=0, atol=1e-5 * scale)
    assert float(abs(expected.values - expected.base).max()) > 0.01


@directly_or_through_mlps
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi", "gpt_oss"])
def test_schedules_agree_where_pairs_share_a_prefix(family: str, together: bool, through_mlps: bool) -> None:
    """Nodes at positions before, at and behind the first difference, by every schedule."""
    model, pairs = loaded(family), pairs_of(4, 4, lengths=(8, 7))
    senders, ends = ("embed@1", "L0.H1@2", "L0.mlp", "L0.H3@-1", "L1.mlp@5"), (
        "L1.H0.q@2", "L2.mlp@3", "L2.H0.k", "L2.mlp@5", "logits",
    )  # fmt: skip
    options = {"together": together, "through_mlps": through_mlps}
    naive, *others = (
        path_patch(model, pairs, senders, ends, schedule=schedule, **options)
        for schedule in ("naive", "rows", "growing", "prefix")
    )
    for other in others:
        same(other, naive)
    assert others[-1].provenance["schedule"] == "prefix"
    if not together:  # the two runs are alike before position 4
        for effects in (naive, others[-1]):
            early = effects.values.sel(sender=["embed@1", "L0.H1@2"]).values
            np.testing.assert_allclose(early - effects.base.values, 0, atol=2e-5)


@directly_or_through_mlps
def test_an_answer_before_the_first_difference_stays(through_mlps: bool) -> None:
    clean = words(8)
    corrupted = [clean[0][:6] + words(2, seed=9)[0]]
    pairs = PromptPairs(clean, corrupted, [20], [33], answer_positions=4)
    for schedule in ("naive", "prefix"):
        options = {"schedule": schedule, "through_mlps": through_mlps}
        effects = path_patch(loaded("llama"), pairs, ["L0.H1", "L0.mlp"], ["L1.mlp", "logits"], **options)
        np.testing.assert_allclose(effects.values.values, float(effects.base[0]), atol=2e-5)
    same = path_patch(loaded("llama"), PromptPairs(clean, clean, [20], [33]), "embed", through_mlps=through_mlps)
    np.testing.assert_allclose(same.values.values, float(same.base[0]), atol=2e-5)


@directly_or_through_mlps
def test_the_logits_at_one_position(through_mlps: bool) -> None:
    """What is written to the stream behind the last block at a position is read there alone."""
    model, pairs = loaded("llama_gqa"), pairs_of(1, lengths=(6,))
    values = path_patch(
        model, pairs, ["L0.H1", "L1.mlp"], ["logits@3", "logits@5", "logits"], through_mlps=through_mlps
    ).values[:, :, 0]
    base = float(path_patch(model, pairs, "embed").base[0])
    np.testing.assert_allclose(values[:, 0], base, atol=2e-5)
    np.testing.assert_allclose(values[:, 1], values[:, 2], atol=2e-5)
    assert float(abs(values[:, 2] - base).min()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3", "falcon_new", "cohere", "stablelm_parallel"])
def test_all_paths_are_the_source_run(family: str) -> None:
    model, pairs = loaded(family), pairs_of(2, 1)
    senders, ends = edges.senders(oracle_of(family)), edges.receivers(oracle_of(family))
    heads = [name for name in senders if "mlp" not in name]
    for start, end, mlps in ((senders, ends, False), (senders, ["logits"], False), (heads, ["logits"], True)):
        effects = path_patch(model, pairs, start, end, together=True, through_mlps=mlps)
        scale = max(1.0, float(abs(effects.source).max()))
        np.testing.assert_allclose(effects.values.values[0, 0], effects.source.values, atol=2e-5 * scale)
        assert float(abs(effects.source - effects.base).min()) > 0.01


@in_both_directions
def test_the_last_layer_tells_the_logits_alone(direction: str) -> None:
    """There the direct effect is the whole effect: that of `patch`. The logits are the default receiver."""
    model, pairs = loaded("qwen2"), pairs_of(2, 1)
    direct = path_patch(model, pairs, "L2.mlp", direction=direction)
    whole = interp.patch(model, pairs, interp.sets({"mlp": ["L2.mlp_out"]}), direction=direction)
    assert list(direct.values["receiver"].values) == ["logits"]
    np.testing.assert_allclose(direct.values.values[0, 0], whole.values.values[0], atol=1e-5)
    earlier = path_patch(model, pairs, "L0.mlp", direction=direction).values.values[0, 0]
    total = interp.patch(model, pairs, interp.sets({"mlp": ["L0.mlp_out"]}), direction=direction).values.values[0]
    assert np.abs(earlier - total).min() > 1e-3


def test_sites_are_names_and_the_record_says_how_it_was_made(tmp_path: Path) -> None:
    model, pairs = loaded("gpt2"), pairs_of(2, 1)
    by_name = path_patch(model, pairs, ["L0.H1", "L0.mlp"], "L2.H0.v", interp.log_prob, "denoising")
    sites = [Site("head_out", layer=0, head=1), Site("mlp_out", layer=0)]
    by_site = path_patch(model, pairs, sites, Site("v", layer=2, head=0), interp.log_prob, "denoising")
    assert by_site.values.equals(by_name.values)
    assert (by_name.provenance["method"], by_name.provenance["metric"]) == ("path_patch", "log_prob")
    assert by_name.direction == "denoising" and by_name.provenance["plan"]["receivers"] == ["L2.H0.v"]
    by_name.save(tmp_path / "paths.nc")
    assert Effects.load(tmp_path / "paths.nc").values.equals(by_name.values)
    frame = by_name.to_dataframe()
    assert len(frame) == 4 and {"sender", "receiver", "pair", "value"} <= set(frame.columns)
    for _ in range(2):  # the second time from the checkpoint
        again = path_patch(
            model, pairs, sites, "L2.H0.v", interp.log_prob, "denoising", checkpoint=tmp_path / "c", max_tokens=20
        )
        same(again, by_name)


def test_layers_count_from_the_end_too() -> None:
    model, pairs = loaded("llama_gqa"), pairs_of(2, 1)
    found = path_patch(model, pairs, [interp.Site("head_out", layer=-3, head=0)], ["L-1.mlp"])
    assert (found.values["sender"].item(), found.values["receiver"].item()) == ("L0.H0", "L2.mlp")
    same(found, path_patch(model, pairs, ["L0.H0"], ["L2.mlp"]))


@pytest.mark.parametrize(
    ("senders", "ends", "error", "says"),
    [
        ("L0.H1.q", "logits", PlanError, r"L0\.H1\.q cannot send; senders are 'embed', heads .* MLPs"),
        ("L0.resid_pre", "logits", PlanError, r"L0\.resid_pre cannot send"),
        ("logits", "logits", PlanError, "logits cannot send"),
        ("L0.mlp", "L1.H1", PlanError, r"L1\.H1.* cannot receive; receivers are 'L3\.H2\.q'"),
        ("L0.mlp", "embed", PlanError, "embed cannot receive"),
        ("L0.mlp", "L1.resid_mid", PlanError, r"L1\.resid_mid cannot receive"),
        ("L0.head_out", "logits", PlanError, r"L0\.head_out names no head; write e\.g\. 'L0\.H0'"),
        ("L0.mlp", "L1.q", PlanError, r"L1\.q names no head"),
        ("L0.H4", "logits", SiteError, r"head 4, but .* has heads 0 to 3"),
        ("L0.mlp", "L1.H2.k", SiteError, r"head 2, but .* has key/value heads 0 to 1"),
        ("L3.mlp", "logits", SiteError, r"layer 3, but .* layers 0 to 2"),
        ("L0.mlp@5", "logits", SiteError, r"L0\.mlp@5: position 5, but the shortest prompt has 5 tokens"),
        ("L0.mlp", "L1.mlp@-6", SiteError, r"L1\.mlp@-6: position -6, but the shortest prompt has 5 tokens"),
        (["L1.mlp", "L2.H0"], ["L1.H0.q", "L1.mlp"], PlanError, "no receiver of .* is downstream of any sender"),
        ([], "logits", PlanError, "no senders"),
        ("embed", [], PlanError, "no receivers"),
        ("the embedding", "logits", SiteError, "cannot read site 'the embedding'"),
    ],
)
def test_what_has_no_path_is_refused(senders: object, ends: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        path_patch(loaded("llama_gqa"), pairs_of(2, 1), senders, ends)


def test_pairs_that_cannot_be_patched_are_refused() -> None:
    uneven = PromptPairs(words(6, 7), words(6, 8, seed=1), ANSWERS, DISTRACTORS)
    with pytest.raises(PairsError, match="path patching"):
        path_patch(loaded("gpt2"), uneven, "embed")
    with pytest.raises(PlanError, match="no corrupted prompts"):
        path_patch(loaded("gpt2"), PromptPairs(words(6), answers=[20], distractors=[33]), "embed")
    with pytest.raises(PlanError, match="direction 'sideways'"):
        path_patch(loaded("gpt2"), pairs_of(2, 1), "embed", direction="sideways")
    in_parallel = path_patch(loaded("gptj"), pairs_of(2, 1), ["L1.H0", "L0.mlp"], ["L1.mlp", "logits"]).values
    assert in_parallel.sel(sender="L1.H0", receiver="L1.mlp").isnull().all()  # they read the same stream
    assert int(in_parallel.isnull().sum()) == 2
