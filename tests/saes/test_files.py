"""Dictionaries on disk: SAELens reads what is written, bit for bit, and what is damaged or does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
import interp.saes.files
from interp.errors import CheckpointError, PlanError
from interp.saes.library import sae_lens
from interp.saes.views import named_site
from interp.sites import Site
from tests.families import loaded

from .made import AUTOENCODERS, WIDTH, pairs_of, random_dictionary, trained, untrained


@pytest.mark.parametrize("architecture", [*AUTOENCODERS, "transcoder"])
def test_plain_saelens_loads_what_was_saved_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    sae, x = trained(architecture), pairs_of(architecture)[:, :WIDTH]
    folder = interp.save_sae(sae, tmp_path / "saes" / "one", metadata={"note": "α", "layer": 1, "component": "mlp_out"})
    plain, ours = sae_lens().SAE.load_from_disk(str(folder)), interp.load_sae(folder)
    used = interp.saes.inference(sae)
    form = {"batchtopk": "JumpReLUSAE", "matryoshka": "JumpReLUSAE", "transcoder": "JumpReLUTranscoder"}
    if architecture in form:
        assert type(plain).__name__ == form[architecture]
    for other in (plain, ours):
        assert all(torch.equal(other.state_dict()[name], value) for name, value in used.state_dict().items())
        assert torch.equal(other.encode(x), used.encode(x)) and torch.equal(other(x), used(x))
    assert plain.cfg.metadata["note"] == "α"
    assert plain.cfg.metadata["training_architecture"]
    assert interp.saes.site_of(ours) == Site("mlp_out" if architecture != "transcoder" else "mlp_in", layer=1)
    interp.save_sae(ours, folder)  # over itself
    assert torch.equal(interp.load_sae(folder)(x), used(x))
    assert [entry.name for entry in folder.parent.iterdir()] == ["one"]


def test_training_ends_in_a_form_that_computes_the_same() -> None:
    """The threshold is one for all tokens; up to it the two forms agree on every token."""
    sae, x = trained("topk"), pairs_of("topk")
    torch.testing.assert_close(sae.encode(x), interp.saes.inference(sae).encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), interp.saes.inference(sae)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.8.hook_resid_post", "L8.resid_post"),
        ("blocks.3.attn.hook_z", "L3.z"),
        ("L2.mlp_out", "L2.mlp_out"),
        ("model.layers.5", "L5.resid_post"),
        ("transformer.h.5.mlp", "L5.mlp_out"),
        ("model.layers.7.self_attn", "L7.attn_out"),
        ("blocks.1.hook_something", None),
        ("layers", None),
    ],
)
def test_a_hook_means_a_site(name: str, site: str | None) -> None:
    assert named_site(name) == (None if site is None else Site.parse(site))


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    folder = interp.save_sae(random_dictionary("JumpReLU", 16), tmp_path / "good")

    def broken(name: str, **files: bytes) -> Path:
        place = tmp_path / name
        place.mkdir()
        for file in folder.iterdir():
            content = files.get(file.stem, file.read_bytes())
            if content:
                (place / file.name).write_bytes(content)
        return place

    config = json.loads((folder / "cfg.json").read_text())
    whole = (folder / "sae_weights.safetensors").read_bytes()
    wide = json.dumps({**config, "d_in": 17}).encode()
    training = json.dumps({**config, "architecture": "batchtopk", "k": 3}).encode()
    for place, message in (
        (broken("truncated", sae_weights=whole[:-100]), "cannot be loaded as a jumprelu dictionary"),
        (broken("empty", sae_weights=b""), "it has no sae_weights.safetensors"),
        (broken("no_config", cfg=b""), "it has no cfg.json"),
        (broken("torn", cfg=b'{"archi'), "cfg.json cannot be read"),
        (broken("wide", cfg=wide), "cannot be loaded"),
        (broken("training", cfg=training), "in the form that is trained"),
        (tmp_path / "nothing", "is no folder, and no pretrained dictionary"),
        (Path("gpt2-small-res-jb/blocks.99"), "has no 'blocks.99'; it has"),
    ):
        with pytest.raises(CheckpointError, match=message):
            interp.load_sae(place)
    with pytest.raises(PlanError, match=r"does not fit L1\.resid_post of .*, which has 32 numbers"):
        interp.load_sae(folder, loaded("gpt2"))
    with pytest.raises(PlanError, match="in training: its inputs are scaled"):
        interp.save_sae(untrained("topk"), tmp_path / "early")
    with pytest.raises(PlanError, match="no threshold yet"):
        interp.save_sae(untrained("batchtopk"), tmp_path / "early")
    with pytest.raises(PlanError, match="metadata is plain data"):
        interp.save_sae(trained("topk"), tmp_path / "early", metadata={"x": torch.ones(1)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no dictionary"):
        interp.save_sae(trained("topk"), tmp_path / "other")
    assert not (tmp_path / "early").exists() and (tmp_path / "other" / "thesis.txt").exists()


def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interp.save_sae(random_dictionary("Standard", 16), tmp_path / "one")
    before = (folder / "sae_weights.safetensors").read_bytes()
    other: Any = random_dictionary("TopK", 16)

    def fails(path: Path) -> None:
        path.mkdir()
        (path / "sae_weights.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(other, "save_model", fails, raising=False)
    with pytest.raises(CheckpointError, match="No space left"):
        interp.save_sae(other, folder)
    assert (folder / "sae_weights.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]


def test_releases_of_centred_models_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mean over features is taken off each token before it is encoded, and stays in what is not explained."""
    made = random_dictionary("Standard", 32)
    made.cfg.metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    with pytest.warns(UserWarning, match="writing weights TransformerLens had centred"):
        sae = interp.load_sae(interp.save_sae(made, tmp_path / "one"))
    view, error = interp.saes.view_of(sae), interp.saes.error_view(sae)
    x = torch.randn(2, 3, 32) + 2
    flat = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(view.read(x, view.seen().tensors), sae.encode(flat))
    torch.testing.assert_close(error.read(x, error.seen().tensors), flat - sae(flat), rtol=1e-4, atol=1e-5)
