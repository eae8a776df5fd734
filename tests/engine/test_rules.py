"""Backward rules: each is exact for its step, all together add up on every family, and what has none is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import interp
from interp.engine.ruled import Rows, Ruling
from interp.errors import AuditError, PairsError, PlanError

from ..families import SUPPORTED, loaded, words
from ..oracle.configs import tiny
from ..oracle.relevance import forward, small_llama

SHAPE = (4, 3, 6)  # rows, positions, features


def pairs_of(lengths: tuple[int, ...] = (9, 7), seed: int = 3) -> interp.PromptPairs:
    """Random pairs that share two tokens, of two lengths, so that one row of a batch is padded."""
    clean, other = words(*lengths, seed=seed), words(*lengths, seed=seed + 1)
    corrupted = [[*a[:2], *b[2:]] for a, b in zip(clean, other, strict=True)]
    return interp.PromptPairs(clean, corrupted, [5] * len(clean), [7] * len(clean))


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "tanh gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "square": torch.square,
    "cube": lambda x: x**3,
    "new gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0)))),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp in place": lambda x: (x * 1.0).clamp_(-0.5, 0.5),
    "product": lambda x: x * torch.roll(x, 1, -1).sigmoid(),
    "product in place": lambda x: (x + 1).mul_(x.exp()),
    "broadcast product": lambda x: x * x.mean(-1, keepdim=True),
    "quotient": lambda x: x / (1 + x.abs()),
    "quotient in place": lambda x: (x * 1.0).div_(3 + x.sum(-1, keepdim=True).tanh()),
    "reciprocal": lambda x: 1 / (2 + x.tanh()),
    "square root": lambda x: (x.pow(2) + 1).sqrt(),
    "matrices": lambda x: x @ x.transpose(-1, -2),
    "softmax": lambda x: x.softmax(-1),
    "sharp softmax": lambda x: (200 * x).softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "shifted softmax": lambda x: (x - x.max(-1, keepdim=True).values).softmax(-1),
    "sink": lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1).softmax(-1)[..., :-1],
    "softcap": lambda x: torch.tanh(x / 2) * 2,
    "layer norm": lambda x: functional.layer_norm(x, (6,), torch.linspace(1, 2, 6, dtype=x.dtype), None, 1e-5),
    "rms norm": lambda x: functional.rms_norm(x, (6,), None, 1e-6),
    "rms norm by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "added product": lambda x: torch.baddbmm(x[..., :3], x, x.transpose(-1, -2), beta=0.5, alpha=0.3),
    "attention": lambda x: functional.scaled_dot_product_attention(
        *(part.unflatten(-1, (heads, 2)).transpose(1, 2) for part, heads in ((x.tanh(), 3), (x[..., :2], 1), (x[..., 2:4], 1))),
        is_causal=True, enable_gqa=True,
    ),
}  # fmt: skip


def ends() -> Tensor:
    """Rows whose other ends differ by a lot, by next to nothing, and (a position) not at all."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1, 1] = x[0, 1]
    x[1, 2, 3] = x[0, 2, 3] + 1e-10
    x[3, 0, :2] = -x[2, 0, :2]
    return x


@pytest.mark.parametrize("name", STEPS)
def test_a_secant_is_exact(name: str) -> None:
    x, rows = ends(), Rows(4, torch.tensor([0, 2]), torch.tensor([1, 3]))
    leaf = x.clone().requires_grad_(True)
    with torch.enable_grad(), Ruling("secant", nn.Identity(), rows):
        out = STEPS[name](leaf)
    torch.testing.assert_close(out, STEPS[name](x), rtol=0, atol=0)
    weights = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (gradient,) = torch.autograd.grad((out[[0, 2]] * weights).sum(), leaf)
    assert not gradient[[1, 3]].any()
    for base in (0, 2):
        got = float(((x[base + 1] - x[base]) * gradient[base]).sum())
        want = float(((out[base + 1] - out[base]) * weights).detach().sum())
        assert got == pytest.approx(want, abs=1e-11) and abs(want) > 1e-4
    assert gradient.isfinite().all()


