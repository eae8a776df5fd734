"""Tokens made under edits, against a plain uncached loop with hooks: the same logits and the same tokens, in every family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import interp
from interp import Edit, Site, generation
from interp.errors import PairsError, PlanError, SiteError
from interp.generated import Generation
from tests.families import SUPPORTED, allowed, has, loaded, oracle_of, words
from tests.oracle.configs import tiny
from tests.oracle.hooks import Patch
from tests.saes.made import random_dictionary

STEPS = 5
PROMPTS = words(7, 4, 9)


def vector(width: int, seed: int = 3) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def plainly(family: str, prompt: Sequence[int], patches: Sequence[Patch], where: str) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and their logits, everything run again for each; patches without positions hold `where`."""
    ids, logits = list(prompt), []
    for _ in range(STEPS):
        spans = {"all": range(len(ids)), "prompt": range(len(prompt)), "generated": range(len(prompt), len(ids))}
        held = [replace(p, positions=tuple(spans[where])) if p.positions is None else p for p in patches]
        logits.append(oracle_of(family).run(ids, held)[-1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], logits


def check(*made: Generation, family: str, patches: Sequence[Patch], where: str = "all") -> None:
    """Every generation over the first of PROMPTS, or all, is what the plain loop makes of each by itself."""
    for number, prompt in enumerate(PROMPTS):
        tokens, logits = plainly(family, prompt, patches, where)
        want = torch.stack(logits)
        for found in made:
            if number < len(found.tokens):
                assert found.logits is not None and list(found.tokens[number]) == tokens
                assert float((found.logits[number] - want).abs().max()) <= allowed(want)


def edits_of(family: str) -> tuple[list[Edit], list[Patch]]:
    """A vector added to the stream, a head's z set to zero, and what the MLP writes changed at one token of the prompt."""
    d = loaded(family).d_model
    step, value = 2 * vector(d), vector(d, 5)
    edits = [
        Edit(Site("resid_post", layer=0), "add", step),
        Edit(Site("z", layer=1, head=1), "set", 0.0),
        Edit(Site("mlp_out", layer=1, position=2), "set", value),
    ]
    patches = [
        Patch("resid_post", 0, step, op="add"),
        Patch("z", 1, head=1, op="zero"),
        Patch("mlp_out", 1, value, (2,)),
    ]
    return edits, patches


@pytest.mark.parametrize("family", SUPPORTED)
def test_cached_and_padded_it_is_the_plain_loop(family: str) -> None:
    """Prompts of three lengths in one batch, and one by itself: each as it is alone, without a cache."""
    edits, patches = edits_of(family)
    options = {"steps": STEPS, "logits": True, "stop": False}
    found = loaded(family).generate(PROMPTS, edits, **options)
    check(found, loaded(family).generate(PROMPTS[0], edits, **options), family=family, patches=patches)
    plain = loaded(family).generate(PROMPTS, **options)
    assert found.logits is not None and plain.logits is not None
    assert float((found.logits - plain.logits).abs().max()) > 0.1, "the edits change something"


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_edits_hold_where_they_are_asked_to(family: str, where: str) -> None:
    edits, patches = edits_of(family)
    found = loaded(family).generate(PROMPTS, edits, STEPS, positions=where, logits=True, stop=False)
    check(found, family=family, patches=patches, where=where)


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3", "bloom", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_without_a_cache_it_is_the_same(family: str, where: str) -> None:
    edits, patches = edits_of(family)
    found = loaded(family).generate(PROMPTS, edits, STEPS, positions=where, logits=True, stop=False, cache=False)
    check(found, family=family, patches=patches, where=where)


def part_of(family: str, kind: str) -> Site:
    """A site of this kind: one head or unit where it has any."""
    site = Site(kind, layer=None if kind == "embed" else 1)
    return site.at(head=0 if site.facts.axis.endswith("head") else None, unit=3 if site.axis == "unit" else None)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("gpt2", "gemma2", "falcon_new", "gpt_oss") for kind in has(family)],
)
def test_every_kind_of_site_can_be_edited_while_tokens_are_made(family: str, kind: str) -> None:
    """Also what a cache keeps as it was before the edit, keys behind their rotary embedding: there it is not used."""
    site = part_of(family, kind)
    patch = Patch(kind, site.layer or 0, head=site.head, unit=site.unit, op="zero")
    for where, at in (("all", None), ("generated", None), ("all", 2)):
        edit = Edit(site.at(position=at), "set", 0.0)
        held = replace(patch, positions=None if at is None else (at,))
        found = loaded(family).generate(PROMPTS, [edit], STEPS, positions=where, logits=True, stop=False)
        check(found, family=family, patches=[held], where=where)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_a_feature_is_held_in_the_delta_form(family: str) -> None:
    """x + D(value − f) at every token of a block's output, made by a hook on the plain model."""
    model, oracle = loaded(family), oracle_of(family)
    sae = random_dictionary("TopK", model.d_model)
    edits = [Edit(interp.saes.view_of(sae).site(unit=5), "set", 3.0)]
    found = model.generate(PROMPTS, edits, STEPS, logits=True, stop=False)

    def hook(_: object, __: object, out: object) -> object:
        x = out[0] if isinstance(out, tuple) else out
        assert isinstance(x, Tensor)
        x = x + (3.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = oracle.blocks[1].register_forward_hook(hook)
    try:
        check(found, family=family, patches=[])
    finally:
        handle.remove()


def test_a_view_of_keys_behind_the_cache_is_written_too() -> None:
    """Its decoder is the unit vectors of one head, so that it is that head's keys."""
    model = loaded("llama_gqa")
    eye = torch.eye(model.n_kv_heads * model.d_head)[: model.d_head]
    view = interp.View(
        "keys", at="k_rot", parts=model.d_head, decoder=eye, read=lambda x, t: x @ t["decoder"].T, exact=True
    )
    found = model.generate(PROMPTS, [Edit(view.site(layer=1), "set", 0.0)], STEPS, logits=True, stop=False)
    check(found, family="llama_gqa", patches=[Patch("k_rot", 1, head=0, op="zero")])


@torch.no_grad()
def test_frequencies_that_depend_on_the_length_are_those_of_the_whole() -> None:
    """With RoPE of type `dynamic`, a cache would keep keys rotated by the frequencies of a shorter text."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        rope_scaling=rope, max_position_embeddings=8,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).eval()
    for parameter in hf.parameters():
        parameter.mul_(12.0 if parameter.dim() > 1 else 1.0)
    model, prompts = interp.load_model(copy.deepcopy(hf)), words(7, 4)
    prompts = [[token % 64 for token in prompt] for prompt in prompts]
    step = vector(32)
    found = model.generate(prompts, [Edit(Site("resid_post", layer=0), "add", step)], 6, logits=True, stop=False)
    assert model.taps["rotary"] and found.logits is not None
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        for place in range(6):
            fresh = copy.deepcopy(hf)
            fresh.model.layers[0].register_forward_hook(lambda *given: given[2] + step)
            want = fresh(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert float((found.logits[number, place] - want).abs().max()) <= allowed(want)
            ids.append(int(want.argmax()))
        assert ids[len(prompt) :] == list(found.tokens[number])


@pytest.mark.parametrize(
    ("config", "passes"), [(None, STEPS), ({"quant_method": "a new one"}, 3 * STEPS)], ids=["plain", "quantised"]
)
def test_where_rows_depend_on_one_another_each_prompt_runs_alone(
    config: object, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations quantised over the batch: one row in a pass, and all of its tokens."""
    model = loaded("gpt2")
    monkeypatch.setattr(model.hf.config, "quantization_config", config, raising=False)
    seen: list[tuple[int, ...]] = []
    embed = model.hf.get_input_embeddings()
    handle = embed.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    try:
        model.generate(PROMPTS, steps=STEPS, stop=False)
    finally:
        handle.remove()
    whole = [(1, len(prompt) + step) for prompt in PROMPTS for step in range(STEPS)]
    assert len(seen) == passes and (seen[1] == (3, 1) if config is None else seen == whole)


def test_on_a_server_it_is_the_same() -> None:
    here = loaded("llama_gqa")
    there = interp.load_model(tiny("llama_gqa")[0], tokenizer=here.tokenizer, backend="simulated")
    edits, patches = edits_of("llama_gqa")
    keys = Edit(Site("k_rot", layer=2, head=1), "set", 0.0)  # without a cache
    for own, plain in ((edits, patches), ([keys], [Patch("k_rot", 2, head=1, op="zero")])):
        found = there.generate(PROMPTS, own, STEPS, logits=True, stop=False)
        check(found, family="llama_gqa", patches=plain)


def test_a_prompt_ends_by_itself() -> None:
    model = loaded("gpt2")
    free = model.generate(PROMPTS, steps=8, stop=False)
    end = free.tokens[0][2]
    config = model.hf.generation_config
    before, config.eos_token_id = config.eos_token_id, end
    try:
        found = model.generate(PROMPTS, steps=8, logits=True)
    finally:
        config.eos_token_id = before
    for ended, whole in zip(found.tokens, free.tokens, strict=True):
        at = whole.index(end) + 1 if end in whole else len(whole)
        assert ended == whole[:at]
    assert found.logits is not None and bool(found.logits[0, len(found.tokens[0]) :].isnan().all())
    assert [len(text) > 0 for text in found.text] == [True] * 3


@pytest.mark.parametrize("where", ["generation_config", "config", "tokenizer"])
def test_the_first_token_of_the_vocabulary_may_be_the_end(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is an id, as it is GPT-NeoX's end; a list holds several. The first of the three that says so is asked."""
    model = loaded("gpt2")
    holders = {"generation_config": model.hf.generation_config, "config": model.hf.config}
    for name, holder in holders.items():
        monkeypatch.setattr(holder, "eos_token_id", 0 if name == where else None)
    model = replace(model, tokenizer=SimpleNamespace(eos_token_id=0 if where == "tokenizer" else 5))
    assert generation.ends_of(model) == [0]
    if where in holders:
        monkeypatch.setattr(holders[where], "eos_token_id", [0, 7])
        assert generation.ends_of(model) == [0, 7]


def test_a_prompt_comes_in_every_form() -> None:
    model, ids = loaded("gpt2"), PROMPTS[0]
    text = model.tokenizer.decode(ids)
    want = model.generate(ids, steps=2, stop=False)
    for given in (
        tuple(ids), [ids], np.array(ids), torch.tensor(ids), torch.tensor([ids]), [np.int64(token) for token in ids],
        text, [text], model.tokenizer(text), [torch.tensor(ids)],
    ):  # fmt: skip
        assert model.generate(given, steps=2, stop=False) == want
    nameless = interp.load_model(tiny("gpt2")[0])
    found = nameless.generate(ids, steps=2, stop=False)
    assert found.tokens == want.tokens and found.text == ("".join(f"<{token}>" for token in want.tokens[0]),)


def test_what_cannot_be_made_says_so() -> None:
    model = loaded("gpt2")
    stream = Site("resid_post", layer=0)
    for options, error, message in (
        ({"steps": 0}, PlanError, "steps=0: make 1 token or more"),
        ({"positions": "late"}, PlanError, "it is one of all, prompt, generated"),
        ({"edits": [Edit(stream)]}, PlanError, "there is no second run"),
        ({"edits": [Edit(stream, "add", torch.zeros(3))]}, PlanError, r"has shape \[3\]"),
        ({"edits": [Edit(stream, "add", torch.zeros(9, 32))]}, PlanError, "differs by position"),
        ({"edits": [Edit(stream, "add", float("nan"))]}, PlanError, "NaN"),
        ({"edits": [Edit(Site("resid_post", layer=7), "set", 0.0)]}, SiteError, "layer 7"),
        ({"edits": [Edit(stream.at(position=30), "set", 0.0)]}, SiteError, "position 30"),
        ({"edits": [Edit(stream.at(position=5), "set", 0.0)]}, SiteError, "prompt 1 has 4 tokens, positions 0 to 3"),
        ({"edits": [Edit(stream.at(position=-6), "set", 0.0)]}, SiteError, "prompt 1 has 4 tokens, positions 0 to 3"),
        ({"edits": ["L0.resid_post"]}, PlanError, "edits holds 'L0.resid_post'"),
        ({"steps": 2.5}, PlanError, "steps=2.5"),
        ({"max_tokens": 0}, PlanError, "max_tokens=0"),
        ({"steps": 60}, PairsError, "make fewer tokens"),
    ):
        with pytest.raises(error, match=message):
            model.generate(PROMPTS, **options)  # type: ignore[arg-type]
    for given in ([], None, 5, ""):
        with pytest.raises(PairsError):
            model.generate(given)
