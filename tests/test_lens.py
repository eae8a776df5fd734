"""The logit lens against the model's norm and head by hand; direct effects against norms frozen with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

import interp.lens
from interp import Model, PromptPairs
from interp.errors import MetricError, PairsError, PlanError, SiteError, SiteUnavailableError
from interp.lens import attention_patterns, direct_effects, logit_lens
from tests.families import EXPERTS, activation, count_forwards, loaded, oracle_of, words
from tests.oracle.hooks import Oracle, Patch

#: The final norm and head by name, written out here and not taken from the library's table.
NORMS = {
    "gpt2": "transformer.ln_f", "gpt_neo": "transformer.ln_f", "gptj": "transformer.ln_f", "bloom": "transformer.ln_f",
    "falcon_new": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "phi": "model.final_layernorm",
    "opt": "model.decoder.final_layer_norm",
}  # fmt: skip
LENS = ("gpt2", "llama_gqa", "gemma2", "gpt_neox", "olmo2", "opt", "cohere", "falcon_new", "gptj", "bloom")


def tail(oracle: Oracle, family: str, stream: Tensor) -> Tensor:
    """Logits `[position, d_vocab]` of a residual stream, with softcap and scale as the configuration has them."""
    model, config = oracle.model, oracle.config
    norm = model.get_submodule(NORMS.get(family, "model.norm"))
    logits = model.get_output_embeddings()(norm(stream)) * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@pytest.mark.parametrize("family", LENS)
def test_lens_reads_every_layer_through_the_models_own_head(family: str) -> None:
    model, oracle, prompts = loaded(family), oracle_of(family), words(9, 5, 7)
    lens = logit_lens(model, prompts, top_k=3)
    assert lens.token.dims == ("prompt", "layer", "position", "k") and lens.token.shape == (3, 3, 9, 3)
    for number, prompt in enumerate(prompts):
        for layer in range(3):
            logits = tail(oracle, family, oracle.read(prompt, "resid_post", layer))
            if layer == 2:
                assert torch.allclose(logits, oracle.run(prompt), atol=1e-4)
            here = lens.isel(prompt=number, layer=layer)
            chances = logits.softmax(-1)
            for position in range(9):
                cell = here.isel(position=position)
                if position >= len(prompt):
                    assert (cell.token == -1).all() and np.isnan(cell.logit).all() and cell.label == ""
                    assert np.isnan(cell.next_rank) and cell.next_token == -1 and (cell.text == "").all()
                    continue
                top = logits[position].topk(3)
                assert np.allclose(cell.logit, top.values, atol=1e-4)
                got = torch.from_numpy(cell.token.values)
                assert np.allclose(logits[position][got], top.values, atol=1e-4)  # the same tokens, up to ties
                assert np.allclose(cell.probability, chances[position][got], atol=1e-5)
                assert cell.text.values.tolist() == model.tokenizer.convert_ids_to_tokens(got.tolist())
                if position + 1 == len(prompt):
                    assert np.isnan(cell.next_rank) and np.isnan(cell.next_probability)
                    continue
                after = prompt[position + 1]
                assert int(cell.next_token) == after
                assert float(cell.next_probability) == pytest.approx(float(chances[position, after]), abs=1e-5)
                above = int((logits[position] > logits[position, after] + 1e-4).sum())
                level = int((logits[position] > logits[position, after] - 1e-4).sum())
                assert above <= int(cell.next_rank) < max(level, above + 1)


def test_lens_of_some_layers_and_positions_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers × tokens × vocabulary is too much at once, parts are computed, with the same numbers."""
    model, prompts = loaded("gemma2"), words(9, 5, 7)
    whole = logit_lens(model, prompts)
    some = logit_lens(model, prompts, layers=[-1, 0], positions=[-1, 2], top_k=5)
    assert some.layer.values.tolist() == [2, 0] and some.position.values.tolist() == [-1, 2]
    for number, prompt in enumerate(prompts):
        for place, position in enumerate((len(prompt) - 1, 2)):
            ours = some.isel(prompt=number, position=place)
            theirs = whole.isel(prompt=number, position=position, layer=[2, 0])
            assert np.allclose(ours.logit, theirs.logit, atol=1e-5)
            assert np.allclose(ours.next_rank, theirs.next_rank, equal_nan=True)
    for cells in (1, 4, 20, 50):
        monkeypatch.setattr(interp.lens, "LOGITS", cells * model.vocab_size)
        parts = logit_lens(model, prompts)
        assert np.allclose(parts.logit, whole.logit, atol=1e-5, equal_nan=True)
        assert np.allclose(parts.next_probability, whole.next_probability, atol=1e-6, equal_nan=True)


