"""The oracle agrees with itself: sums, equivalent interventions, and runs that must come out the same."""

from __future__ import annotations

import ast
import pathlib
from functools import cache

import pytest
import torch
from torch import Tensor

from .configs import D_VOCAB, FAMILIES, prompts, tiny
from .edges import all_edges, edges
from .hooks import KINDS, Oracle, Patch, logit_diff

PARALLEL = {"gptj", "gpt_neox", "phi", "falcon", "falcon_new", "stablelm_parallel", "cohere", "cohere2"}
PARALLEL |= {"falcon_one_norm"}
EXPERTS = {"mixtral", "qwen3_moe", "olmoe", "gpt_oss"}
UNGATED = {
    *(
        "gpt2",
        "gpt_neo",
        "gptj",
        "gpt_neox",
        "gpt_neox_sequential",
        "phi",
        "opt",
        "bloom",
        "falcon",
        "falcon_new",
    ),
    *(
        "falcon_one_norm",
        "falcon_sequential",
        "falcon_alibi",
        "starcoder2",
        "nemotron",
        "arcee",
        "apertus",
        "persimmon",
    ),
}
#: Families without rotation, where q_rot and k_rot are the projections' outputs.
UNROTATED = {"gpt2", "gpt_neo", "opt", "bloom", "falcon_alibi"}
#: Layers whose attention reaches back this many positions, counting the query's own.
WINDOWS = {"gpt_neo": 3, "mistral": 4, "gemma2": 4, "gemma3": 4, "gpt_oss": 4, "olmo3": 4, "starcoder2": 4}
WINDOWS |= {"gemma3_vision": 4, "cohere2": 4, "ministral": 4, "exaone4": 4}
HEAD_KINDS = ("q", "k", "v", "q_rot", "k_rot", "z", "head_out", "pattern")
CLEAN, CORRUPTED = prompts(length=9, first_difference=2)
#: One of every way to be built: fused, split and grouped projections, norms, parallel parts, rotations, windows, biases
#: in position, experts, a scaled branch. The other families are put together of the same parts.
DISTINCT = {
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "llama_gqa", "gemma2", "phi3", "olmo2", "opt", "bloom", "falcon"),
    *(
        "falcon_new",
        "falcon_alibi",
        "stablelm_parallel",
        "mixtral",
        "gpt_oss",
        "cohere2",
        "granite",
        "smollm3",
        "exaone4",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
#: What shows that the oracle is right by itself; on every family the library shows it.
distinct_families = pytest.mark.parametrize(
    "family", [family if family in DISTINCT else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)


@cache
def oracle_of(family: str) -> Oracle:
    return Oracle(tiny(family)[0], copy_model=False)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def missing(family: str) -> set[str]:
    return ({"resid_mid"} if family in PARALLEL else set()) | ({"mlp_pre", "neuron"} if family in EXPERTS else set())


@every_family
def test_models_are_small_wide_and_reproducible(family: str) -> None:
    model, tokenizer = tiny(family)
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    assert len(tokenizer) == D_VOCAB == model.config.get_text_config().vocab_size
    ids = torch.tensor([CLEAN])
    assert torch.equal(model(ids).logits, tiny(family)[0](ids).logits)
    assert not torch.equal(model(ids).logits, tiny(family, seed=1)[0](ids).logits)
    assert_equal(oracle_of(family).run(CLEAN), model(ids).logits[0])


@every_family
def test_rows_of_a_batch_are_runs_one_at_a_time(family: str) -> None:
    """Each kind whole, and at a position of a head or unit beside a write elsewhere: as rows, and in runs of their own."""
    o, rows = oracle_of(family), list[list[Patch]]()
    for kind, value in ((kind, o.read(CORRUPTED, kind, 1)) for kind in KINDS if kind not in missing(family)):
        head = 1 % o.n_kv_heads if kind in HEAD_KINDS else None
        unit = 5 if kind in ("mlp_pre", "neuron") else None
        beside = Patch("mlp_out", 0, op="zero") if len(rows) % 4 else Patch("resid_pre", 2, 0.5, (5, -1), op="add")
        rows += [[Patch(kind, 1, value)], [Patch(kind, 1, value, (3,), head, unit), beside]]
    together = o.run_rows(CLEAN, rows)
    read = o.reads_rows(CLEAN, [("resid_post", 2), ("z", 1), ("pattern", 2)], rows)
    for row, patches in enumerate(rows):
        assert_equal(together[row], o.run(CLEAN, patches))
        for site, alone in (o.reads(CLEAN, read, patches) if row % 5 == 0 else {}).items():
            assert_equal(read[site][row], alone)
    assert len({float(logits[-1].sum()) for logits in together}) > len(rows) // 3


def test_tokenizer_pads_left_and_adds_nothing() -> None:
    tokenizer = tiny("gpt2")[1]
    batch = tokenizer(["the king gave", "Mary saw the old dog."], padding=True)
    assert batch["input_ids"][0][:3] == [tokenizer.pad_token_id] * 3
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][1]) == ["Mary", "saw", "the", "old", "dog", "."]
    assert tokenizer("unheard")["input_ids"] == [tokenizer.unk_token_id]


