"""What `load_model` is told reaches everything that reads a checkpoint, and what a checkpoint lacks is said."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import interp
from interp import PromptPairs
from interp.errors import ArchitectureError, ModelNotFoundError, PairsError
from interp.models.sources import EVERYWHERE
from tests.families import words
from tests.oracle.configs import tiny

SAID: dict[str, Any] = {
    "token": "hf_secret",
    "cache_dir": "/nowhere/cache",
    "subfolder": "sub",
    "local_files_only": True,
    "trust_remote_code": True,
    "revision": "main",
    "code_revision": "v2",
    "proxies": {"https": "http://user:password@proxy"},
    "force_download": False,
    "gguf_file": "model.gguf",
}


def saved(folder: Path, family: str = "llama", seed: int = 0) -> Any:
    """A tiny model in a folder, with its tokenizer."""
    hf, tokenizer = tiny(family, seed)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hf


def same(model: interp.Model, hf: Any) -> bool:
    ids = torch.tensor(words(6))
    with torch.no_grad():
        return torch.equal(model.hf(ids).logits, hf(ids).logits)


# --- options -----------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a load once everything has been asked for."""


@pytest.mark.parametrize("backend", ["local", "http://127.0.0.1:1"])
def test_every_option_of_reading_reaches_config_tokenizer_and_model(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, dict[str, Any]] = {}
    hf, tokenizer = tiny("llama")

    def recorder(what: str, answer: Any) -> Any:
        def from_pretrained(source: Any, **options: Any) -> Any:
            seen[what] = options
            if answer is None:
                raise Stop
            return answer

        return from_pretrained

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", recorder("config", hf.config))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", recorder("tokenizer", tokenizer))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", recorder("model", None))

    def remote(source: Any, **options: Any) -> Any:
        seen["model"] = options
        raise Stop

    monkeypatch.setattr("interp.models.checkpoints.nnsight.TransformersModel", remote)
    assert set(SAID) == set(EVERYWHERE)
    with pytest.raises(Stop):
        interp.load_model("org/name", backend=backend, sliding_window=4, **SAID)
    assert set(seen) == {"config", "tokenizer", "model"}
    for what, options in seen.items():
        assert {name: options.get(name) for name in SAID} == SAID, what
    assert seen["model"]["sliding_window"] == 4


