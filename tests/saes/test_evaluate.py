"""What a dictionary costs the model, against a plain loop of hooks and cross-entropies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp.errors import PlanError, SiteError
from interp.saes.baselines import linear, pca, signed
from interp.saes.library import Dictionary
from interp.saes.views import decoder_of
from tests.families import loaded, words
from tests.oracle.configs import tiny

from .made import random_dictionary

FAMILIES = ("gpt2", "llama_gqa", "gemma3", "gpt_neox")
LAYER, CONTEXT = 1, 8


def rows_of(texts: list[list[int]]) -> list[list[int]]:
    return [text[start : start + CONTEXT] for text in texts for start in range(0, len(text), CONTEXT)]


def losses(family: str, module: Any, rows: list[list[int]], change: Callable[[Tensor], Tensor] | None) -> float:
    """Mean cross-entropy of the next token with a module's output changed."""
    hf = tiny(family)[0].eval()
    found: list[Tensor] = []

    def hook(_: Any, __: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        new = x if change is None else change(x)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module(hf).register_forward_hook(hook)
    try:
        for row in rows:
            if len(row) > 1:
                ids = torch.tensor([row])
                logits = hf(input_ids=ids).logits[0, :-1].float()
                found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    finally:
        handle.remove()
    return float(torch.cat(found).mean())


def block(hf: Any) -> Any:
    return next(part for part in hf.modules() if isinstance(part, torch.nn.ModuleList))[LAYER]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["TopK", "JumpReLU"])
@torch.no_grad()
def test_every_number_is_that_of_plain_hooks(form: str, family: str) -> None:
    model, texts = loaded(family), words(21, 5, 8)
    sae = random_dictionary(form, model.d_model)
    report = interp.evaluate_sae(model, sae, texts, context=CONTEXT)
    rows = rows_of(texts)
    kept: list[Tensor] = []
    clean = losses(family, block, rows + [[row[0], row[0]] for row in rows if len(row) == 1], None)
    for row in rows:
        losses(family, block, [row * 2 if len(row) == 1 else row], lambda x: kept.append(x[0]) or x)
    x = torch.cat([part[: len(row)] for part, row in zip(kept, rows, strict=True)])
    acts = sae.encode(x)
    error = (x - sae.decode(acts)).pow(2).sum(-1)
    spread = (x - x.mean(0)).pow(2).sum()
    assert report.tokens == len(x) == sum(map(len, texts))
    assert report.l0_with_massive == pytest.approx(float((acts > 0).float().sum(1).mean()))
    assert report.l0 == pytest.approx(report.l0_with_massive) or report.massive > 0
    assert report.explained_variance_with_massive == pytest.approx(1 - float(error.sum() / spread), abs=1e-4)
    np.testing.assert_allclose(report.density, (acts > 0).float().mean(0), atol=1e-6)
    assert report.dead == float((acts.max(0).values == 0).float().mean())
    want = {
        "clean": clean,
        "spliced": losses(family, block, rows, lambda x: sae.decode(sae.encode(x))),
        "zero": losses(family, block, rows, torch.zeros_like),
        "zero_everywhere": losses(family, block, rows, torch.zeros_like),
        "mean": losses(family, block, rows, lambda y: x.mean(0).expand_as(y)),
    }
    assert report.loss == pytest.approx(want, abs=2e-5)
    for name in ("zero", "mean"):
        recovered = (want[name] - want["spliced"]) / (want[name] - want["clean"])
        assert report.recovered[name] == pytest.approx(recovered, rel=1e-2)


@torch.no_grad()
def test_a_dictionary_that_explains_all_costs_nothing() -> None:
    model = loaded("llama_gqa")
    d = model.d_model
    identity = signed(torch.eye(d), torch.eye(d), torch.zeros(d), torch.zeros(d))
    report = interp.evaluate_sae(model, identity, words(21, 9), site="L1.resid_post", context=CONTEXT)
    assert report.loss["spliced"] == pytest.approx(report.loss["clean"], abs=1e-6)
    assert report.explained_variance == pytest.approx(1, abs=1e-9) and report.recovered["mean"] == pytest.approx(
        1, abs=1e-5
    )
    view = interp.saes.error_view(identity, "L1.resid_post")
    pairs = interp.PromptPairs(words(7), None, [3], [4], answer_positions=-1)
    found = interp.ablate(model, pairs, interp.sets({"none": [view.site()]}), "zero")
    assert float(abs(found.values - found.clean).max()) <= 1e-5


