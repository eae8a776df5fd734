"""The table of families: rows as data, and the views that cut heads out of fused tensors, against names written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from interp.models.families import FAMILIES, Family, find_family
from interp.models.infer import infer_family
from interp.models.layout import at, attention_pattern, mix_values, output_matrix, part_index, project_heads, sizes
from interp.sites import KINDS
from tests.families import EXPERTS, NO_ROTATED, PARALLEL, SUPPORTED, UNSUPPORTED, has, loaded, oracle_of, words
from tests.oracle.configs import FAMILIES as CONFIGS
from tests.oracle.configs import tiny
from tests.oracle.names import columns
from tests.oracle.names import output_matrix as oracle_output_matrix

every_family = pytest.mark.parametrize("family", SUPPORTED)


def test_rows_are_values_with_names_of_their_own() -> None:
    names = [row.name for row in FAMILIES]
    kinds = [model_type for row in FAMILIES for model_type in row.model_types]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAMILIES[0].name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt2",
        "gpt_neo",
        "gptj",
        "gpt_neox",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo2",
        "opt",
        "bloom",
        "falcon",
        "stablelm",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
    ],
)
def test_the_families_that_were_promised_have_a_row(model_type: str) -> None:
    row = find_family(model_type)
    assert row is not None and model_type in row.model_types


def test_unknown_types_have_none() -> None:
    assert find_family("made_up") is None
    assert all(find_family(CONFIGS[family][0]) is None for family in UNSUPPORTED)


@every_family
def test_a_row_has_a_tap_for_each_site_that_its_family_has_and_a_reason_for_each_other(family: str) -> None:
    row = loaded(family).family
    tapped = [kind for _, _, kinds in row.block for kind in kinds]
    inside = set(has(family)) - {
        "embed",
        "resid_post",
    }  # the embedding has a path; resid_post is the next block's input
    assert inside <= set(tapped)
    assert len(set(tapped)) == len(tapped)
    assert set(row.missing) == set(KINDS) - set(has(family)) - {"logits"}
    assert all(len(reason) > 20 for reason in row.missing.values())
    assert row.parallel == (family in PARALLEL) and row.moe == (family in EXPERTS)
    assert ("q_rot" in row.missing) == (family in NO_ROTATED)
    assert row.alibi == (family in ("bloom", "falcon_alibi"))


@every_family
def test_every_path_leads_somewhere(family: str) -> None:
    model = loaded(family)
    block = at(model.hf, model.family.layers)[0]
    for path in (model.family.embed, model.family.norm, model.family.head):
        assert isinstance(at(model.hf, path), torch.nn.Module)
    for path, side, kinds in model.family.block:
        module = at(block, path.split(".source")[0])
        assert isinstance(module, torch.nn.Module) and side in ("inputs", "input", "output") and kinds


@every_family
def test_heads_are_cut_out_of_projections_as_written_by_hand(family: str) -> None:
    model, oracle = loaded(family), oracle_of(family)
    for kind in "qkv":
        ours = part_index(model.taps, kind)
        theirs = columns(oracle.names, kind, oracle.n_heads, oracle.n_kv_heads, oracle.d_head)
        assert torch.equal(ours, theirs), kind
    o = at(at(model.hf, model.family.layers)[1], model.family.o)
    assert torch.equal(
        output_matrix(o, part_index(model.taps, "z"), torch.zeros(1)),
        oracle_output_matrix(oracle.part(1, "o"), oracle.n_heads),
    )


@every_family
def test_the_parts_of_a_fused_projection_are_all_of_it_and_do_not_overlap(family: str) -> None:
    model = loaded(family)
    block = at(model.hf, model.family.layers)[0]
    parts = {kind: part_index(model.taps, kind).flatten() for kind in "qkv"}
    for path in set(model.family.qkv):
        here = torch.cat([parts[kind] for kind, own in zip("qkv", model.family.qkv, strict=True) if own == path])
        assert sorted(here.tolist()) == list(range(sizes(at(block, path))[0]))


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "phi3", "falcon_new", "bloom"])
def test_a_projection_of_each_heads_own_input(family: str) -> None:
    """The same input for every head gives the projection itself, cut into heads."""
    model = loaded(family)
    module = at(at(model.hf, model.family.layers)[0], model.family.qkv[0])
    x = torch.randn(2, 1, 5, model.d_model, generator=torch.Generator().manual_seed(0))
    index = part_index(model.taps, "q")
    each = project_heads(module, x.expand(-1, model.n_heads, -1, -1), index)
    whole = module(x[:, 0])[..., index].transpose(1, 2)
    assert torch.allclose(each, whole, atol=1e-5)


def test_a_pattern_from_queries_and_keys() -> None:
    """Grouped heads, a window given as a mask, a softcap, sinks; without a mask it is causal."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    scores = torch.stack([q[:, h] @ k[:, h // 2].transpose(1, 2) for h in range(4)], 1) * 0.3
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    window = causal & ~torch.ones(5, 5, dtype=torch.bool).tril(-3)

    def softmax(allowed: torch.Tensor, x: torch.Tensor = scores) -> torch.Tensor:
        weights = x.exp() * allowed
        return weights / weights.sum(-1, keepdim=True)

    options = {"scaling": 0.3}
    assert torch.allclose(attention_pattern(q, k, None, options), softmax(causal), atol=1e-6)
    assert torch.allclose(attention_pattern(q, k, window[None, None], options), softmax(window), atol=1e-6)
    added = torch.zeros(5, 5).masked_fill(~window, torch.finfo(torch.float32).min)
    assert torch.allclose(attention_pattern(q, k, added[None, None], options), softmax(window), atol=1e-6)
    capped = attention_pattern(q, k, None, {"scaling": 0.3, "softcap": 2.0})
    assert torch.allclose(capped, softmax(causal, (scores / 2).tanh() * 2), atol=1e-6)
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    weights = scores.exp() * causal
    want = weights / (weights.sum(-1, keepdim=True) + sinks.exp()[None, :, None, None])
    assert torch.allclose(attention_pattern(q, k, None, {"scaling": 0.3, "s_aux": sinks}), want, atol=1e-6)
    late = attention_pattern(q[:, :, 3:], k, None, options)  # behind a cached prefix
    assert torch.allclose(late, softmax(causal)[:, :, 3:], atol=1e-6)
    plain = attention_pattern(q, k, None, {})
    assert torch.allclose(plain, softmax(causal, scores / 0.3 / 8**0.5), atol=1e-6)


