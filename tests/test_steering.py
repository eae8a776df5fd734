"""Steering: vectors from differences of means, and what is added while tokens are made."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import Edit, Site, steering
from interp.errors import PlanError
from interp.saes.views import view_of
from tests.families import activation, allowed, count_forwards, loaded, oracle_of, words
from tests.oracle.hooks import Patch
from tests.saes.made import random_dictionary

FAMILY = "llama_gqa"


def test_a_vector_is_the_difference_of_means() -> None:
    model, positive, negative = loaded(FAMILY), words(5, 7, 3), words(4, 6, seed=2)
    found = interp.steering_vector(model, positive, negative, "L1.resid_post")
    means = [
        torch.stack([activation(FAMILY, text, "resid_post", 1)[-1] for text in texts]).mean(0)
        for texts in (positive, negative)
    ]
    torch.testing.assert_close(found, means[0] - means[1], rtol=1e-4, atol=1e-5)
    every = interp.steering_vector(model, positive, negative, "L1.resid_post", positions=None)
    means = [
        torch.cat([activation(FAMILY, text, "resid_post", 1) for text in texts]).mean(0)
        for texts in (positive, negative)
    ]
    torch.testing.assert_close(every, means[0] - means[1], rtol=1e-4, atol=1e-5)
    heads = interp.steering_vector(model, positive, negative, "L1.z")
    assert heads.shape == (model.n_heads * model.d_head,)
    view = view_of(random_dictionary("TopK", model.d_model))
    features = interp.steering_vector(model, positive, negative, view.site())
    collected = [interp.collect_activations(model, texts, 1, view, positions="last") for texts in (positive, negative)]
    torch.testing.assert_close(features, collected[0].mean(0) - collected[1].mean(0))
    assert features.shape == (view.parts,) and float(features.abs().max()) > 0


def test_what_is_added_is_an_edit_of_generation() -> None:
    model, prompts = loaded(FAMILY), words(5, 7)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    found = interp.steer(model, prompts, vector, 4.0, site="L1.resid_post", steps=6)
    assert found.before == model.generate(prompts, steps=6)
    assert found.after == model.generate(prompts, [Edit(Site("resid_post", layer=1), "add", 4.0 * vector)], 6)
    assert found.before.tokens != found.after.tokens
    sae = random_dictionary("TopK", model.d_model)
    by_feature = interp.steer(model, prompts, sae, 9.0, feature=3, steps=6)
    by_vector = interp.steer(model, prompts, sae.W_dec[3].detach(), 9.0, site="L1.resid_post", steps=6)
    by_site = interp.steer(model, prompts, view_of(sae).site(unit=3), 9.0, steps=6)
    assert by_feature.after.tokens == by_vector.after.tokens == by_site.after.tokens
    assert by_feature.what == "L1.sae1[3] + 9"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon_new", "llama_gqa"])
@pytest.mark.parametrize("kind", ["q", "k", "v", "z"])
def test_a_vector_by_head_is_added_where_the_projection_has_it(family: str, kind: str) -> None:
    """Joined, interleaved, grouped and separate projections: all heads at once, and one, as plain hooks add them.

    At one token: what is added to every key alike does not move a softmax.
    """
    model, oracle, prompt = loaded(family), oracle_of(family), words(6)[0]
    heads = model.heads_of(kind)
    vector = torch.randn(heads * model.d_head, generator=torch.Generator().manual_seed(2))
    by_head = vector.unflatten(0, (heads, model.d_head))
    last = heads - 1
    for site, given, patch in (
        (f"L1.{kind}@-1", vector, Patch(kind, 1, 3 * by_head, (-1,), op="add")),
        (f"L1.H{last}.{kind}@-1", by_head[last], Patch(kind, 1, 3 * by_head[last], (-1,), last, op="add")),
    ):
        edit, _ = steering.change_of(model, given, 3.0, None, site)
        found = model.generate(prompt, [edit], 1, logits=True)
        want = oracle.run(prompt, [patch])[-1]
        assert found.logits is not None
        assert float((found.logits[0, 0] - want).abs().max()) <= allowed(want)
        assert float((want - oracle.run(prompt)[-1]).abs().max()) > 100 * allowed(want), "the step moves something"


@torch.no_grad()
def test_a_feature_that_is_off_is_raised_as_one_that_is_on() -> None:
    """strength · D[unit] is added at every token, whatever the feature was: its decoder's row, and nothing else."""
    model, oracle, prompt = loaded(FAMILY), oracle_of(FAMILY), words(6)[0]
    sae = random_dictionary("TopK", model.d_model)
    active = sae.encode(oracle.read(prompt, "resid_post", 1)) > 0
    off = int((~active).all(0).nonzero()[0])
    mixed = int((active.any(0) & ~active.all(0)).nonzero()[0])
    for unit in (off, mixed):
        edit, _ = steering.change_of(model, view_of(sae).site(unit=unit), 5.0, None, None)
        found = model.generate(prompt, [edit], 1, logits=True)
        want = oracle.run(prompt, [Patch("resid_post", 1, 5.0 * sae.W_dec[unit], op="add")])[-1]
        assert found.logits is not None
        assert float((found.logits[0, 0] - want).abs().max()) <= allowed(want)


