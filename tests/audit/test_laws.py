"""The laws of edges: where a model keeps them, edges are right; where not, every method that rests on them is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import interp
from interp import Circuit, Model, PromptPairs
from interp.errors import AuditError
from interp.findings import LAWS
from interp.models import loading
from tests.families import allowed, count_forwards

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
CLEAN, CORRUPTED, ANSWERS = [3, 5, 6, 8, 10], [4, 5, 6, 8, 10], (3, 4)
PAIRS = PromptPairs([CLEAN], [CORRUPTED], [3], [4])
GRANITE = {
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
}


def tiny(config: Any, scale: float = 12.0) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    return model


def llama(**more: Any) -> Any:
    return tiny(transformers.LlamaConfig(**BASE, **more))


def diff(logits: Tensor) -> Tensor:
    return logits[0, -1, ANSWERS[0]] - logits[0, -1, ANSWERS[1]]


def seen(hf: Any, ids: list[int], path: str, side: str = "out") -> Tensor:
    """The output (or first input) of a module in a plain run."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: Any, out: Any) -> None:
        x = args[0] if side == "in" else out
        kept.append((x[0] if isinstance(x, tuple) else x).detach().clone())

    handle = hf.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        hf(input_ids=torch.tensor([ids]))
    handle.remove()
    return kept[0]


def changed(hf: Any, path: str, change: Callable[[Tensor], Tensor]) -> float:
    """The metric of the clean run with a module's first input changed."""
    handle = hf.get_submodule(path).register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    with torch.no_grad():
        found = float(diff(hf(input_ids=torch.tensor([CLEAN])).logits))
    handle.remove()
    return found


def read_gradient(hf: Any, layer: int, kind: str, head: int, width: int = 8) -> Tensor:
    """d metric / d what one head's q, k or v reads, by autograd through the model's own modules: `[position, d_model]`."""
    block = hf.model.layers[layer]
    module = block.self_attn.get_submodule(f"{kind}_proj")
    leaf = torch.zeros(1, len(CLEAN), module(torch.zeros(1, 32)).shape[-1], requires_grad=True)
    handle = module.register_forward_hook(lambda _, args, out: out + leaf)
    (by_out,) = torch.autograd.grad(diff(hf(input_ids=torch.tensor([CLEAN])).logits), leaf)
    handle.remove()
    only = torch.zeros_like(by_out)
    only[..., head * width : (head + 1) * width] = by_out[..., head * width : (head + 1) * width]
    x = seen(hf, CLEAN, f"model.layers.{layer}.input_layernorm", "in").requires_grad_(True)
    (gradient,) = torch.autograd.grad(module(block.input_layernorm(x)), x, only)
    return gradient[0]


def embedded(hf: Any) -> Tensor:
    """Corrupted minus clean of the stream that enters block 0."""
    runs = (seen(hf, ids, "model.layers.0.input_layernorm", "in")[0] for ids in (CORRUPTED, CLEAN))
    return next(runs) - next(runs)


# --- a scaled branch ------------------------------------------------------------------------------------------


def test_a_head_of_granite_writes_what_the_model_adds() -> None:
    hf = tiny(transformers.GraniteConfig(**BASE, **GRANITE), 6.0)
    base, weight = float(diff(hf(input_ids=torch.tensor([CLEAN])).logits)), hf.model.layers[3].self_attn.o_proj.weight
    z = [seen(hf, ids, "model.layers.3.self_attn.o_proj", "in") for ids in (CLEAN, CORRUPTED)]
    step = (z[1] - z[0])[..., 8:16] @ weight[:, 8:16].T * 0.22
    want = changed(hf, "model.norm", lambda x: x + step) - base
    assert want == pytest.approx(-0.002193, abs=1e-6)
    model = interp.load_model(hf)
    assert not model.refused and model.audit().ok
    circuit = Circuit.from_edges([("L3.H1", "logits")], model)
    assert interp.discover(model, PAIRS, method="exact", within=circuit).scores()["L3.H1", "logits"] == pytest.approx(
        want, abs=1e-6
    )
    assert interp.path_patch(model, PAIRS, "L3.H1").values.item() == pytest.approx(base + want, abs=1e-5)
    effects = interp.direct_effects(model, PAIRS)
    assert float(effects.values.sum()) == pytest.approx(base, abs=1e-5)