@torch.no_grad()
def test_massive_tokens_are_counted_apart() -> None:
    """Tokens whose activation is longer than three medians hold the variance of the whole, and not of the rest."""
    hf = copy.deepcopy(tiny("llama_gqa")[0])
    hf.model.embed_tokens.weight[7] *= 300
    model, texts = interp.load_model(hf), [[*text[:9], 7, *text[9:]] for text in words(40, 30)]
    x = interp.collect_activations(model, texts, LAYER, "resid_post")
    median = float(x.norm(dim=-1).median())
    report = interp.evaluate_sae(model, pca(x, 4), texts, site="L1.resid_post")
    assert 0 < report.massive < 0.1 and report.explained_variance < 0.6 < report.explained_variance_with_massive
    assert round(report.massive * len(x)) == int((x.norm(dim=-1) > 3 * median).sum()) == 3
    kept = interp.collect_activations(model, texts, LAYER, "resid_post", drop="massive")
    assert report.l0 == pytest.approx(float((pca(x, 4).encode(kept) > 0).float().sum(1).mean()))
    assert len(kept) == len(x) - round(report.massive * len(x))


@torch.no_grad()
def test_a_transcoder_stands_for_the_mlp() -> None:
    model, texts = loaded("llama_gqa"), words(21, 9)
    acts = interp.collect_activations(model, texts, LAYER, ["mlp_in", "mlp_out"])
    x, y = acts["L1.mlp_in"], acts["L1.mlp_out"]
    made: Dictionary = linear(x, y)
    report = interp.evaluate_sae(model, made, texts, site="L1.mlp_out", context=CONTEXT)
    centred = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    want = centred @ torch.linalg.lstsq(centred, y.double()).solution
    np.testing.assert_allclose(made(x), want, atol=1e-4)  # type: ignore[operator]
    rest, spread = (y - want).pow(2).sum(), (y - y.mean(0)).pow(2).sum()
    rows = rows_of(texts)

    def module(hf: Any) -> Any:
        return block(hf).mlp

    inputs: list[Tensor] = []

    def spliced() -> float:
        hf = tiny("llama_gqa")[0].eval()
        block(hf).mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block(hf).mlp.register_forward_hook(lambda _, args, out: made(args[0]))  # type: ignore[operator]
        found = []
        for row in rows:
            ids = torch.tensor([row])
            if len(row) > 1:
                logits = hf(input_ids=ids).logits[0, :-1]
                found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        for hooks in (block(hf).mlp._forward_pre_hooks, block(hf).mlp._forward_hooks):
            hooks.clear()
        return float(torch.cat(found).mean())

    assert report.loss["spliced"] == pytest.approx(spliced(), abs=2e-5)
    assert report.loss["zero"] == pytest.approx(losses("llama_gqa", module, rows, torch.zeros_like), abs=2e-5)
    assert 0 < float(rest / spread) < 1 and decoder_of(made).shape == (2 * model.d_model, model.d_model)


def test_on_a_server_it_is_the_same() -> None:
    here = loaded("llama_gqa")
    there = interp.load_model(tiny("llama_gqa")[0], tokenizer=here.tokenizer, backend="simulated")
    for sae in (random_dictionary("TopK", here.d_model), random_dictionary("JumpReLU", here.d_model)):
        one, other = (interp.evaluate_sae(model, sae, words(21, 9), context=CONTEXT) for model in (here, there))
        assert other.loss == pytest.approx(one.loss, abs=1e-5) and other.l0 == one.l0


def test_what_does_not_fit_says_so() -> None:
    model = loaded("gpt2")
    with pytest.raises(PlanError, match=r"does not fit L1\.resid_post of .*, which has 32 numbers"):
        interp.evaluate_sae(model, random_dictionary("TopK", 40), words(9))
    with pytest.raises(SiteError, match="layer 9"):
        interp.evaluate_sae(model, random_dictionary("TopK", 32), words(9), site="L9.resid_post")
    with pytest.raises(PlanError, match="is a part of a site"):
        interp.evaluate_sae(model, random_dictionary("TopK", 32), words(9), site="L1.H2.z")
