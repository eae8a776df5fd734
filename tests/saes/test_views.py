"""Features as sites: patched, ablated, attributed, set and collected as plain hooks do it, on four families."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs
from interp.errors import PlanError, SiteError
from interp.saes.library import Dictionary, sae_lens
from interp.saes.views import error_view, view_of
from tests.families import allowed, loaded, words
from tests.oracle.configs import tiny

from .made import random_dictionary, rows, trained, untrained

FAMILIES = ("gpt2", "llama_gqa", "gemma3", "gpt_neox")
FORMS = ("Standard", "TopK", "JumpReLU", "Gated")
LAYER = 1
every = pytest.mark.parametrize("family", FAMILIES)
forms = pytest.mark.parametrize("form", FORMS)


@cache
def dictionary(form: str, family: str) -> Dictionary:
    return random_dictionary(form, loaded(family).d_model)


@cache
def pairs() -> PromptPairs:
    clean = words(7, 5)
    corrupted = [[prompt[0], 99 - prompt[1] % 50, *prompt[2:]] for prompt in clean]
    return PromptPairs(clean, corrupted, [20, 21], [40, 41])


@cache
@torch.no_grad()
def busy(form: str, family: str) -> tuple[int, ...]:
    """The three features that are most active on the pairs."""
    sae = dictionary(form, family)
    hooked = Hooked(family, sae)
    total = sum(sae.encode(hooked.run(prompt)[1])[0].sum(0) for prompt in (*pairs().clean, *(pairs().corrupted or ())))
    return tuple(torch.as_tensor(total).topk(3).indices.tolist())


class Hooked:
    """The plain model with a hook on a block's output, and SAELens's own encode and decode."""

    def __init__(self, family: str, sae: Dictionary) -> None:
        self.hf, self.sae = tiny(family)[0].eval(), sae
        self.block = next(part for part in self.hf.modules() if isinstance(part, torch.nn.ModuleList))[LAYER]

    def run(self, ids: Any, change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def hook(_: Any, __: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            seen.append(x)
            new = x if change is None else change(x)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = self.block.register_forward_hook(hook)
        try:
            logits = self.hf(input_ids=torch.tensor([list(ids)])).logits[0]
        finally:
            handle.remove()
        return logits, seen[0]

    def moved(self, units: Any, new: Any) -> Callable[[Tensor], Tensor]:
        """x + the decoder times what these features become, less what they are."""

        def change(x: Tensor) -> Tensor:
            f = self.sae.encode(x)
            g = f.clone()
            g[..., list(units)] = new[..., list(units)] if isinstance(new, Tensor) else new
            return x + (g - f) @ self.sae.W_dec

        return change


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(
        np.asarray(got), np.asarray(want), rtol=0, atol=allowed(torch.as_tensor(np.asarray(want)))
    )


@forms
@every
@torch.no_grad()
def test_features_are_patched_and_ablated(form: str, family: str) -> None:
    sae, model = dictionary(form, family), loaded(family)
    hooked, units = Hooked(family, sae), busy(form, family)
    plan = interp.features(sae, units)
    patched = interp.patch(model, pairs(), plan).values.values[0, 0]
    zeroed = interp.ablate(model, pairs(), plan).values.values[0, 0]
    moved = 0
    for pair, (base, source) in enumerate(zip(pairs().clean, pairs().corrupted or (), strict=True)):
        new = sae.encode(hooked.run(source)[1])
        plain = hooked.run(base)[0]
        for number, unit in enumerate(units):
            for got, value in ((patched, new), (zeroed, 0.0)):
                logits = hooked.run(base, hooked.moved([unit], value))[0]
                moved += not torch.equal(logits, plain)
                close(got[number, pair], float((logits[-1, 20 + pair] - logits[-1, 40 + pair]).detach()))
    assert moved > 3


@forms
@every
def test_features_are_attributed(form: str, family: str) -> None:
    sae, model = dictionary(form, family), loaded(family)
    units = busy(form, family)
    found = interp.attribute(model, pairs(), interp.features(sae, units)).values.values[0, 0]
    hooked = Hooked(family, sae)
    for pair, (base, source) in enumerate(zip(pairs().clean, pairs().corrupted or (), strict=True)):
        kept: list[Tensor] = []

        def leaf(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_(True))
            return kept[0]

        logits = hooked.run(base, leaf)[0]
        metric = logits[-1, 20 + pair] - logits[-1, 40 + pair]
        (slope,) = torch.autograd.grad(metric, kept)
        with torch.no_grad():
            step = sae.encode(hooked.run(source)[1]) - sae.encode(kept[0])
            want = float(metric) + (step * (slope @ sae.W_dec.T))[0].sum(0)[list(units)]
        close(found[:, pair], want)


@forms
@every
@torch.no_grad()
def test_features_are_collected_and_stand_in_sets(form: str, family: str) -> None:
    sae, model = dictionary(form, family), loaded(family)
    view, hooked = view_of(sae), Hooked(family, sae)
    texts = words(6, 3)
    got = interp.collect_activations(model, texts, LAYER, view)
    close(got, torch.cat([sae.encode(hooked.run(text)[1])[0] for text in texts]))
    members = [interp.Edit(view.site(unit=3), "set", 2.0), interp.Edit(view.site(unit=9), "set", 2.0)]
    found = interp.patch(model, pairs(), interp.sets({"two": members})).values.values[0]
    for pair, base in enumerate(pairs().clean):
        logits = hooked.run(base, hooked.moved([3, 9], 2.0))[0]
        close(found[pair], float(logits[-1, 20 + pair] - logits[-1, 40 + pair]))


@forms
@every
@torch.no_grad()
def test_what_a_dictionary_does_not_explain_is_the_rest(form: str, family: str) -> None:
    """Set to zero it leaves SAELens's own reconstruction."""
    sae, model = dictionary(form, family), loaded(family)
    hooked = Hooked(family, sae)
    view = error_view(sae)
    found = interp.patch(model, pairs(), interp.sets({"none": [interp.Edit(view.site(), "set", 0.0)]})).values.values[0]
    for pair, base in enumerate(pairs().clean):
        logits = hooked.run(base, lambda x: sae.decode(sae.encode(x)))[0]
        close(found[pair], float(logits[-1, 20 + pair] - logits[-1, 40 + pair]))


