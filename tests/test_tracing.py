"""`interp.causal_trace` against plain hooks: noisy embeddings, clean activations put back, one forward each."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from interp import Effects, PromptPairs, log_prob, logit_diff, prob
from interp.engine.forward import add_noise
from interp.errors import PairsError, PlanError
from interp.tracing import causal_trace, token_seed
from tests.families import PARALLEL, activation, allowed, loaded, oracle_of, words
from tests.oracle.hooks import Oracle, Patch

ANSWERS, DISTRACTORS = (20, 41), (33, 12)
SUBJECTS = ((2, 3), (1,))


def subject_pairs(*lengths: int) -> PromptPairs:
    clean = words(*(lengths or (8, 6)))
    spans = [{"clean": list(span)} for span in SUBJECTS[: len(clean)]]
    n = len(clean)
    return PromptPairs(clean, None, ANSWERS[:n], DISTRACTORS[:n], positions={"subject": spans})


def noise_of(oracle: Oracle, effects: Effects, seed: int, sample: int, pair: int) -> Patch:
    """The noise of one sample as a write of the oracle, its scale from the embeddings themselves."""
    embed = oracle.model.get_input_embeddings()
    prompts = effects.provenance["prompts"]["clean"]
    rows = [embed(torch.tensor([prompts[i][p]]))[0] for i in range(len(prompts)) for p in SUBJECTS[i]]
    std = float(torch.stack(rows).std()) * 3.0
    width, drawn = rows[0].shape[0], []
    for position in SUBJECTS[pair]:
        generator = torch.Generator().manual_seed(token_seed(seed, sample, pair, position))
        drawn.append(std * torch.randn(width, generator=generator))
    whole = torch.zeros(len(prompts[pair]), width)
    whole[list(SUBJECTS[pair])] = torch.stack(drawn)
    return Patch("embed", 0, whole, SUBJECTS[pair], op="add")


def score(logits: Tensor, pair: int) -> tuple[float, float]:
    """The logit difference, and what may separate it from an equal one."""
    return float(logits[-1, ANSWERS[pair]] - logits[-1, DISTRACTORS[pair]]), 2 * allowed(logits[-1])


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "opt", "falcon_alibi", "gemma3"])
def test_against_hooks(family: str) -> None:
    """Three kinds and the embedding, two samples, two pairs of different lengths, every position and layer."""
    model, oracle = loaded(family), oracle_of(family)
    pairs, seed, samples, window = subject_pairs(), 5, 2, 2
    kinds = ["embed", "resid_post", "attn_out", "mlp_out", *([] if family in PARALLEL else ["resid_mid"])]
    effects = causal_trace(
        model, pairs, samples=samples, window=window, components=kinds, metric=logit_diff, seed=seed, average=False
    )
    assert effects.values.dims == ("component", "layer", "position", "sample", "pair")
    corrupted = torch.zeros(2)
    for pair, prompt in enumerate(pairs.clean):
        want, tolerance = score(oracle.run(prompt), pair)
        assert float(effects.clean[pair]) == pytest.approx(want, abs=tolerance)
        clean = {(kind, la): activation(family, prompt, kind, la) for kind in kinds for la in range(model.n_layers)}
        for sample in range(samples):
            noise = noise_of(oracle, effects, seed, sample, pair)
            noisy, _ = score(oracle.run(prompt, [noise]), pair)
            corrupted[pair] += noisy / samples
            moved, cells = dict.fromkeys(kinds, 0.0), {}
            for kind in kinds:
                for layer in [0] if kind == "embed" else range(model.n_layers):
                    around = [layer]
                    if kind in ("attn_out", "mlp_out"):  # a window of two: the layer below, and the layer
                        around = [la for la in (layer - 1, layer) if la >= 0]
                    for position in range(len(prompt)):
                        restored = [Patch(kind, la, clean[kind, la], (position,)) for la in around]
                        cells[kind, layer, position] = (prompt, [noise, *restored])
            for (kind, layer, position), logits in zip(cells, oracle.run_all(cells.values()), strict=True):
                want, tolerance = score(logits, pair)
                cell = effects.values.sel(component=kind, layer=layer, position=position, sample=sample)
                assert abs(float(cell[pair]) - want) <= tolerance, (kind, layer, position, sample, pair)
                moved[kind] = max(moved[kind], abs(want - noisy))
            assert min(moved.values()) > 0.001, moved
    assert torch.allclose(torch.from_numpy(effects.corrupted.values), corrupted, atol=1e-4)
    assert math.isnan(float(effects.values.sel(component="resid_post", position=7)[0, 0, 1]))


@cache
def traced(family: str, schedule: str, max_tokens: int | None) -> Effects:
    """One trace by a schedule, at the first two of three layers."""
    options: dict = {"samples": 2, "window": 1, "components": ["embed", "resid_pre", "mlp_out"], "metric": logit_diff}
    return causal_trace(
        loaded(family), subject_pairs(), layers=[0, 1], schedule=schedule, max_tokens=max_tokens, **options
    )


@pytest.mark.parametrize("schedule", ["rows", "growing", "prefix"])
@pytest.mark.parametrize("family", ["gpt2", "falcon_alibi"])
def test_schedules_agree(family: str, schedule: str) -> None:
    """Small chunks: noise on rows that start with the embedding, on copied rows, and below a cached prefix."""
    one = traced(family, "naive", None)
    other = traced(family, schedule, 50)
    assert other.provenance["schedule"] == schedule
    assert float(abs(one.values - other.values).max()) < 5e-5
    assert float(abs(one.corrupted - other.corrupted).max()) < 5e-5


def test_samples_are_averaged_and_seeded() -> None:
    model, pairs = loaded("gpt2"), subject_pairs()
    apart = causal_trace(model, pairs, samples=3, seed=1, average=False)
    mean = causal_trace(model, pairs, samples=3, seed=1)
    assert mean.values.dims == ("component", "layer", "position", "pair") and mean.direction == "denoising"
    assert float(abs(apart.values.mean("sample") - mean.values).max()) < 1e-6
    assert float(apart.values.isel(component=0, layer=0, position=5).std("sample").min()) > 1e-6
    other = causal_trace(model, pairs, samples=3, seed=2)
    assert float(abs(other.corrupted - mean.corrupted).max()) > 1e-4
    assert bool((other.clean == mean.clean).all())
    assert mean.provenance["samples"] == 3 and len(mean.provenance["tokens"]) == 2
    assert mean.provenance["prompts"]["corrupted"] is None


def test_restoring_everything_above_the_noise_is_the_clean_run() -> None:
    """Embeddings restored at the subject's only token; no noise at all; the last position's last stream."""
    model, pairs = loaded("llama_gqa"), subject_pairs()[1]
    restored = causal_trace(model, pairs, samples=2, components="embed", positions=["subject"], metric=log_prob)
    assert float(restored.values[0, 0, 0, 0]) == pytest.approx(float(restored.clean[0]), abs=1e-5)
    assert abs(float(restored.corrupted[0] - restored.clean[0])) > 0.01
    last = causal_trace(model, pairs, samples=2, layers=-1, positions=[-1], metric=prob)
    assert float(last.normalized[0, 0, 0, 0]) == pytest.approx(1, abs=1e-3)
    quiet = causal_trace(model, pairs, noise=0.0, samples=1)
    assert float(abs(quiet.corrupted - quiet.clean).max()) < 1e-6


def test_noise_is_gaussian_and_each_token_has_its_own() -> None:
    seeds = [[0, column, token_seed(0, sample, 0, column)] for sample in range(1) for column in range(400)]
    noisy = add_noise(torch.zeros(1, 401, 64), {"std": 0.3, "table": torch.tensor(seeds)})
    drawn = noisy[0, :400]
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.02) and abs(float(drawn.mean())) < 0.01
    assert float((drawn.abs() < 0.3).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert float((drawn @ drawn.T / 64 / 0.09).fill_diagonal_(0).abs().max()) < 0.8
    assert bool((noisy[0, 400] == 0).all())
    assert len({token_seed(*key) for key in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]}) == 4


def test_what_is_refused() -> None:
    model, pairs = loaded("gpt2"), subject_pairs()
    with pytest.raises(PairsError, match=r"no positions named 'topic'.*\['subject'\]"):
        causal_trace(model, pairs, subject="topic")
    with pytest.raises(PairsError, match="they have none"):
        causal_trace(model, PromptPairs(words(5), None, [3], [4]))
    with pytest.raises(PlanError, match="samples=0"):
        causal_trace(model, pairs, samples=0)
