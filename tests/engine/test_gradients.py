"""Gradients in the trace against derivatives by plain hooks: every method of attribution, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import interp
from interp import Model, PromptPairs
from interp.attribution import attribute
from interp.engine.slopes import midpoints
from tests.families import EAGER, EXPERTS, HEAD_KINDS, UNIT_KINDS, has, words
from tests.oracle.configs import FAMILIES, tiny, widen
from tests.oracle.derivatives import gradient, slope
from tests.oracle.hooks import Oracle, Patch

#: One of every way to be built: norms, layouts of q, k and v, biases in position, parallel blocks, caps and windows.
GENERAL = (
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama_gqa", "gemma2", "olmo2", "opt", "bloom", "falcon", "phi3", "cohere2",
)  # fmt: skip
#: Of these, all but a spelled out softmax is in double precision; others have norms or attention in single.
DOUBLE = ("gpt2", "gpt_neox", "opt", "falcon")
#: Families whose attention logits can be reached: capped, windowed, with sinks, normed q and k, one key for all heads.
LOGITS = ("gpt2", "gpt_neox", "llama_gqa", "gemma2", "qwen3", "phi", "stablelm_parallel", "gpt_oss")
RIGHT, WRONG = 20, 33


def score(logits: Tensor) -> Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, the oracle on another copy of it, and the tokens of the run that is patched and of the other."""

    model: Model
    oracle: Oracle
    base: list[int]
    source: list[int]

    def attribute(self, plan: interp.Plan, direction: str = "noising", **options: object) -> Tensor:
        """Estimated changes, dims of the plan; the base run is `base` in either direction."""
        sides = (self.base, self.source) if direction == "noising" else (self.source, self.base)
        pairs = PromptPairs([sides[0]], [sides[1]], [RIGHT], [WRONG])
        effects = attribute(self.model, pairs, plan, direction=direction, **options)
        return torch.tensor((effects.values - effects.base).values[..., 0], dtype=torch.float64)

    def change(self, kind: str, layer: int) -> Tensor:
        """Source minus base activation."""
        return activation(self, "source", kind, layer) - activation(self, "base", kind, layer)


@cache
def activation(at: Case, side: str, kind: str, layer: int) -> Tensor:
    """An activation of one of the two plain runs."""
    return at.oracle.read(getattr(at, side), kind, layer)


@cache
def case(family: str, layers: int = 3) -> Case:
    """A tiny model of three layers, or of one."""

    def made() -> torch.nn.Module:
        if layers == 3:
            hf, _ = tiny(family)
        else:
            kind, given = FAMILIES[family]
            arguments = given | ({"n_layer": 1} if "n_layer" in given else {"num_hidden_layers": 1})
            if "layer_types" in arguments:
                arguments["layer_types"] = arguments["layer_types"][:1]
            hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments), dtype=torch.float32)
            widen(hf, seed=3)
        if family in EAGER:
            hf.config._attn_implementation = "eager"
        hf = hf.eval().requires_grad_(False)
        return hf if family in EXPERTS else hf.double()  # experts are multiplied in single precision only

    base, source = words(7, 7, seed=2)
    return Case(interp.load_model(made()), Oracle(made(), copy_model=False), base, source)


def by_item(kind: str, product: Tensor) -> Tensor:
    """[position, head or unit or 1] of (source - base) · gradient, summed over features."""
    if kind == "pattern":
        return product.sum(-1).T
    if kind in UNIT_KINDS:
        return product
    return product.sum(-1) if kind in HEAD_KINDS else product.sum(-1, keepdim=True)


def check(found: Tensor, expected: Tensor) -> None:
    largest = float(expected.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=1e-5 * max(1.0, largest))


def check_all(
    at: Case, kinds: Sequence[str], layers: Sequence[int], naive: Callable[[str, int], Tensor], **options: object
) -> None:
    """Position, head and unit plans against a naive estimate `[dropped or 1, position, item]` of every site."""
    estimates = {
        (kind, layer): naive(kind, layer)
        for kind in kinds
        for layer in (layers if kind != "embed" else [0])
    }  # fmt: skip
    by_position = at.attribute(interp.grid(kinds, layers=layers), **options)
    for kind, layer in estimates:
        found = by_position[list(kinds).index(kind), list(layers).index(layer) if kind != "embed" else 0]
        check(found, in_one(estimates[kind, layer].sum(2)))
    for kind in kinds:
        if kind in HEAD_KINDS or kind in UNIT_KINDS:
            last = layers[-1]
            plan = interp.heads(kind, layers=last) if kind in HEAD_KINDS else interp.neurons(last, component=kind)
            check(at.attribute(plan, **options)[0, 0], in_one(estimates[kind, last].sum(1)))


def in_one(estimates: Tensor) -> Tensor:
    """[item] of [1 + dropped, item]: the plain estimates, or the mean size with layers dropped and the plain sign."""
    plain, dropped = estimates[0], estimates[1:]
    return plain.sign() * dropped.abs().mean(0) * len(dropped) / (len(dropped) - 1) if len(dropped) else plain


