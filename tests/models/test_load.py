"""Loading: names, folders, modules in memory, and what is said when none of them can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import interp
from interp import PromptPairs, Site
from interp.errors import ArchitectureError, AuditError, BackendError, ModelNotFoundError, PairsError
from interp.models import loading
from tests.families import SUPPORTED, UNSUPPORTED, count_forwards, loaded, oracle_of, words
from tests.oracle.configs import tiny


def made_up() -> torch.nn.Module:
    """A model that transformers can build and whose blocks resemble no row: a recurrent one."""
    config = AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    return AutoModelForCausalLM.from_config(config)


# --- what is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_facts_of_a_model_are_those_of_its_modules(family: str) -> None:
    model, oracle = loaded(family), oracle_of(family)
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (3, oracle.n_heads, oracle.n_kv_heads)
    assert model.d_head == oracle.d_head
    assert model.d_model == oracle.read([5, 6], "resid_pre").shape[1] == 32
    assert model.vocab_size == model.hf.get_input_embeddings().weight.shape[0]
    if model.d_mlp is not None:
        assert model.d_mlp == oracle.read([5, 6], "neuron").shape[1]
    assert model.cfg.n_key_value_heads == model.n_kv_heads and model.cfg.d_vocab == model.vocab_size
    assert model.heads_of("z") == model.n_heads and model.heads_of("v") == model.n_kv_heads
    assert type(model).__name__ in repr(model) and "3 layers" in repr(model)


def test_a_module_in_memory_is_used_as_it_is() -> None:
    hf, tokenizer = tiny("gpt2")
    model = interp.load_model(hf, tokenizer=tokenizer)
    assert model.hf is hf and model.tokenizer is tokenizer and model.backend.weights_here


def test_without_a_tokenizer_prompts_are_token_ids() -> None:
    hf, _ = tiny("gpt2")
    model = interp.load_model(hf)
    pairs = PromptPairs(words(6), words(6, seed=1), [20], [30])
    assert interp.patch(model, pairs, interp.grid("z", layers=[0])).provenance["tokens"][0][0].startswith("<")
    assert model.tokenizer is None
    with pytest.raises(
        PairsError, match=r"the model has no tokenizer; give token ids, or load_model\(..., tokenizer=\)"
    ):
        interp.patch(model, PromptPairs(["Mary went"], ["John went"], [20], [30]), interp.grid("z"))
    with pytest.raises(PairsError, match="no tokenizer"):
        interp.patch(model, PromptPairs(words(6), words(6, seed=1), ["home"], ["out"]), interp.grid("z"))
    with pytest.raises(PairsError, match="no tokenizer"):
        interp.collect_activations(model, ["Mary went"], layer=0, component="mlp_out")
    with pytest.raises(ArchitectureError, match="needs a tokenizer, and this model has none"):
        interp.load_model(hf, prefix="<bos>")


def test_what_a_module_in_memory_is_may_be_asked_of_it() -> None:
    hf, tokenizer = tiny("gpt2")
    asked = {"device": "cpu", "dtype": torch.float32, "attn_implementation": "sdpa", "revision": "main"}
    model = interp.load_model(hf, tokenizer=tokenizer, **asked)
    assert model.hf is hf and model.revision == "main"
    assert interp.load_model(hf, device=torch.device("cpu"), dtype="float32").hf is hf


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
        {"token": "x"},
    ],
)
def test_a_module_in_memory_takes_no_options_of_loading(option: dict[str, str]) -> None:
    with pytest.raises(ArchitectureError, match=f"{next(iter(option))}=.* does not go with a module in memory"):
        interp.load_model(tiny("gpt2")[0], **option)


def test_an_unknown_dtype_is_told(tmp_path: Path) -> None:
    hf, tokenizer = tiny("gpt2")
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match="dtype='foo' is no type of torch"):
        interp.load_model(tmp_path, dtype="foo")


def test_a_relative_folder_is_found_by_the_worker_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, tokenizer = tiny("gpt2")
    hf.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pairs, plan = PromptPairs(words(6), words(6, seed=1), [20], [30]), interp.grid("z", layers=[0])
    here, there = (
        interp.patch(interp.load_model("model", backend=name), pairs, plan) for name in ("local", "simulated")
    )
    assert there.values.equals(here.values)


def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    hf, tokenizer = tiny("qwen3")
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        model = interp.load_model(name)
        assert model.dtype == torch.float32 and not model.hf.training
        ids = torch.tensor(words(6))
        with torch.no_grad():
            assert torch.equal(model.hf(ids).logits, hf(ids).logits)
    eager = interp.load_model(tmp_path, attn_implementation="eager", dtype="bfloat16")
    assert eager.taps["attention"] == "eager" and eager.dtype == torch.bfloat16


def test_a_prefix_stands_before_strings_and_in_the_record() -> None:
    hf, tokenizer = tiny("llama")
    model = interp.load_model(hf, tokenizer=tokenizer, prefix="<bos>")
    assert model.prefix_ids == (1,)
    pairs = PromptPairs(["Mary went to", [5, 6, 7]], ["John went to", [5, 6, 8]], [20, 20], [30, 30])
    assert [prompt[0] for prompt in model.encode(pairs).clean] == [1, 5]
    assert interp.patch(model, pairs[[0]], interp.grid("z", layers=[0])).provenance["prefix"] == "<bos>"


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no-such-folder"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*smollm2-135m") as caught:
        interp.load_model(name)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", ""])
def test_a_name_that_no_hub_gives(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not a bundled name .smollm2-135m"):
        interp.load_model(name)


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        interp.load_model(tmp_path)
    hf, tokenizer = tiny("gpt2")
    hf.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no file named model\.safetensors"):
        interp.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="not a valid JSON"):
        interp.load_model(tmp_path)


@pytest.mark.parametrize("config", [{"model_type": "made_up"}, {"model_type": "t5"}, {}])
def test_a_folder_of_no_language_model_that_is_known(tmp_path: Path, config: dict) -> None:
    tiny("gpt2")[1].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match="no causal language model that transformers knows"):
        interp.load_model(tmp_path)


def test_an_architecture_that_no_row_fits_is_told_how_to_add_one() -> None:
    model = made_up()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ArchitectureError, match=r"'mamba', which has no row in interp/models/families\.py") as caught:
        interp.load_model(model)
    assert "python -m interp.audit" in str(caught.value) and "llama" in str(caught.value)
    assert not seen


@pytest.mark.parametrize("family", [family for family in UNSUPPORTED if family != "granite"])
def test_families_that_resemble_a_row_but_are_not_one(family: str) -> None:
    with pytest.raises(ArchitectureError, match="resemble none"):
        interp.load_model(tiny(family)[0])


def test_an_unknown_name_with_known_modules_is_inferred_and_audited() -> None:
    """A llama by another name: the row is found by its modules, every site passes, and results are those of llama."""
    hf, tokenizer = tiny("llama_gqa")
    hf.config.model_type = "lama"
    model = interp.load_model(hf, tokenizer=tokenizer)
    assert model.family.name == "llama (inferred for lama)" and not model.refused
    assert model.audit().ok


def test_what_is_no_language_model() -> None:
    with pytest.raises(ArchitectureError, match="a Linear is no HuggingFace language model"):
        interp.load_model(torch.nn.Linear(3, 3))
    own = torch.nn.Linear(3, 3)
    own.config = {"n_layer": 3}  # type: ignore[assignment]
    with pytest.raises(
        ArchitectureError, match="a Linear is no HuggingFace language model: it has no config of transf"
    ):
        interp.load_model(own)


def test_opt_with_norms_behind_its_blocks_is_told_why_it_cannot_be_used() -> None:
    config = tiny("opt")[0].config
    config.do_layer_norm_before = False
    with pytest.raises(ArchitectureError, match="use a pre-norm checkpoint"):
        interp.load_model(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("backend", ["nowhere", 3, object()])
def test_an_unknown_backend(backend: object) -> None:
    with pytest.raises(BackendError, match="it is 'local', 'simulated', 'ndif'"):
        interp.load_model(tiny("gpt2")[0], backend=backend)


@pytest.mark.parametrize("backend", ["ndif", "http://127.0.0.1:1"])
def test_a_module_in_memory_cannot_go_to_a_server(backend: str) -> None:
    with pytest.raises(BackendError, match="in memory cannot run on a server"):
        interp.load_model(tiny("gpt2")[0], backend=backend)


# --- the check at load -------------------------------------------------------------------------------------


def test_a_few_short_forwards_check_reads_and_laws_at_load() -> None:
    hf, _ = tiny("gpt2")
    seen: list[tuple[int, ...]] = []
    hf.transformer.wte.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    interp.load_model(hf)
    assert 0 < len(seen) <= 8 and all(rows * positions <= 25 for rows, positions, _ in seen)
    seen.clear()
    interp.load_model(hf, check=False)
    assert not seen


def test_a_wrong_read_is_refused_from_load_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales what its blocks add by a number that Llama's row does not know: attn_out and mlp_out are not what is
    added."""
    monkeypatch.setattr(loading, "find_family", lambda _: None)
    hf, tokenizer = tiny("granite")
    with pytest.warns(UserWarning, match="are refused"):
        model = interp.load_model(hf, tokenizer=tokenizer)
    assert {"attn_out", "mlp_out"} <= set(model.refused)
    pairs = PromptPairs(words(6), words(6, seed=1), [20], [30])
    forwards, stop = count_forwards(model)
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(AuditError, match=f"{kind} is refused on .*: the audit says: read at layer"):
            interp.patch(model, pairs, interp.grid(kind))
        with pytest.raises(AuditError, match="is refused"):
            model.require(Site(kind, 0))
    stop()
    assert not forwards
    oracle = oracle_of("granite")  # the sites that passed are right
    effects = interp.patch(model, pairs, interp.heads("z", layers=[1]))
    for head in range(4):
        logits = oracle.patched(words(6)[0], words(6, seed=1)[0], "z", 1, head=head)[-1]
        assert float(effects.values[0, 0, head, 0]) == pytest.approx(float(logits[20] - logits[30]), abs=1e-5)


def test_token_ids_are_checked_against_the_embedding() -> None:
    with pytest.raises(PairsError, match="outside the vocabulary"):
        loaded("gpt2").encode(PromptPairs([[1, 2, 400]]))


def test_a_module_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a GPU, too: nnsight makes a pipeline, and transformers would move the model there."""
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    hf, tokenizer = tiny("llama_gqa")
    model = interp.load_model(hf, tokenizer=tokenizer)
    assert model.hf is hf and model.device.type == "cpu" and next(hf.parameters()).device.type == "cpu"
