"""What else runs, and in which state the module and the caller are, changes no number."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import interp
from interp import Model, PromptPairs
from tests.families import allowed

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
SHORT, LONG, LONGER = [3, 5, 6, 8, 10], [4, 7, 9, 11, 13, 15, 17, 19, 21, 23], list(range(5, 19))
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 8, "factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
ROTARY: dict[str, Any] = {
    "dynamic": lambda: transformers.LlamaConfig(**BASE, rope_scaling=DYNAMIC, max_position_embeddings=8),
    "dynamic, qwen2": lambda: transformers.Qwen2Config(**BASE, rope_scaling=DYNAMIC, max_position_embeddings=8),
    "longrope": lambda: transformers.Phi3Config(**BASE, rope_scaling=LONGROPE, max_position_embeddings=32),
    "longrope, gemma3": lambda: transformers.Gemma3TextConfig(
        **BASE,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        rope_parameters={
            "full_attention": LONGROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        max_position_embeddings=32,
    ),
}


def tiny(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(12.0)
    return model


def alone(
    hf: Any, ids: list[int], layer: int, change: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """A fresh copy of the model on one prompt: what enters a block, changed, and the logits of the last token."""
    fresh, kept = copy.deepcopy(hf), []

    def before(_: Any, args: tuple) -> tuple:
        kept.append(args[0].clone())
        return (change(args[0].clone()), *args[1:])

    fresh.model.layers[layer].register_forward_pre_hook(before)
    with torch.no_grad():
        logits = fresh(input_ids=torch.tensor([ids])).logits[0, -1]
    return kept[0], logits


@pytest.mark.parametrize("rotary", ROTARY)
def test_a_row_is_rotated_as_it_would_be_alone(rotary: str) -> None:
    pristine = tiny(ROTARY[rotary]())
    hf = copy.deepcopy(pristine)
    before = {name: buffer.clone() for name, buffer in hf.named_buffers()}
    model = interp.load_model(hf)
    assert not model.refused and model.taps["rotary"]
    texts = [SHORT, LONG, LONGER, SHORT[:2]]
    for _ in range(2):  # a run of long rows leaves nothing behind
        found = interp.collect_activations(model, texts, layer=2, component="resid_pre", padded=True)
        for row, ids in zip(found, texts, strict=True):
            want, _ = alone(pristine, ids, 2)
            assert (row[: len(ids)] - want[0]).abs().max() < allowed(want)
    for name, buffer in hf.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(not module._forward_hooks for module in hf.modules())


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("schedule", ["auto", "rows", "naive"])
def test_a_pair_on_both_sides_of_the_limit_is_patched_right(rotary: str, direction: str, schedule: str) -> None:
    pristine = tiny(ROTARY[rotary]())
    model = interp.load_model(copy.deepcopy(pristine))
    pairs = PromptPairs(
        [SHORT, LONG], [LONGER, SHORT], [3, 3], [4, 4],
        positions={"place": [{"clean": -2, "corrupted": -3}, {"clean": -3, "corrupted": -2}]},
    )  # fmt: skip
    plan = interp.grid("resid_pre", layers=[1, 2], positions=["place"])
    effects = interp.patch(model, pairs, plan, direction=direction, schedule=schedule)
    for pair, ((clean, at_clean), (corrupted, at_corrupted)) in enumerate(
        [((SHORT, -2), (LONGER, -3)), ((LONG, -3), (SHORT, -2))]
    ):
        base, at, source, of = clean, at_clean, corrupted, at_corrupted
        if direction == "denoising":
            base, at, source, of = source, of, base, at
        for row, layer in enumerate((1, 2)):
            other, _ = alone(pristine, source, layer)

            def put(x: Tensor, at: int = at, other: Tensor = other, of: int = of) -> Tensor:
                x[:, at] = other[:, of]
                return x

            _, logits = alone(pristine, base, layer, put)
            got = float(effects.values[0, row, 0, pair])
            assert abs(got - float(logits[3] - logits[4])) < allowed(logits)


def test_rows_are_rotated_alone_on_a_server_too() -> None:
    hf = tiny(ROTARY["dynamic"]())
    here = interp.collect_activations(interp.load_model(hf), [SHORT, LONGER], layer=2, component="resid_pre")
    there = interp.load_model(copy.deepcopy(hf), backend="simulated")
    assert torch.equal(interp.collect_activations(there, [SHORT, LONGER], layer=2, component="resid_pre"), here)


# --- the state of the module and of the caller ------------------------------------------------------------------

PAIRS = PromptPairs([[3, 5, 6, 8, 10]], [[4, 5, 6, 8, 10]], [3], [4])
PLAN = interp.grid(["resid_pre", "mlp_out"])


def dropping() -> Model:
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return interp.load_model(
        tiny(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32, **ids))
    )


METHODS: dict[str, Callable[[Model], Any]] = {
    "patch": lambda model: interp.patch(model, PAIRS, PLAN).values.values,
    "attribute": lambda model: interp.attribute(model, PAIRS, PLAN, verify=2).values.values,
    "ig": lambda model: interp.attribute(model, PAIRS, PLAN, method="ig").values.values,
    "path_patch": lambda model: interp.path_patch(model, PAIRS, "L0.H1", ["L2.H0.q", "logits"]).values.values,
    "eap": lambda model: interp.discover(model, PAIRS, method="eap").score_matrix(),
    "eap-ig": lambda model: interp.discover(model, PAIRS, method="eap-ig").score_matrix(),
    "exact": lambda model: interp.discover(model, PAIRS, method="exact", level="node").score_matrix(),
    "mean": lambda model: interp.ablate(model, PAIRS, PLAN, mode="mean").values.values,
    "circuit": lambda model: interp.run_circuit(model, PAIRS, [(0, 1)], "mean"),
    "collect": lambda model: interp.collect_activations(model, PAIRS, layer=1).numpy(),
    "lens": lambda model: interp.logit_lens(model, PAIRS)["logit"].values,
    "direct": lambda model: interp.direct_effects(model, PAIRS).values.values,
    "trace": lambda model: (
        interp.causal_trace(
            model, PromptPairs([[3, 5, 6]], None, [3], positions={"subject": [1]}), samples=2, metric=interp.prob
        ).values.values
    ),
}
STATES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "grad off": partial(torch.set_grad_enabled, False),
    "inference_mode": torch.inference_mode,
    "double by default": lambda: default_dtype(torch.float64),
}


class default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def same(found: Any, right: Any) -> bool:
    """Equal to rounding, and absent where the other is."""
    one, other = (torch.as_tensor(each).double() for each in (found, right))
    return torch.allclose(one, other, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    model = dropping()
    return {name: method(model) for name, method in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_depends_on_the_mode_around_it(method: str, right: dict[str, Any]) -> None:
    model = dropping()
    for name, state in STATES.items():
        with state():
            found = METHODS[method](model)
        assert same(found, right[method]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_module_in_training_mode_runs_without_dropout_and_stays_in_training_mode(
    method: str, right: dict[str, Any]
) -> None:
    model = dropping()
    model.hf.train()
    model.hf.transformer.h[1].mlp.eval()  # some parts may be frozen
    modes = [module.training for module in model.hf.modules()]
    found = METHODS[method](model)
    assert same(found, right[method])
    assert [module.training for module in model.hf.modules()] == modes


def test_a_module_in_training_mode_loads_and_is_audited() -> None:
    hf = dropping().hf.train()
    model = interp.load_model(hf)
    assert not model.refused and model.audit().ok and hf.training


def test_weights_made_under_inference_mode_can_be_patched_but_not_attributed() -> None:
    with torch.inference_mode():
        hf = tiny(transformers.LlamaConfig(**BASE))
    with pytest.warns(UserWarning, match="autograd"):
        model = interp.load_model(hf)
    interp.patch(model, PAIRS, PLAN)
    with pytest.raises(interp.errors.AuditError, match="rests on the law of backward"):
        interp.attribute(model, PAIRS, PLAN)


def test_threads_on_one_model_take_turns(right: dict[str, Any]) -> None:
    model = dropping()
    names = ["attribute", "patch", "eap", "collect", "path_patch", "attribute"]
    found: dict[int, Any] = {}
    errors: list[BaseException] = []

    def work(number: int, name: str) -> None:
        try:
            found[number] = METHODS[name](model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, name in enumerate(names):
        assert same(found[number], right[name]), name