@every
def test_features_pass_the_laws_of_views_and_run_on_a_server(family: str) -> None:
    here = loaded(family)
    there = interp.load_model(tiny(family)[0], tokenizer=here.tokenizer, backend="simulated")
    for form in FORMS:
        sae = dictionary(form, family)
        assert here.audit(layers=[], views=[view_of(sae)]).ok
        plan = interp.features(sae, busy(form, family))
        close(interp.patch(there, pairs(), plan).values, interp.patch(here, pairs(), plan).values)


def test_a_dictionary_has_one_view_of_a_site() -> None:
    sae = dictionary("TopK", "gpt2")
    assert view_of(sae) is view_of(sae) and str(view_of(sae).site(unit=4)) == "L1.sae1[4]"
    assert view_of(sae, "L0.mlp_out").name == "sae0_mlp_out"
    assert interp.features(sae, [1]).components == (view_of(sae),)


def test_a_view_is_of_the_weights_as_they_are() -> None:
    """Made, then trained on: the next view is of what it has become."""
    sae = untrained("topk")
    sae.cfg.metadata["site"] = "L1.resid_post"
    interp.train_sae(sae, rows(), tokens=2560, batch_size=128, progress=False)
    before = view_of(sae)
    assert view_of(sae) is before
    interp.train_sae(sae, rows(), tokens=2560, batch_size=128, progress=False)
    x = rows()[None, :20]
    after = view_of(sae)
    want = interp.saes.inference(sae).encode(x)
    torch.testing.assert_close(after.read(x, after.seen().tensors), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before.read(x, before.seen().tensors), want, rtol=1e-4, atol=1e-4)
    used = random_dictionary("Standard", 16)
    first = view_of(used)
    with torch.no_grad():
        used.W_enc.data *= 2
    assert view_of(used) is not first and torch.equal(view_of(used).tensors["encoder"], used.W_enc.T)


@torch.no_grad()
def test_a_dictionary_of_heads_side_by_side() -> None:
    """SAELens's hook_z dictionaries, on z of all heads."""
    model = loaded("llama_gqa")
    made = sae_lens().TopKSAE(
        sae_lens().TopKSAEConfig(d_in=model.n_heads * model.d_head, d_sae=48, k=6, reshape_activations="hook_z")
    )
    made.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    made.turn_on_forward_pass_hook_z_reshaping()
    texts = words(9, 5)
    z = interp.collect_activations(model, texts, 1, "z")
    assert view_of(made).tap == interp.Site("z", layer=1)
    close(interp.collect_activations(model, texts, 1, view_of(made)), made.encode(z))
    report = interp.evaluate_sae(model, made, texts, context=16)
    flat = z.flatten(1)
    error = (z - made(z)).flatten(1).pow(2).sum() / (flat - flat.mean(0)).pow(2).sum()
    assert report.explained_variance_with_massive == pytest.approx(1 - float(error), abs=1e-4)
    found = interp.patch(model, pairs(), interp.features(made, [0, 1]))
    assert np.isfinite(found.values).all()


def test_what_is_no_site_says_so() -> None:
    model = loaded("gpt2")
    stray = random_dictionary("TopK", 32)
    stray.cfg.metadata.site = None
    for call, error, message in (
        (lambda: interp.features(stray), PlanError, "does not say where it belongs; give the site"),
        (lambda: interp.features(trained("transcoder")), PlanError, "use interp.attribution_graph"),
        (lambda: interp.features(untrained("batchtopk")), PlanError, "does not say where it belongs"),
        (lambda: view_of(untrained("batchtopk"), "L1.resid_post"), PlanError, "no threshold yet"),
        (lambda: view_of(untrained("topk"), "L1.resid_post"), PlanError, "train_sae"),
        (
            lambda: interp.patch(model, pairs(), interp.features(random_dictionary("TopK", 40), [0])),
            SiteError,
            "is of 40 numbers, but resid_post of .* has 32",
        ),
        (lambda: interp.patch(model, pairs(), interp.features(dictionary("TopK", "gpt2"), [64])), SiteError, "0 to 63"),
    ):
        with pytest.raises(error, match=message):
            call()