def granite_without_a_row(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(loading, "find_family", lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return interp.load_model(tiny(transformers.GraniteConfig(**BASE, **GRANITE), 6.0))


EDGE = [("L3.H1", "logits")]
RESTS: dict[str, Callable[[Model], Any]] = {
    **{method: partial(interp.discover, pairs=PAIRS, method=method) for method in ("exact", "acdc", "eap", "eap-ig")},
    "eap-ig-activations": partial(interp.discover, pairs=PAIRS, method="eap-ig-activations"),
    "nodes": partial(interp.discover, pairs=PAIRS, method="exact", level="node"),
    "run_circuit": lambda model: interp.run_circuit(model, PAIRS, Circuit.from_edges(EDGE, model)),
    "run_circuit, mean": lambda model: interp.run_circuit(model, PAIRS, Circuit.from_edges(EDGE, model), "mean"),
    "evaluate_circuit": lambda model: interp.evaluate_circuit(model, PAIRS, Circuit.from_edges(EDGE, model)),
    "iterative_pruning": lambda model: interp.iterative_pruning(model, pairs=PAIRS),
    "path_patch": lambda model: interp.path_patch(model, PAIRS, "embed", "logits"),
    "direct_effects": lambda model: interp.direct_effects(model, PAIRS),
}


@pytest.mark.parametrize("method", RESTS)
def test_what_rests_on_sums_is_refused_where_they_do_not_hold(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = granite_without_a_row(monkeypatch)
    assert {"senders", "head", "attn_out", "mlp_out"} <= set(model.refused)
    forwards, stop = count_forwards(model)
    with pytest.raises(
        AuditError, match=r"(rests on the law of senders, which|mlp_out) is refused on Granite.*the audit says"
    ):
        RESTS[method](model)
    stop()
    assert not forwards
    interp.patch(model, PAIRS, interp.grid("resid_pre"))  # what rests on its own site alone goes on


# --- projections that are not their weight --------------------------------------------------------------------


def adapted(*targets: str, **config: Any) -> Any:
    hf = llama(**config)
    torch.manual_seed(1)
    hf.add_adapter(peft.LoraConfig(r=4, lora_alpha=64, target_modules=list(targets), init_lora_weights=False))
    return hf.eval()


def test_edges_through_an_adapter_are_those_of_autograd_and_of_the_merged_weights() -> None:
    hf = adapted("q_proj", "v_proj")
    model = interp.load_model(hf)
    assert model.audit().ok
    scores = interp.discover(model, PAIRS, method="eap").scores()
    change = embedded(hf)
    assert scores["embed", "L2.H1.v"] == pytest.approx(0.01547, abs=1e-5)
    for kind, head in (("v", 1), ("q", 3), ("k", 0)):
        want = float((change * read_gradient(hf, 2, kind, head)).sum())
        assert scores["embed", f"L2.H{head}.{kind}"] == pytest.approx(want, rel=1e-4, abs=1e-7)
    merged = copy.deepcopy(hf)
    plain = llama()
    for name, module in merged.named_modules():
        if hasattr(module, "get_base_layer"):
            module.merge()
            plain.get_submodule(name).weight.data = module.get_base_layer().weight.data
    others = interp.discover(interp.load_model(plain), PAIRS, method="exact").scores()
    own = interp.discover(model, PAIRS, method="exact").scores()
    assert max(abs(own[edge] - others[edge]) for edge in others) < allowed(hf(input_ids=torch.tensor([CLEAN])).logits)


def test_heads_and_direct_effects_through_adapters_add_up() -> None:
    hf = adapted("o_proj", "lm_head", tie_word_embeddings=False)
    model = interp.load_model(hf)
    assert not model.refused and model.audit().ok
    effects = interp.direct_effects(model, PAIRS, by="head")
    base = float(diff(hf(input_ids=torch.tensor([CLEAN])).logits))
    assert float(effects.clean[0]) == pytest.approx(base, abs=1e-5)
    assert float(effects.values.sum()) == pytest.approx(base, rel=1e-5)
    o = hf.model.layers[1].self_attn.o_proj
    z = [seen(hf, ids, "model.layers.1.self_attn.o_proj", "in") for ids in (CLEAN, CORRUPTED)]
    moved = z[0].clone()
    moved[..., 16:24] = z[1][..., 16:24]
    with torch.no_grad():
        step = o(moved) - o(z[0])
    want = changed(hf, "model.layers.1.self_attn.o_proj", lambda x: moved)
    found = interp.patch(model, PAIRS, interp.heads("head_out", layers=1, heads=2)).values.item()
    assert found == pytest.approx(want, abs=1e-5) and float(step.abs().max()) > 0.01


def test_a_hook_on_a_projection_is_part_of_what_it_computes() -> None:
    hf = llama()
    hf.model.layers[2].self_attn.v_proj.register_forward_hook(lambda _, args, out: 3 * out + 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = interp.load_model(hf)
    if "receivers" in model.refused or "edge gradients" in model.refused:
        with pytest.raises(AuditError):
            interp.discover(model, PAIRS, method="eap")
        return
    found = interp.discover(model, PAIRS, method="eap").scores()["embed", "L2.H1.v"]
    assert found == pytest.approx(float((embedded(hf) * read_gradient(hf, 2, "v", 1)).sum()), rel=1e-4)


@pytest.mark.parametrize("clip", [0.05, 2.0, 100.0])
def test_edges_into_clipped_queries_keys_and_values_are_those_of_autograd(clip: float) -> None:
    """OLMo clips what its projections put out, in place: where it does, nothing moves."""
    hf = tiny(transformers.OlmoConfig(**BASE, clip_qkv=clip))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = interp.load_model(hf)
    assert set(model.refused) <= {"v"} and (clip < 100) == bool(model.refused)
    scores = interp.discover(model, PAIRS, method="eap").scores()
    change = embedded(hf)
    for layer in (0, 3):
        for kind, head in (("q", 2), ("k", 1), ("v", 0)):
            want = float((change * read_gradient(hf, layer, kind, head)).sum())
            assert scores["embed", f"L{layer}.H{head}.{kind}"] == pytest.approx(want, rel=1e-4, abs=1e-6)


class Clipped(nn.Linear):
    """A projection that clips what it puts out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("q_proj", {"receivers"}), ("o_proj", {"head_out", "senders"}), ("lm_head", {"head"})],
)
def test_a_projection_that_is_no_affine_map_takes_with_it_what_needs_one(name: str, lost: set[str]) -> None:
    hf = llama(tie_word_embeddings=False)
    path = name if name == "lm_head" else f"model.layers.2.self_attn.{name}"
    old = hf.get_submodule(path)
    new = Clipped(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    hf.set_submodule(path, new)
    with pytest.warns(UserWarning, match="is no affine map at its input here"):
        model = interp.load_model(hf)
    assert lost <= set(model.refused) and lost <= set(model.audit().failed)
    method = "direct_effects" if name == "lm_head" else "eap"
    with pytest.raises(AuditError, match=r"is no affine map|is refused"):
        RESTS[method](model)
    interp.patch(model, PAIRS, interp.grid(["resid_pre", "mlp_out"]))


def test_every_law_is_checked_at_load_and_in_a_full_audit() -> None:
    model = interp.load_model(llama())
    checked = {finding.kind for finding in model.audit(layers=[0]).findings if finding.what == "law"}
    assert checked == set(LAWS) - {"backward"}  # which has findings where layers are no plain projections
    assert "edge gradients" in str(model.audit(layers=[0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_load_and_say_what_they_lack(bits: int, tmp_path) -> None:
    tiny(transformers.LlamaConfig(**{**BASE, "hidden_size": 64, "intermediate_size": 128}), 2.0).save_pretrained(
        tmp_path
    )
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = interp.load_model(tmp_path, quantization_config=config, device="cpu")
    assert (model.n_layers, model.n_kv_heads, model.d_model, model.d_head) == (4, 2, 64, 16)
    hf = model.hf
    kept = seen(hf, CORRUPTED, "model.layers.2", "in")
    handle = hf.model.layers[2].register_forward_pre_hook(
        lambda _, args: (torch.cat([args[0][:, :3], kept[:, 3:4], args[0][:, 4:]], 1), *args[1:])
    )
    with torch.no_grad():
        want = float(diff(hf(input_ids=torch.tensor([CLEAN])).logits.float()))
    handle.remove()
    found = interp.patch(model, PAIRS, interp.grid("resid_pre", layers=2, positions=3), schedule="naive")
    assert found.values.item() == pytest.approx(want, abs=2e-2)
    for law in ("receivers", "senders"):
        if law in model.refused:
            with pytest.raises(AuditError, match="is refused on"):
                interp.discover(model, PAIRS, method="eap")
