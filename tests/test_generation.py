"""Tokens made under edits, against a plain uncached loop with hooks: the same logits and the same tokens, in every family."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import interp
from interp import Edit, Site
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
        held = [
            Patch(
                p.kind,
                p.layer,
                p.value,
                tuple(spans[where]) if p.positions is None else p.positions,
                p.head,
                p.unit,
                p.op,
            )
            for p in patches
        ]
        logits.append(oracle_of(family).run(ids, held)[-1])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], logits


def check(found: Generation, family: str, patches: Sequence[Patch], where: str = "all") -> None:
    assert found.logits is not None
    for number, prompt in enumerate(PROMPTS):
        tokens, logits = plainly(family, prompt, patches, where)
        assert list(found.tokens[number]) == tokens
        want = torch.stack(logits)
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
    """Prompts of three lengths in one batch: each as it is alone, without a cache."""
    edits, patches = edits_of(family)
    options = {"steps": STEPS, "logits": True, "stop": False}
    found = loaded(family).generate(PROMPTS, edits, **options)
    check(found, family, patches)
    plain = loaded(family).generate(PROMPTS, **options)
    assert found.logits is not None and plain.logits is not None
    assert float((found.logits - plain.logits).abs().max()) > 0.1, "the edits change something"


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3", "bloom", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("where", ["prompt", "generated"])
@pytest.mark.parametrize("cache", [True, False])
def test_edits_hold_where_they_are_asked_to(family: str, where: str, cache: bool) -> None:
    edits, patches = edits_of(family)
    found = loaded(family).generate(PROMPTS, edits, STEPS, positions=where, logits=True, stop=False, cache=cache)
    check(found, family, patches, where)


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2"])
def test_every_kind_of_site_can_be_edited_while_tokens_are_made(family: str) -> None:
    model = loaded(family)
    for kind in has(family):
        if kind in ("pattern", "q_rot", "k_rot", "embed"):
            continue
        site = Site(kind, layer=1)
        head, unit = (0 if site.facts.axis.endswith("head") else None), (3 if site.axis == "unit" else None)
        edit = Edit(site.at(head=head, unit=unit), "scale", 0.5)
        found = model.generate(PROMPTS, [edit], STEPS, logits=True, stop=False)
        again = model.generate(PROMPTS, [edit], STEPS, logits=True, stop=False, cache=False)
        assert found.tokens == again.tokens and found.logits is not None and again.logits is not None
        assert float((found.logits - again.logits).abs().max()) <= allowed(again.logits), kind


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_a_feature_is_held_in_the_delta_form(family: str) -> None:
    """x + D(value − f) at every token of a block's output, made by a hook on the plain model."""
    model, hf = loaded(family), tiny(family)[0].eval()
    sae = random_dictionary("TopK", model.d_model)
    edits = [Edit(interp.saes.view_of(sae).site(unit=5), "set", 3.0)]
    found = model.generate(PROMPTS, edits, STEPS, logits=True, stop=False)
    block = next(part for part in hf.modules() if isinstance(part, torch.nn.ModuleList))[1]

    def hook(_: object, __: object, out: object) -> object:
        x = out[0] if isinstance(out, tuple) else out
        assert isinstance(x, Tensor)
        x = x + (3.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = block.register_forward_hook(hook)
    try:
        for number, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for step in range(STEPS):
                logits = hf(input_ids=torch.tensor([ids])).logits[0, -1]
                assert found.logits is not None
                assert float((found.logits[number, step] - logits).abs().max()) <= allowed(logits)
                ids.append(int(logits.argmax()))
            assert ids[len(prompt) :] == list(found.tokens[number])
    finally:
        handle.remove()


def test_on_a_server_it_is_the_same() -> None:
    here = loaded("llama_gqa")
    there = interp.load_model(tiny("llama_gqa")[0], tokenizer=here.tokenizer, backend="simulated")
    edits, patches = edits_of("llama_gqa")
    check(there.generate(PROMPTS, edits, STEPS, logits=True, stop=False), "llama_gqa", patches)


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
        ({"steps": 60}, PairsError, "make fewer tokens"),
    ):
        with pytest.raises(error, match=message):
            model.generate(PROMPTS, **options)  # type: ignore[arg-type]
    with pytest.raises(PairsError):
        model.generate([])
