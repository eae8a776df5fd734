"""`interp.patch` against TransformerLens 3.9's `get_act_patch_*`: same weights, one real model, random ones.

TransformerLens patches the clean run's activations into the corrupted run: what is called denoising here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp import Model, PromptPairs

lens = pytest.importorskip("transformer_lens", reason="comes with the dev extra")
from transformer_lens import patching  # noqa: E402
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights  # noqa: E402
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights  # noqa: E402

#: Our kind of site, and the function of TransformerLens that sweeps it over positions.
BY_POSITION = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
}
#: The same over heads at all positions, and over heads and positions.
ALL_POSITIONS = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}
HEADS_BY_POSITION = {
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_by_pos,
}
Hooked = Any


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TransformerLens draws a bar for each sweep, and needs no gradients here."""
    monkeypatch.setattr(patching, "tqdm", lambda rows: rows)
    with torch.no_grad():
        yield


def hooked(convert: Callable[..., dict[str, Tensor]], hf: Any, **facts: Any) -> Hooked:
    """A HookedTransformer with a HuggingFace model's weights, none of them folded or centred."""
    config = lens.HookedTransformerConfig(device="cpu", dtype=torch.float32, **facts)
    model = lens.HookedTransformer(config)
    raw = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    state = {name: weight.detach().clone() for name, weight in convert(hf, config).items()}
    model.load_and_process_state_dict(state, **raw)
    return model.eval()


#: Layers, width and heads of random models: a few seconds for all sweeps, and GPT-2 small's own size.
SIZES = {"small": (3, 96, 4), "gpt2": (12, 768, 12)}


@pytest.fixture(scope="module", params=["small", pytest.param("gpt2", marks=pytest.mark.slow)])
def gpt2(request: pytest.FixtureRequest) -> tuple[Model, Hooked]:
    """A random GPT-2 (its vocabulary is small), weights wide enough to matter."""
    torch.manual_seed(0)
    layers, width, heads = SIZES[request.param]
    config = GPT2Config(vocab_size=2000, n_positions=64, n_layer=layers, n_embd=width, n_head=heads)
    hf = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, weight in hf.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0, (0.6 if "wte" in name else 1.7) / width**0.5)
        elif name.endswith("bias"):
            weight.normal_(0, 0.05)
    facts = {"n_layers": layers, "d_model": width, "n_ctx": 64, "d_head": width // heads, "n_heads": heads}
    other = hooked(
        convert_gpt2_weights,
        hf,
        d_mlp=4 * width,
        d_vocab=2000,
        act_fn="gelu_new",
        eps=1e-5,
        normalization_type="LN",
        **facts,
    )
    return interp.load_model(hf), other


@pytest.fixture(scope="module")
def smollm(bundled: Model) -> tuple[Model, Hooked]:
    """The bundled real model (nine heads over three kv heads), and its weights in TransformerLens."""
    config: Any = bundled.hf.config
    other = hooked(
        convert_llama_weights,
        bundled.hf,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=64,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.head_dim,
        rotary_base=config.rope_parameters["rope_theta"],
    )
    return bundled, other


class Sweeps:
    """One pair of prompts in both libraries, patched from clean to corrupted and the other way round."""

    def __init__(self, models: tuple[Model, Hooked], pairs: PromptPairs) -> None:
        self.model, self.hooked = models
        self.pairs = pairs
        encoded = self.model.encode(pairs)
        assert encoded.corrupted is not None and encoded.answers is not None and encoded.distractors is not None
        self.ids = {
            "clean": torch.tensor(encoded.clean[:1]),
            "corrupted": torch.tensor(encoded.corrupted[:1]),
        }
        self.right, self.wrong = encoded.answers[0][0], encoded.distractors[0][0]
        logits = torch.cat([self.hooked(ids)[:, -1] for ids in self.ids.values()])
        self.allowed = 1e-5 * max(1.0, float(logits.abs().max()))

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, self.right] - logits[0, -1, self.wrong]

    def theirs(self, sweep: Callable[..., Tensor], direction: str) -> np.ndarray:
        base, source = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
        _, cache = self.hooked.run_with_cache(self.ids[source])
        return sweep(self.hooked, self.ids[base], cache, self.metric).numpy()

    def ours(self, plan: interp.Plan, direction: str) -> np.ndarray:
        effects = interp.patch(self.model, self.pairs, plan, direction=direction)
        return effects.values.isel(component=0, pair=0).values

    def compare(self, kind: str, plan: interp.Plan, sweep: Callable[..., Tensor], direction: str, by: str) -> None:
        ours, theirs = self.ours(plan, direction), self.theirs(sweep, direction)
        if by == "head and position" and kind != "pattern":
            theirs = theirs.swapaxes(1, 2)  # [layer, position, head] -> [layer, head, position]
        assert ours.shape == theirs.shape
        assert np.ptp(theirs) > 0.05
        error = float(np.abs(ours - theirs).max())
        print(f"{self.model.name}, {kind} by {by}, {direction}: {error:.2e} (allowed {self.allowed:.2e})")
        assert error <= self.allowed