def test_values_are_mixed_by_their_group() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern, v = torch.rand(2, 4, 3, 5, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    mixed = mix_values(pattern, v)
    assert mixed.shape == (2, 3, 4, 8)
    for head in range(4):
        assert torch.allclose(mixed[:, :, head], pattern[:, head] @ v[:, head // 2], atol=1e-6)


# --- variants and guesses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt_neox", "parallel", True),
        ("gpt_neox_sequential", "parallel", False),
        ("stablelm_parallel", "norm2", "input_layernorm"),
        ("stablelm", "norm2", "post_attention_layernorm"),
        ("falcon", "qkv_layout", "split"),
        ("falcon_new", "qkv_layout", "grouped"),
        ("falcon_alibi", "qkv_layout", "interleaved"),
        ("falcon_one_norm", "norm2", "input_layernorm"),
        ("falcon_sequential", "qkv_layout", "split"),
        ("falcon_sequential", "alibi", False),
    ],
)
def test_a_configuration_picks_its_variant(family: str, field: str, value: object) -> None:
    assert getattr(loaded(family).family, field) == value


@every_family
def test_a_family_by_another_name_is_found_by_its_modules_or_not_at_all(family: str) -> None:
    """A guess need not be right, for the audit decides; it must be a row whose paths all exist in this model."""
    hf, _ = tiny(family)
    guess = infer_family(hf)
    if guess is None:
        return
    assert guess.name.endswith(f"(inferred for {hf.config.get_text_config().model_type})")
    block = at(hf, guess.layers)[0]
    assert all(at(block, path.split(".source")[0]) is not None for path, _, _ in guess.block)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_gqa", "gemma2", "gpt_neo", "bloom", "opt", "phi"])
def test_guesses_that_must_be_right(family: str) -> None:
    guess, row = infer_family(tiny(family)[0]), loaded(family).family
    assert guess is not None and guess.block == row.block and guess.qkv_layout == row.qkv_layout


@pytest.mark.parametrize("family", ["glm4", "apertus", "persimmon"])
def test_blocks_with_a_module_that_no_row_knows_are_not_guessed(family: str) -> None:
    assert infer_family(tiny(family)[0]) is None


def test_what_has_no_blocks_is_not_guessed() -> None:
    class Config:
        model_type = "linear"

        def get_text_config(self) -> Config:
            return self

    module = torch.nn.Linear(2, 2)
    module.config = Config()  # type: ignore[assignment]
    assert infer_family(module) is None


def test_a_row_of_ones_own_is_one_replace_away() -> None:
    llama = find_family("llama")
    assert llama is not None
    mine = dataclasses.replace(llama, name="mine", model_types=("mine",))
    assert isinstance(mine, Family) and mine.for_config(tiny("llama")[0].config) == mine


def test_sinks_make_rows_sum_to_less_than_one() -> None:
    oracle = oracle_of("gpt_oss")
    sums = oracle.read(words(6)[0], "pattern", 0).sum(-1)
    assert loaded("gpt_oss").family.sinks and float(sums.min()) < 0.5 < float(sums.max()) < 1
    assert not loaded("llama").family.sinks
