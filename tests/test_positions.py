"""A prompt as long as a model's table of positions runs; a longer one is refused before the model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import interp
from interp import Model, PromptPairs
from interp.errors import PairsError
from interp.lens import attention_patterns, direct_effects, logit_lens
from interp.models.families import FAMILIES

from .families import SUPPORTED, count_forwards, loaded, words

#: Families whose positions end: 64 in every tiny model of theirs.
ENDING = ("gpt2", "gpt_neo", "gptj", "opt")
FITS, LONG = words(64, 65)


def plain(model: Model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("family", ENDING)
def test_the_longest_prompt_runs_beside_a_short_one(family: str) -> None:
    model = loaded(family)
    assert model.n_positions == 64
    with pytest.raises((IndexError, RuntimeError)):
        plain(model, LONG)  # what it is kept from
    short = words(5, seed=3)[0]
    pairs = PromptPairs([FITS, short], [FITS[::-1], short[::-1]], [20, 21], [33, 34])
    effects = interp.patch(model, pairs, interp.heads("z", layers=0))
    for pair, ids in enumerate((FITS, short)):
        logits = plain(model, ids)
        want = logits[20 + pair] - logits[33 + pair]
        assert float(effects.clean[pair]) == pytest.approx(float(want), abs=1e-4 * max(1.0, float(logits.abs().max())))
    assert len(interp.collect_activations(model, [FITS, LONG], 1, max_length=64)) == 128


METHODS: dict[str, Callable[[Model, list[int]], Any]] = {
    "patch": lambda model, ids: interp.patch(
        model, PromptPairs([FITS, ids], [FITS, FITS], [20] * 2, [33] * 2), interp.heads("z")
    ),
    "the other prompt": lambda model, ids: interp.patch(
        model, PromptPairs([FITS, FITS], [FITS, ids], [20] * 2, [33] * 2), interp.sets({"a": ["L0.z@0"]})
    ),
    "attribute": lambda model, ids: interp.attribute(
        model, PromptPairs([ids], [ids[::-1]], [20], [33]), interp.grid("z")
    ),
    "ablate": lambda model, ids: interp.ablate(model, PromptPairs([ids], None, [20], [33]), interp.grid("z")),
    "reference": lambda model, ids: interp.ablate(
        model, PromptPairs([FITS], None, [20], [33]), interp.grid("z"), "mean", reference=[FITS, ids]
    ),
    "discover": lambda model, ids: interp.discover(model, PromptPairs([ids], [ids[::-1]], [20], [33])),
    "iterative_pruning": lambda model, ids: interp.iterative_pruning(model, ids, [20, 33]),
    "direct_effects": lambda model, ids: direct_effects(model, PromptPairs([ids], None, [20], [33])),
    "logit_lens": lambda model, ids: logit_lens(model, [FITS, ids]),
    "attention_patterns": lambda model, ids: attention_patterns(model, ids),
    "causal_trace": lambda model, ids: interp.causal_trace(
        model, PromptPairs([ids], None, [20], positions={"subject": 1})
    ),
    "collect": lambda model, ids: interp.collect_activations(model, [FITS, ids], 1),
    "collect a stream": lambda model, ids: next(interp.collect_activations(model, [FITS, ids], 1, stream=True)),
    "collect more": lambda model, ids: interp.collect_activations(model, [FITS, ids], 1, max_length=65),
}


@pytest.mark.parametrize("family", ENDING)
@pytest.mark.parametrize("method", METHODS)
def test_one_token_more_is_refused_before_the_model_runs(method: str, family: str) -> None:
    model = loaded(family)
    forwards, stop = count_forwards(model)
    with pytest.raises(PairsError) as error:
        METHODS[method](model, LONG)
    stop()
    said = str(error.value)
    assert "has 65 tokens, but" in said and "has embeddings for 64 positions" in said
    assert ("max_length=64" if method.startswith("collect") else "give a shorter prompt") in said
    named = {"patch": "clean of pair 1", "the other prompt": "corrupted of pair 1", "collect": "text 1"}
    assert said.startswith(named.get(method, ""))
    assert not forwards


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in ENDING])
def test_other_families_have_no_end(family: str) -> None:
    """Their configuration says 64 too, and transformers runs 70 tokens all the same."""
    model = loaded(family)
    assert model.n_positions is None
    ids = words(70)[0]
    assert plain(model, ids).isfinite().all()
    model.check_length("it", 10**6, "")


def test_a_limit_that_the_configuration_does_not_tell_is_none() -> None:
    row = replace(loaded("gpt2").family, positions="no_such_attribute")
    assert replace(loaded("gpt2"), family=row).n_positions is None
    assert sum(row.positions is not None for row in FAMILIES) == len(ENDING)
