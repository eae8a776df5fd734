"""What is seen of features, held against everything collected at once, and against plain computations."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import interp.saes.passages
from interp import Model
from interp.collect import collect_activations
from interp.errors import PairsError, PlanError
from interp.saes.dashboard import BINS, Dashboard, choose, dashboard
from interp.saes.library import Dictionary
from interp.saes.passages import final_stream, rows_of
from interp.saes.promoted import promoted, why_not
from interp.saes.views import view_of
from interp.views import View
from tests.families import loaded, words
from tests.saes.made import random_dictionary

REACH, TOP, LENGTH = 3, 4, 12
TEXTS = words(30, 5, 41, 1, 12, 13, 24, 33, 7, 60, seed=3)


@cache
def topk(site: str = "L1.resid_post") -> Dictionary:
    """A random dictionary of SAELens at a site."""
    return random_dictionary("TopK", 32, 48, site)


@cache
def jumprelu(site: str = "L1.resid_post") -> Dictionary:
    """One whose features fire above a threshold: two of them never, one on every token."""
    sae: Any = random_dictionary("JumpReLU", 32, 48, site)
    sae.threshold.data = torch.linspace(0.1, 1.5, 48)
    sae.threshold.data[:2] = 1e6
    sae.b_enc.data[2] = 1e3
    return sae


def everything(model: Model, view: View, texts: list[list[int]]) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """All activations `[token, feature]`, and (text, passage, position in it) of each row."""
    pieces = [
        (number, text[start : start + LENGTH])
        for number, text in enumerate(texts)
        for start in range(0, len(text), LENGTH)
    ]
    values = collect_activations(model, [piece for _, piece in pieces], view.tap.layer, view)
    places = [(text, n, p) for n, (text, piece) in enumerate(pieces) for p in range(len(piece))]
    return values, places


def seen(model: Model, sae: Dictionary, features: Any, **options: Any) -> Dashboard:
    given = rows_of(model, TEXTS, LENGTH)
    return dashboard(model, view_of(sae), given, features, options.get("top", TOP), options.get("reach", REACH))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [topk, jumprelu])
@pytest.mark.parametrize("numbers", [2**22, 700])  # few numbers to a block: a passage or two
def test_contexts_are_those_of_a_search_through_everything(
    family: str, make: Any, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interp.saes.passages, "NUMBERS", numbers)
    model, sae = loaded(family), make()
    features = [0, 2, 3, 17, 40, 47]
    found = seen(model, sae, features)
    values, places = everything(model, view_of(sae), TEXTS)
    assert found.tokens == len(values)
    for feature, shown in zip(features, found.features, strict=True):
        acts = values[:, feature]
        rows = []
        for row, (_, passage, position) in enumerate(places):
            near = [r for r, (_, n, p) in enumerate(places) if n == passage and abs(p - position) <= REACH]
            if acts[row] > 0 and row == max(near, key=lambda r: (float(acts[r]), -r)):  # of equals the first
                rows.append(row)
        rows = sorted(rows, key=lambda row: (-float(acts[row]), row))[:TOP]
        assert len(shown.contexts) == len(rows)
        for context, row in zip(shown.contexts, rows, strict=True):
            text, passage, position = places[row]
            near = [r for r, (_, n, p) in enumerate(places) if n == passage and abs(p - position) <= REACH]
            assert context.text == text and context.at == near.index(row)
            assert context.ids == [TEXTS[text][context.position + r - row] for r in near]
            torch.testing.assert_close(torch.tensor(context.activations), acts[near])
            assert context.activations[context.at] == max(context.activations)
        assert shown.fires == int((acts > 0).sum())
        assert shown.largest == pytest.approx(max(0.0, float(acts.max())), rel=1e-5)
        assert bool(rows) == bool(shown.fires)


@pytest.mark.parametrize("make", [topk, jumprelu])
def test_histograms_count_every_activation(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interp.saes.passages, "NUMBERS", 700)
    model, sae = loaded("llama"), make()
    found = seen(model, sae, range(48))
    values, _ = everything(model, view_of(sae), TEXTS)
    for shown in found.features:
        acts = values[:, shown.number].double()
        acts = acts[acts > 0]
        if not len(acts):
            assert shown.histogram == [0] * BINS and shown.width == shown.fires == 0 and shown.contexts == []
            continue
        assert shown.width * BINS / 2 <= shown.largest < shown.width * BINS
        edges = torch.arange(BINS + 1) * shown.width
        counts = torch.histogram(acts, edges.double()).hist.long().tolist()
        # rounding between two runs may carry an activation over an edge
        assert sum(abs(a - b) for a, b in zip(counts, shown.histogram, strict=True)) <= 2
        assert sum(shown.histogram) == len(acts) == shown.fires


def test_a_histogram_is_exact_while_its_range_grows() -> None:
    from interp.saes.dashboard import Running

    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(400, 5, generator=generator).relu() * torch.logspace(-3, 3, 400)[:, None]
    acts[:, 4] = 0
    acts[7, 0], acts[8, 0] = 2.0**5, 2.0**-9  # on an edge
    running = Running.of(torch.arange(5), 5, 1, 1)
    for part in acts.split(37):
        running.count(part)
    for f in range(4):
        own = acts[:, f][acts[:, f] > 0].double()
        width = 2.0 ** int(running.exponent[f]) / BINS
        assert running.counts[f].tolist() == torch.bincount((own / width).long(), minlength=BINS).tolist()
        assert width * BINS / 2 <= own.max() < width * BINS
    assert not running.counts[4].any()


def test_correlated_features_are_those_of_all_activations() -> None:
    model, sae = loaded("llama"), jumprelu()
    found = seen(model, sae, [2, 5, 30])
    values, _ = everything(model, view_of(sae), TEXTS)
    r = torch.corrcoef(values.double().T)
    for shown in found.features:
        own = r[shown.number].clone()
        own[shown.number] = float("nan")
        best = own.nan_to_num(nan=-2).topk(5)
        want = [(i, v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v > 0]
        assert [g for g, _ in shown.beside] == [g for g, _ in want]
        assert [v for _, v in shown.beside] == pytest.approx([v for _, v in want], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_promoted_tokens_are_those_of_a_plain_computation(family: str) -> None:
    """A step along a decoder row, so small that the norm's scale stays, moves the logits by what is said."""
    model, sae = loaded(family), topk()
    given = rows_of(model, TEXTS, LENGTH)
    found = seen(model, sae, [3, 40]).features
    final = final_stream(model, given).double()
    hf = model.hf
    norm, head = hf.get_submodule(model.family.norm), hf.get_submodule(model.family.head)
    for shown in found:
        row = sae.W_dec[shown.number].detach().double()
        centred = isinstance(norm, torch.nn.LayerNorm) or family == "cohere"
        inside = final - final.mean(-1, keepdim=True) if centred else final
        eps = next(getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n))
        scale = (inside.pow(2).mean(-1) + eps).rsqrt().mean()
        gain = norm.weight.detach().double() + (1 if family == "gemma2" else 0)
        logits = ((row - row.mean() if centred else row) * gain * scale) @ head.weight.detach().double().T
        logits = logits * model.taps["logit_scale"]
        high, low = logits.topk(10), logits.topk(10, largest=False)
        assert [token for token, _ in shown.raised] == high.indices.tolist()
        assert [by for _, by in shown.raised] == pytest.approx(high.values.tolist(), rel=1e-3)
        assert [token for token, _ in shown.lowered] == low.indices.tolist()
        assert [by for _, by in shown.lowered] == pytest.approx(low.values.tolist(), rel=1e-3)


