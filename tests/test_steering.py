"""Steering: vectors from differences of means, and what is added while tokens are made."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import Edit, Site
from interp.errors import PlanError
from interp.saes.views import view_of
from tests.families import activation, loaded, words
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


def test_it_shows_both_sides() -> None:
    model = loaded("gpt2")
    found = interp.steer(model, words(5), "L1.neuron[7]", 50.0, steps=4)
    text = str(found)
    assert text.splitlines()[0].split("  ")[0] == "without" and "with L1.neuron[7] + 50" in text
    marked = interp.steering.Steering(
        interp.generated.Generation(((1,),), ((2,),), ("<b>x",)), found.before, "a & b"
    )._repr_html_()
    assert "&lt;b&gt;x" in marked and "a &amp; b" in marked and "<b>x" not in marked


def test_what_cannot_steer_says_so() -> None:
    model = loaded(FAMILY)
    d = model.d_model
    for what, options, message in (
        (torch.ones(d), {}, "say where it is added"),
        (
            torch.ones(d + 1),
            {"site": "L1.resid_post"},
            rf"has shape \[{d + 1}\]; one at L1.resid_post of .* is \[{d}\]",
        ),
        (torch.full((d,), float("nan")), {"site": "L1.resid_post"}, "without NaN"),
        (random_dictionary("TopK", d), {}, "which of its features"),
        ("L1.resid_post", {}, "is all of a site"),
        (torch.ones(d), {"site": "L1.resid_post", "strength": float("nan")}, "strength=nan"),
    ):
        given = {"strength": 1.0, **options}
        with pytest.raises(PlanError, match=message):
            interp.steer(model, words(5), what, **given)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="is a part of a site"):
        interp.steering_vector(model, words(5), words(4), "L1.H2.z")