@pytest.mark.parametrize("backend", ["local", "simulated"])
def test_a_subfolder(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folders hold a model: the one that is asked for is read, wherever it runs."""
    saved(tmp_path / "model", seed=1)
    hf = saved(tmp_path / "model" / "sub" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pairs, plan = PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.grid("z", layers=[0])
    want = interp.patch(interp.load_model(hf, tokenizer=tiny("llama")[1]), pairs, plan)
    for name in (tmp_path / "model", "model", "./model", "~/model", Path("~/model")):
        model = interp.load_model(name, subfolder="sub/deep", backend=backend)
        assert same(model, hf)
    assert torch.equal(torch.tensor(interp.patch(model, pairs, plan).values.values), torch.tensor(want.values.values))


def test_a_subfolder_without_a_model(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"sub is not a model folder \(no config\.json\)"):
        interp.load_model(tmp_path, subfolder="sub")
    with pytest.raises(ModelNotFoundError, match=r"is not a model folder \(no tiny\.gguf\)"):
        interp.load_model(tmp_path, gguf_file="tiny.gguf")


_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def written_as_gguf(file: Path) -> Any:
    """The tiny Llama as llama.cpp's tools would write it: the two halves of each rotated head lie interleaved."""
    hf, tokenizer = tiny("llama")
    file.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(file, "llama")
    for name, number in {
        "context_length": 64, "embedding_length": 32, "block_count": 3, "feed_forward_length": 48, "head_count": 4,
        "head_count_kv": 4, "layer_norm_rms_eps": hf.config.rms_norm_eps, "rope_dimension_count": 8,
        "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "pad_token_id": 0,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_scores([0.0] * len(tokenizer))
    writer.add_token_types([1] * len(tokenizer))
    for name, tensor in hf.state_dict().items():
        layer, module = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", name).groups()  # type: ignore[union-attr]
        if module.endswith(("q_proj", "k_proj")):
            tensor = tensor.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)
        block = "" if layer is None else f"blk.{layer}."
        writer.add_tensor(f"{block}{_GGUF[module]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


@pytest.mark.parametrize("backend", ["local", "simulated"])
def test_one_file_in_a_subfolder_holds_all_three(backend: str, tmp_path: Path) -> None:
    hf = written_as_gguf(tmp_path / "sub" / "tiny.gguf")
    model = interp.load_model(tmp_path, gguf_file="tiny.gguf", subfolder="sub", backend=backend)
    assert same(model, hf) and model.tokenizer.get_vocab()["Mary"] == tiny("llama")[1].get_vocab()["Mary"]
    pairs, plan = PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.grid("z", layers=[0])
    assert interp.patch(model, pairs, plan).values.equals(interp.patch(interp.load_model(hf), pairs, plan).values)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


def own_code(folder: Path) -> Any:
    """A model whose classes lie beside its weights."""
    hf = saved(folder)
    (folder / "own.py").write_text(CODE)
    for file, name, classes in (
        ("config.json", "architectures", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}),
        ("tokenizer_config.json", "tokenizer_class", {"AutoTokenizer": [None, "own.OwnTokenizer"]}),
    ):
        said = json.loads((folder / file).read_text())
        said["auto_map"] = classes
        said[name] = ["OwnForCausalLM"] if name == "architectures" else "OwnTokenizer"
        said.update({"model_type": "own_llama"} if name == "architectures" else {})
        (folder / file).write_text(json.dumps(said))
    return hf


def test_code_beside_the_weights_is_run_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    hf = own_code(tmp_path / "model")
    model = interp.load_model(tmp_path / "model", trust_remote_code=True)
    assert type(model.hf).__name__ == "OwnForCausalLM" and model.tokenizer.own and same(model, hf)
    assert model.family.name == "llama (inferred for own_llama)"
    with pytest.raises(ArchitectureError, match="trust_remote_code=True"):
        interp.load_model(tmp_path / "model", trust_remote_code=False)


def test_a_cache_of_ones_own_without_a_network(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--org--name"
    hf = saved(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    model = interp.load_model("org/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same(model, hf) and model.tokenizer is not None and model.revision == commit
    with pytest.raises(ModelNotFoundError, match="the hub could not give it"):
        interp.load_model("org/name", cache_dir=tmp_path, local_files_only=True)


def test_a_cache_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError):
        interp.load_model("org/name", cache_dir="~/cache")
    assert not (tmp_path / "~").exists()


def test_a_token_is_told_to_nobody(tmp_path: Path) -> None:
    saved(tmp_path)
    model = interp.load_model(tmp_path, token="hf_secret", backend="simulated")
    effects = interp.patch(model, PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.grid("z", layers=[0]))
    assert (
        "hf_secret" not in json.dumps(effects.provenance, default=str) + repr(model) + model.hf.config.to_json_string()
    )
    remote = interp.load_model(tmp_path, token="hf_secret", backend="http://127.0.0.1:1")
    assert "hf_secret" not in repr(vars(remote.nn)) + repr(remote)
    with pytest.raises(ArchitectureError) as caught:
        interp.load_model(tiny("llama")[0], token="hf_secret")
    assert "token=…" in str(caught.value)
    with pytest.raises(ModelNotFoundError) as missing:
        interp.load_model("nobody/nothing", token="hf_secret")
    assert "hf_secret" not in str(missing.value)


def test_changes_to_the_config_reach_the_worker(tmp_path: Path) -> None:
    saved(tmp_path, "mistral")
    pairs, plan = PromptPairs(words(9), words(9, seed=1), [20], [30]), interp.grid("z", layers=[0])
    here, there = (
        interp.patch(interp.load_model(tmp_path, backend=name, sliding_window=2), pairs, plan)
        for name in ("local", "simulated")
    )
    assert there.values.equals(here.values)


# --- checkpoints that are not whole ------------------------------------------------------------------------


def change(folder: Path, edit: Any) -> None:
    """Edit the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    hf = saved(tmp_path)
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    said = r"does not hold all weights of a LlamaForCausalLM: missing: 9 \(model\.layers\.1\.input_layernorm\.weight, .*, …\)"
    for backend in ("local", "simulated"):
        with pytest.raises(ModelNotFoundError, match=said + r".*allow_missing=True"):
            interp.load_model(tmp_path, backend=backend)
    with pytest.warns(UserWarning, match=said + "; they are random numbers"):
        model = interp.load_model(tmp_path, allow_missing=True)
    assert torch.equal(model.hf.model.layers[0].mlp.up_proj.weight, hf.model.layers[0].mlp.up_proj.weight)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4)}))
    said = r"of another shape: 1 \(model\.layers\.0\.mlp\.up_proj\.weight \(3, 4\), not \(48, 32\)\)"
    with pytest.raises(ModelNotFoundError, match=said):
        interp.load_model(tmp_path)
    for asked in ({"allow_missing": True}, {"ignore_mismatched_sizes": True}):
        with pytest.warns(UserWarning, match=said):
            interp.load_model(tmp_path, **asked)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bloom"])
def test_a_base_model_whose_head_is_its_embedding_is_whole(family: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny(family)
    hf.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert same(interp.load_model(tmp_path), hf)


@pytest.mark.parametrize(("family", "missing"), [("llama", "1 .lm_head.weight."), ("phi", "2 .lm_head.bias")])
def test_a_base_model_without_its_head_is_not(family: str, missing: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny(family)
    hf.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"missing: {missing}.* saved from {type(hf.base_model).__name__}"):
        interp.load_model(tmp_path)


def test_a_classifier_has_no_head_for_tokens(tmp_path: Path) -> None:
    hf, tokenizer = tiny("llama")
    transformers.LlamaForSequenceClassification(hf.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"missing: 1 .lm_head.* saved from LlamaForSequenceClassification"):
        interp.load_model(tmp_path)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    hf = saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelNotFoundError, match=r"the weights of .* cannot be read: .*header"):
        interp.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    old = tmp_path / "pytorch_model.bin"
    torch.save(hf.state_dict(), old)
    assert same(interp.load_model(tmp_path), hf)
    for damaged in (b"not weights", old.read_bytes()[:2000]):
        old.write_bytes(damaged)
        with pytest.raises(ModelNotFoundError, match=r"the weights of .* cannot be read: "):
            interp.load_model(tmp_path)
    old.unlink()
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelNotFoundError, match=r"the model folder .* cannot be read: .*model-00002"):
        interp.load_model(tmp_path)


# --- tokenizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["local", "simulated", "http://127.0.0.1:1"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_folder_without_a_tokenizer_takes_token_ids(family: str, backend: str, tmp_path: Path) -> None:
    """GPT-2's and Gemma's tokenizer classes would be built from nothing, with no token but the special ones."""
    hf, tokenizer = tiny(family)
    hf.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"has no tokenizer files: .* token ids, or give load_model\(\.\.\., tokenizer=\)"
    ):
        model = interp.load_model(tmp_path, backend=backend)
    assert model.tokenizer is None
    with pytest.raises(PairsError, match="the model has no tokenizer"):
        model.encode(PromptPairs(["Mary went"]))
    if backend != "http://127.0.0.1:1":
        pairs, plan = PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.grid("z", layers=[0])
        want = interp.patch(interp.load_model(hf, tokenizer=tokenizer), pairs, plan)
        assert interp.patch(model, pairs, plan).values.equals(want.values)
    assert interp.load_model(tmp_path, tokenizer=tokenizer, backend=backend).tokenizer is tokenizer
    with (
        pytest.warns(UserWarning, match="no tokenizer files"),
        pytest.raises(ArchitectureError, match="needs a tokenizer"),
    ):
        interp.load_model(tmp_path, backend=backend, prefix="<bos>")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{broken", "JSONDecodeError"), (None, "instantiate the backend tokenizer")],
)
def test_a_tokenizer_that_cannot_be_built_says_why(text: str | None, reason: str, tmp_path: Path) -> None:
    saved(tmp_path)
    if text is None:
        os.unlink(tmp_path / "tokenizer.json")
    else:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelNotFoundError, match=rf"the tokenizer of .* cannot be built \(.*{reason}.*tokenizer=\)"):
        interp.load_model(tmp_path)


def test_a_tokenizer_without_a_vocabulary(tmp_path: Path) -> None:
    hf, _ = tiny("gpt2")
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    with pytest.raises(ModelNotFoundError, match=r"cannot be built \(its vocabulary is empty\)"):
        interp.load_model(tmp_path)