def test_lens_takes_strings_and_pairs_and_says_what_is_wrong() -> None:
    model = loaded("gpt2")
    one = logit_lens(model, "the cat was in the garden")
    pairs = PromptPairs(["the cat was in the garden"], ["the dog was in the garden"], ["."], [","])
    assert one.equals(logit_lens(model, pairs)) and one.label.values.tolist()[0][1] == "cat"
    assert logit_lens(model, words(4), top_k=10**6).sizes["k"] == model.vocab_size
    with pytest.raises(SiteError, match=r"layer 7, but .* has layers 0 to 2"):
        logit_lens(model, words(4), layers=7)
    with pytest.raises(SiteError, match="position 4, but the longest prompt has positions 0 to 3"):
        logit_lens(model, words(4), positions=4)
    with pytest.raises(PlanError, match="top_k=0"):
        logit_lens(model, words(4), top_k=0)


# ---- direct effects ----------------------------------------------------------------------------------------------

DIRECT = ("gpt2", "llama_gqa", "gemma2", "gpt_neox", "olmo2", "opt", "cohere", "falcon_new", "bloom", "gptj", "phi")
SETS = {"answers": [[20, 9], 41, 7], "distractors": [33, [12, 13, 14], 9]}


def some_pairs() -> PromptPairs:
    return PromptPairs(words(8, 5, 6), words(3, 3, 3), **SETS, answer_positions=[-1, 3, -2])


