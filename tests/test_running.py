"""`model.run`, `model.logits`, `model.tokens`: every kind of every family against the oracle's hooks, padded, under edits."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import interp
from interp import Edit, Site
from interp.cached import TokenIds
from interp.errors import AuditError, PairsError, PlanError, SiteError
from interp.saes.views import view_of
from tests.families import SUPPORTED, activation, allowed, count_forwards, has, loaded, oracle_of, words
from tests.oracle.configs import tiny
from tests.oracle.hooks import Patch
from tests.saes.made import random_dictionary

FAMILY = "llama_gqa"


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_kind_is_what_a_hook_reads(family: str) -> None:
    """Prompts of two lengths, so that one is padded; kinds without a layer have all of them."""
    model, prompts = loaded(family), words(7, 4)
    kinds = has(family)
    logits, cache = model.run(prompts, sites=kinds)
    assert logits is not None and logits.shape == (2, 7, model.vocab_size)
    for number, prompt in enumerate(prompts):
        want = oracle_of(family).run(prompt)
        n = len(prompt)
        assert float((logits[number, :n] - want).abs().max()) <= allowed(want)
        assert bool(logits[number, n:].isnan().all())
        for kind in kinds:
            layerless = not Site(kind).facts.layered
            found = cache[kind] if layerless else cache[kind].sel(layer=1)
            own = found.isel(prompt=number).values
            own = own[:, :n, :n] if kind == "pattern" else own[:n]
            want = activation(family, prompt, kind, 1)
            torch.testing.assert_close(torch.tensor(own), want.reshape(own.shape), rtol=1e-4, atol=1e-4)
            assert kind == "pattern" or np.isnan(found.isel(prompt=number).values[n:]).all()


def test_one_activation_has_three_names() -> None:
    model, prompt = loaded(FAMILY), words(6)[0]
    _, cache = model.run(prompt, sites=["L1.z", "blocks.0.hook_resid_post", ("pattern", 1)])
    assert cache["L1.z"] is cache["blocks.1.attn.hook_z"] is cache["z", 1] is cache[Site("z", layer=1)]
    assert cache["L1.z"].dims == ("prompt", "position", "head", "d_head")
    assert cache["L1.pattern"].dims == ("prompt", "head", "query", "key")
    assert cache["L0.resid_post"].dims == ("prompt", "position", "d_model")
    assert "L0.resid_post" in cache and "L0.resid_pre" not in cache and list(cache) == cache.keys() and len(cache) == 3
    assert cache["L-2.z"] is cache["L1.z"], "layers from the end"
    with pytest.raises(SiteError, match=r"L0\.z was not asked for.*sites=\['L0\.z'.*holds L1\.z"):
        _ = cache["L0.z"]
    assert "L1.z: prompt 1 × position 6 × head 4 × d_head" in repr(cache)
    assert set(cache.to_dataset().data_vars) == {"L1.z", "L0.resid_post", "L1.pattern"}
    assert cache.to_dataset()["token"].dims == ("prompt", "position")


def test_parts_of_a_site() -> None:
    model, prompts = loaded(FAMILY), words(6, 4)
    _, cache = model.run(
        prompts, ["L1.z", "L1.H2.z@-1", "L1.k", "L0.H1.k", "L0.neuron[5]", "L0.pattern", "L0.H3.pattern@-2"]
    )
    for number, prompt in enumerate(prompts):
        n = len(prompt)
        whole = cache["L1.z"].isel(prompt=number)
        np.testing.assert_array_equal(cache["L1.H2.z@-1"].isel(prompt=number), whole.values[n - 1, 2])
        want = activation(FAMILY, prompt, "k", 0)[:, 1]
        np.testing.assert_allclose(cache["L0.H1.k"].values[number, :n], want, rtol=1e-4, atol=1e-5)
        pattern = cache["L0.pattern"].values[number, 3, n - 2]
        np.testing.assert_array_equal(cache["L0.H3.pattern@-2"].values[number], pattern)
    assert cache["L1.k"].dims == ("prompt", "position", "kv_head", "d_head")
    assert cache["L0.neuron[5]"].dims == ("prompt", "position")
    with pytest.raises(SiteError, match="prompt 1 has 4 tokens, positions 0 to 3"):
        model.run(prompts, "L1.z@5")


def test_a_view_is_read_also_where_parts_of_it_are_changed() -> None:
    model, prompt = loaded(FAMILY), words(6)[0]
    sae = random_dictionary("TopK", model.d_model)
    view = view_of(sae)
    site = view.site()
    _, cache = model.run(prompt, [site])
    stream = activation(FAMILY, prompt, "resid_post", site.layer or 0)
    want = sae.encode(stream).detach()
    np.testing.assert_allclose(cache[str(site)].values[0], want, rtol=1e-4, atol=1e-4)
    assert cache[str(site)].dims == ("prompt", "position", "unit")
    off = Edit(view.site(unit=int(want.sum(0).argmax())), "set", 0.0)
    logits, changed = model.run(prompt, [view, "L1.resid_post"], edits=off)
    moved = stream - want[:, off.site.unit, None] * sae.W_dec[off.site.unit].detach()
    plain = oracle_of(FAMILY).run(prompt, [Patch("resid_post", site.layer or 0, moved)])
    assert logits is not None and float((logits[0] - plain).abs().max()) <= 10 * allowed(plain)
    assert changed[str(site)].shape == cache[str(site)].shape
    assert not changed[str(site)].equals(cache[str(site)])


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gpt_neox", "gemma2"])
def test_edits_hold_while_it_runs(family: str) -> None:
    model, prompts = loaded(family), words(7, 5)
    step = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    edits = [
        Edit(Site("resid_post", layer=0, position=-2), "add", step),
        Edit(Site("z", layer=1, head=1), "scale", 0.0),
    ]
    logits, cache = model.run(prompts, "L1.resid_post", edits=edits)
    for number, prompt in enumerate(prompts):
        z = torch.zeros(model.d_head)
        patches = [
            Patch("resid_post", 0, step, (len(prompt) - 2,), op="add"),
            Patch("z", 1, z, tuple(range(len(prompt))), 1),
        ]
        want = oracle_of(family).run(prompt, patches)
        assert logits is not None and float((logits[number, : len(prompt)] - want).abs().max()) <= 2 * allowed(want)
        read = oracle_of(family).read(prompt, "resid_post", 1, patches)
        np.testing.assert_allclose(cache["L1.resid_post"].values[number, : len(prompt)], read, rtol=1e-4, atol=1e-4)
    plain = model.logits(prompts)
    assert float((plain - logits).nan_to_num().abs().max()) > 0.01
    assert torch.equal(model.logits(prompts, edits=edits).nan_to_num(), logits.nan_to_num())


def test_without_logits_nothing_above_is_run() -> None:
    model, prompt = loaded(FAMILY), words(6)[0]
    seen = []
    handle = model.hf.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    try:
        found = model.run(prompt, "L0.z", logits=False)
    finally:
        handle.remove()
    assert found.logits is None and not seen and found.cache["L0.z"].shape[1] == 6


def test_many_prompts_go_in_several_passes_and_keep_their_order() -> None:
    model, prompts = loaded(FAMILY), words(*range(2, 12))
    seen, stop = count_forwards(model)
    try:
        logits, cache = model.run(prompts, "L1.mlp_out", max_tokens=16)
    finally:
        stop()
    assert len(seen) > 3 and logits is not None
    for number, prompt in enumerate(prompts):
        want = oracle_of(FAMILY).run(prompt)
        assert float((logits[number, : len(prompt)] - want).abs().max()) <= allowed(want)
        read = activation(FAMILY, prompt, "mlp_out", 1)
        np.testing.assert_allclose(cache["L1.mlp_out"].values[number, : len(prompt)], read, rtol=1e-4, atol=1e-5)


def test_elsewhere_it_gives_the_same() -> None:
    here, prompts = loaded(FAMILY), words(6, 3)
    there = interp.load_model(tiny(FAMILY)[0], tokenizer=here.tokenizer, backend="simulated")
    edits = [Edit(Site("resid_post", layer=0), "scale", 1.5)]
    asked = ["L1.H2.z", "pattern", "embed"]
    mine, other = (model.run(prompts, asked, edits=edits) for model in (here, there))
    assert torch.equal(mine.logits.nan_to_num(), other.logits.nan_to_num())
    for name, array in mine.cache.items():
        assert array.identical(other.cache[name]), name


def test_tokens_are_those_that_experiments_run() -> None:
    model = loaded(FAMILY)
    ids = words(5)[0]
    assert model.tokens(ids) == tuple(ids) and isinstance(model.tokens(ids), TokenIds)
    text = model.tokenizer.decode(ids)
    found = model.tokens(text)
    assert list(found) == model.tokenizer(text)["input_ids"] and len(found.labels) == len(found)
    assert torch.equal(model.logits(found), model.logits(text))
    both = model.tokens([text, ids])
    assert isinstance(both, list) and both[0] == found and both[1] == tuple(ids)
    for made in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert made == found and made.labels == found.labels
    assert repr(found).startswith("0:")
    pairs = interp.PromptPairs([found], answers=[ids[0]], distractors=[ids[1]])
    assert model.encode(pairs).clean[0] == tuple(found)


def test_what_cannot_be_run_is_refused() -> None:
    model, prompt = loaded(FAMILY), words(6)[0]
    for sites, said in (
        ("L9.z", r"layer 9, but .* has layers 0 to 2"),
        ("nonsense", "unknown site kind"),
        ("blocks.0.hook_nothing", "no site for hook"),
        ("logits", "leave logits=True"),
        (["L0.z", "L0.H9.z"], "head 9"),
    ):
        with pytest.raises(SiteError, match=said):
            model.run(prompt, sites)
    with pytest.raises(SiteError, match="nothing is asked for"):
        model.run(prompt, logits=False)
    with pytest.raises(PlanError, match="no second run"):
        model.run(prompt, edits=Edit(Site("z", layer=0)))
    with pytest.raises(PlanError, match=r"holds 'L0\.z'"):
        model.run(prompt, edits=["L0.z"])
    with pytest.raises(PairsError):
        model.run(3)
    with pytest.raises(PairsError):
        model.tokens({"a": 1})
    model.refused["z"] = "a test"
    try:
        with pytest.raises(AuditError, match="a test"):
            model.run(prompt, "z")
    finally:
        del model.refused["z"]