def test_where_the_ends_are_the_same_a_secant_is_the_derivative() -> None:
    for name, step in STEPS.items():
        x = ends()[[0, 0, 2, 2]]
        found = []
        for rule in ("secant", "gradient"):
            leaf = x.clone().requires_grad_(True)
            with torch.enable_grad(), Ruling(rule, nn.Identity(), Rows(4, torch.tensor([0, 2]), torch.tensor([1, 3]))):
                out = step(leaf)
                total = (out[[0, 2]] * torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(out[0].shape)).sum()
            found.append(torch.autograd.grad(total, leaf)[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_effects_add_up_on_every_family(family: str, direction: str) -> None:
    """Over the stream into each block, at all positions; of a probability too, whose own steps have rules."""
    pairs = pairs_of()
    for metric in (interp.logit_diff, interp.log_prob):
        found = interp.attribute(loaded(family), pairs, interp.grid(["resid_pre"]), metric, "secant", direction)
        base, end = (found.clean, found.corrupted) if direction == "noising" else (found.corrupted, found.clean)
        change = (end - base).values
        total = (found.values - base).sum("position").values  # [component, layer, pair]
        assert np.abs(total - change).max() <= 1e-4 * np.abs(change).max()
        assert found.provenance["completeness"] <= 1e-4


@pytest.mark.parametrize("family", SUPPORTED)
def test_edges_add_up_on_every_family(family: str) -> None:
    circuit = interp.discover(loaded(family), pairs_of(), "secant", progress=False)
    assert circuit.meta["completeness"] <= 1e-4


def test_entries_of_a_softmax_that_underflow() -> None:
    hf, tokenizer = tiny("llama_gqa")
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    model = interp.load_model(hf, tokenizer=tokenizer)
    pairs = pairs_of((8,))
    pattern = model.run(pairs.clean[0], ["pattern"]).cache["pattern"]
    assert float((pattern == 0).mean()) > 0.6  # more than what the mask hides
    for direction in ("noising", "denoising"):
        found = interp.attribute(model, pairs, interp.grid(["mlp_out"]), method="secant", direction=direction)
        assert found.provenance["completeness"] <= 1e-4


def test_the_way_in_parts_adds_up_too() -> None:
    model, pairs = loaded("gpt2"), pairs_of()
    found = interp.attribute(
        model, pairs, interp.grid(["resid_pre"], layers=[0]), method="secant", points=[1 / 3, 2 / 3]
    )
    change = (found.corrupted - found.clean).values
    total = (found.values - found.clean).sum(("position", "layer", "component")).values
    np.testing.assert_allclose(total, change, rtol=0, atol=1e-4 * np.abs(change).max())
    with pytest.raises(PlanError, match="part the way evenly"):
        interp.attribute(model, pairs, interp.grid(["resid_pre"]), method="secant", points=[0.4])


def test_relp_is_the_papers_rule_on_two_layers_by_hand() -> None:
    hf = small_llama(2, 40)
    model, pairs = interp.load_model(hf), pairs_of((9,))
    clean, corrupted = torch.tensor([pairs.clean[0]]) % 60, torch.tensor([pairs.corrupted[0]]) % 60
    pairs = interp.PromptPairs(clean.tolist(), corrupted.tolist(), [5], [7])
    logits, blocks = forward(hf, clean)
    torch.testing.assert_close(logits, hf(clean).logits[:, -1], rtol=1e-4, atol=1e-4)
    (_, others) = forward(hf, corrupted)
    with pytest.warns(UserWarning, match="add up to"):
        found = interp.attribute(model, pairs, interp.grid(["resid_pre", "attn_out", "mlp_out"]), method="relp")
    for kind in ("resid_pre", "attn_out", "mlp_out"):
        live = [block[kind] for block in blocks]
        slopes = torch.autograd.grad(logits[0, 5] - logits[0, 7], live, retain_graph=True)
        for layer, (x, other, slope) in enumerate(zip(live, (b[kind] for b in others), slopes, strict=True)):
            want = ((other - x) * slope).sum(-1)[0].detach().numpy()
            got = (found.values - found.clean).sel(component=kind, layer=layer).values[:, 0]
            assert np.abs(want).max() > 0.02
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


class Odd(nn.Module):
    """An activation with weights that calls what no rule is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.special.erfcx(x)


def test_a_step_without_a_rule_is_refused_by_its_name() -> None:
    hf, tokenizer = tiny("llama")
    hf.model.layers[1].mlp.act_fn = Odd()
    with pytest.warns(UserWarning, match="'secant' has no rule for special_erfcx in model.layers.1.mlp.act_fn"):
        model = interp.load_model(hf, tokenizer=tokenizer)
    for ask in (
        lambda: interp.attribute(model, pairs_of(), interp.grid(["z"]), method="secant"),
        lambda: interp.discover(model, pairs_of(), "secant"),
    ):
        with pytest.raises(AuditError, match=r"special_erfcx in model\.layers\.1\.mlp\.act_fn"):
            ask()
    interp.attribute(model, pairs_of(), interp.grid(["mlp_out"]))  # the derivative is autograd's


def test_a_metric_without_a_rule_is_refused() -> None:
    def odd(logits: Tensor, batch: interp.Batch) -> Tensor:
        return torch.special.erfcx(logits[:, 5] / 10)

    with pytest.raises(AuditError, match="special_erfcx in the model's own forward pass, or the metric"):
        interp.attribute(loaded("gpt2"), pairs_of(), interp.grid(["mlp_out"]), odd, "secant")
    with pytest.warns(UserWarning, match="add up"):
        interp.attribute(loaded("gpt2"), pairs_of(), interp.grid(["mlp_out"]), odd, "relp")  # its derivative


def test_prompts_of_two_lengths_are_refused() -> None:
    pairs = interp.PromptPairs(words(7), words(8), [5], [7], positions={"here": 3})
    with pytest.raises(PairsError, match="method 'secant'"):
        interp.attribute(loaded("gpt2"), pairs, interp.grid("mlp_out", positions=["here"]), method="secant")


def test_a_model_is_left_as_it_was() -> None:
    hf, tokenizer = tiny("qwen3_moe")
    model = interp.load_model(hf.requires_grad_(True), tokenizer=tokenizer)
    before = {name: weight.requires_grad for name, weight in model.hf.named_parameters()}
    interp.attribute(model, pairs_of(), interp.grid(["mlp_out"]), method="secant")
    assert before == {name: weight.requires_grad for name, weight in model.hf.named_parameters()} and any(
        before.values()
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["secant", "relp"])
def test_the_simulated_backend_gives_the_same(family: str, method: str, recwarn: pytest.WarningsRecorder) -> None:
    here = loaded(family)
    there = interp.load_model(here.hf, tokenizer=here.tokenizer, backend="simulated")
    plan = interp.grid(["attn_out"])
    got, want = (interp.attribute(model, pairs_of(), plan, method=method) for model in (there, here))
    np.testing.assert_allclose(got.values.values, want.values.values, rtol=0, atol=1e-5)