def test_it_shows_both_sides() -> None:
    model = loaded("gpt2")
    found = interp.steer(model, words(5), "L1.neuron[7]", 50.0, steps=4)
    text = str(found)
    assert text.splitlines()[0].split("  ")[0] == "without" and "with L1.neuron[7] + 50" in text
    marked = steering.Steering(
        interp.generated.Generation(((1,),), ((2,),), ("<b>x",)), found.before, "a & b"
    )._repr_html_()
    assert "&lt;b&gt;x" in marked and "a &amp; b" in marked and "<b>x" not in marked


def test_what_cannot_steer_says_so_before_anything_runs() -> None:
    model = loaded(FAMILY)
    d = model.d_model
    view = view_of(random_dictionary("TopK", d))
    stream = {"site": "L1.resid_post"}
    seen, stop = count_forwards(model)
    for what, options, message in (
        (torch.ones(d), {}, "say where it is added"),
        (torch.ones(d + 1), stream, rf"has shape \[{d + 1}\]; one at L1.resid_post of .* is \[{d}\]"),
        (torch.ones(1, d), stream, rf"has shape \[1, {d}\]; one at L1.resid_post of .* is \[{d}\]"),
        (torch.ones(d), {"site": "L1.H2.z"}, rf"has shape \[{d}\]; one at L1.H2.z of .* is \[{model.d_head}\]"),
        (torch.full((d,), float("nan")), stream, "without NaN"),
        ({"a": 1}, stream, "given a dict"),
        (random_dictionary("TopK", d), {}, "which of its features"),
        (view, {}, "give one part of it"),
        (view.site(unit=3), stream, "leave out site='L1.resid_post'"),
        ("L1.resid_post", {}, "is all of a site"),
        (torch.ones(d), {"site": "L1.pattern"}, "nothing can be added at L1.pattern"),
        ("L1.H2.head_out", {}, "nothing can be added at L1.H2.head_out: take what heads mix"),
        (torch.ones(d), {"site": "logits"}, "nothing can be added at logits"),
        (torch.ones(d), {**stream, "strength": float("nan")}, "strength=nan"),
        (torch.ones(d), {**stream, "strength": float("inf")}, "strength=inf"),
        (torch.ones(d), {**stream, "positions": "late"}, "positions='late'"),
        (torch.ones(d), {**stream, "steps": 0}, "steps=0"),
    ):
        given = {"strength": 1.0, **options}
        with pytest.raises(PlanError, match=message):
            interp.steer(model, words(5), what, **given)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="is a part of a site"):
        interp.steering_vector(model, words(5), words(4), "L1.H2.z")
    stop()
    assert not seen