@contextmanager
def frozen(modules: Sequence[torch.nn.Module], run: Callable[[], Tensor]) -> Iterator[None]:
    """Every one of these norms divides by what it divided by in `run`, whatever enters it afterwards."""
    seen: dict[torch.nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [m.register_forward_hook(lambda m, a, out: seen.update({m: (a[0].clone(), out.clone())})) for m in modules]
    run()
    for hook in hooks:
        hook.remove()

    def linear(module: torch.nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        """Affine by construction: the Jacobian of the norm with its statistics held, found by torch itself."""
        was, out = seen[module]
        change = args[0] - was
        if "Layer" in type(module).__name__ and "RMS" not in type(module).__name__:
            change = change - change.mean(-1, keepdim=True)
            spread = (was - was.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
        else:
            spread = was.pow(2).mean(-1, keepdim=True)
        weight = module.weight + (1 if "Gemma" in type(module).__name__ else 0)
        epsilon = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
        return out + change * weight / (spread + epsilon).sqrt()

    hooks = [module.register_forward_hook(linear) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def difference(logits: Tensor, pair: int) -> float:
    right, wrong = (torch.as_tensor(SETS[side][pair]).reshape(-1) for side in ("answers", "distractors"))
    return float(logits[right].mean() - logits[wrong].mean())


@pytest.mark.parametrize("by", ["component", "head", "position"])
@pytest.mark.parametrize("family", [*DIRECT, *EXPERTS])
def test_parts_sum_to_the_models_own_logit_difference(family: str, by: str) -> None:
    model, oracle, pairs = loaded(family), oracle_of(family), some_pairs()
    effects = direct_effects(model, pairs, by=by)
    sums = effects.values.sum([dim for dim in effects.values.dims if dim != "pair"])
    cap = getattr(oracle.config, "final_logit_softcapping", None)
    for pair, prompt in enumerate(pairs.clean):
        logits = oracle.run(prompt)[pairs.answer_positions[pair]]
        logits = torch.atanh(logits.double() / cap) * cap if cap else logits  # the logits before the softcap
        want = difference(logits, pair)
        assert float(sums[pair]) == pytest.approx(want, abs=1e-4)
        assert float(effects.clean[pair]) == pytest.approx(want, abs=1e-4)
    assert effects.corrupted is None and effects.direction is None
    assert effects.provenance["remainder"] <= 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "olmo2", "opt"])
def test_each_part_is_what_is_lost_without_it(family: str) -> None:
    """Take one part out of the final stream, the final norm frozen with hooks: the logits fall by its direct effect.

    A part is taken out as a difference of streams that the oracle reads: an MLP's or attention's output; the share of
    a head is its output through the post-norm where there is one, at the norm's frozen scale.
    """
    model, oracle, pairs = loaded(family), oracle_of(family), some_pairs()
    last = model.n_layers - 1
    norm = oracle.model.get_submodule(NORMS.get(family, "model.norm"))
    cap = getattr(oracle.config, "final_logit_softcapping", None)
    by_component, by_head = direct_effects(model, pairs), direct_effects(model, pairs, by="head")
    for pair, prompt in enumerate(pairs.clean):
        at = pairs.answer_positions[pair]
        stream = oracle.read(prompt, "resid_post", last)
        parts: dict[str, tuple[object, Tensor]] = {}  # what was found, and the part `[position, d_model]`
        found = by_component.values.sel(component="embed", layer=0)[pair]
        parts["embed"] = (found, oracle.read(prompt, "resid_pre", 0))
        for layer in range(model.n_layers):
            for kind in ("attn_out", "mlp_out"):
                found = by_component.values.sel(component=kind, layer=layer)[pair]
                parts[f"{kind} {layer}"] = (found, oracle.read(prompt, kind, layer))
            heads = oracle.read(prompt, "head_out", layer)
            for head in range(model.n_heads):
                part = heads[:, head]
                if model.family.post_attn:
                    post = oracle.part(layer, "attn_out")
                    with frozen([post], lambda: oracle.run(prompt)):  # noqa: B023
                        whole = oracle.read(prompt, "attn_out", layer)
                        part = whole - oracle.read(
                            prompt, "attn_out", layer, [Patch("head_out", layer, 0.0, head=head)]
                        )
                found = by_head.values.sel(component="head_out", layer=layer, head=head)[pair]
                parts[f"L{layer}.H{head}"] = (found, part)
        left = [stream, *(stream - part for _, part in parts.values())]  # the whole, and without each part
        with frozen([norm], lambda: oracle.run(prompt)):  # noqa: B023
            rows = oracle.run_rows(prompt, [[Patch("resid_post", last, x)] for x in left])[:, at]
        rows = torch.atanh(rows.double() / cap) * cap if cap else rows
        for (name, (found, _)), row in zip(parts.items(), rows[1:], strict=True):
            assert float(found) == pytest.approx(difference(rows[0], pair) - difference(row, pair), abs=1e-4), (
                name,
                pair,
            )


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2"])
def test_sources_of_attention_are_pattern_times_value(family: str) -> None:
    """Each position's share: a run in which heads attend to that position only, in the parts that reach the logits."""
    model, oracle, pairs = loaded(family), oracle_of(family), some_pairs()
    effects, last = direct_effects(model, pairs, by="position"), model.n_layers - 1
    norm = oracle.model.get_submodule(NORMS.get(family, "model.norm"))
    cap = getattr(oracle.config, "final_logit_softcapping", None)
    for pair, prompt in enumerate(pairs.clean):
        at = pairs.answer_positions[pair]
        pattern = oracle.read(prompt, "pattern", last)
        norms = [norm, oracle.part(last, "attn_out")] if model.family.post_attn else [norm]
        # nothing above reads the last layer's attention but its MLP, which is held
        held = Patch("mlp_out", last, oracle.read(prompt, "mlp_out", last))
        for source in range(len(prompt)):
            without = pattern.clone()
            without[..., source] = 0
            with frozen(norms, lambda: oracle.run(prompt)):  # noqa: B023
                rows = [oracle.run(prompt, [Patch("pattern", last, value), held])[at] for value in (pattern, without)]
            rows = [torch.atanh(row.double() / cap) * cap if cap else row for row in rows]
            want = difference(rows[0], pair) - difference(rows[1], pair)
            got = float(effects.values.sel(component="attn_out", layer=last, position=source)[pair])
            assert got == pytest.approx(want, abs=1e-4), (pair, source)


def test_bundled_model(bundled: Model) -> None:
    """Real weights and two prompts of different lengths: parts sum to the logit difference, in one batch."""
    prompts = ["When Mary and John went to the store, John gave a drink to", "The capital of France is"]
    pairs = PromptPairs(prompts, None, [" Mary", " Paris"], [" John", " Rome"])
    seen, stop = count_forwards(bundled)
    effects = direct_effects(bundled, pairs)
    stop()
    assert len(seen) == 1
    for by in ("head", "position"):
        other = direct_effects(bundled, pairs, by=by)
        for made in (effects, other):
            sums = made.values.sum([dim for dim in made.values.dims if dim != "pair"])
            for pair, prompt in enumerate(model_ids(bundled, pairs)):
                with torch.no_grad():
                    logits = bundled.hf(torch.tensor([prompt])).logits[0, -1]
                ids = [bundled.tokenizer(text)["input_ids"] for text in (pairs.answers[pair] + pairs.distractors[pair])]
                want = float(logits[ids[0][0]] - logits[ids[1][0]])
                assert float(sums[pair]) == pytest.approx(want, abs=1e-4)
    assert float(effects.clean.min()) > 0.5


def model_ids(model: Model, pairs: PromptPairs) -> list[list[int]]:
    return [list(prompt) for prompt in model.encode(pairs).clean]


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match="by='layer'"):
        direct_effects(loaded("gpt2"), some_pairs(), by="layer")
    for pairs in (PromptPairs(words(5)), words(5)):
        with pytest.raises(MetricError, match="answers"):
            direct_effects(loaded("gpt2"), pairs)
    with pytest.raises(PlanError, match="positions must be whole numbers, not 'subject'"):
        logit_lens(loaded("gpt2"), words(5), positions="subject")
    assert logit_lens(loaded("gpt2"), words(5), layers=np.int64(1), positions=np.arange(2)).sizes["position"] == 2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama_gqa", "gemma2", "gpt_neox", "bloom", "gpt_oss"])
def test_attention_patterns_are_those_of_eager_attention(family: str) -> None:
    model, (prompt,) = loaded(family), words(7)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            want = model.hf(torch.tensor([prompt]), output_attentions=True).attentions
    finally:
        model.hf.set_attn_implementation(before)
    got = attention_patterns(model, prompt)
    assert got.dims == ("layer", "head", "query", "key") and got.shape == (3, model.n_heads, 7, 7)
    np.testing.assert_allclose(got.values, np.stack([layer[0].numpy() for layer in want]), atol=1e-5)
    some = attention_patterns(model, list(np.array(prompt)), layers=[-1, 0])
    assert some["layer"].values.tolist() == [2, 0]
    np.testing.assert_array_equal(some.values, got.values[[2, 0]])
    assert some["token"].values.tolist() == list(model.encode(PromptPairs([prompt])).labels[0])


def test_attention_patterns_refuse_what_has_none() -> None:
    with pytest.raises(SiteUnavailableError, match="attn_implementation='eager'"):
        attention_patterns(loaded("falcon_new", "sdpa"), words(4)[0])
    with pytest.raises(SiteError, match="layer 3"):
        attention_patterns(loaded("gpt2"), words(4)[0], layers=3)
    with pytest.raises(PairsError, match="prompt is 2 prompts, and one prompt is wanted"):
        attention_patterns(loaded("gpt2"), words(4, 4))
    with pytest.raises(PlanError, match="no layer"):
        attention_patterns(loaded("gpt2"), words(4)[0], layers=[])


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa"])
def test_patterns_know_how_long_values_are(family: str) -> None:
    model, prompt = loaded(family), words(6)[0]
    found = interp.lens.attention_patterns(model, prompt, layers=[1, 0], values=True)
    for place, layer in enumerate((1, 0)):
        values = activation(family, prompt, "v", layer)  # [position, kv head, d_head]
        want = values.norm(dim=-1).T.repeat_interleave(model.n_heads // model.n_kv_heads, 0)
        np.testing.assert_allclose(found["value_norm"][place], want, rtol=1e-4)
    np.testing.assert_array_equal(found, interp.lens.attention_patterns(model, prompt, layers=[1, 0]))