GPT2_PAIRS = PromptPairs([[11, 205, 1700, 42, 950, 333, 8, 77]], [[11, 205, 64, 42, 950, 1999, 8, 77]], [17], [1234])
IOI_PAIRS = PromptPairs(
    ["When Mary and John went to the store, John gave a drink to"],
    ["When Mary and John went to the store, Mary gave a drink to"],
    [" Mary"],
    [" John"],
)


in_both_directions = pytest.mark.parametrize("direction", ["noising", "denoising"])


@in_both_directions
@pytest.mark.parametrize("kind", BY_POSITION)
def test_gpt2_by_position(gpt2: tuple[Model, Hooked], kind: str, direction: str) -> None:
    Sweeps(gpt2, GPT2_PAIRS).compare(kind, interp.grid(kind), BY_POSITION[kind], direction, "position")


@in_both_directions
@pytest.mark.parametrize("kind", ALL_POSITIONS)
def test_gpt2_by_head(gpt2: tuple[Model, Hooked], kind: str, direction: str) -> None:
    Sweeps(gpt2, GPT2_PAIRS).compare(kind, interp.heads(kind), ALL_POSITIONS[kind], direction, "head")


@pytest.mark.parametrize("kind", HEADS_BY_POSITION)
def test_gpt2_by_head_and_position(gpt2: tuple[Model, Hooked], kind: str) -> None:
    plan = interp.heads(kind, positions=range(8))
    Sweeps(gpt2, GPT2_PAIRS).compare(kind, plan, HEADS_BY_POSITION[kind], "denoising", "head and position")


def test_the_real_model_gives_the_same_logits(smollm: tuple[Model, Hooked]) -> None:
    """What the sweeps below rest on: both libraries run the same network, IOI included."""
    sweeps = Sweeps(smollm, IOI_PAIRS)
    ids = sweeps.ids["clean"]
    ours, theirs = smollm[0].hf(ids).logits[0, -1], smollm[1](ids)[0, -1]
    assert float((ours - theirs).abs().max()) <= sweeps.allowed
    assert float(sweeps.metric(smollm[1](ids))) > 1


def test_real_model_on_some_layers(smollm: tuple[Model, Hooked]) -> None:
    """A layer of each sweep, at two positions; the slow tests below run all of them."""
    import pandas as pd

    sweeps = Sweeps(smollm, IOI_PAIRS)
    last = len(sweeps.ids["clean"][0]) - 1
    setter = patching.layer_pos_patch_setter
    for kind in ("resid_pre", "attn_out", "mlp_out"):
        cells = pd.DataFrame([(22, at) for at in (11, last)], columns=["layer", "pos"])
        sweep = partial(patching.generic_activation_patch, patch_setter=setter, activation_name=kind, index_df=cells)

        def theirs(*args: Any, sweep: Callable[..., Tensor] = sweep) -> Tensor:
            return sweep(*args).view(1, 2)

        plan = interp.grid(kind, layers=[22], positions=[11, last])
        sweeps.compare(kind, plan, theirs, "denoising", "position")
    heads = pd.DataFrame([(20, head) for head in range(9)], columns=["layer", "head"])
    sweep = partial(
        patching.generic_activation_patch,
        patch_setter=patching.layer_head_vector_patch_setter,
        activation_name="z",
        index_df=heads,
    )
    sweeps.compare("z", interp.heads("z", layers=[20]), lambda *a: sweep(*a).view(1, 9), "noising", "head")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_out"])
def test_real_model_by_position(smollm: tuple[Model, Hooked], kind: str) -> None:
    sweeps = Sweeps(smollm, IOI_PAIRS)
    sweeps.compare(kind, interp.grid(kind), BY_POSITION[kind], "denoising", "position")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["z", "v", "pattern"])
def test_real_model_by_head(smollm: tuple[Model, Hooked], kind: str) -> None:
    sweeps = Sweeps(smollm, IOI_PAIRS)
    sweeps.compare(kind, interp.heads(kind), ALL_POSITIONS[kind], "denoising", "head")