def test_a_feature_off_the_stream_has_no_direct_path() -> None:
    model = loaded("llama")
    inside = view_of(topk(site="L1.mlp_in"))
    assert "L1.mlp_in is no part of the residual stream" in why_not(model, inside)
    assert why_not(model, view_of(topk(site="L1.mlp_out"))) == ""
    found = dashboard(model, inside, rows_of(model, TEXTS, LENGTH), [3], TOP, REACH)
    assert found.features[0].raised == [] and "L1.mlp_in" in found.no_direct


def test_a_head_that_is_no_affine_map_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp.errors import AuditError

    def no_map(*_: object) -> None:
        raise AuditError("the projection clips")

    monkeypatch.setattr("interp.saes.promoted.affine", no_map)
    model, view = loaded("llama"), view_of(topk())
    assert promoted(model, view, torch.tensor([1]), torch.randn(3, 32), 5) == "the projection clips"


def test_features_that_nobody_named_fire_often_and_are_not_common() -> None:
    model, sae = loaded("llama"), jumprelu()
    view = view_of(sae)
    chosen = choose(model, view, rows_of(model, TEXTS, LENGTH))
    values, _ = everything(model, view, TEXTS)
    density = (values > 0).double().mean(0)
    assert chosen == sorted(chosen) == [f for f in range(48) if density[f] > 0]  # fewer than 50: all that fire
    silent: Any = random_dictionary("JumpReLU", 32, 48)
    silent.threshold.data[:] = 1e6
    dead = view_of(silent, name="dead")
    with pytest.raises(PlanError, match=r"no feature of dead fires on these 226 tokens; name the features"):
        choose(model, dead, rows_of(model, TEXTS, LENGTH))


