"""Sites: what can be named, in which forms, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from interp import Site
from interp.errors import InterpError, SiteError, SiteUnavailableError
from interp.sites import HEAD_KINDS, KINDS, LAYERLESS, UNIT_KINDS
from tests.families import EAGER, NO_ROTATED, PARALLEL, SUPPORTED, has, loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [None, 0, -1, 12])
def test_text_says_everything_and_is_read_back(kind: str, position: int | None) -> None:
    layer = None if kind in LAYERLESS else 11
    sites = [Site(kind, layer, position=position)]
    if kind in HEAD_KINDS:
        sites.append(Site(kind, layer, head=3, position=position))
    if kind in UNIT_KINDS:
        sites.append(Site(kind, layer, unit=40, position=position))
    texts = [str(site) for site in sites]
    assert [Site.parse(text) for text in texts] == sites
    assert len(set(texts)) == len(texts)


def test_the_text_forms_of_the_documentation() -> None:
    assert Site.parse("L9.H6.z@-1") == Site("z", layer=9, head=6, position=-1)
    assert Site.parse("blocks.9.attn.hook_z") == Site("z", layer=9)
    assert Site.parse("L5.neuron[17]") == Site("neuron", 5, unit=17)
    assert Site.parse("L3.mlp") == Site("mlp_out", 3)
    assert Site.parse("L3.H2") == Site("head_out", 3, head=2)
    assert Site.parse("L3.H1.k") == Site("k", 3, head=1)
    assert Site.parse("embed") == Site("embed")
    assert Site.parse("L-1.H0.z") == Site("z", layer=-1, head=0) and str(Site("z", layer=-1, head=0)) == "L-1.H0.z"
    assert Site.parse(Site("q", 1)) == Site("q", 1)


@pytest.mark.parametrize(
    "name", ["embed", "L3.H2", "L3.mlp", "L3.H1.k", "L3.H1.v", "L3.H2.q", "logits", "L1.H2@4", "L1.mlp@-1"]
)
def test_names_of_nodes_are_read_and_written_alike(name: str) -> None:
    assert Site.parse(name).node == name


@pytest.mark.parametrize(
    ("hook", "kind"),
    [
        ("hook_resid_pre", "resid_pre"),
        ("hook_resid_mid", "resid_mid"),
        ("hook_resid_post", "resid_post"),
        ("hook_attn_out", "attn_out"),
        ("hook_mlp_out", "mlp_out"),
        ("attn.hook_q", "q"),
        ("attn.hook_k", "k"),
        ("attn.hook_v", "v"),
        ("attn.hook_rot_q", "q_rot"),
        ("attn.hook_rot_k", "k_rot"),
        ("attn.hook_z", "z"),
        ("attn.hook_pattern", "pattern"),
        ("attn.hook_result", "head_out"),
        ("mlp.hook_pre", "mlp_pre"),
        ("mlp.hook_post", "neuron"),
    ],
)
def test_transformer_lens_names(hook: str, kind: str) -> None:
    assert Site.parse(f"blocks.7.{hook}") == Site(kind, 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "z",
        "L3",
        "H3.z",
        "L3.H",
        "3.z",
        "L3.H2.z@",
        "L3.zz",
        "blocks.1.hook_nothing",
        "L3.z@1.5",
        "embed.z",
    ],
)
def test_text_of_no_form(text: str) -> None:
    with pytest.raises(SiteError):
        Site.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "residual", "layer": 1}, "unknown site kind 'residual'; the kinds are: embed, resid_pre"),
        ({"kind": "mlp_out", "layer": 1, "head": 0}, "no heads; kinds with heads are: q, k, v"),
        ({"kind": "z", "layer": 1, "unit": 0}, "no units; kinds with units are"),
        ({"kind": "embed", "layer": 1}, "'embed' has no layer, but layer=1"),
    ],
)
def test_sites_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(SiteError, match=message) as caught:
        Site(**arguments)
    assert isinstance(caught.value, InterpError) and isinstance(caught.value, ValueError)


def test_sites_are_values() -> None:
    site = Site("z", 1, head=2)
    assert {site, Site("z", 1, head=2)} == {site}
    assert site.at(layer=4, head=None) == Site("z", 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.layer = 3  # type: ignore[misc]


def test_which_sites_overlap() -> None:
    z = Site("z", 1)
    assert z.overlaps(Site("z", 1, head=2)) and Site("z", 1, head=2).overlaps(z)
    assert Site("z", 1, position=3).overlaps(Site("z", 1, head=2))
    assert not Site("z", 1, head=1).overlaps(Site("z", 1, head=2))
    assert not Site("z", 1, head=1, position=3).overlaps(Site("z", 1, head=1, position=4))
    assert not z.overlaps(Site("z", 2)) and not z.overlaps(Site("v", 1))
    assert not Site("neuron", 1, unit=1).overlaps(Site("neuron", 1, unit=2))


# --- what a model has --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_site_that_the_architecture_lacks_is_refused_with_the_reason(family: str) -> None:
    model, kinds = loaded(family), has(family)
    for kind in KINDS:
        layer = None if kind in LAYERLESS else 1
        if kind in kinds or kind == "logits":
            assert model.require(Site(kind, layer)) == Site(kind, layer)
            continue
        with pytest.raises(SiteUnavailableError, match=f"have no {kind}: ") as caught:
            model.require(Site(kind, layer))
        reason = str(caught.value)
        if kind == "resid_mid":
            assert family in PARALLEL and "in parallel" in reason
        elif kind in ("q_rot", "k_rot"):
            assert family in NO_ROTATED and "rotary" in reason
        else:
            assert "experts" in reason


@pytest.mark.parametrize("family", EAGER)
def test_the_pattern_of_falcon_needs_eager_attention(family: str) -> None:
    with pytest.raises(SiteUnavailableError, match="attn_implementation='eager'"):
        loaded(family, "sdpa").require(Site("pattern", 0))


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("z", 40), r"L40\.z: layer 40, but .* has layers 0 to 2"),
        (Site("z", 10), "did you mean L1?"),
        (Site("z", -4), "layer -4, but .* has layers 0 to 2"),
        (Site("z", 1, head=4), "head 4, but .* has heads 0 to 3"),
        (Site("v", 1, head=2), "head 2, but .* has key/value heads 0 to 1"),
        (Site("z", 1, head=-1), "head -1"),
        (Site("neuron", 1, unit=48), "unit 48, but .* has units 0 to 47"),
        (Site("mlp_pre", 1, unit=-1), "unit -1"),
        (Site("mlp_out"), "needs a layer; this model has layers 0 to 2"),
    ],
)
def test_out_of_range(site: Site, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        loaded("llama_gqa").require(site)


def test_layers_count_from_the_end_too() -> None:
    assert loaded("llama_gqa").require(Site("z", -1, head=3)) == Site("z", 2, head=3)
    assert loaded("llama_gqa").require(Site("z", -3)) == Site("z", 0)