@distinct_families
def test_reads_add_up(family: str) -> None:
    o = oracle_of(family)
    kinds = [kind for kind in KINDS if kind not in missing(family)]
    read = o.reads(CLEAN, [(kind, layer) for kind in kinds for layer in range(o.n_layers)])
    for layer in range(o.n_layers):
        site = {kind: read[kind, layer] for kind in kinds}
        assert_equal(site["resid_pre"] + site["attn_out"] + site["mlp_out"], site["resid_post"])
        if "resid_mid" in site:
            assert_equal(site["resid_pre"] + site["attn_out"], site["resid_mid"])
        if layer + 1 < o.n_layers:
            assert torch.equal(site["resid_post"], read["resid_pre", layer + 1])
        projection = o.part(layer, "o")
        summed = site["head_out"].sum(1) + (0.0 if projection.bias is None else projection.bias)
        if o.names.post1:
            summed = o.part(layer, "post1")(summed)
        assert_equal(summed * o.scale, site["attn_out"])
        assert site["k"].shape == site["v"].shape == site["k_rot"].shape == (9, o.n_kv_heads, o.d_head)
        assert site["q"].shape == site["q_rot"].shape == site["z"].shape == (9, o.n_heads, o.d_head)
        by_head = site["v"].repeat_interleave(o.n_heads // o.n_kv_heads, 1)
        assert_equal(torch.einsum("hqk,khd->qhd", site["pattern"], by_head), site["z"])


@distinct_families
def test_patterns_are_causal_and_windowed(family: str) -> None:
    o = oracle_of(family)
    pattern = torch.stack([o.read(CLEAN, "pattern", layer) for layer in range(o.n_layers)])
    assert (pattern.triu(1) == 0).all()
    rows = pattern.sum(-1)
    assert rows.max() < 1 and rows.mean() < 0.95 if family == "gpt_oss" else torch.allclose(rows, rows.new_ones(()))
    assert (pattern[0].tril(-WINDOWS.get(family, 9)) == 0).all()
    reach = WINDOWS.get(family, 9) - 1
    assert (pattern[0].diagonal(-reach, -2, -1) > 0).any()


@distinct_families
def test_rotation_starts_at_the_projection(family: str) -> None:
    o = oracle_of(family)
    for kind in ("q", "k"):
        before, after = o.read(CLEAN, kind, 1), o.read(CLEAN, f"{kind}_rot", 1)
        if family in UNROTATED:
            assert_equal(before * (o.d_head**-0.5 if (family, kind) == ("opt", "q") else 1.0), after)
        else:
            size = {"gpt_oss": 0.1 * torch.log(torch.tensor(4.0)) + 1.0}.get(family, 1.0)
            if not any(hasattr(o.part(1, "attn"), norm) for norm in ("q_norm", "q_layernorm")):
                assert_equal(before[0] * size, after[0])  # position 0 is not rotated
                assert_equal(before.norm(dim=-1) * size, after.norm(dim=-1))
            rotated = family != "smollm3"  # its layer 1 has no rotation
            rotated &= family not in ("cohere2", "exaone4")  # nor have their layers with full attention
            assert ((before[1:] - after[1:]).abs().max() > 0.1) == (rotated or family == "exaone4")


@distinct_families
def test_sites_that_do_not_exist_say_so(family: str) -> None:
    o = oracle_of(family)
    for kind in missing(family):
        with pytest.raises(LookupError, match=kind):
            o.read(CLEAN, kind, 0)
        with pytest.raises(LookupError, match=kind):
            o.patched(CLEAN, None, kind, 0, op="zero")
    with pytest.raises(LookupError, match="no kind"):
        o.read(CLEAN, "resid_middle", 0)


@distinct_families
def test_patching_a_run_with_itself_changes_nothing_and_with_another_something(family: str) -> None:
    o = oracle_of(family)
    sites = [(kind, 1) for kind in sorted(set(KINDS) - missing(family))]
    base, own, other = o.run(CLEAN), o.reads(CLEAN, sites), o.reads(CORRUPTED, sites)
    for logits in o.run_rows(CLEAN, [[Patch(*site, own[site])] for site in sites]):
        assert_equal(logits, base)
    moving = [Patch(*site, other[site]) for site in sites] + [Patch(*site, op="zero") for site in sites]
    for patch, logits in zip(moving, o.run_rows(CLEAN, [[patch] for patch in moving]), strict=True):
        assert (logits[-1] - base[-1]).abs().max() > 0.005, (patch.kind, patch.op)


@distinct_families
def test_whole_stream_patched_is_the_source_run(family: str) -> None:
    o = oracle_of(family)
    source = o.run(CORRUPTED)
    for kind, layer in (
        ("embed", 0),
        ("resid_pre", 0),
        ("resid_pre", 2),
        ("resid_post", 0),
        ("resid_post", 2),
    ):
        assert_equal(o.patched(CLEAN, CORRUPTED, kind, layer), source)


@distinct_families
@pytest.mark.parametrize("layer", [0, 2])
def test_equivalent_interventions_agree(family: str, layer: int) -> None:
    o = oracle_of(family)
    values = o.reads(CORRUPTED, [(kind, layer) for kind in set(KINDS) - missing(family)])

    def run(*kinds: str) -> Tensor:
        return o.run(CLEAN, [Patch(kind, layer, values[kind, layer]) for kind in kinds])

    attention = run("attn_out")
    for route in (("z",), ("head_out",), ("pattern", "v"), ("q", "k", "v"), ("q_rot", "k_rot", "v")):
        assert_equal(run(*route), attention)
    assert_equal(run("q", "k"), run("pattern"))
    if family not in EXPERTS:
        assert_equal(run("neuron"), run("mlp_out"))
        assert (run("mlp_pre") - run("mlp_out")).abs().max() < 1e-4 or family not in UNGATED
    assert_equal(run("resid_pre", "attn_out", "mlp_out"), run("resid_post"))


@distinct_families
def test_resid_mid_reaches_both_the_norm_and_the_stream(family: str) -> None:
    if family in PARALLEL:
        return
    o = oracle_of(family)
    delta = torch.randn(9, o.read(CLEAN, "resid_mid", 1).shape[1], generator=torch.Generator().manual_seed(1))
    write = Patch("resid_mid", 1, delta, op="add")
    assert_equal(o.run(CLEAN, [write]), o.run(CLEAN, [Patch("attn_out", 1, delta, op="add")]))
    mlp_before, mlp_after = o.read(CLEAN, "mlp_out", 1), o.read(CLEAN, "mlp_out", 1, [write])
    assert (mlp_after - mlp_before).abs().max() > 0.01
    moved = o.read(CLEAN, "resid_post", 1, [write]) - o.read(CLEAN, "resid_post", 1)
    assert_equal(moved, delta + mlp_after - mlp_before)


@distinct_families
def test_parts_of_a_site_are_written_alone(family: str) -> None:
    o = oracle_of(family)
    sites = [(kind, 1) for kind in sorted(set(KINDS) - missing(family))]
    base, own, other = o.run(CLEAN), o.reads(CLEAN, sites), o.reads(CORRUPTED, sites)
    for kind, _ in sites:
        value = other[kind, 1]
        heads = 1 if kind not in HEAD_KINDS else o.n_kv_heads if kind in ("k", "v", "k_rot") else o.n_heads
        rows = [[Patch(kind, 1, value)], [Patch(kind, 1, value, (5,))], [Patch(kind, 1, value, (i,)) for i in range(9)]]
        if kind in HEAD_KINDS:
            rows.append([Patch(kind, 1, value, head=head) for head in range(heads)])
        if kind in ("mlp_pre", "neuron"):
            rows.append([Patch(kind, 1, value, unit=unit) for unit in range(value.shape[1])])
        whole, at_five, *in_parts = o.run_rows(CLEAN, rows)
        assert_equal(at_five[:5], base[:5])  # causal
        for logits in in_parts:
            assert_equal(logits, whole)
        head = 0 if kind in HEAD_KINDS else None
        unit = 3 if kind in ("mlp_pre", "neuron") else None
        last, one = [Patch(kind, 1, value, head=heads - 1)], [Patch(kind, 1, own[kind, 1] + 1, (-2,), head, unit)]
        seen = o.reads_rows(CLEAN, {("z", 1), (kind, 1)}, [last, one])
        mixed = kind in "qk" and family in ("olmo2", "olmo3", "olmoe")  # their QK norm is over all heads
        if kind in HEAD_KINDS and kind != "head_out" and not mixed:
            moved = seen["z", 1][0] - own["z", 1]
            assert moved[:, : -(o.n_heads // heads)].abs().sum() < 1e-3 < moved.abs().max()
        moved = seen[kind, 1][1] - own[kind, 1]
        assert int((moved.abs() > 0.5).sum()) == (value.shape[-1] if unit is None else 1), kind
        place = (slice(0, 1), 7) if kind == "pattern" else (7, 0) if head == 0 else (7, slice(unit, unit and 4))
        assert_equal(moved[place], torch.ones_like(moved[place]))
    assert_equal(
        o.patched(CLEAN, CORRUPTED, "z", 1, head=2, positions=[4, -1]),
        o.patched(CLEAN, CORRUPTED, "head_out", 1, head=2, positions=[4, 8]),
    )


def test_rows_move_between_prompts_of_different_lengths() -> None:
    o, longer = oracle_of("llama"), [*CORRUPTED[:2], 50, *CORRUPTED[2:]]
    moved = o.patched(CLEAN, longer, "mlp_out", 1, [2, 4], source_positions=[3, 7])
    rows = o.read(longer, "mlp_out", 1)
    patches = [Patch("mlp_out", 1, rows[3], (2,)), Patch("mlp_out", 1, rows[7], (4,))]
    assert torch.equal(moved, o.run(CLEAN, patches))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral", "falcon_alibi"])
def test_sweep_is_the_loop_in_both_directions(family: str) -> None:
    o, metric = oracle_of(family), logit_diff(7, 11)
    clean, corrupted = metric(o.run(CLEAN)), metric(o.run(CORRUPTED))
    noising = o.sweep(CLEAN, CORRUPTED, "resid_post", metric)
    denoising = o.sweep(CLEAN, CORRUPTED, "resid_post", metric, direction="denoising")
    assert noising.shape == denoising.shape == (3, 9)
    assert torch.allclose(noising[:, :2], torch.tensor(clean), atol=1e-5)  # the prompts do not differ there
    assert torch.allclose(denoising[:, :2], torch.tensor(corrupted), atol=1e-5)
    assert noising[2, -1] == pytest.approx(corrupted, abs=1e-4)
    assert denoising[2, -1] == pytest.approx(clean, abs=1e-4)
    assert noising[0, 2] == pytest.approx(metric(o.patched(CLEAN, CORRUPTED, "resid_post", 0, [2])), abs=1e-5)
    heads = o.sweep(CLEAN, CORRUPTED, "pattern", metric, over="head", layers=[1])
    assert heads[0, 3] == pytest.approx(metric(o.patched(CLEAN, CORRUPTED, "pattern", 1, head=3)), abs=1e-5)
    assert o.sweep(CLEAN, CORRUPTED, "neuron", metric, over="unit", layers=[0]).shape[1] >= 48


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama")[0]
    before = model(torch.tensor([CLEAN])).logits
    o = Oracle(model, copy_model=False)
    for kind in KINDS:
        o.patched(CLEAN, CORRUPTED, kind, 1)
    edges(o, CLEAN, CORRUPTED, all_edges(o))
    assert torch.equal(model(torch.tensor([CLEAN])).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copied = Oracle(model)
    model.model.layers[0].mlp.down_proj.weight.zero_()
    assert torch.equal(copied.run(CLEAN), before[0])


def test_the_oracle_imports_nothing_from_the_library() -> None:
    for file in pathlib.Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.split(".")[0] in ("interp", "nnsight") for name in names), file