def test_rare_features_come_before_common_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.saes.dashboard.SHOWN", 10)
    model, sae = loaded("llama"), topk()
    values, _ = everything(model, view_of(sae), TEXTS)
    density = (values > 0).double().mean(0)
    rare = [f for f in range(48) if 0 < density[f] < 0.1]
    chosen = choose(model, view_of(sae), rows_of(model, TEXTS, LENGTH))
    want = sorted(rare, key=lambda f: (-float(density[f]), f))[:10]
    if len(rare) < 10:
        more = sorted(set(range(48)) - set(rare), key=lambda f: (float(density[f]), f))
        want += [f for f in more if density[f] > 0][: 10 - len(rare)]
    assert chosen == sorted(want)


def test_texts_are_cut_into_rows_behind_the_prefix() -> None:
    model = loaded("llama")
    prefixed = interp.load_model(model.hf, tokenizer=model.tokenizer, prefix="<bos>")
    (start,) = prefixed.prefix_ids
    made = rows_of(prefixed, ["the king went to Paris", [9]], 4)
    assert [row.ids[0] == start for row in made] == [True, True, False]
    assert [(row.index[0], len(row.places)) for row in made] == [((0, 1), 3), ((0, 4), 2), ((1, 0), 1)]
    assert [len(row.places) for row in rows_of(prefixed, ["the king went to Paris", [9]], 4, 4)] == [3, 1]
    found = dashboard(prefixed, view_of(topk()), made, range(48), TOP, REACH)
    assert found.tokens == 6 and sum(feature.fires for feature in found.features) == 6 * 8
    assert all(start not in context.ids for feature in found.features for context in feature.contexts)
    assert len(final_stream(prefixed, made)) == 6
    with pytest.raises(PlanError, match="context=0"):
        rows_of(model, TEXTS, 0)
    with pytest.raises(PlanError, match="tokens=0"):
        rows_of(model, TEXTS, max_tokens=0)
    with pytest.raises(PairsError, match="empty"):
        rows_of(model, [[]])
    with pytest.raises(PlanError, match="no text"):
        rows_of(model, [])
    long = rows_of(loaded("gpt2"), words(200), 256)  # 64 learned positions
    assert [len(row.ids) for row in long] == [64, 64, 64, 8]