@pytest.mark.parametrize("family", GENERAL)
def test_atp_is_the_derivative_along_the_patch(family: str) -> None:
    at = case(family)
    gradients: dict[tuple[str, int], Tensor] = {}

    def naive(kind: str, layer: int) -> Tensor:
        gradients[kind, layer] = at.change(kind, layer) * gradient(at.oracle, at.base, (kind, layer), score)
        return by_item(kind, gradients[kind, layer])[None]

    direction = ("noising", "denoising")[GENERAL.index(family) % 2]
    check_all(at, has(family), [0, 2], naive, direction=direction)
    for (kind, layer), product in gradients.items():  # and autograd against a difference of whole runs
        if layer == 0:
            exact = family in DOUBLE and kind not in ("q_rot", "k_rot", "pattern")
            epsilon, tolerance = (1e-3, 1e-7) if exact else (0.01, 1e-3)
            found = slope(at.oracle, at.base, (kind, 0), at.change(kind, 0), score, epsilon, positions=(3,))
            want = float(by_item(kind, product)[3].sum())
            assert found == pytest.approx(want, rel=tolerance, abs=tolerance), kind


def dropped(at: Case, kind: str, layer: int) -> Tensor:
    """[1 + layers, position, item]: AtP's plain estimate, then with each layer dropped; q and k through the softmax."""
    cuts = [None, *range(at.oracle.n_layers)] if at.oracle.n_layers > 1 else [None]
    if kind in ("q", "k"):
        slopes = [gradient(at.oracle, at.base, ("pattern", layer), score, cut=cut) for cut in cuts]
        return torch.stack([through_softmax(at, kind, layer, slope) for slope in slopes])
    change = at.change(kind, layer)
    return torch.stack(
        [by_item(kind, change * gradient(at.oracle, at.base, (kind, layer), score, cut=cut)) for cut in cuts]
    )


@cache
def patterns(at: Case, kind: str, layer: int) -> Tensor:
    """The pattern's change when one query or key of one head alone is patched: [position, item, head, query, key]."""
    value = at.oracle.read(at.source, kind, layer)
    old = at.oracle.read(at.base, "pattern", layer)
    places = [(position, head) for position in range(len(at.base)) for head in range(value.shape[1])]
    rows = [[Patch(kind, layer, value, (position,), head)] for position, head in places]
    changes = at.oracle.reads_rows(at.base, [("pattern", layer)], rows)["pattern", layer] - old
    return changes.unflatten(0, (len(at.base), -1))


def through_softmax(at: Case, kind: str, layer: int, slope: Tensor) -> Tensor:
    """Σ (new pattern - old pattern) · d score / d pattern, [position, head]."""
    return (patterns(at, kind, layer) * slope).sum((2, 3, 4))


@pytest.mark.parametrize("family", LOGITS)
def test_atp_star_is_the_naive_loop_over_queries_keys_and_dropped_layers(family: str) -> None:
    at = case(family)
    kinds = [kind for kind in ("q", "k", "v", "z", "resid_pre", "attn_out", "mlp_out", "neuron") if kind in has(family)]
    check_all(at, kinds, [1], lambda kind, layer: dropped(at, kind, layer), method="atp*")


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_oss"])
def test_queries_and_keys_of_a_single_layer(family: str) -> None:
    """No other layer can be dropped: what is left is the exact softmax. Below the logits all is linear but the norm."""
    at = case(family, layers=1)
    check_all(at, ["q", "k"], [0], lambda kind, layer: dropped(at, kind, layer), method="atp*")
    plain = at.attribute(interp.grid(["q", "k"]), method="atp")
    exact = torch.stack([dropped(at, kind, 0)[0].sum(1) for kind in ("q", "k")])
    assert float((plain[:, 0] - exact).abs().max()) > 0.01  # the softmax is not linear here


def mixed(at: Case, kind: str, layer: int, alpha: float) -> Patch:
    """A whole site between base and source."""
    return Patch(kind, layer, activation(at, "base", kind, layer) + alpha * at.change(kind, layer))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "olmo2", "bloom"])
def test_integrated_gradients_are_means_over_mixed_runs(family: str) -> None:
    """ig moves the embeddings, ig-activations the site itself; points in the middle of equal steps, or given."""
    at = case(family)
    points = midpoints(3)
    assert points == pytest.approx((1 / 6, 3 / 6, 5 / 6))

    def average(kind: str, layer: int, moved: tuple[str, int], among: Sequence[float]) -> Tensor:
        runs = [gradient(at.oracle, at.base, (kind, layer), score, [mixed(at, *moved, alpha)]) for alpha in among]
        return by_item(kind, at.change(kind, layer) * torch.stack(runs).mean(0))[None]

    kinds = [kind for kind in has(family) if kind not in ("q_rot", "resid_post")]
    check_all(at, kinds, [1], lambda k, n: average(k, n, ("embed", 0), points), method="ig", steps=3)
    kinds.remove("pattern")
    own = {"method": "ig-activations", "points": (0.1, 0.7), "max_tokens": 60}
    check_all(at, kinds, [1], lambda k, n: average(k, n, (k, n), (0.1, 0.7)), **own)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama_gqa", "gemma3", "bloom"])
def test_integrated_gradients_over_inputs_are_complete(family: str) -> None:
    """Over all positions of the input they sum to the whole change of the metric (Sundararajan et al. 2017)."""
    at = case(family)
    whole = float(score(at.oracle.run(at.source)) - score(at.oracle.run(at.base)))
    inputs = ["embed"] if family == "bloom" else ["embed", "resid_pre"]  # BLOOM norms its embeddings
    sums = {}
    for steps in (1, 256):
        sums[steps] = at.attribute(interp.grid(inputs, layers=[0]), method="ig", steps=steps)[:, 0].sum(1)
    assert abs(whole) > 0.1
    for found in sums[256]:
        assert float(found) == pytest.approx(whole, rel=0.01)
    assert abs(float(sums[1][0]) - whole) > 0.02 * abs(whole)
